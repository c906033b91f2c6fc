"""Activations by name: a mapping that knows the hook points' short forms and the residual stream's algebra."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lens_core._call import Call
from lens_core._positions import Positions, local_positions
from lens_core._residual import ResidualAlgebra
from lens_core.errors import ArgumentError, CacheError
from lens_core.hook_points import HookPoint, HookTable, Selection
from lens_core.shapes import axis_index

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["ActivationCache", "CacheSink"]


class ActivationCache(ResidualAlgebra, Mapping[str, Tensor]):
    """The activations of one run by canonical hook name.

    `cache["blocks.3.attn.hook_q"]`, `cache["q", 3]` and `cache["q3"]` are one entry; `cache["q"]` stacks what is cached
    of all layers along a new first axis (a copy). Calls that continue a sequence append their positions; a call that
    starts one replaces what was there. Entries may share storage with each other; nothing else writes to them.

    Attributes:
        model: The model that was run; None for a cache read from a file without one.
        grad: Gradients at the same hook points, where they were asked for.
        has_batch_dim: False after `remove_batch_dim`.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        table: HookTable,
        model: "LensModel | None" = None,
        has_batch_dim: bool = True,
    ) -> None:
        """Hold tensors by canonical name; `table` resolves other forms of the names."""
        self._pieces: dict[str, list[Tensor]] = {name: [value] for name, value in (tensors or {}).items()}
        self.table = table
        self.model = model
        self.has_batch_dim = has_batch_dim
        self.grad: Gradients = Gradients(self)

    def __getitem__(self, key: Any) -> Tensor:
        """Give one activation, or the stack over layers of a short form without a layer.

        Raises:
            UnknownHookError: No such hook point in the model.
            CacheError: The hook point exists and was not cached.
        """
        if isinstance(key, str) and key in self._pieces:
            return self._joined(key)
        if isinstance(key, str) and key.endswith("_grad") and self.grad:
            return self.grad[key.removesuffix("_grad")]
        names = self.table.select(key).names if not _is_filter(key) else ()
        found = [name for name in names if name in self._pieces]
        if not found:
            kept = ", ".join(list(self._pieces)[:4])
            raise NotCachedError(
                f"{key!r} was not cached; {len(self)} hook points were{': ' + kept if kept else ''}"
                f"{', ...' if len(self) > 4 else ''}. Name it in names_filter"
            )
        if len(names) == 1:
            return self._joined(names[0])
        return torch.stack([self._joined(name) for name in found])

    def _joined(self, name: str) -> Tensor:
        pieces = self._pieces[name]
        if len(pieces) > 1:
            pieces[:] = [_join(pieces, self.table[name].shape, fill=float("-inf") if "scores" in name else 0.0)]
        return pieces[0]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the canonical names that are cached, in the order of computation."""
        return iter(self._pieces)

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._pieces)

    def __contains__(self, key: object) -> bool:
        """Whether a name or short form is cached."""
        try:
            self[key]
        except (KeyError, ArgumentError):
            return False
        return True

    def __delitem__(self, key: Any) -> None:
        """Forget one entry, to free its memory."""
        self[key]
        for name in self.table.select(key).names:
            self._pieces.pop(name, None)

    def __repr__(self) -> str:
        """Show how many entries of what size."""
        size = sum(piece.numel() * piece.element_size() for pieces in self._pieces.values() for piece in pieces)
        return f"ActivationCache({len(self)} entries, {size / 2**20:.1f} MiB)"

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "ActivationCache":
        """Move the entries, in place, to a device; floating ones also to a dtype. Returns the cache."""
        for pieces in (*self._pieces.values(), *self.grad.pieces.values()):
            pieces[:] = [_moved(piece, device, dtype) for piece in pieces]
        return self

    def remove_batch_dim(self) -> "ActivationCache":
        """Drop the batch axis of every entry, in place.

        Raises:
            CacheError: The batch has more than one row.
        """
        if self.has_batch_dim:
            for name in (*self, *self.grad.pieces):
                rows = self._joined(name).shape[0] if name in self._pieces else 1
                if rows != 1:
                    raise CacheError(f"{name!r} has {rows} rows; remove_batch_dim is for a batch of one")
            for store in (self._pieces, self.grad.pieces):
                for pieces in store.values():
                    pieces[:] = [piece[0] for piece in pieces]
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: int | slice | Sequence[int] | Tensor) -> "ActivationCache":
        """Give a new cache with some rows (an int drops the batch axis); entries are views where slicing gives views."""
        if not self.has_batch_dim:
            raise CacheError("this cache has no batch axis any more")
        rows = list(batch_slice) if isinstance(batch_slice, Sequence) else batch_slice
        tensors = {name: self[name][rows] for name in self}
        return ActivationCache(
            tensors, table=self.table, model=self.model, has_batch_dim=not isinstance(batch_slice, int)
        )


class NotCachedError(CacheError, KeyError):
    """A hook point that exists is not in this cache."""

    __str__ = Exception.__str__


class Gradients(Mapping[str, Tensor]):
    """Gradients of a cache's entries, under the same names; zeros where nothing flowed."""

    def __init__(self, cache: ActivationCache) -> None:
        self._cache = cache
        self.pieces: dict[str, list[Tensor]] = {}
        self.names: set[str] = set()

    def __getitem__(self, key: Any) -> Tensor:
        """Give the gradient at a hook point; short forms as in the cache.

        Raises:
            CacheError: Gradients were not asked for there.
        """
        names = [name for name in self._cache.table.select(key).names if name in self.names]
        if not names:
            raise NotCachedError(f"no gradient was kept at {key!r}; use caching(detach=False) or incl_bwd=True")
        if len(self._cache.table.select(key).names) == 1:
            return self._one(names[0])
        return torch.stack([self._one(name) for name in names])

    def _one(self, name: str) -> Tensor:
        pieces = self.pieces.get(name)
        if not pieces:
            return torch.zeros_like(self._cache[name]).detach()
        if len(pieces) > 1:
            pieces[:] = [_join(pieces, self._cache.table[name].shape, fill=0.0)]
        return pieces[0]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names with gradients."""
        return iter(name for name in self._cache if name in self.names)

    def __len__(self) -> int:
        """Count them."""
        return len(self.names)


class CacheSink:
    """Fills a cache during a run."""

    def __init__(
        self,
        cache: ActivationCache,
        selection: Selection,
        *,
        detach: bool = True,
        incl_bwd: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        pos_slice: Positions = None,
    ) -> None:
        self.cache = cache
        self.names, self.exact = selection.names, selection.exact
        self.keeps_graph = not detach
        self.wants_gradient = incl_bwd
        self._device, self._dtype, self._pos_slice = device, dtype, pos_slice
        if self.keeps_graph or self.wants_gradient:
            cache.grad.names.update(name for name in self.names if name != "hook_tokens")

    def begin(self, call: Call) -> None:
        """Start a new sequence where the call starts one."""
        if call.is_prefill:
            for name in self.names:
                self.cache._pieces.pop(name, None)
                self.cache.grad.pieces.pop(name, None)

    def store(self, point: HookPoint, value: Tensor, call: Call, *, is_foreign: bool) -> None:
        """Take a value; `is_foreign` says that a user's function holds it and may write to it."""
        kept = self._sliced(value, point, call)
        if not self.keeps_graph:
            kept = _moved(kept.detach(), self._device, self._dtype)
            shares = kept.data_ptr() == value.data_ptr() and kept.untyped_storage().nbytes() != kept.nbytes
            if shares or (is_foreign and kept.data_ptr() == value.data_ptr()):
                kept = kept.clone(memory_format=torch.contiguous_format)
        self.cache._pieces.setdefault(point.name, []).append(kept)

    def store_gradient(self, point: HookPoint, gradient: Tensor, call: Call) -> None:
        """Take the gradient of a value that was stored."""
        kept = _moved(self._sliced(gradient.detach(), point, call), self._device, self._dtype)
        self.cache.grad.pieces.setdefault(point.name, []).append(kept.clone())

    def _sliced(self, value: Tensor, point: HookPoint, call: Call) -> Tensor:
        axis = position_axis(point.shape)
        if self._pos_slice is None or axis is None:
            return value
        first = call.first_position(value.shape[axis])
        index = local_positions(self._pos_slice, first=first, total=call.total)
        return value.index_select(axis, torch.tensor(index, dtype=torch.long, device=value.device))


def position_axis(shape: str) -> int | None:
    """Find the axis of this call's positions: `pos`, or `query` in scores and patterns."""
    axis = axis_index(shape, name="pos")
    return axis_index(shape, name="query") if axis is None else axis


def _moved(tensor: Tensor, device: Any, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _join(pieces: Sequence[Tensor], shape: str, *, fill: float) -> Tensor:
    """Put the positions of several calls together; earlier rows of a pattern get `fill` for later keys."""
    axis = position_axis(shape)
    if axis is None:
        return pieces[-1]
    if shape.endswith("query key"):
        keys = max(piece.shape[-1] for piece in pieces)
        pieces = [torch.nn.functional.pad(piece, (0, keys - piece.shape[-1]), value=fill) for piece in pieces]
    return torch.cat(list(pieces), dim=axis)


def _is_filter(key: Any) -> bool:
    return key is None or callable(key) or isinstance(key, list | set) or (isinstance(key, str) and "*" in key)
