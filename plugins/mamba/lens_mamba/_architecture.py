"""Mamba and Falcon-Mamba as tables: where each hook point, norm and weight is in HF's `MambaForCausalLM` and its kin.

Source: transformers `models/mamba/modeling_mamba.py`, `models/falcon_mamba/modeling_falcon_mamba.py`. Falcon-Mamba
differs by RMSNorms without gain of dt, B and C. What HF calls `mixer.conv1d`, `mixer.act` and `mixer.dt_proj` are
modules that it never calls: their places are inside functions, see `_kernel.py`.
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
    NormInside,
    NormKind,
    NormPlace,
    Tokens,
    WeightView,
    norm_points,
    point,
    unembedding_points,
    weight_and_bias,
)
from lens_mamba._calls import read_call
from lens_mamba._kernel import KERNEL

BLOCK = "backbone.layers.{layer}"
NORMS = {
    "norm": NormPlace(path=f"{BLOCK}.norm", kind=RMS_NORM),
    "ln_final": NormPlace(path="backbone.norm_f", kind=RMS_NORM),
}
CHANNELS = "batch pos d_inner"
STATES = "batch pos d_state"
CHANNEL_STATES = "batch pos d_inner d_state"


def Mamba(config: Any) -> Declaration:
    """Declare Mamba or Falcon-Mamba at one HF config."""
    cfg = LensConfig(
        model_type=config.model_type,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_inner=config.intermediate_size,
        d_state=config.state_size,
        d_conv=config.conv_kernel,
        dt_rank=int(config.time_step_rank),
        d_vocab=config.vocab_size,
        act_fn=config.hidden_act,
        eps=config.layer_norm_epsilon,
        normalization_type="RMS",
        positional_embedding_type="none",
    )
    stream = "float32" if config.residual_in_fp32 else "model"
    return Declaration(
        cfg=cfg,
        base="backbone",
        blocks="backbone.layers",
        embed="backbone.embeddings",
        unembed="lm_head",
        norms=NORMS,
        points=tuple(_points(cfg, stream)),
        writers=("hook_mixer_out",),
        embeddings=("hook_embed",),
        weights=tuple(_weights()),
        read_call=lambda call: read_call(call, has_bias=config.use_bias),
    )


def _points(cfg: LensConfig, stream: str) -> Iterator[HookPoint]:
    yield point("hook_tokens", Tokens(path="backbone"))
    embedding = Embedding(base="backbone", path="backbone.embeddings")
    yield point("hook_embed", embedding, equation="W_E[tokens] = blocks.0.hook_resid_pre")
    for layer in range(cfg.n_layers):
        yield from _block(cfg, layer, stream)
    yield from norm_points("ln_final", NORMS["ln_final"], dtype=stream)
    yield from unembedding_points("backbone", "lm_head", finish=Tensor.float, dtype="float32")


def _block(cfg: LensConfig, layer: int, stream: str) -> Iterator[HookPoint]:
    hf, here = BLOCK.format(layer=layer), partial(point, layer=layer)
    # The embeddings are in the model's dtype; the first block's sum makes the stream what residual_in_fp32 says.
    yield here("hook_resid_pre", ModuleInput(path=hf), dtype=stream if layer else "model")
    yield here("hook_mixer_in", ModuleInput(path=f"{hf}.norm", is_copy=True))
    yield from norm_points("norm", NORMS["norm"], layer=layer)
    yield from _mixer(here, f"{hf}.mixer", cfg)
    yield here("hook_mixer_out", ModuleOutput(path=f"{hf}.mixer"), equation="gated W_out_proj + b_out_proj")
    yield here("hook_resid_post", ModuleOutput(path=hf), equation="resid_pre + mixer_out", dtype=stream)


def _mixer(here: Callable[..., HookPoint], path: str, cfg: LensConfig) -> Iterator[HookPoint]:
    in_width, x_width = 2 * (cfg.d_inner or 0), (cfg.dt_rank or 0) + 2 * (cfg.d_state or 0)
    is_falcon = cfg.model_type == "falcon_mamba"

    def inside(part: str, shape: str, equation: str, **options: Any) -> HookPoint:
        seam = InsideMixer(path=path, part=part, kernel=KERNEL)
        return here(f"mixer.hook_{part}", seam, shape=shape, equation=equation, **options)

    normed = ", each over its root mean square" if is_falcon else ""
    yield inside("in_proj", f"batch pos {in_width}", "[u | z] = W_in_proj norm.out (+ b_in_proj)")
    yield inside("gate", CHANNELS, "z, before SiLU")
    yield inside("conv_in", CHANNELS, "u, what the convolution reads")
    yield inside("conv", CHANNELS, "b_conv + sum_k w_k u_(t-K+1+k), before the activation")
    yield inside("ssm_input", CHANNELS, "x = act(conv), zero at padding")
    yield inside("x_proj", f"batch pos {x_width}", f"[dt | B | C] = W_x x{', before their norms' if is_falcon else ''}")
    if is_falcon:
        yield from _selection_norms(here, path)
    yield inside("B", STATES, f"B of x_proj{normed}")
    yield inside("C", STATES, f"C of x_proj{normed}")
    yield inside("delta_pre", CHANNELS, "W_dt dt + b_dt")
    yield inside("delta", CHANNELS, "softplus(delta_pre)")
    yield inside("decay", CHANNEL_STATES, "exp(delta A), A = -exp(A_log)", dtype="float32", default=False)
    yield inside("ssm_write", CHANNEL_STATES, "(delta x) outer B", dtype="float32", default=False)
    yield inside("ssm_state", CHANNEL_STATES, "h_t = decay_t h_(t-1) + ssm_write_t", dtype="float32", default=False)
    yield inside("y", CHANNELS, "h_t C_t")
    yield inside("ssm_output", CHANNELS, "y + D x", dtype="float32")
    yield inside("gated", CHANNELS, "ssm_output * SiLU(gate), what W_out_proj multiplies")


def _without_gain(module: Any, normalized: Tensor) -> Tensor:
    return normalized


SELECTION_NORM = NormKind(name="RMS", split=RMS_NORM.split, affine=_without_gain, centres=False)
"""Falcon-Mamba's norm of dt, B and C; its weight is a buffer of ones that only kernels read."""


def _selection_norms(here: Callable[..., HookPoint], path: str) -> Iterator[HookPoint]:
    for part, module in (("dt", "dt_layernorm"), ("B", "b_layernorm"), ("C", "c_layernorm")):
        seam = NormInside(path=f"{path}.{module}", part="scale", kind=SELECTION_NORM)
        equation = f"sqrt(mean({part}^2) + eps)"
        yield here(f"mixer.{part}_norm.hook_scale", seam, shape="batch pos 1", equation=equation)


def _negative_exp(A_log: Tensor) -> Tensor:
    return -torch.exp(A_log.float())


def _weights() -> Iterator[WeightView]:
    mixer = f"{BLOCK}.mixer"
    yield WeightView(name="W_E", path="backbone.embeddings")
    yield from weight_and_bias("U", "lm_head")
    yield from weight_and_bias("in_proj", f"{mixer}.in_proj")
    yield from weight_and_bias("conv", f"{mixer}.conv1d", pattern="c 1 k -> c k")
    yield WeightView(name="W_x", path=f"{mixer}.x_proj")
    yield from weight_and_bias("dt", f"{mixer}.dt_proj")
    yield WeightView(name="A_log", path=mixer, part="A_log")
    yield WeightView(name="A", path=mixer, part="A_log", function=_negative_exp)
    yield WeightView(name="D", path=mixer, part="D")
    yield from weight_and_bias("out_proj", f"{mixer}.out_proj")
