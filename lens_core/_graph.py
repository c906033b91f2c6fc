"""Autograd: a value with the bits of one computation and the gradient of another, and modes that end with their block.

An interrupt (Ctrl-C) may come between the end of a block and the exit of its context, which then never runs. So what
lens switches for a moment is switched back by a generator, which ends when nobody refers to it.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["FunctionMode", "during", "explicit_where", "gradients", "with_gradient_of"]


@contextmanager
def gradients(enabled: bool) -> Generator[None, None, None]:
    """Switch the recording of gradients on or off inside the block."""
    before = torch.is_grad_enabled()
    try:
        try:
            torch.set_grad_enabled(enabled)
            yield
        finally:
            _switch_back(before, enabled)
    finally:
        _switch_back(before, enabled)


def _switch_back(before: bool, enabled: bool) -> None:
    if torch.is_grad_enabled() == enabled:  # else others have done so, before this generator came to its end
        torch.set_grad_enabled(before)


_torchs: Any = TorchFunctionMode


class FunctionMode(TorchFunctionMode):
    """A torch function mode that does nothing once `during` is over, should an interrupt have left it on the stack."""

    is_over = False

    def __exit__(self, *error: Any) -> None:
        """Leave the stack; torch itself takes the mode off for as long as a function of its own runs."""
        if _top() is self:
            _torchs.__exit__(self, *error)


Mode = TypeVar("Mode", bound=FunctionMode)


@contextmanager
def during(mode: Mode) -> Generator[Mode, None, None]:
    """Let a mode see torch's functions inside the block."""
    _pop_ended()
    try:
        with mode:
            yield mode
    finally:
        mode.is_over = True
        _pop_ended()


def _pop_ended() -> None:
    """Take modes whose block is over from the top of torch's stack."""
    while isinstance(mode := _top(), FunctionMode) and mode.is_over:
        _torchs.__exit__(mode, None, None, None)


def _top() -> Any:
    overrides: Any = torch.overrides
    return overrides._get_current_function_mode()


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


def explicit_where(changed: Tensor, explicit: Tensor, own: Tensor) -> Tensor:
    """Give the explicit computation where what it reads was changed, and elsewhere the model's own bits."""
    return torch.where(changed, explicit, with_gradient_of(explicit, own))
