"""GPT-2 as tables: where each hook point, norm and weight is in HF's `GPT2LMHeadModel`.

Source: transformers `models/gpt2/modeling_gpt2.py`. Glossary: `c_attn` is the fused projection [q | k | v], `c_proj`
the output projection (of attention and of the MLP), `c_fc` the MLP's input projection; all are `Conv1D`, stored
`[in, out]`.
"""

from collections.abc import Callable, Iterator
from typing import Any

from lens_core.plugin import (
    LAYER_NORM,
    Attention,
    Columns,
    Declaration,
    Embedding,
    HeadInput,
    HeadResult,
    HookPoint,
    LensConfig,
    ModuleInput,
    ModuleOutput,
    NormInside,
    NormPlace,
    Projection,
    Tokens,
    Unembedding,
    WeightView,
)

RESIDUAL = "batch pos d_model"
PER_HEAD = "batch pos n_heads d_head"
PER_HEAD_RESIDUAL = "batch pos n_heads d_model"
QUERY_KEY = "batch n_heads query key"
HIDDEN = "batch pos d_mlp"


def GPT2(config: Any) -> Declaration:
    """Declare GPT-2 at one HF `GPT2Config`."""
    cfg = LensConfig(
        model_type="gpt2",
        n_layers=config.n_layer,
        d_model=config.n_embd,
        n_heads=config.n_head,
        d_head=config.n_embd // config.n_head,
        d_mlp=config.n_inner or 4 * config.n_embd,
        d_vocab=config.vocab_size,
        n_ctx=config.n_positions,
        act_fn=config.activation_function,
        eps=config.layer_norm_epsilon,
        normalization_type="LN",
        positional_embedding_type="standard",
    )
    return Declaration(
        cfg=cfg,
        base="transformer",
        blocks="transformer.h",
        embed="transformer.wte",
        unembed="lm_head",
        norms={
            "ln1": NormPlace(path="transformer.h.{layer}.ln_1", kind=LAYER_NORM),
            "ln2": NormPlace(path="transformer.h.{layer}.ln_2", kind=LAYER_NORM),
            "ln_final": NormPlace(path="transformer.ln_f", kind=LAYER_NORM),
        },
        points=(*_before(), *(p for layer in range(cfg.n_layers) for p in _block(layer, config)), *_after()),
        writers=("hook_attn_out", "hook_mlp_out"),
        embeddings=("hook_embed", "hook_pos_embed"),
        weights=tuple(_weights(cfg)),
        has_absolute_positions=True,
    )


def _before() -> Iterator[HookPoint]:
    yield HookPoint(
        name="hook_tokens", shape="batch pos", dtype="int64", equation="token ids", seam=Tokens(path="transformer")
    )
    yield HookPoint(
        name="hook_embed",
        shape=RESIDUAL,
        equation="W_E[tokens]",
        seam=Embedding(base="transformer", path="transformer.wte"),
    )
    yield HookPoint(
        name="hook_pos_embed",
        shape=RESIDUAL,
        equation="W_pos[positions]; hook_embed + hook_pos_embed = blocks.0.hook_resid_pre",
        seam=ModuleOutput(path="transformer.wpe"),
    )


def _norm(name: str, path: str, layer: int | None) -> Iterator[HookPoint]:
    scale = NormInside(path=path, part="scale", kind=LAYER_NORM)
    normalized = NormInside(path=path, part="normalized", kind=LAYER_NORM)
    for part, shape, equation, seam in (
        ("scale", "batch pos 1", "sqrt(var(x) + eps)", scale),
        ("normalized", RESIDUAL, "(x - mean(x)) / scale", normalized),
        ("out", RESIDUAL, "normalized * gain + bias", ModuleOutput(path=path)),
    ):
        yield HookPoint(name=f"{name}.hook_{part}", layer=layer, shape=shape, equation=equation, seam=seam)


def _block(layer: int, config: Any) -> Iterator[HookPoint]:
    hf = f"transformer.h.{layer}"

    def point(name: str, shape: str, equation: str, seam: Any, **options: Any) -> HookPoint:
        name = f"blocks.{layer}.{name}"
        return HookPoint(name=name, layer=layer, shape=shape, equation=equation, seam=seam, **options)

    yield point("hook_resid_pre", RESIDUAL, "what enters the block", ModuleInput(path=hf))
    yield from _attention(point, layer, hf, config)
    yield point("hook_resid_mid", RESIDUAL, "resid_pre + attn_out", ModuleInput(path=f"{hf}.ln_2", reaches="all"))
    yield point(
        "hook_mlp_in",
        RESIDUAL,
        "a copy of resid_mid, before ln2",
        ModuleInput(path=f"{hf}.ln_2", is_copy=True),
        default=False,
    )
    yield from _norm(f"blocks.{layer}.ln2", f"{hf}.ln_2", layer)
    mlp = f"{hf}.mlp"
    yield point("mlp.hook_in", RESIDUAL, "what the MLP receives", ModuleInput(path=mlp))
    yield point("mlp.hook_pre", HIDDEN, "mlp.in W_in + b_in", ModuleOutput(path=f"{mlp}.c_fc"))
    yield point("mlp.hook_post", HIDDEN, "act(pre)", ModuleInput(path=f"{mlp}.c_proj"))
    yield point("mlp.hook_out", RESIDUAL, "post W_out + b_out", ModuleOutput(path=f"{mlp}.c_proj"))
    yield point("hook_mlp_out", RESIDUAL, "what the MLP adds to the residual stream", ModuleOutput(path=mlp))
    yield point("hook_resid_post", RESIDUAL, "resid_pre + attn_out + mlp_out", ModuleOutput(path=hf))


def _attention(point: Callable[..., HookPoint], layer: int, hf: str, config: Any) -> Iterator[HookPoint]:
    attn, c_attn, c_proj = f"{hf}.attn", f"{hf}.attn.c_attn", f"{hf}.attn.c_proj"
    d, heads = config.n_embd, config.n_head
    q, k, v = (Columns(start=i * d, stop=(i + 1) * d, heads=heads) for i in range(3))
    projections = {
        part: Projection(path=c_attn, columns=columns) for part, columns in zip("qkv", (q, k, v), strict=True)
    }

    def head_input(part: str) -> HeadInput:
        return HeadInput(part=part, attention=attn, norm=f"{hf}.ln_1", projections=projections)

    for name, part, equation in (
        ("hook_attn_in", "attn", "a copy of resid_pre for each head, before ln1"),
        ("hook_q_input", "q", "attn_in, for the query of each head"),
        ("hook_k_input", "k", "attn_in, for the key of each head"),
        ("hook_v_input", "v", "attn_in, for the value of each head"),
    ):
        yield point(name, PER_HEAD_RESIDUAL, equation, head_input(part), default=False)
    yield from _norm(f"blocks.{layer}.ln1", f"{hf}.ln_1", layer)
    yield point("attn.hook_q", PER_HEAD, "ln1 W_Q + b_Q", ModuleOutput(path=c_attn, view=q))
    yield point("attn.hook_k", PER_HEAD, "ln1 W_K + b_K", ModuleOutput(path=c_attn, view=k))
    yield point("attn.hook_v", PER_HEAD, "ln1 W_V + b_V", ModuleOutput(path=c_attn, view=v))
    # With reorder_and_upcast_attn in eager, HF calls this method instead of its registry, in float32.
    upcast = "_upcast_and_reordered_attn"
    is_upcast = config.reorder_and_upcast_attn and config._attn_implementation == "eager"
    for name, part, equation in (
        ("attn.hook_attn_scores", "scores", "q . k / sqrt(d_head), masked cells -inf"),
        ("attn.hook_pattern", "pattern", "softmax(attn_scores) over keys"),
    ):
        seam = Attention(path=attn, part=part, method=upcast)
        yield point(name, QUERY_KEY, equation, seam, dtype="float32" if is_upcast else "model")
    z = ModuleInput(path=c_proj, view=Columns(start=0, stop=d, heads=heads))
    yield point("attn.hook_z", PER_HEAD, "pattern v", z)
    result = HeadResult(path=c_proj, heads=heads)
    yield point("attn.hook_result", PER_HEAD_RESIDUAL, "z W_O of each head", result, default=False)
    yield point("attn.hook_out", RESIDUAL, "sum of the results + b_O", ModuleOutput(path=c_proj))
    yield point("hook_attn_out", RESIDUAL, "what attention adds to the residual stream", ModuleOutput(path=attn))


def _after() -> Iterator[HookPoint]:
    yield from _norm("ln_final", "transformer.ln_f", None)
    for name, shape, equation, part in (
        ("unembed.hook_in", RESIDUAL, "what the unembedding receives", "in"),
        ("unembed.hook_out", "batch pos d_vocab", "unembed.in W_U + b_U", "out"),
        ("hook_logits", "batch pos d_vocab", "the logits", "out"),
    ):
        seam = Unembedding(base="transformer", path="lm_head", part=part)
        yield HookPoint(name=name, shape=shape, equation=equation, seam=seam)


def _weights(cfg: LensConfig) -> Iterator[WeightView]:
    h = "transformer.h.{layer}"
    d, heads = cfg.d_model, {"h": cfg.n_heads}
    yield WeightView(name="W_E", path="transformer.wte")
    yield WeightView(name="W_pos", path="transformer.wpe")
    yield WeightView(name="W_U", path="lm_head")
    yield WeightView(name="b_U", path="lm_head", part="bias", width=cfg.d_vocab)
    for index, letter in enumerate("QKV"):
        columns = (index * d, (index + 1) * d)
        yield WeightView(
            name=f"W_{letter}", path=f"{h}.attn.c_attn", columns=columns, pattern="d (h e) -> h d e", sizes=heads
        )
        yield WeightView(
            name=f"b_{letter}",
            path=f"{h}.attn.c_attn",
            part="bias",
            columns=columns,
            pattern="(h e) -> h e",
            sizes=heads,
        )
    yield WeightView(name="W_O", path=f"{h}.attn.c_proj", pattern="(h e) d -> h e d", sizes=heads)
    yield WeightView(name="b_O", path=f"{h}.attn.c_proj", part="bias")
    yield WeightView(name="W_in", path=f"{h}.mlp.c_fc")
    yield WeightView(name="b_in", path=f"{h}.mlp.c_fc", part="bias")
    yield WeightView(name="W_out", path=f"{h}.mlp.c_proj")
    yield WeightView(name="b_out", path=f"{h}.mlp.c_proj", part="bias")
