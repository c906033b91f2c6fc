"""Positions that a hook entry may name: absolute, 0-based, or negative from the end of the sequence so far."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from lens_core.errors import ArgumentError

__all__ = ["Positions", "local_positions", "read_positions"]

Positions: TypeAlias = int | slice | Sequence[int] | None


def read_positions(given: Any) -> Positions:
    """Bring positions to an int, a slice or a tuple of ints.

    Raises:
        ArgumentError: Anything else.
    """
    if given is None or isinstance(given, slice):
        return cast("slice[Any, Any, Any] | None", given)
    if isinstance(given, Tensor):
        tensor: Any = given.nonzero().flatten() if given.dtype == torch.bool else given
        given = tensor.tolist()
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    if isinstance(given, Iterable) and not isinstance(given, str | bytes):
        listed = tuple(cast("Iterable[Any]", given))
        if listed and all(isinstance(p, int) and not isinstance(p, bool) for p in listed):
            return listed
    raise ArgumentError(f"positions are an int, a slice, or some ints; got {given!r}")


def local_positions(positions: Positions, *, first: int, total: int) -> list[int]:
    """Find which of this call's positions are named, as indices into its position axis.

    Args:
        positions: What the entry named.
        first: Absolute position of the axis' first element.
        total: Positions of the sequence so far, this call's included.

    Example:
        >>> local_positions([0, 5, -1], first=4, total=8)
        [1, 3]
    """
    if positions is None:
        return list(range(total - first))
    if isinstance(positions, slice):
        absolute: Iterable[int] = range(*positions.indices(total))
    elif isinstance(positions, int):
        absolute = (positions,)
    else:
        absolute = positions
    wrapped = {position + total if position < 0 else position for position in absolute}
    return sorted(position - first for position in wrapped if first <= position < total)
