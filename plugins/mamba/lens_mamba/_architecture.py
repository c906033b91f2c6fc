"""Mamba and Falcon-Mamba as tables: where each hook point, norm and weight is in HF's `MambaForCausalLM` and its kin.

Source: transformers `models/mamba/modeling_mamba.py`, `models/falcon_mamba/modeling_falcon_mamba.py`. Falcon-Mamba
differs by RMSNorms without gain of dt, B and C. What HF calls `mixer.conv1d`, `mixer.act` and `mixer.dt_proj` are
modules that it never calls: their places are inside functions, see `_kernel.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

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
    Unembedding,
    WeightView,
)
from lens_mamba._calls import read_call
from lens_mamba._kernel import KERNEL

RESIDUAL = "batch pos d_model"
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
    blocks = (point for layer in range(cfg.n_layers) for point in _block(layer, cfg, stream))
    return Declaration(
        cfg=cfg,
        base="backbone",
        blocks="backbone.layers",
        embed="backbone.embeddings",
        unembed="lm_head",
        norms={
            "norm": NormPlace(path="backbone.layers.{layer}.norm", kind=RMS_NORM),
            "ln_final": NormPlace(path="backbone.norm_f", kind=RMS_NORM),
        },
        points=(*_before(), *blocks, *_after(stream)),
        writers=("hook_mixer_out",),
        embeddings=("hook_embed",),
        weights=tuple(_weights(cfg, config)),
        read_call=lambda call: read_call(call, has_bias=config.use_bias),
    )


def _before() -> Iterator[HookPoint]:
    yield HookPoint(
        name="hook_tokens", shape="batch pos", dtype="int64", equation="token ids", seam=Tokens(path="backbone")
    )
    yield HookPoint(
        name="hook_embed",
        shape=RESIDUAL,
        equation="W_E[tokens] = blocks.0.hook_resid_pre",
        seam=Embedding(base="backbone", path="backbone.embeddings"),
    )


def _norm(name: str, path: str, layer: int | None, dtype: str) -> Iterator[HookPoint]:
    for part, shape, equation, seam in (
        ("scale", "batch pos 1", "sqrt(mean(x^2) + eps)", NormInside(path=path, part="scale", kind=RMS_NORM)),
        ("normalized", RESIDUAL, "x / scale", NormInside(path=path, part="normalized", kind=RMS_NORM)),
        ("out", RESIDUAL, "normalized * gain", ModuleOutput(path=path)),
    ):
        yield HookPoint(name=f"{name}.hook_{part}", layer=layer, shape=shape, equation=equation, seam=seam, dtype=dtype)


def _block(layer: int, cfg: LensConfig, stream: str) -> Iterator[HookPoint]:
    hf = f"backbone.layers.{layer}"

    def point(name: str, shape: str, equation: str, seam: Any, **options: Any) -> HookPoint:
        name = f"blocks.{layer}.{name}"
        return HookPoint(name=name, layer=layer, shape=shape, equation=equation, seam=seam, **options)

    # The embeddings are in the model's dtype; the first block's sum makes the stream what residual_in_fp32 says.
    entering = stream if layer else "model"
    yield point("hook_resid_pre", RESIDUAL, "what enters the block", ModuleInput(path=hf), dtype=entering)
    copy = ModuleInput(path=f"{hf}.norm", is_copy=True)
    yield point("hook_mixer_in", RESIDUAL, "a copy of resid_pre, before the norm", copy, default=False)
    yield from _norm(f"blocks.{layer}.norm", f"{hf}.norm", layer, "model")
    yield from _mixer(point, f"{hf}.mixer", cfg)
    yield point(
        "hook_mixer_out",
        RESIDUAL,
        "gated W_out_proj + b_out_proj, added to the stream",
        ModuleOutput(path=f"{hf}.mixer"),
    )
    yield point("hook_resid_post", RESIDUAL, "resid_pre + mixer_out", ModuleOutput(path=hf), dtype=stream)


def _mixer(point: Callable[..., HookPoint], path: str, cfg: LensConfig) -> Iterator[HookPoint]:
    in_width, x_width = 2 * (cfg.d_inner or 0), (cfg.dt_rank or 0) + 2 * (cfg.d_state or 0)
    is_falcon = cfg.model_type == "falcon_mamba"

    def inside(part: str, shape: str, equation: str, **options: Any) -> HookPoint:
        seam = InsideMixer(path=path, part=part, kernel=KERNEL)
        return point(f"mixer.hook_{part}", shape, equation, seam, **options)

    normed = ", each over its root mean square" if is_falcon else ""
    yield inside("in_proj", f"batch pos {in_width}", "[u | z] = W_in_proj norm.out (+ b_in_proj)")
    yield inside("gate", CHANNELS, "z, before SiLU")
    yield inside("conv_in", CHANNELS, "u, what the convolution reads")
    yield inside("conv", CHANNELS, "b_conv + sum_k w_k u_(t-K+1+k), before the activation")
    yield inside("ssm_input", CHANNELS, "x = act(conv), zero at padding")
    yield inside("x_proj", f"batch pos {x_width}", f"[dt | B | C] = W_x x{', before their norms' if is_falcon else ''}")
    if is_falcon:
        yield from _selection_norms(point, path)
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


def _selection_norms(point: Callable[..., HookPoint], path: str) -> Iterator[HookPoint]:
    for part, module in (("dt", "dt_layernorm"), ("B", "b_layernorm"), ("C", "c_layernorm")):
        seam = NormInside(path=f"{path}.{module}", part="scale", kind=SELECTION_NORM)
        yield point(f"mixer.{part}_norm.hook_scale", "batch pos 1", f"sqrt(mean({part}^2) + eps)", seam)


def _after(stream: str) -> Iterator[HookPoint]:
    yield from _norm("ln_final", "backbone.norm_f", None, stream)
    ends: tuple[tuple[str, str, str, Literal["in", "out", "logits"], str], ...] = (
        ("unembed.hook_in", RESIDUAL, "what the unembedding receives", "in", "model"),
        ("unembed.hook_out", "batch pos d_vocab", "unembed.in W_U", "out", "model"),
        ("hook_logits", "batch pos d_vocab", "the logits, in float32", "logits", "float32"),
    )
    for name, shape, equation, part, dtype in ends:
        seam = Unembedding(base="backbone", path="lm_head", part=part, finish=Tensor.float)
        yield HookPoint(name=name, shape=shape, equation=equation, seam=seam, dtype=dtype)


def _negative_exp(A_log: Tensor) -> Tensor:
    return -torch.exp(A_log.float())


def _weights(cfg: LensConfig, config: Any) -> Iterator[WeightView]:
    mixer = "backbone.layers.{layer}.mixer"
    yield WeightView(name="W_E", path="backbone.embeddings")
    yield WeightView(name="W_U", path="lm_head")
    yield WeightView(name="b_U", path="lm_head", part="bias", width=cfg.d_vocab)
    yield WeightView(name="W_in_proj", path=f"{mixer}.in_proj")
    yield WeightView(name="b_in_proj", path=f"{mixer}.in_proj", part="bias", width=2 * config.intermediate_size)
    yield WeightView(name="W_conv", path=f"{mixer}.conv1d", pattern="c 1 k -> c k")
    yield WeightView(name="b_conv", path=f"{mixer}.conv1d", part="bias", width=config.intermediate_size)
    yield WeightView(name="W_x", path=f"{mixer}.x_proj")
    yield WeightView(name="W_dt", path=f"{mixer}.dt_proj")
    yield WeightView(name="b_dt", path=f"{mixer}.dt_proj", part="bias")
    yield WeightView(name="A_log", path=mixer, part="A_log")
    yield WeightView(name="A", path=mixer, part="A_log", function=_negative_exp)
    yield WeightView(name="D", path=mixer, part="D")
    yield WeightView(name="W_out_proj", path=f"{mixer}.out_proj")
    yield WeightView(name="b_out_proj", path=f"{mixer}.out_proj", part="bias", width=config.hidden_size)
