"""GPT-NeoX as tables: where each hook point, norm and weight is in HF's `GPTNeoXForCausalLM`.

Source: transformers `models/gpt_neox/modeling_gpt_neox.py`. Glossary: `input_layernorm` is ln1 and
`post_attention_layernorm` ln2, which reads resid_pre where blocks are parallel (`use_parallel_residual`) and resid_mid
elsewhere; `query_key_value` gives q, k and v of one head after the other; `dense` is W_O, `dense_h_to_4h` W_in,
`dense_4h_to_h` W_out; dropouts end both branches.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from lens_core.plugin import (
    LAYER_NORM,
    Attention,
    Columns,
    Declaration,
    HeadResult,
    HookPoint,
    LensConfig,
    ModuleInput,
    ModuleOutput,
    NormPlace,
    Projection,
    Tokens,
    WeightView,
    head_input_points,
    norm_points,
    point,
    projection_points,
    rotary_reach,
    unembedding_points,
    weight_and_bias,
)

BLOCK = "gpt_neox.layers.{layer}"
NORMS = {
    "ln1": NormPlace(path=f"{BLOCK}.input_layernorm", kind=LAYER_NORM),
    "ln2": NormPlace(path=f"{BLOCK}.post_attention_layernorm", kind=LAYER_NORM),
    "ln_final": NormPlace(path="gpt_neox.final_layer_norm", kind=LAYER_NORM),
}


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
        n_ctx=rotary_reach(config),
        act_fn=config.hidden_act,
        eps=config.layer_norm_eps,
        normalization_type="LN",
        positional_embedding_type="rotary",
        parallel_attn_mlp=config.use_parallel_residual,
    )
    return Declaration(
        cfg=cfg,
        base="gpt_neox",
        blocks="gpt_neox.layers",
        embed="gpt_neox.embed_in",
        unembed="lm_head",
        norms=NORMS,
        points=tuple(_points(config)),
        writers=("hook_attn_out", "hook_mlp_out"),
        embeddings=("hook_embed",),
        weights=tuple(_weights(config)),
        has_absolute_positions=True,  # a rotation by a common offset is exact on paper only
    )


def _points(config: Any) -> Iterator[HookPoint]:
    yield point("hook_tokens", Tokens(path="gpt_neox"))
    yield point("hook_embed", ModuleOutput(path="gpt_neox.emb_dropout"), equation="W_E[tokens], after dropout")
    for layer in range(config.num_hidden_layers):
        yield from _block(config, layer)
    yield from norm_points("ln_final", NORMS["ln_final"])
    yield from unembedding_points("gpt_neox", "lm_head")


def _block(config: Any, layer: int) -> Iterator[HookPoint]:
    hf, here = BLOCK.format(layer=layer), partial(point, layer=layer)
    ln2, read = f"{hf}.post_attention_layernorm", "resid_pre"
    yield here("hook_resid_pre", ModuleInput(path=hf))
    yield from _attention(config, layer)
    yield here("hook_attn_out", ModuleOutput(path=f"{hf}.post_attention_dropout"))
    if not config.use_parallel_residual:
        read = "resid_mid"
        yield here("hook_resid_mid", ModuleInput(path=ln2, reaches="all"))
    yield here("hook_mlp_in", ModuleInput(path=ln2, is_copy=True), equation=f"a copy of {read}, before ln2")
    yield from norm_points("ln2", NORMS["ln2"], layer=layer)
    yield here("mlp.hook_in", ModuleInput(path=f"{hf}.mlp"))
    yield here("mlp.hook_pre", ModuleOutput(path=f"{hf}.mlp.dense_h_to_4h"))
    yield here("mlp.hook_post", ModuleInput(path=f"{hf}.mlp.dense_4h_to_h"))
    yield here("mlp.hook_out", ModuleOutput(path=f"{hf}.mlp.dense_4h_to_h"))
    yield here("hook_mlp_out", ModuleOutput(path=f"{hf}.post_mlp_dropout"))
    yield here("hook_resid_post", ModuleOutput(path=hf))


def _attention(config: Any, layer: int) -> Iterator[HookPoint]:
    hf, here, heads = BLOCK.format(layer=layer), partial(point, layer=layer), config.num_attention_heads
    attn, out = f"{hf}.attention", f"{hf}.attention.dense"
    projections = _projections(config, f"{attn}.query_key_value")
    yield from head_input_points(attn, projections, layer=layer, norm=NORMS["ln1"], has_rotary=True)
    yield from norm_points("ln1", NORMS["ln1"], layer=layer)
    yield from projection_points(projections, layer=layer)
    yield here("attn.hook_rot_q", Attention(path=attn, part="q"))
    yield here("attn.hook_rot_k", Attention(path=attn, part="k"))
    scores = Attention(path=attn, part="scores")
    yield here("attn.hook_attn_scores", scores, equation="rot_q . rot_k / sqrt(d_head), masked cells -inf")
    yield here("attn.hook_pattern", Attention(path=attn, part="pattern"))
    yield here("attn.hook_z", ModuleInput(path=out, view=Columns(heads=heads)))
    yield here("attn.hook_result", HeadResult(path=out, heads=heads))
    yield here("attn.hook_out", ModuleOutput(path=out))


def _projections(config: Any, path: str) -> dict[str, Projection]:
    heads, d_head = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    columns = (Columns(start=i * d_head, stop=(i + 1) * d_head, heads=heads, groups=heads) for i in range(3))
    return {part: Projection(path=path, columns=own) for part, own in zip("qkv", columns, strict=True)}


def _weights(config: Any) -> Iterator[WeightView]:
    yield WeightView(name="W_E", path="gpt_neox.embed_in")
    yield from weight_and_bias("U", "lm_head")
    for part, projection in _projections(config, f"{BLOCK}.attention.query_key_value").items():
        yield from weight_and_bias(part.upper(), projection.path, columns=projection.columns)
    heads = {"h": config.num_attention_heads}
    yield from weight_and_bias("O", f"{BLOCK}.attention.dense", pattern="(h e) d -> h e d", sizes=heads)
    yield from weight_and_bias("in", f"{BLOCK}.mlp.dense_h_to_4h")
    yield from weight_and_bias("out", f"{BLOCK}.mlp.dense_4h_to_h")
