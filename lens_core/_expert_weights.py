"""Weights of the experts of a mixture, each stacked over experts, as HF keeps them: views of the live parameters."""

from collections.abc import Iterator
from functools import partial
from typing import Literal

from torch import Tensor

from lens_core.weights import WeightView

__all__ = ["ExpertLayout", "expert_weights"]

ExpertLayout = Literal["gated", "interleaved", "plain"]


def expert_weights(path: str, layout: ExpertLayout, layers: tuple[int, ...] | None) -> Iterator[WeightView]:
    """Give `W_expert_in`, `W_expert_out` and, where they are, gate and biases: `[expert, in, out]`, `[expert, out]`.

    Args:
        path: The module of the experts, with `{layer}`.
        layout: As `Moe.expert_layout`.
        layers: The blocks that have one; None for all.
    """
    view = partial(WeightView, path=path, layers=layers)
    turned, fused = "x out d -> x d out", "gate_up_proj"
    if layout == "interleaved":  # [expert, in, out], and biases
        for kind, part in (("W", ""), ("b", "_bias")):
            yield view(name=f"{kind}_expert_gate", part=f"{fused}{part}", function=_even)
            yield view(name=f"{kind}_expert_in", part=f"{fused}{part}", function=_odd)
            yield view(name=f"{kind}_expert_out", part=f"down_proj{part}")
        return
    if layout == "gated":
        yield view(name="W_expert_gate", part=fused, function=_first_half, pattern=turned)
        yield view(name="W_expert_in", part=fused, function=_second_half, pattern=turned)
    else:
        yield view(name="W_expert_in", part="up_proj", pattern=turned)
    yield view(name="W_expert_out", part="down_proj", pattern="x d m -> x m d")


def _even(fused: Tensor) -> Tensor:
    return fused[..., ::2]


def _odd(fused: Tensor) -> Tensor:
    return fused[..., 1::2]


def _first_half(fused: Tensor) -> Tensor:
    return fused.chunk(2, dim=1)[0]


def _second_half(fused: Tensor) -> Tensor:
    return fused.chunk(2, dim=1)[1]
