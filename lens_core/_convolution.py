"""Handlers of the causal convolution of HF's mixers: shown before its activation, trimmed to the call's positions.

They take whatever stands under HF's names `causal_conv1d_fn` and `causal_conv1d_update`, and ask nothing of it but
HF's own arguments.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_core._graph import gradients, with_gradient_of
from lens_core._mixer import MixerCall

__all__ = ["convolution", "convolution_step"]


def convolution(call: MixerCall, original: Any, hidden: Tensor, *args: Any, activation: Any, **options: Any) -> Tensor:
    """Handle causal_conv1d_fn: a sequence `[batch, channels, pos]`, with a cache's window in front of it."""
    own = partial(original, hidden, *args, activation=activation, **options)
    plain = partial(original, hidden, *args, activation=None, **options)
    return _convolved(call, own, plain, hidden.dtype)


def convolution_step(
    call: MixerCall, original: Any, hidden: Tensor, window: Tensor, *args: Any, activation: Any, **options: Any
) -> Tensor:
    """Handle causal_conv1d_update: one position; it shifts the window in place, so the call beside has a copy."""
    before = window.clone() if call.watched("conv") else window
    own = partial(original, hidden, window, *args, activation=activation, **options)
    plain = partial(original, hidden, before, *args, activation=None, **options)
    return _convolved(call, own, plain, hidden.dtype)


def _convolved(
    call: MixerCall, own: Callable[[], Tensor], plain: Callable[[], Tensor], dtype: torch.dtype
) -> Float[Tensor, "batch channels any"]:
    call.notes["convolved"] = True
    if not call.watched("conv"):
        return own()
    with gradients(call.needs_graph("conv")):
        new = call.fire("conv", plain()[..., -call.n_pos :].mT)
        explicit = call.module.act(new.mT).to(dtype) if call.changed("conv") else None
    result = own()  # also where edited: it moves the window of the cache
    if explicit is None:
        return result
    return explicit if call.edited("conv") else with_gradient_of(explicit, result[..., -call.n_pos :])
