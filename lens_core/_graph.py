"""A value with the bits of one computation and the gradient of another."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["with_gradient_of"]


class _Substitute(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(explicit: Tensor, own: Tensor) -> Tensor:
        return own.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0], None


def with_gradient_of(explicit: Tensor, own: Tensor) -> Tensor:
    """Give the model's own value, bit for bit, with gradients flowing through the explicit computation of the same.

    For places computed beside a fused kernel whose value nobody changed, but whose gradient is wanted or was cut.
    """
    return _Substitute.apply(explicit, own.detach())  # type: ignore[no-any-return]
