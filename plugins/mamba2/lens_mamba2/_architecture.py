"""Mamba-2 as tables: where each hook point, norm and weight is in HF's `Mamba2ForCausalLM`.

Source: transformers `models/mamba2/modeling_mamba2.py`. HF's `mixer.conv1d` and `mixer.act` are modules that it never
calls: their places are inside functions, see `_kernel.py`.
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
    NormPlace,
    Tokens,
    Unembedding,
    WeightView,
)
from lens_mamba2._calls import read_call
from lens_mamba2._kernel import KERNEL

RESIDUAL = "batch pos d_model"
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
    blocks = (point for layer in range(cfg.n_layers) for point in _block(layer, config, stream))
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
        aliases={
            f"blocks.{layer}.mixer.hook_inner_norm": f"blocks.{layer}.mixer.hook_gated" for layer in range(cfg.n_layers)
        },
        read_call=lambda call: read_call(call, has_bias=config.use_bias, limit=(float(low), float(high))),
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


def _block(layer: int, config: Any, stream: str) -> Iterator[HookPoint]:
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
    yield from _mixer(point, f"{hf}.mixer", config)
    yield point(
        "hook_mixer_out",
        RESIDUAL,
        "gated W_out_proj + b_out_proj, added to the stream",
        ModuleOutput(path=f"{hf}.mixer"),
    )
    yield point("hook_resid_post", RESIDUAL, "resid_pre + mixer_out", ModuleOutput(path=hf), dtype=stream)


def _mixer(point: Callable[..., HookPoint], path: str, config: Any) -> Iterator[HookPoint]:
    inner, shared = config.num_heads * config.head_dim, config.n_groups * config.state_size

    def inside(part: str, shape: str, equation: str, **options: Any) -> HookPoint:
        seam = InsideMixer(path=path, part=part, kernel=KERNEL)
        name = "inner_norm.hook_scale" if part == "inner_norm" else f"hook_{part}"
        return point(f"mixer.{name}", shape, equation, seam, **options)

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
    yield WeightView(name="W_E", path="backbone.embeddings")
    yield WeightView(name="W_U", path="lm_head")
    yield WeightView(name="b_U", path="lm_head", part="bias", width=cfg.d_vocab)
    mixer, inner = "backbone.layers.{layer}.mixer", config.num_heads * config.head_dim
    conv = inner + 2 * config.n_groups * config.state_size
    yield WeightView(name="W_in_proj", path=f"{mixer}.in_proj")
    yield WeightView(name="b_in_proj", path=f"{mixer}.in_proj", part="bias", width=inner + conv + config.num_heads)
    yield WeightView(name="W_conv", path=f"{mixer}.conv1d", pattern="c 1 k -> c k")
    yield WeightView(name="b_conv", path=f"{mixer}.conv1d", part="bias", width=conv)
    yield WeightView(name="b_dt", path=mixer, part="dt_bias")
    yield WeightView(name="A_log", path=mixer, part="A_log")
    yield WeightView(name="A", path=mixer, part="A_log", function=_negative_exp)
    yield WeightView(name="D", path=mixer, part="D")
    yield WeightView(name="W_inner_norm", path=f"{mixer}.norm")
    yield WeightView(name="W_out_proj", path=f"{mixer}.out_proj")
    yield WeightView(name="b_out_proj", path=f"{mixer}.out_proj", part="bias", width=config.hidden_size)
