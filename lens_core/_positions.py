"""Positions that a hook entry may name: absolute, 0-based, or negative from the end of the sequence so far."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex, TypeAlias, cast

import torch
from torch import Tensor

from lens_core.errors import ArgumentError

__all__ = ["Positions", "check_ends", "leaves_gaps", "local_positions", "outside_positions", "read_positions"]

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
    if _is_index(given):
        return operator.index(given)
    if isinstance(given, Iterable) and not isinstance(given, str | bytes):
        listed = tuple(cast("Iterable[Any]", given))
        if listed and all(map(_is_index, listed)):
            return tuple(map(operator.index, listed))
    raise ArgumentError(f"positions are an int, a slice, or some ints; got {given!r}")


def outside_positions(positions: Positions, *, total: int) -> list[int]:
    """List the ints that name no position of a sequence; a slice is cut to it, as everywhere in Python.

    Example:
        >>> outside_positions([0, 5, -6], total=5)
        [5, -6]
    """
    listed = [positions] if isinstance(positions, int) else positions if isinstance(positions, tuple | list) else []
    return [position for position in listed if not -total <= position < total]


def leaves_gaps(positions: Positions) -> bool:
    """Whether positions between the named ones are left out.

    Example:
        >>> leaves_gaps([2, 3]), leaves_gaps([2, 4]), leaves_gaps(slice(None, None, 2))
        (False, True, True)
    """
    if isinstance(positions, slice):
        return positions.step not in (None, 1, -1)
    if positions is None or isinstance(positions, int):
        return False
    named = sorted(set(positions))
    return named != list(range(named[0], named[0] + len(named)))


def _is_index(given: Any) -> bool:
    """Whether something is a whole number: an int, or numpy's; a bool is none."""
    return isinstance(given, SupportsIndex) and not isinstance(given, bool | Tensor)


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


def check_ends(given: Any, mask: Tensor | None, what: str = "positions") -> None:
    """Refuse positions counted from the end of rows that end in padding: they would name padding.

    Args:
        given: An int, a slice, or ints, nested or in a tensor.
        mask: 1 for real tokens `[batch, pos]`; None where nothing is padding.
        what: The argument's name.

    Raises:
        ArgumentError: A negative one, and a row that ends in padding.

    Example:
        >>> check_ends(-1, torch.tensor([[1, 1], [1, 0]]))
        Traceback (most recent call last):
        lens_core.errors.ArgumentError: row 1 ends in padding, and positions=-1 counts from its end: ...
    """
    if mask is None or not mask.numel() or not any(at < 0 for at in _numbers(given)):
        return
    ends: Any = mask[:, -1] == 0
    if bool(ends.any()):
        shown: Any = cast("Any", given).tolist() if isinstance(given, Tensor) else given
        raise ArgumentError(
            f"row {int(ends.nonzero()[0])} ends in padding, and {what}={shown} counts from its end: pad on the left "
            "(padding_side='left'), or count from the start"
        )


def _numbers(given: Any) -> list[int]:
    """List the ints in what names positions."""
    if isinstance(given, slice):
        return [at for at in (cast("Any", given).start, cast("Any", given).stop) if _is_index(at)]
    if isinstance(given, Tensor):
        tensor: Any = given
        return [] if given.dtype == torch.bool else tensor.flatten().tolist()
    if isinstance(given, list | tuple):
        return [at for one in cast("Sequence[Any]", given) for at in _numbers(one)]
    return [operator.index(given)] if _is_index(given) else []
