"""What a cache keeps of a value: some positions, and of scores and patterns some heads.

What is chosen of scores and patterns is also what has to be computed of them: `Part` tells it to the seam, which then
never makes the rest.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from lens_core._call import Call
from lens_core._positions import Positions, local_positions, outside_positions, read_positions
from lens_core.errors import ArgumentError
from lens_core.hook_points import HookPoint
from lens_core.shapes import axis_index

__all__ = ["Choice", "Part", "is_by_head", "position_axis", "read_choice", "together"]


@attrs.frozen(kw_only=True)
class Part:
    """Cells of scores or a pattern, of all keys: these heads, and these query rows, both 0-based in the call."""

    heads: Sequence[int]
    rows: Sequence[int]

    def __or__(self, other: "Part") -> "Part":
        """Give the smallest part that holds both."""
        return Part(heads=_both(self.heads, other.heads), rows=_both(self.rows, other.rows))


def together(parts: Sequence[Part | None]) -> Part | None:
    """Give the smallest part that serves all who ask; None where one of them wants every cell, or nobody asks."""
    found: Part | None = None
    for part in parts:
        if part is None:
            return None
        found = part if found is None else found | part
    return found


def _both(some: Sequence[int], others: Sequence[int]) -> Sequence[int]:
    return some if some == others else sorted({*some, *others})


@attrs.frozen(kw_only=True)
class Choice:
    """Which positions and which heads a cache keeps; None for all."""

    positions: Positions = None
    heads: tuple[int, ...] | None = None
    """Of scores and patterns; other values keep all of theirs."""

    def part(self, call: Call, n_heads: int) -> Part | None:
        """Say what it needs of scores and patterns; None for all of them."""
        if self.positions is None and self.heads is None:
            return None
        rows = local_positions(self.positions, first=call.past, total=call.total)
        return Part(heads=range(n_heads) if self.heads is None else self.heads, rows=rows)

    def of(
        self, value: Tensor, point: HookPoint, call: Call, position: int | None = None, part: Part | None = None
    ) -> Tensor:
        """Take what is kept of a value: a view, or a copy where something is left out.

        Args:
            value: The whole of it, or of what the other arguments say.
            point: Its place.
            call: The call that it is of.
            position: Which of the call's positions it is about, 0-based in the call, where it is about one.
            part: Which cells it holds, where these are not all.
        """
        axis = position_axis(point.shape)
        if self.positions is not None and axis is not None:
            value = _taken(value, axis, self._indices(call, value.shape[axis], position, part))
        if part is not None or (self.heads is not None and is_by_head(point)):
            there = range(value.shape[1]) if part is None else part.heads
            heads = there if self.heads is None else self.heads
            value = _taken(value, 1, [there.index(head) for head in heads])
        return value

    def _indices(self, call: Call, length: int, position: int | None, part: Part | None) -> Sequence[int]:
        if part is not None:
            where = {row: index for index, row in enumerate(part.rows)}
            return [where[row] for row in local_positions(self.positions, first=call.past, total=call.total)]
        if position is not None:
            return [0] if position in local_positions(self.positions, first=call.past, total=call.total) else []
        return local_positions(self.positions, first=call.first_position(length), total=call.total)


def _taken(value: Tensor, axis: int, index: Sequence[int]) -> Tensor:
    if list(index) == list(range(value.shape[axis])):
        return value
    return value.index_select(axis, torch.tensor(index, dtype=torch.long, device=value.device))


def position_axis(shape: str) -> int | None:
    """Find the axis of this call's positions: `pos`, or `query` in scores and patterns."""
    axis = axis_index(shape, name="pos")
    return axis_index(shape, name="query") if axis is None else axis


def is_by_head(point: HookPoint) -> bool:
    """Whether a value is one of those that heads are chosen of: scores and patterns.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> [is_by_head(model.table[name, 0]) for name in ("pattern", "attn_scores", "z")]
        [True, True, False]
    """
    return point.shape.split()[1:] == ["n_heads", "query", "key"]


def read_choice(pos_slice: Any, heads: Any, points: Iterable[HookPoint], *, n_heads: int | None) -> Choice:
    """Read `pos_slice` and `heads` as users give them, for a cache of these hook points.

    Raises:
        ArgumentError: Not positions, or not heads of the model; or heads where no scores and no pattern are kept.
    """
    positions = read_positions(pos_slice)
    if heads is None:
        return Choice(positions=positions)
    try:
        named = read_positions(heads)
    except ArgumentError:
        raise ArgumentError(f"heads are an int, a slice, or some ints; got {heads!r}") from None
    if not any(map(is_by_head, points)):
        raise ArgumentError(
            f"heads={heads!r} chooses heads of scores and patterns, and the names to keep have none of these; "
            "add 'pattern' to the names, or leave heads out: other values keep all of theirs"
        )
    total = n_heads or 0
    outside = outside_positions(named, total=total)
    chosen = tuple(local_positions(named, first=0, total=total))
    if outside or not chosen:
        raise ArgumentError(f"heads={heads!r} names a head that is not there: the model has {total} (0 to {total - 1})")
    return Choice(positions=positions, heads=chosen)
