"""The cells of a sweep: which entries of which hook point each of them takes from the other run."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import attrs
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_core._positions import local_positions, outside_positions, read_positions
from lens_core.errors import ArgumentError, CacheError
from lens_core.hook_points import HookPoint, HookTable

__all__ = ["Axis", "Cell", "Cells", "Grid", "SetterGrid", "read_axes", "read_points", "row_positions"]

WORDS: Mapping[str, tuple[str, ...]] = {
    "position": ("pos", "query"),
    "destination": ("query",),
    "source": ("key",),
    "head": ("n_heads", "n_kv_heads", "ssm_heads"),
    "neuron": ("d_mlp",),
    "channel": ("d_inner",),
    "group": ("n_groups",),
}
"""Names of a sweep's axes, and the axes of a hook point's shape that they may stand for."""
LOCAL = ("pos", "query")
"""Axes that count positions of the call, which an engine may run from a later one on."""


@attrs.frozen(kw_only=True, eq=False)
class Axis:
    """One axis of a sweep's result.

    Attributes:
        name: `layer`, `position`, `head`, ...
        word: The axis of the hook point's shape; `layer`.
        choices: What each entry stands for: a number, or positions `[batch]`, one for each row.
    """

    name: str
    word: str
    choices: tuple[Any, ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        """A number for each entry: its index in the model; its count where each row has another."""
        return tuple(at if isinstance(at, int) else count for count, at in enumerate(self.choices))


@attrs.frozen(kw_only=True, eq=False)
class Cell:
    """One patched run: its place in the result, the point that is patched, and the first position that can change."""

    index: tuple[int, ...]
    point: HookPoint
    start: int


@runtime_checkable
class Cells(Protocol):
    """What an engine must know of a sweep."""

    def cells(self) -> Iterator[Cell]:
        """Yield the cells, in the order of the result."""
        ...

    def write(self, cell: Cell, values: Tensor, first: int) -> None:
        """Patch one cell: write into the values at its point, `[batch, pos, ...]`, whose positions begin at `first`."""
        ...

    def is_idle(self, cell: Cell, values: Tensor | None) -> bool:
        """Whether the patch puts in what is there anyway, at the point's values in the run that is patched."""
        ...

    def asked(self, cells: Sequence[Cell]) -> list[int] | None:
        """List the positions that these cells patch; None for all."""
        ...


@attrs.frozen(kw_only=True, eq=False)
class Grid:
    """Every combination of the axes' choices; what no axis names is as `fixed` says, or patched whole."""

    axes: tuple[Axis, ...]
    points: Mapping[int | None, HookPoint]
    """Where the model is patched, by the layer that the result calls it."""
    clean: Mapping[str, Tensor]
    """By hook point, `[batch, ...]`."""
    fixed: Mapping[str, Tensor] = attrs.field(factory=dict[str, Tensor])
    """By axis of the shape: indices `[n]`, or positions `[batch, n]`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(len(axis.choices) for axis in self.axes)

    def cells(self) -> Iterator[Cell]:
        """Yield the cells, in the order of the result."""
        only = next(iter(self.points.values()))
        layer_axis = next((number for number, axis in enumerate(self.axes) if axis.word == "layer"), None)
        for index in itertools.product(*(range(size) for size in self.shape)):
            layer = None if layer_axis is None else self.axes[layer_axis].choices[index[layer_axis]]
            point = only if layer is None else self.points[layer]
            yield Cell(index=index, point=point, start=self._start(index, point))

    def _chosen(self, index: tuple[int, ...], word: str) -> Tensor | None:
        """Give the indices along one axis of the shape, `[n]` or `[batch, n]`; None for all."""
        for at, axis in zip(index, self.axes, strict=True):
            if axis.word == word:
                choice = axis.choices[at]
                return torch.tensor([choice]) if isinstance(choice, int) else choice[:, None]
        return self.fixed.get(word)

    def _start(self, index: tuple[int, ...], point: HookPoint) -> int:
        for word in LOCAL:
            chosen = self._chosen(index, word)
            if chosen is not None and word in point.shape.split():
                return int(chosen.min())
        return 0

    def asked(self, cells: Sequence[Cell]) -> list[int] | None:
        """List the positions that these cells patch; None for all."""
        found: set[int] = set()
        for cell in cells:
            word = next((word for word in LOCAL if word in cell.point.shape.split()), "")
            chosen: Any = self._chosen(cell.index, word)
            if chosen is None:
                return None
            found.update(chosen.flatten().tolist())
        return sorted(found)

    def write(self, cell: Cell, values: Tensor, first: int) -> None:
        """Patch one cell."""
        places = self._places(cell, values, first)
        if places is not None:
            there, here = places
            values[here] = self.clean[cell.point.name].to(values.device)[there].to(values.dtype)

    def is_idle(self, cell: Cell, values: Tensor | None) -> bool:
        """Whether the patch puts in what is there anyway."""
        places = None if values is None else self._places(cell, values, 0)
        if values is None or places is None:
            return False
        there, here = places
        return torch.equal(self.clean[cell.point.name].to(values.device)[there].to(values.dtype), values[here])

    def _places(self, cell: Cell, values: Tensor, first: int) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
        """Give the indices into the clean values and into these, which begin at position `first`; None: not among them.

        Rows and positions are pairs, since each row may have its own positions; the other axes span a grid with them.
        """
        words = cell.point.shape.split()
        local = next((word for word in LOCAL if word in words), None)
        positions = None if local is None else self._chosen(cell.index, local)
        others = [word for word in words[1:] if word != local]
        chosen = {word: found for word in others if (found := self._chosen(cell.index, word)) is not None}
        ndim = 1 + len(chosen)
        there: dict[str, Any] = {}
        for number, (word, index) in enumerate(chosen.items(), start=1):
            there[word] = index.to(values.device).reshape([-1 if axis == number else 1 for axis in range(ndim)])
        here = dict(there)
        if local is not None:
            width = values.shape[words.index(local)]
            if positions is None:
                there[local] = slice(first, first + width)
            else:
                wanted = positions.expand(len(values), -1)
                rows, order = ((wanted >= first) & (wanted < first + width)).nonzero(as_tuple=True)
                if not len(rows):
                    return None
                at = wanted[rows, order].to(values.device).reshape([-1] + [1] * (ndim - 1))
                there |= {words[0]: rows.to(at.device).reshape(at.shape), local: at}
                here |= {words[0]: there[words[0]], local: at - first}
        whole = slice(None)
        return tuple(there.get(word, whole) for word in words), tuple(here.get(word, whole) for word in words)


# ---------------------------------------------------------------------- reading what the user asked for


def read_points(table: HookTable, name: Any, layers: Any) -> tuple[HookPoint, ...]:
    """Find the hook points that a sweep patches, one of each layer.

    Raises:
        UnknownHookError: No such hook point.
        ArgumentError: Points of several kinds, or a layer that has none.
    """
    points = tuple(table[found] for found in table.select(name).names)
    kinds = sorted({point.part for point in points})
    if len(kinds) > 1:
        raise ArgumentError(
            f"a sweep patches one kind of hook point, and {name!r} stands for {', '.join(kinds)}; sweep each by itself"
        )
    if any(point.name.startswith("hf.") or not point.shape.startswith("batch") for point in points):
        raise ArgumentError(f"{points[0].name!r} has no declared axes to sweep over; use run_with_hooks")
    if layers is None:
        return points
    if points[0].layer is None:
        raise ArgumentError(f"{points[0].name!r} is outside of the blocks; leave out layers={layers!r}")
    wanted = _numbers("layers", layers, table.n_layers)
    by_layer = {point.layer: point for point in points}
    missing = [layer for layer in wanted if layer not in by_layer]
    if missing:
        there = [point.layer for point in points]
        raise ArgumentError(f"{points[0].part!r} does not exist in layers {missing}; it is in {there}")
    return tuple(by_layer[layer] for layer in wanted)


def read_axes(
    points: Sequence[HookPoint],
    axes: Sequence[str] | None,
    chosen: Mapping[str, Any],
    clean: Mapping[str, Tensor],
    *,
    n_pos: int,
) -> tuple[tuple[Axis, ...], dict[str, Tensor]]:
    """Bring the axes and what was chosen along them to numbers; gives the axes, and the choices that no axis names.

    Raises:
        ArgumentError: An axis that the point does not have, an index out of range, or positions of another batch.
        CacheError: The clean values have other positions than the corrupted input.
    """
    point, value = points[0], clean[points[0].name]
    words = point.shape.split()
    sizes = dict(zip(words, value.shape, strict=True))
    for word in (*LOCAL, "key"):
        if word in words and sizes[word] != n_pos:
            raise CacheError(
                f"the clean cache has {sizes[word]} positions at {point.name!r}, and the corrupted input has {n_pos}"
            )
    taken: dict[str, str] = {}
    for name in default_axes(point) if axes is None else axes:
        word = _word(name, point)
        if word in taken:
            raise ArgumentError(f"the axes {list(axes or ())} name {word!r} twice")
        taken[word] = name
    selected = {_word(name, point): given for name, given in chosen.items() if given is not None}

    def read(word: str) -> Int[Tensor, "rows n"] | Int[Tensor, " n"]:
        if word in LOCAL:
            return row_positions(selected.get(word), batch=len(value), n_pos=n_pos)
        return torch.tensor(_numbers(_user_name(word), selected.get(word), sizes[word]))

    found: list[Axis] = []
    for word, name in taken.items():
        if word == "layer":
            choices: tuple[Any, ...] = tuple(point.layer for point in points)
        else:
            listed: Any = read(word)
            choices = tuple(listed.tolist()) if listed.ndim == 1 else tuple(listed.unbind(1))
        found.append(Axis(name=name, word=word, choices=choices))
    if len(points) > 1 and "layer" not in taken:
        raise ArgumentError(
            f"{len(points)} layers and no axis 'layer' in {list(taken.values())}; add it, or choose one layer"
        )
    return tuple(found), {word: read(word) for word in selected if word not in taken}


def default_axes(point: HookPoint) -> tuple[str, ...]:
    """Give layer and position, or layer and head where an entry is of two positions."""
    inner = "position" if "pos" in point.shape.split() else "head"
    return (inner,) if point.layer is None else ("layer", inner)


def _word(name: str, point: HookPoint) -> str:
    """Find the axis of the point's shape that a sweep's axis stands for."""
    words = point.shape.split()
    if name == "layer" and point.layer is not None:
        return "layer"
    for word in WORDS.get(name, (name,)):
        if word in words[1:]:
            return word
    known = ["layer"] if point.layer is not None else []
    known += [_user_name(word) for word in words[1:]]
    raise ArgumentError(f"{point.name!r}, {point.shape}, has no axis {name!r}; it has {', '.join(known)}")


def _user_name(word: str) -> str:
    return next((name for name, words in reversed(list(WORDS.items())) if word in words), word)


def _numbers(what: str, given: Any, size: int) -> list[int]:
    """List indices from 0 to size - 1, in the order given."""
    read = read_positions(given)
    listed = [read] if isinstance(read, int) else list(read) if isinstance(read, tuple) else None
    outside = outside_positions(read, total=size)
    if outside:
        raise ArgumentError(f"{what} are from {-size} to {size - 1}; got {outside[0]}")
    if listed is None:
        listed = local_positions(read, first=0, total=size)
    wrapped = [at % size for at in listed]
    if not wrapped or len(set(wrapped)) < len(wrapped):
        raise ArgumentError(f"{what} are some numbers, each once; got {given!r}")
    return wrapped


def row_positions(given: Any, *, batch: int, n_pos: int) -> Int[Tensor, "batch n"] | Int[Tensor, " n"]:
    """Read positions: `[n]` for all rows alike, `[batch, n]` where each row has its own.

    A tensor of one axis, and a list of lists, are positions by row.

    Raises:
        ArgumentError: A position that does not exist, or another number of rows.
    """
    if isinstance(given, list | tuple) and any(isinstance(row, list | tuple) for row in cast("list[Any]", given)):
        listed = cast("list[Any]", given)
        rows: list[list[Any]] = [[*row] if isinstance(row, list | tuple) else [row] for row in listed]
        if len({len(row) for row in rows}) > 1:
            raise ArgumentError(f"each row has as many positions as the others; got {[len(row) for row in rows]}")
        given = torch.tensor(rows)
    if not isinstance(given, Tensor) or given.dtype == torch.bool or given.ndim == 0:
        return torch.tensor(_numbers("positions", given, n_pos))
    by_row = given[:, None] if given.ndim == 1 else given
    if by_row.ndim != 2 or by_row.shape[0] != batch or by_row.is_floating_point() or not by_row.numel():
        raise ArgumentError(
            f"a tensor of positions is [batch={batch}] or [batch={batch}, n], one or more for each row; got "
            f"{list(given.shape)}. A list or a slice stands for all rows"
        )
    outside: Bool[Tensor, "batch n"] = (by_row < -n_pos) | (by_row >= n_pos)
    if bool(outside.any()):
        raise ArgumentError(f"positions are from {-n_pos} to {n_pos - 1}; got {int(by_row[outside][0])}")
    return (by_row % n_pos).long().cpu()


@attrs.frozen(kw_only=True, eq=False)
class SetterGrid:
    """Cells that a function of the user's writes, TransformerLens' way: `setter(corrupted, index, clean)`."""

    rows: Sequence[Sequence[int]]
    """Each cell's index: the layer first."""
    points: Mapping[int, HookPoint]
    clean: Mapping[str, Tensor]
    setter: Callable[[Float[Tensor, "batch ..."], Sequence[int], Float[Tensor, "batch ..."]], Any]

    def cells(self) -> Iterator[Cell]:
        """Yield the cells; what a setter changes, nobody knows."""
        for number, row in enumerate(self.rows):
            yield Cell(index=(number,), point=self.points[row[0]], start=0)

    def write(self, cell: Cell, values: Tensor, first: int) -> None:
        """Let the setter write; it may give back another tensor."""
        clean = self.clean[cell.point.name].to(values)
        new = self.setter(values, list(self.rows[cell.index[0]]), clean)
        if isinstance(new, Tensor) and new is not values:
            values.copy_(new)

    def is_idle(self, cell: Cell, values: Tensor | None) -> bool:
        """Nobody knows."""
        return False

    def asked(self, cells: Sequence[Cell]) -> list[int] | None:
        """All."""
        return None
