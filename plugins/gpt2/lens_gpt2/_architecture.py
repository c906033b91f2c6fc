"""GPT-2 as tables: where each hook point, norm and weight is in HF's `GPT2LMHeadModel`.

Source: transformers `models/gpt2/modeling_gpt2.py`. Glossary: `c_attn` is the fused projection [q | k | v], `c_proj`
the output projection (of attention and of the MLP), `c_fc` the MLP's input projection; all are `Conv1D`, stored
`[in, out]`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from lens_core.plugin import (
    LAYER_NORM,
    Attention,
    Columns,
    Declaration,
    Embedding,
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
    unembedding_points,
    weight_and_bias,
)

BLOCK = "transformer.h.{layer}"
NORMS = {
    "ln1": NormPlace(path=f"{BLOCK}.ln_1", kind=LAYER_NORM),
    "ln2": NormPlace(path=f"{BLOCK}.ln_2", kind=LAYER_NORM),
    "ln_final": NormPlace(path="transformer.ln_f", kind=LAYER_NORM),
}


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
        norms=NORMS,
        points=tuple(_points(config)),
        writers=("hook_attn_out", "hook_mlp_out"),
        embeddings=("hook_embed", "hook_pos_embed"),
        weights=tuple(_weights(config)),
        has_absolute_positions=True,
    )


def _points(config: Any) -> Iterator[HookPoint]:
    yield point("hook_tokens", Tokens(path="transformer"))
    yield point("hook_embed", Embedding(base="transformer", path="transformer.wte"))
    yield point("hook_pos_embed", ModuleOutput(path="transformer.wpe"))
    for layer in range(config.n_layer):
        yield from _block(config, layer)
    yield from norm_points("ln_final", NORMS["ln_final"])
    yield from unembedding_points("transformer", "lm_head")


def _block(config: Any, layer: int) -> Iterator[HookPoint]:
    hf, here = BLOCK.format(layer=layer), partial(point, layer=layer)
    yield here("hook_resid_pre", ModuleInput(path=hf))
    yield from _attention(config, layer)
    yield here("hook_resid_mid", ModuleInput(path=f"{hf}.ln_2", reaches="all"))
    yield here("hook_mlp_in", ModuleInput(path=f"{hf}.ln_2", is_copy=True))
    yield from norm_points("ln2", NORMS["ln2"], layer=layer)
    yield here("mlp.hook_in", ModuleInput(path=f"{hf}.mlp"))
    yield here("mlp.hook_pre", ModuleOutput(path=f"{hf}.mlp.c_fc"))
    yield here("mlp.hook_post", ModuleInput(path=f"{hf}.mlp.c_proj"))
    yield here("mlp.hook_out", ModuleOutput(path=f"{hf}.mlp.c_proj"))
    yield here("hook_mlp_out", ModuleOutput(path=f"{hf}.mlp"))
    yield here("hook_resid_post", ModuleOutput(path=hf))


def _attention(config: Any, layer: int) -> Iterator[HookPoint]:
    hf, here = BLOCK.format(layer=layer), partial(point, layer=layer)
    attn, out = f"{hf}.attn", f"{hf}.attn.c_proj"
    projections = _projections(config, f"{attn}.c_attn")
    yield from head_input_points(attn, projections, layer=layer, norm=NORMS["ln1"])
    yield from norm_points("ln1", NORMS["ln1"], layer=layer)
    yield from projection_points(projections, layer=layer)
    # With reorder_and_upcast_attn in eager, HF calls this method instead of its registry, in float32.
    upcast = "_upcast_and_reordered_attn"
    is_upcast = config.reorder_and_upcast_attn and config._attn_implementation == "eager"
    dtype = "float32" if is_upcast else "model"
    yield here("attn.hook_attn_scores", Attention(path=attn, part="scores", method=upcast), dtype=dtype)
    yield here("attn.hook_pattern", Attention(path=attn, part="pattern", method=upcast), dtype=dtype)
    yield here("attn.hook_z", ModuleInput(path=out, view=Columns(heads=config.n_head)))
    yield here("attn.hook_result", HeadResult(path=out, heads=config.n_head))
    yield here("attn.hook_out", ModuleOutput(path=out))
    yield here("hook_attn_out", ModuleOutput(path=attn))


def _projections(config: Any, path: str) -> dict[str, Projection]:
    d = config.n_embd
    columns = (Columns(start=i * d, stop=(i + 1) * d, heads=config.n_head) for i in range(3))
    return {part: Projection(path=path, columns=own) for part, own in zip("qkv", columns, strict=True)}


def _weights(config: Any) -> Iterator[WeightView]:
    yield WeightView(name="W_E", path="transformer.wte")
    yield WeightView(name="W_pos", path="transformer.wpe")
    yield from weight_and_bias("U", "lm_head")
    for part, projection in _projections(config, f"{BLOCK}.attn.c_attn").items():
        yield from weight_and_bias(part.upper(), projection.path, columns=projection.columns)
    yield from weight_and_bias("O", f"{BLOCK}.attn.c_proj", pattern="(h e) d -> h e d", sizes={"h": config.n_head})
    yield from weight_and_bias("in", f"{BLOCK}.mlp.c_fc")
    yield from weight_and_bias("out", f"{BLOCK}.mlp.c_proj")
