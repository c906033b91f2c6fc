"""What fills an activation cache during a run."""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lens_core._call import Call
from lens_core._choice import Choice, Part
from lens_core._positions import leaves_gaps
from lens_core.hook_points import HookPoint, Selection

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache

__all__ = ["CacheSink", "moved"]

MAYBE_THE_USERS = ("hook_tokens", "hook_embed")
"""Places whose value may be the very tensor that the user gave as input, and may write to later."""


class CacheSink:
    """Fills a cache during a run."""

    is_optional = False
    """A run that leaves out what was named is a mistake."""

    def __init__(
        self,
        cache: "ActivationCache",
        selection: Selection,
        *,
        detach: bool = True,
        incl_bwd: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        choice: Choice | None = None,
    ) -> None:
        # Tensors' backward hooks hold the sink: a strong reference would keep the cache alive as long as the graph, and
        # with undetached entries for ever.
        self._cache = weakref.ref(cache)
        self._choice = choice or Choice()
        cache.has_gaps, cache.heads = leaves_gaps(self._choice.positions), self._choice.heads
        self.names, self.exact = selection.names, selection.exact
        self.keeps_graph = not detach
        self.wants_gradient = incl_bwd
        self._device, self._dtype = device, dtype
        self._sequence = 0

    @property
    def cache(self) -> "ActivationCache":
        """The cache; whoever runs the model holds it."""
        cache = self._cache()
        if cache is None:
            raise RuntimeError("the activation cache went away during the run")
        return cache

    def begin(self, call: Call) -> None:
        """Start a new sequence where the call starts one."""
        if call.is_prefill:
            self.cache.restart()
            self._sequence += 1
        self.cache.forget_derived()
        call.sequences[self] = self._sequence

    def part(self, call: Call, n_heads: int) -> Part | None:
        """Say what it needs of scores and patterns; None for all of them."""
        return self._choice.part(call, n_heads)

    def store(
        self,
        point: HookPoint,
        value: Tensor,
        call: Call,
        *,
        is_foreign: bool,
        by_position: bool = False,
        part: Part | None = None,
    ) -> None:
        """Take a value; `is_foreign` says that a user's function holds it and may write to it.

        `by_position` says that its gradient will come one position after the other; `part` which cells it holds, where
        these are not all.
        """
        kept = self._choice.of(value, point, call, part=part)
        if self.keeps_graph:
            kept = moved(kept, self._device, self._dtype)
        else:
            kept = moved(kept.detach(), self._device, self._dtype)
            shares = kept.data_ptr() == value.data_ptr() and kept.untyped_storage().nbytes() != kept.nbytes
            is_foreign = is_foreign or point.name in MAYBE_THE_USERS
            if shares or (is_foreign and kept.data_ptr() == value.data_ptr()):
                kept = kept.clone(memory_format=torch.contiguous_format)
        self.cache.append(point.name, kept)
        if (self.keeps_graph or self.wants_gradient) and value.is_floating_point():
            if not by_position:
                self.cache.grad.expect(point.name, call.past, kept)
            else:
                for position in range(call.n_pos):
                    piece = self._choice.of(value[:, position : position + 1], point, call, position)
                    self.cache.grad.expect(point.name, call.past + position, piece)

    def store_gradient(self, point: HookPoint, gradient: Tensor, call: Call, *, position: int | None = None) -> None:
        """Take the gradient of a value that was stored, unless another sequence has taken its place.

        `position` says which of the call's positions it is about, where it is about one.
        """
        if call.sequences.get(self) == self._sequence and self._cache() is not None:
            first = call.past + (position or 0)
            self.cache.grad.add(point.name, first, self._choice.of(gradient.detach(), point, call, position))


def moved(tensor: Tensor, device: Any, dtype: torch.dtype | None) -> Tensor:
    """Move a tensor; a floating one also to a dtype."""
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
