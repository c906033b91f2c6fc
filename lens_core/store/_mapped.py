"""The shards of a store as one sequence of entries: found by number, mapped when they are read."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core.errors import ArgumentError, StoreError
from lens_core.store._layout import COLUMNS, REPAIR, Manifest, Record, check_size

__all__ = ["Shards", "distinct", "expected", "numbers", "opened"]

_OPEN = 8
"""Shards that stay mapped: pages of a file, which the system takes back when it needs them."""


class Shards:
    """The complete shards of a store; a few are mapped at a time, and no more is in memory than was asked for."""

    def __init__(self, folder: Path, manifest: Manifest, records: Sequence[Record]) -> None:
        self.folder, self.manifest, self.records = folder, manifest, tuple(records)
        self.starts = torch.tensor([0, *accumulate(record.entries for record in self.records)])
        self.row_starts = torch.tensor([0, *accumulate(record.rows for record in self.records)])
        self.mapped = lru_cache(maxsize=_OPEN)(self._mapped)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "mapped"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self.mapped = lru_cache(maxsize=_OPEN)(self._mapped)

    def __len__(self) -> int:
        """Count the entries."""
        return int(self.starts[-1])

    def _mapped(self, shard: int) -> dict[str, Tensor]:
        """Map a shard.

        Raises:
            StoreError: It is missing, or not what its record and the manifest say.
        """
        return opened(self.folder, self.manifest, self.records[shard])

    def read(self, name: str, index: Int[Tensor, " entry"]) -> Shaped[Tensor, "entry ..."]:
        """Copy entries of a hook point, in the order asked; fastest where that is the store's own."""
        point = next(point for point in self.manifest.points if point.name == name)
        out = torch.empty(len(index), *point.shape, dtype=point.torch_dtype)
        for shard, asked, local in _by_shard(index, self.starts):
            values = self.mapped(shard)[name]
            if isinstance(asked, slice):
                torch.index_select(values, 0, local, out=out[asked])
            else:
                out[asked] = values[local]
        return out

    def columns(self, index: Int[Tensor, " entry"]) -> dict[str, Int[Tensor, " entry"]]:
        """Say what is at entries: `tokens`, `documents`, `offsets`, `rows`, `positions`, `sources`."""
        names = ("documents", "tokens", "offsets")
        out = {name: torch.empty(len(index), dtype=COLUMNS[name]) for name in names}
        out |= {name: torch.empty(len(index), dtype=torch.int64) for name in ("rows", "positions", "sources")}
        for shard, asked, local in _by_shard(index, self.starts):
            values = self.mapped(shard)
            row, position = _places(values["kept"], local)
            for name in names:
                out[name][asked] = values[name][row, position]
            out["rows"][asked] = row + self.row_starts[shard]
            out["positions"][asked] = position
            out["sources"][asked] = self.records[shard].source
        return out

    def row_columns(self, index: Int[Tensor, " row"]) -> dict[str, Shaped[Tensor, "row pos"]]:
        """Copy rows: `tokens`, `documents`, `offsets` and `kept`, as wide as the widest, -1 (not kept) beyond."""
        pieces = [(shard, asked, local) for shard, asked, local in _by_shard(index, self.row_starts)]
        width = max((self.records[shard].width for shard, _, _ in pieces), default=0)
        out = {
            name: torch.full((len(index), width), 0 if dtype == torch.bool else -1, dtype=dtype)
            for name, dtype in COLUMNS.items()
        }
        for shard, asked, local in pieces:
            for name, value in out.items():
                value[asked, : self.records[shard].width] = self.mapped(shard)[name][local]
        return out


def expected(manifest: Manifest, record: Record) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Say what a shard has to hold: dtype and shape of each tensor."""
    columns = {name: (dtype, (record.rows, record.width)) for name, dtype in COLUMNS.items()}
    return columns | {point.name: (point.torch_dtype, (record.entries, *point.shape)) for point in manifest.points}


def opened(folder: Path, manifest: Manifest, record: Record) -> dict[str, Tensor]:
    """Map the tensors of a shard; its values are not looked at.

    Raises:
        StoreError: It is missing, or not what its record and the manifest say.
    """
    check_size(record, folder)
    shown = os.fspath(record.file(folder))
    try:
        with cast("Any", safetensors).safe_open(shown, framework="pt") as file:
            found: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        why = str(error).partition("\n")[0]
        if "mmap" in why or isinstance(error, OSError | MemoryError):
            raise StoreError(f"the shard {shown!r} cannot be read: {why}") from error
        raise StoreError(f"the shard {shown!r} is damaged: {why}; {REPAIR}") from error
    there = {name: (value.dtype, tuple(value.shape)) for name, value in found.items()}
    for name, what in (expected(manifest, record) | there).items():
        if there.get(name) != expected(manifest, record).get(name):
            raise StoreError(f"the shard {shown!r} has another {name!r} than its record tells ({what}); {REPAIR}")
    return found


@checks_arguments
def numbers(index: Any, count: int, what: str = "entry") -> tuple[Int[Tensor, " entry"], bool]:
    """Read an index into one dimension; the second says whether it was a single number.

    Args:
        index: A number, a slice, numbers, a tensor or array of these, or a mask of all.
        count: How many there are.
        what: What is numbered, for messages.

    Raises:
        ArgumentError: A number that is out of range, or no index.
    """
    if isinstance(index, slice):
        chosen = range(count)[index]
        return torch.arange(chosen.start, chosen.stop, chosen.step) if chosen else _none(), False
    try:
        found = torch.as_tensor(index) if not isinstance(index, Tensor) else index.detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = torch.tensor(0.5)
    if found.dtype == torch.bool and found.shape == (count,) and found.ndim:
        return found.nonzero()[:, 0], False
    if not found.numel() and found.ndim == 1:
        return _none(), False
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex() or found.ndim > 1:
        shown = f"{found.dtype} {list(found.shape)}" if isinstance(index, Tensor) else repr(index)[:80]
        raise ArgumentError(f"an index is a number, a slice, numbers, or a mask of all {count}; got {shown}")
    is_single, found = found.ndim == 0, found.reshape(-1).to(torch.int64)
    wrong = found[(found < -count) | (found >= count)]
    if len(wrong):
        raise ArgumentError(f"{what} {int(wrong[0])} is not there: the store has {count}, 0 to {count - 1}")
    return torch.where(found < 0, found + count, found), is_single


def _none() -> Int[Tensor, " entry"]:
    return torch.empty(0, dtype=torch.int64)


def _by_shard(
    index: Int[Tensor, " entry"], starts: Int[Tensor, " shard"]
) -> Iterator[tuple[int, slice | Int[Tensor, " asked"], Int[Tensor, " asked"]]]:
    """Give each shard that is touched once: which of the asked are in it, and their number there."""
    if not len(index):
        return
    shards = torch.searchsorted(starts, index, right=True) - 1
    order = None
    if bool((shards[1:] < shards[:-1]).any()):
        shards, order = shards.sort(stable=True)
    found: list[Tensor] = cast("Any", torch).unique_consecutive(shards, return_counts=True)
    touched, counts = (cast("list[int]", cast("Any", part).tolist()) for part in found)
    at = 0
    for shard, count in zip(touched, counts, strict=True):
        span = slice(at, at + count)
        asked = span if order is None else order[span]
        yield shard, asked, index[asked] - starts[shard]
        at += count


def distinct(values: Int[Tensor, " one"]) -> tuple[Int[Tensor, " distinct"], Int[Tensor, " one"]]:
    """Give distinct values, ascending, and for each of the values which of them it is."""
    return cast("Any", torch).unique(values, return_inverse=True)


def _places(
    kept: Shaped[Tensor, "row pos"], local: Int[Tensor, " entry"]
) -> tuple[Int[Tensor, " entry"], Int[Tensor, " entry"]]:
    """Give row and position of entries of a shard, looking at their rows alone."""
    ends = kept.sum(1).cumsum(0)
    rows = torch.searchsorted(ends, local, right=True)
    touched, which = distinct(rows)
    some = kept[touched]
    counts = some.sum(1)
    positions = some.nonzero()[:, 1]
    first = counts.cumsum(0) - counts
    before = ends[touched] - counts
    return rows, positions[first[which] + local - before[which]]
