"""Mappings from hook points to tensors, which may come in pieces: one for each call that continues a sequence."""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor

from lens_core._choice import position_axis
from lens_core.errors import ArgumentError, HookError, NotCachedError, UnknownHookError
from lens_core.hook_points import HookTable, is_short_form

__all__ = ["Entries", "Gradients"]


class Entries(Mapping[str, Tensor]):
    """Tensors by canonical name, alias or short form."""

    table: HookTable
    has_batch_dim: bool = True
    is_from_file: bool = False
    """Whether the table knows only the names of a file."""

    @abstractmethod
    def _names(self) -> Mapping[str, Any]:
        """Give a mapping whose keys are the canonical names held."""

    @abstractmethod
    def _joined(self, name: str) -> Tensor:
        """Give the whole tensor of a canonical name that is held."""

    @abstractmethod
    def _absence(self, key: object) -> str:
        """Say that a name is not held, and what to do."""

    def __getitem__(self, key: Any) -> Tensor:
        """Give one entry, or the stack over layers of a short form without a layer.

        Raises:
            UnknownHookError: No such hook point in the model.
            CacheError: The hook point exists and is not held.
            ArgumentError: Not a name: a filter, or something else.
        """
        names = self.resolve(key)
        found = [self._joined(name) for name in names if name in self._names()]
        if not found:
            raise NotCachedError(self._absence(key))
        if names == (key,) or self.table[names[0]].layer is None or _names_a_layer(key):
            return found[0]
        return torch.stack([value.to(found[0].device) for value in found])

    def resolve(self, key: Any) -> tuple[str, ...]:
        """Give the canonical names that a name, alias or short form stands for, held or not."""
        if isinstance(key, str) and key in self._names():
            return (key,)
        if not _is_one_name(key):
            raise ArgumentError(f"a cache is read by one name or short form, such as ('q', 3); got {key!r}")
        try:
            return self.table.select(cast("Any", key)).names
        except UnknownHookError as error:
            if not self.is_from_file:
                raise
            raise NotCachedError(f"{key!r} is not among the {len(self.table)} names of this cache file") from error

    def __contains__(self, key: object) -> bool:
        """Whether a name or short form is held, on some layer; nothing is stacked."""
        held = self._names()
        try:
            return _is_one_name(key) and (key in held or any(name in held for name in self.table.find(key)))
        except (HookError, ArgumentError):
            return False

    def __iter__(self) -> Iterator[str]:
        """Iterate over the canonical names that are held, in the order of computation."""
        return iter(self._names())

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._names())

    def __eq__(self, other: object) -> bool:
        """Whether this is the same object: comparing tensors by == would not give one truth value."""
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def position_axis(self, name: str) -> int | None:
        """Find the axis of positions of an entry (in scores and patterns, of those that attend); None without one."""
        axis = position_axis(self.table[name].shape)
        return axis if axis is None or self.has_batch_dim else axis - 1

    def join(self, name: str, pieces: Sequence[Tensor], *, fill: float = 0.0) -> Tensor:
        """Put several calls' positions together; earlier rows of scores and patterns get `fill` for later keys."""
        axis = self.position_axis(name)
        if axis is None or len(pieces) == 1:
            return pieces[-1]
        if self.table[name].shape.endswith("query key"):
            keys = max(piece.shape[-1] for piece in pieces)
            pieces = [torch.nn.functional.pad(piece, (0, keys - piece.shape[-1]), value=fill) for piece in pieces]
        return torch.cat(list(pieces), dim=axis)


def _is_one_name(key: object) -> TypeGuard[str | tuple[Any, ...]]:
    return is_short_form(key) or (isinstance(key, str) and not any(sign in key for sign in "*?["))


def _names_a_layer(key: Any) -> bool:
    """Tell `("q", 3)`, `"q3"`, `"scale3ln1"` and full names from `"q"` and `"ln1.hook_scale"`, all layers."""
    if isinstance(key, tuple):
        return cast("tuple[Any, ...]", key)[1] is not None
    return key.startswith("blocks.") or re.search(r"\d([a-z]\w*)?$", key) is not None


class Gradients(Entries):
    """Gradients of a cache's entries, under the same names; zeros where nothing flowed.

    As with torch's `.grad`, what several backward passes bring adds up, until `clear`.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, table: HookTable, has_batch_dim: bool, is_from_file: bool
    ) -> None:
        self.table = table
        self.has_batch_dim = has_batch_dim
        self.is_from_file = is_from_file
        self._pieces: dict[str, dict[int, Tensor]] = {name: {0: value} for name, value in tensors.items()}

    def _names(self) -> Mapping[str, Any]:
        return self._pieces

    def _joined(self, name: str) -> Tensor:
        by_position = self._pieces[name]
        whole = self.join(name, [by_position[first] for first in sorted(by_position)])
        return whole.contiguous()  # zeros that stand for no gradient have no memory of their own

    def _absence(self, key: object) -> str:
        return f"no gradient was kept at {key!r}; use caching(detach=False) or incl_bwd=True"

    def __repr__(self) -> str:
        """Show how many there are."""
        return f"Gradients({len(self)} entries)"

    def clear(self) -> None:
        """Forget all gradients."""
        self._pieces.clear()

    def drop(self, name: str) -> None:
        """Forget one."""
        self._pieces.pop(name, None)

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put every gradient through a function."""
        for pieces in self._pieces.values():
            for first, piece in pieces.items():
                pieces[first] = function(piece)

    def expect(self, name: str, first: int, value: Tensor) -> None:
        """Stand zeros for the gradient of a call's value until one comes; `first` is the call's first position."""
        zeros = torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape)
        self._pieces.setdefault(name, {})[first] = zeros if self.has_batch_dim else zeros[0]

    def add(self, name: str, first: int, gradient: Tensor) -> None:
        """Take the gradient of a call's value."""
        there = self._pieces.get(name, {}).get(first)
        if there is not None:
            self._pieces[name][first] = there + (gradient if self.has_batch_dim else gradient[0]).to(there)
