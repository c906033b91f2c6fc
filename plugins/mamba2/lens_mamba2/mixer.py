"""Mamba-2's mixer by declaration: its hook points and weights at any path, for whatever block holds one.

Every file of transformers that has such a mixer holds the same functions under the same names; the kernel finds them in
the file of the mixer's class. What differs is where the mixer is, and its sizes.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lens_core.plugin import HookPoint, InsideMixer, MixerKernel, WeightView, point, weight_and_bias
from lens_mamba2._calls import check_call
from lens_mamba2._kernel import KERNEL, SCAN, in_columns, scan_step

__all__ = ["ALIASES", "KERNEL", "SCAN", "check_call", "in_columns", "mixer_points", "mixer_weights", "scan_step"]

ALIASES: Mapping[str, str] = {"mixer.hook_inner_norm": "mixer.hook_gated"}
"""Further names in a block whose mixer has the gated norm."""
_SCALES = {"after": "sqrt(mean((ssm_output SiLU(gate))^2) + eps)", "before": "sqrt(mean(ssm_output^2) + eps)"}
_GATED = {"none": "ssm_output SiLU(gate)"} | dict.fromkeys(_SCALES, "ssm_output SiLU(gate) / inner_norm.scale * gain")


def mixer_points(
    layer: int,
    *,
    path: str,
    n_heads: int,
    head_dim: int,
    n_groups: int,
    d_state: int,
    heads: str = "n_heads",
    norm: Literal["after", "before", "none"] = "after",
    kernel: MixerKernel = KERNEL,
) -> Iterator[HookPoint]:
    """Give what is inside one mixer, in the order of computation: the names `blocks.L.mixer.*`.

    Args:
        layer: The block, 0-based.
        path: The mixer, with `{layer}`.
        n_heads: Its heads.
        head_dim: Their width.
        n_groups: The groups of heads that share B and C.
        d_state: The width of B and C.
        heads: The word for its heads in shapes, where `n_heads` are those of attention.
        norm: Whether a norm of groups comes after the gate, before it, or not at all.
        kernel: What serves these places.

    Example:
        >>> sizes = {"n_heads": 4, "head_dim": 8, "n_groups": 1, "d_state": 16}
        >>> next(mixer_points(3, path="model.layers.{layer}.mamba", **sizes)).name
        'blocks.3.mixer.hook_in_proj'
    """
    mixer, inner, shared = path.format(layer=layer), n_heads * head_dim, n_groups * d_state
    per_head, grouped = f"batch pos {heads} head_dim", "batch pos n_groups d_state"
    here = partial(point, layer=layer)

    def inside(part: str, shape: str, equation: str, **options: Any) -> HookPoint:
        seam = InsideMixer(path=mixer, part=part, kernel=kernel)
        name = "inner_norm.hook_scale" if part == "inner_norm" else f"hook_{part}"
        return here(f"mixer.{name}", seam, shape=shape, equation=equation, **options)

    conv, projected = f"batch pos {inner + 2 * shared}", f"batch pos {2 * inner + 2 * shared + n_heads}"
    yield inside("in_proj", projected, "[z | xBC | dt] = W_in_proj norm.out (+ b_in_proj)")
    yield inside("gate", "batch pos d_inner", "z, before SiLU")
    yield inside("conv_in", conv, "xBC, what the convolution reads")
    yield inside("conv", conv, "b_conv + sum_k w_k xBC_(t-K+1+k), before the activation")
    yield inside("ssm_input", per_head, "x of act(conv) = [x | B | C], zero at padding")
    yield inside("B", grouped, "B of act(conv)")
    yield inside("C", grouped, "C of act(conv)")
    yield inside("delta_pre", f"batch pos {heads}", "dt + b_dt")
    yield inside("delta", f"batch pos {heads}", "softplus(delta_pre), within time_step_limit")
    yield inside("decay", f"batch pos {heads}", "exp(delta A), A = -exp(A_log)", dtype="float32")
    starred: dict[str, Any] = {"dtype": "float32", "default": False}
    yield inside("ssm_write", f"{per_head} d_state", "(delta x) outer B", **starred)
    yield inside("ssm_state", f"{per_head} d_state", "h_t = decay_t h_(t-1) + ssm_write_t", **starred)
    yield inside("y", per_head, "h_t C_t", dtype="float32")
    yield inside("ssm_output", per_head, "y + D x", dtype="float32")
    if norm != "none":
        yield inside("inner_norm", "batch pos n_groups", f"{_SCALES[norm]} of each group", dtype="float32")
    yield inside("gated", "batch pos d_inner", f"{_GATED[norm]}, what W_out_proj multiplies")


def mixer_weights(path: str, *, layers: tuple[int, ...] | None = None, has_norm: bool = True) -> Iterator[WeightView]:
    """Give the weights of the mixers.

    Args:
        path: The mixer, with `{layer}`.
        layers: The blocks that have one; None for all.
        has_norm: Whether they have a norm of groups.
    """
    yield from weight_and_bias("in_proj", f"{path}.in_proj", layers=layers)
    yield from weight_and_bias("conv", f"{path}.conv1d", pattern="c 1 k -> c k", layers=layers)
    yield WeightView(name="b_dt", path=path, part="dt_bias", layers=layers)
    yield WeightView(name="A_log", path=path, part="A_log", layers=layers)
    yield WeightView(name="A", path=path, part="A_log", function=_negative_exp, layers=layers)
    yield WeightView(name="D", path=path, part="D", layers=layers)
    if has_norm:
        yield WeightView(name="W_inner_norm", path=f"{path}.norm", layers=layers)
    yield from weight_and_bias("out_proj", f"{path}.out_proj", layers=layers)


def _negative_exp(A_log: Tensor) -> Tensor:
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
