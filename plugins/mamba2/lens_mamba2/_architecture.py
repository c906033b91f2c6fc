"""Mamba-2 as tables: where each hook point, norm and weight is in HF's `Mamba2ForCausalLM`.

Source: transformers `models/mamba2/modeling_mamba2.py`. HF's `mixer.conv1d` and `mixer.act` are modules that it never
calls: their places are inside functions, see `_kernel.py`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lens_core.plugin import (
    RMS_NORM,
    Declaration,
    Embedding,
    HookPoint,
    InsideMixer,
    LensConfig,
    ModuleInput,
    ModuleOutput,
    NormPlace,
    Tokens,
    WeightView,
    norm_points,
    point,
    unembedding_points,
    weight_and_bias,
)
from lens_mamba2._calls import read_call
from lens_mamba2._kernel import KERNEL

BLOCK = "backbone.layers.{layer}"
NORMS = {
    "norm": NormPlace(path=f"{BLOCK}.norm", kind=RMS_NORM),
    "ln_final": NormPlace(path="backbone.norm_f", kind=RMS_NORM),
}
HEADS = "batch pos n_heads"
PER_HEAD = "batch pos n_heads head_dim"
HEAD_STATES = "batch pos n_heads head_dim d_state"
SHARED = "batch pos n_groups d_state"


def Mamba2(config: Any) -> Declaration:
    """Declare Mamba-2 at one HF `Mamba2Config`."""
    cfg = LensConfig(
        model_type=config.model_type,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_heads,
        head_dim=config.head_dim,
        n_groups=config.n_groups,
        d_inner=config.num_heads * config.head_dim,
        d_state=config.state_size,
        d_conv=config.conv_kernel,
        chunk_size=config.chunk_size,
        d_vocab=config.vocab_size,
        act_fn=config.hidden_act,
        eps=config.layer_norm_epsilon,
        normalization_type="RMS",
        positional_embedding_type="none",
    )
    low, high = config.time_step_limit
    stream = "float32" if config.residual_in_fp32 else "model"
    return Declaration(
        cfg=cfg,
        base="backbone",
        blocks="backbone.layers",
        embed="backbone.embeddings",
        unembed="lm_head",
        norms=NORMS,
        points=tuple(_points(config, stream)),
        writers=("hook_mixer_out",),
        embeddings=("hook_embed",),
        weights=tuple(_weights()),
        aliases={
            f"blocks.{layer}.mixer.hook_inner_norm": f"blocks.{layer}.mixer.hook_gated" for layer in range(cfg.n_layers)
        },
        read_call=lambda call: read_call(call, has_bias=config.use_bias, limit=(float(low), float(high))),
    )


def _points(config: Any, stream: str) -> Iterator[HookPoint]:
    yield point("hook_tokens", Tokens(path="backbone"))
    embedding = Embedding(base="backbone", path="backbone.embeddings")
    yield point("hook_embed", embedding, equation="W_E[tokens] = blocks.0.hook_resid_pre")
    for layer in range(config.num_hidden_layers):
        yield from _block(config, layer, stream)
    yield from norm_points("ln_final", NORMS["ln_final"], dtype=stream)
    yield from unembedding_points("backbone", "lm_head", finish=Tensor.float, dtype="float32")


def _block(config: Any, layer: int, stream: str) -> Iterator[HookPoint]:
    hf, here = BLOCK.format(layer=layer), partial(point, layer=layer)
    # The embeddings are in the model's dtype; the first block's sum makes the stream what residual_in_fp32 says.
    yield here("hook_resid_pre", ModuleInput(path=hf), dtype=stream if layer else "model")
    yield here("hook_mixer_in", ModuleInput(path=f"{hf}.norm", is_copy=True))
    yield from norm_points("norm", NORMS["norm"], layer=layer)
    yield from _mixer(here, f"{hf}.mixer", config)
    yield here("hook_mixer_out", ModuleOutput(path=f"{hf}.mixer"), equation="gated W_out_proj + b_out_proj")
    yield here("hook_resid_post", ModuleOutput(path=hf), equation="resid_pre + mixer_out", dtype=stream)


def _mixer(here: Callable[..., HookPoint], path: str, config: Any) -> Iterator[HookPoint]:
    inner, shared = config.num_heads * config.head_dim, config.n_groups * config.state_size

    def inside(part: str, shape: str, equation: str, **options: Any) -> HookPoint:
        seam = InsideMixer(path=path, part=part, kernel=KERNEL)
        name = "inner_norm.hook_scale" if part == "inner_norm" else f"hook_{part}"
        return here(f"mixer.{name}", seam, shape=shape, equation=equation, **options)

    conv, projected = f"batch pos {inner + 2 * shared}", f"batch pos {2 * inner + 2 * shared + config.num_heads}"
    yield inside("in_proj", projected, "[z | xBC | dt] = W_in_proj norm.out (+ b_in_proj)")
    yield inside("gate", "batch pos d_inner", "z, before SiLU")
    yield inside("conv_in", conv, "xBC, what the convolution reads")
    yield inside("conv", conv, "b_conv + sum_k w_k xBC_(t-K+1+k), before the activation")
    yield inside("ssm_input", PER_HEAD, "x of act(conv) = [x | B | C], zero at padding")
    yield inside("B", SHARED, "B of act(conv)")
    yield inside("C", SHARED, "C of act(conv)")
    yield inside("delta_pre", HEADS, "dt + b_dt")
    yield inside("delta", HEADS, "softplus(delta_pre), within time_step_limit")
    yield inside("decay", HEADS, "exp(delta A), A = -exp(A_log)", dtype="float32")
    yield inside("ssm_write", HEAD_STATES, "(delta x) outer B", dtype="float32", default=False)
    yield inside("ssm_state", HEAD_STATES, "h_t = decay_t h_(t-1) + ssm_write_t", dtype="float32", default=False)
    yield inside("y", PER_HEAD, "h_t C_t", dtype="float32")
    yield inside("ssm_output", PER_HEAD, "y + D x", dtype="float32")
    norm = "sqrt(mean((ssm_output SiLU(gate))^2) + eps) of each group"
    yield inside("inner_norm", "batch pos n_groups", norm, dtype="float32")
    yield inside(
        "gated", "batch pos d_inner", "ssm_output SiLU(gate) / inner_norm.scale * gain, what W_out_proj multiplies"
    )


def _negative_exp(A_log: Tensor) -> Tensor:
    return -torch.exp(A_log.float())


def _weights() -> Iterator[WeightView]:
    mixer = f"{BLOCK}.mixer"
    yield WeightView(name="W_E", path="backbone.embeddings")
    yield from weight_and_bias("U", "lm_head")
    yield from weight_and_bias("in_proj", f"{mixer}.in_proj")
    yield from weight_and_bias("conv", f"{mixer}.conv1d", pattern="c 1 k -> c k")
    yield WeightView(name="b_dt", path=mixer, part="dt_bias")
    yield WeightView(name="A_log", path=mixer, part="A_log")
    yield WeightView(name="A", path=mixer, part="A_log", function=_negative_exp)
    yield WeightView(name="D", path=mixer, part="D")
    yield WeightView(name="W_inner_norm", path=f"{mixer}.norm")
    yield from weight_and_bias("out_proj", f"{mixer}.out_proj")
