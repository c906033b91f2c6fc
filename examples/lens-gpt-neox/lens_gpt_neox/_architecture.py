"""GPT-NeoX as tables: where each hook point, norm and weight is in HF's `GPTNeoXForCausalLM`.

Source: transformers `models/gpt_neox/modeling_gpt_neox.py`. Glossary: `input_layernorm` is ln1 and
`post_attention_layernorm` ln2, which reads resid_pre where blocks are parallel (`use_parallel_residual`) and resid_mid
elsewhere; `dense` is W_O, `dense_h_to_4h` W_in, `dense_4h_to_h` W_out; dropouts end both branches.
"""

from collections.abc import Iterator
from typing import Any

from lens_core.plugin import (
    LAYER_NORM,
    Attention,
    Columns,
    Declaration,
    HeadInput,
    HeadResult,
    HookPoint,
    LensConfig,
    ModuleInput,
    ModuleOutput,
    NormInside,
    NormPlace,
    Projection,
    Seam,
    Tokens,
    Unembedding,
    WeightView,
)

from lens_gpt_neox._places import HeadPart, RotatedKeys, WholeHeads

RESIDUAL, HIDDEN, LOGITS = "batch pos d_model", "batch pos d_mlp", "batch pos d_vocab"
HEADS, HEAD_INPUTS, QUERY_KEY = "batch pos n_heads d_head", "batch pos n_heads d_model", "batch n_heads query key"
STARRED = {"hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "attn.hook_result", "hook_mlp_in"}
BASE, BLOCK = "gpt_neox", "gpt_neox.layers.{layer}"
LN1, LN2, LN_FINAL = f"{BLOCK}.input_layernorm", f"{BLOCK}.post_attention_layernorm", f"{BASE}.final_layer_norm"
Rows = Iterator[tuple[str, str, str, Seam]]


def GPTNeoX(config: Any) -> Declaration:
    """Declare GPT-NeoX at one HF `GPTNeoXConfig`."""
    cfg = LensConfig(
        model_type="gpt_neox",
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        d_head=config.hidden_size // config.num_attention_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=_n_ctx(config),
        act_fn=config.hidden_act,
        eps=config.layer_norm_eps,
        normalization_type="LN",
        positional_embedding_type="rotary",
        parallel_attn_mlp=config.use_parallel_residual,
    )
    norms = {"ln1": LN1, "ln2": LN2, "ln_final": LN_FINAL}
    return Declaration(
        cfg=cfg,
        base=BASE,
        blocks=f"{BASE}.layers",
        embed=f"{BASE}.embed_in",
        unembed="lm_head",
        norms={name: NormPlace(path=path, kind=LAYER_NORM) for name, path in norms.items()},
        points=tuple(_points(config)),
        writers=("hook_attn_out", "hook_mlp_out"),
        embeddings=("hook_embed",),
        weights=tuple(_weights(config)),
        has_absolute_positions=True,  # a rotation by a common offset is exact on paper only
    )


def _n_ctx(config: Any) -> int:
    """Give the most positions that rotary embeddings reach: stretched ones go beyond what the config says."""
    rope = config.rope_parameters
    if rope["rope_type"] in ("linear", "dynamic"):
        return int(config.max_position_embeddings * rope["factor"])
    stretched = rope.get("original_max_position_embeddings", 0) * (rope.get("factor") or 1.0)
    return max(config.max_position_embeddings, int(stretched))


def _points(config: Any) -> Iterator[HookPoint]:
    rows: list[tuple[int | None, Any]] = [(None, row) for row in _before()]
    for layer in range(config.num_hidden_layers):
        rows += [(layer, row) for row in _block(config, layer)]
    rows += [(None, row) for row in _after()]
    for layer, (name, shape, equation, seam) in rows:
        full = name if layer is None else f"blocks.{layer}.{name}"
        options: Any = {"dtype": "int64"} if name == "hook_tokens" else {"default": name not in STARRED}
        yield HookPoint(name=full, layer=layer, shape=shape, equation=equation, seam=seam, **options)


def _before() -> Rows:
    yield "hook_tokens", "batch pos", "token ids", Tokens(path=BASE)
    yield "hook_embed", RESIDUAL, "W_E[tokens], after dropout", ModuleOutput(path=f"{BASE}.emb_dropout")


def _block(config: Any, layer: int) -> Rows:
    hf, ln1, ln2 = (path.format(layer=layer) for path in (BLOCK, LN1, LN2))
    up, down, mlp_reads = f"{hf}.mlp.dense_h_to_4h", f"{hf}.mlp.dense_4h_to_h", "resid_pre"
    yield "hook_resid_pre", RESIDUAL, "what enters the block", ModuleInput(path=hf)
    yield from _attention(config, f"{hf}.attention", ln1)
    yield (
        "hook_attn_out",
        RESIDUAL,
        "what attention adds to the stream",
        ModuleOutput(path=f"{hf}.post_attention_dropout"),
    )
    if not config.use_parallel_residual:
        mlp_reads = "resid_mid"
        yield "hook_resid_mid", RESIDUAL, "resid_pre + attn_out", ModuleInput(path=ln2, reaches="all")
    yield "hook_mlp_in", RESIDUAL, f"a copy of {mlp_reads}, before ln2", ModuleInput(path=ln2, is_copy=True)
    yield from _norm("ln2", ln2)
    yield "mlp.hook_in", RESIDUAL, "what the MLP receives", ModuleInput(path=f"{hf}.mlp")
    yield "mlp.hook_pre", HIDDEN, "mlp.in W_in + b_in", ModuleOutput(path=up)
    yield "mlp.hook_post", HIDDEN, "act(pre)", ModuleInput(path=down)
    yield "mlp.hook_out", RESIDUAL, "post W_out + b_out", ModuleOutput(path=down)
    yield "hook_mlp_out", RESIDUAL, "what the MLP adds to the stream", ModuleOutput(path=f"{hf}.post_mlp_dropout")
    yield "hook_resid_post", RESIDUAL, "resid_pre + attn_out + mlp_out", ModuleOutput(path=hf)


def _attention(config: Any, attn: str, ln1: str) -> Rows:
    d, heads, fused, dense = config.hidden_size, config.num_attention_heads, f"{attn}.query_key_value", f"{attn}.dense"
    views: dict[Any, HeadPart] = {part: HeadPart(heads=heads, part=index) for index, part in enumerate("qkv")}
    columns = {part: WholeHeads(start=0, stop=3 * d, heads=heads, own=view) for part, view in views.items()}
    copies: dict[str, Any] = {
        "norm": ln1,
        "attention": attn,
        "projections": {part: Projection(path=fused, columns=columns[part]) for part in views},
    }
    yield "hook_attn_in", HEAD_INPUTS, "a copy of resid_pre for each head, before ln1", HeadInput(part="attn", **copies)
    for part in views:
        yield f"hook_{part}_input", HEAD_INPUTS, f"attn_in, for {part} of each head", HeadInput(part=part, **copies)
    yield from _norm("ln1", ln1)
    for part, view in views.items():
        equation = f"ln1 W_{part.upper()} + b_{part.upper()}"
        yield f"attn.hook_{part}", HEADS, equation, ModuleOutput(path=fused, view=view)
    scores, pattern = Attention(path=attn, part="scores"), Attention(path=attn, part="pattern")
    z = ModuleInput(path=dense, view=Columns(start=0, stop=d, heads=heads))
    yield "attn.hook_rot_q", HEADS, "q, rotated by position", Attention(path=attn, part="q")
    yield "attn.hook_rot_k", HEADS, "k, rotated by position", RotatedKeys(path=attn)
    yield "attn.hook_attn_scores", QUERY_KEY, "rot_q . rot_k / sqrt(d_head), masked cells -inf", scores
    yield "attn.hook_pattern", QUERY_KEY, "softmax(attn_scores) over keys", pattern
    yield "attn.hook_z", HEADS, "pattern v", z
    yield "attn.hook_result", HEAD_INPUTS, "z W_O of each head", HeadResult(path=dense, heads=heads)
    yield "attn.hook_out", RESIDUAL, "sum of the results + b_O", ModuleOutput(path=dense)


def _norm(name: str, path: str) -> Rows:
    scale = NormInside(path=path, part="scale", kind=LAYER_NORM)
    normalized = NormInside(path=path, part="normalized", kind=LAYER_NORM)
    yield f"{name}.hook_scale", "batch pos 1", "sqrt(var(x) + eps)", scale
    yield f"{name}.hook_normalized", RESIDUAL, "(x - mean(x)) / scale", normalized
    yield f"{name}.hook_out", RESIDUAL, "normalized * gain + bias", ModuleOutput(path=path)


def _after() -> Rows:
    read = Unembedding(base=BASE, path="lm_head", part="in")
    logits = Unembedding(base=BASE, path="lm_head", part="out")
    yield from _norm("ln_final", LN_FINAL)
    yield "unembed.hook_in", RESIDUAL, "what the unembedding receives", read
    yield "unembed.hook_out", LOGITS, "unembed.in W_U + b_U", logits
    yield "hook_logits", LOGITS, "the logits", logits


def _weights(config: Any) -> Iterator[WeightView]:
    attn, mlp, d, heads = f"{BLOCK}.attention", f"{BLOCK}.mlp", config.hidden_size, {"h": config.num_attention_heads}
    zeros: Any = {"pattern": "(h e) -> h e", "sizes": heads, "width": d}  # a bias that is not there goes by no function
    yield WeightView(name="W_E", path=f"{BASE}.embed_in")
    yield WeightView(name="W_U", path="lm_head")
    yield WeightView(name="b_U", path="lm_head", part="bias", width=config.vocab_size)
    for index, letter in enumerate("QKV"):
        fused, part = f"{attn}.query_key_value", HeadPart(heads=heads["h"], part=index).read
        bias: Any = {"function": part} if config.attention_bias else zeros
        yield WeightView(name=f"W_{letter}", path=fused, function=part, pattern="d h e -> h d e")
        yield WeightView(name=f"b_{letter}", path=fused, part="bias", **bias)
    yield WeightView(name="W_O", path=f"{attn}.dense", pattern="(h e) d -> h e d", sizes=heads)
    yield WeightView(name="b_O", path=f"{attn}.dense", part="bias", width=d)
    yield WeightView(name="W_in", path=f"{mlp}.dense_h_to_4h")
    yield WeightView(name="b_in", path=f"{mlp}.dense_h_to_4h", part="bias")
    yield WeightView(name="W_out", path=f"{mlp}.dense_4h_to_h")
    yield WeightView(name="b_out", path=f"{mlp}.dense_4h_to_h", part="bias")
