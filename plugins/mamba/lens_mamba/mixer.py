"""Mamba's mixer by declaration: its hook points and weights at any path, for whatever block holds one.

Every file of transformers that has such a mixer holds the same functions under the same names; the kernel finds them in
the file of the mixer's class. What differs is where the mixer is, its sizes, and whether dt, B and C are normed.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lens_core.plugin import HookPoint, InsideMixer, NormInside, NormKind, WeightView, point, weight_and_bias
from lens_mamba._calls import check_call
from lens_mamba._kernel import KERNEL

__all__ = ["KERNEL", "check_call", "mixer_points", "mixer_weights"]

CHANNELS = "batch pos d_inner"
STATES = "batch pos d_state"
CHANNEL_STATES = "batch pos d_inner d_state"
NORMED = (("dt", "dt_layernorm"), ("B", "b_layernorm"), ("C", "c_layernorm"))


def mixer_points(
    layer: int, *, path: str, d_inner: int, d_state: int, dt_rank: int, norm: NormKind | None = None
) -> Iterator[HookPoint]:
    """Give what is inside one mixer, in the order of computation: the names `blocks.L.mixer.*`.

    Args:
        layer: The block, 0-based.
        path: The mixer, with `{layer}`.
        d_inner: Its channels.
        d_state: States of a channel.
        dt_rank: Width of the projection that step sizes come from.
        norm: The kind of the norms of dt, B and C; None where there are none.

    Example:
        >>> next(mixer_points(3, path="model.layers.{layer}.mamba", d_inner=8, d_state=4, dt_rank=2)).name
        'blocks.3.mixer.hook_in_proj'
    """
    mixer, here = path.format(layer=layer), partial(point, layer=layer)

    def inside(part: str, shape: str, equation: str, **options: Any) -> HookPoint:
        seam = InsideMixer(path=mixer, part=part, kernel=KERNEL)
        return here(f"mixer.hook_{part}", seam, shape=shape, equation=equation, **options)

    normed = "" if norm is None else ", over its root mean square, times the gain if there is one"
    before = "" if norm is None else ", before their norms"
    yield inside("in_proj", f"batch pos {2 * d_inner}", "[u | z] = W_in_proj norm.out (+ b_in_proj)")
    yield inside("gate", CHANNELS, "z, before SiLU")
    yield inside("conv_in", CHANNELS, "u, what the convolution reads")
    yield inside("conv", CHANNELS, "b_conv + sum_k w_k u_(t-K+1+k), before the activation")
    yield inside("ssm_input", CHANNELS, "x = act(conv), zero at padding")
    yield inside("x_proj", f"batch pos {dt_rank + 2 * d_state}", f"[dt | B | C] = W_x x{before}")
    for part, module in NORMED:
        if norm is not None:
            scale = NormInside(path=f"{mixer}.{module}", part="scale", kind=norm)
            equation = f"sqrt(mean({part}^2) + eps)"
            yield here(f"mixer.{part}_norm.hook_scale", scale, shape="batch pos 1", equation=equation)
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


def mixer_weights(path: str, *, layers: tuple[int, ...] | None = None, has_norms: bool = False) -> Iterator[WeightView]:
    """Give the weights of the mixers.

    Args:
        path: The mixer, with `{layer}`.
        layers: The blocks that have one; None for all.
        has_norms: Whether the norms of dt, B and C have gains.
    """
    for part, module in NORMED if has_norms else ():
        yield WeightView(name=f"W_{part}_norm", path=f"{path}.{module}", layers=layers)
    yield from weight_and_bias("in_proj", f"{path}.in_proj", layers=layers)
    yield from weight_and_bias("conv", f"{path}.conv1d", pattern="c 1 k -> c k", layers=layers)
    yield WeightView(name="W_x", path=f"{path}.x_proj", layers=layers)
    yield from weight_and_bias("dt", f"{path}.dt_proj", layers=layers)
    yield WeightView(name="A_log", path=path, part="A_log", layers=layers)
    yield WeightView(name="A", path=path, part="A_log", function=_negative_exp, layers=layers)
    yield WeightView(name="D", path=path, part="D", layers=layers)
    yield from weight_and_bias("out_proj", f"{path}.out_proj", layers=layers)


def _negative_exp(A_log: Tensor) -> Tensor:
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
