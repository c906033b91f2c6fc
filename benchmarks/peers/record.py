"""One cell of the table: a library's measurements of a row on a model, or why there are none."""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from benchmarks.pairs import Pair

__all__ = ["Cell", "merged", "read_results", "write_results"]


@attrs.frozen(kw_only=True)
class Cell:
    """What a library took, plain HF in the same process being 1."""

    model: str
    row: str
    size: str = ""
    """Of the input, in words; rows of one kind differ in it."""
    values: tuple[float, ...] = attrs.field(default=(), converter=tuple)
    processor: tuple[float, ...] = attrs.field(default=(), converter=tuple)
    """The same ratios in processor time of all threads."""
    plain: float | None = None
    """Median seconds of plain HF, or its peak in MiB."""
    ours: float | None = None
    """The library's, alike."""
    difference: float | None = None
    """The largest from HF's values, the largest of those being 1; of generated tokens, how many differ."""
    note: str = ""
    cannot: str = ""
    """Why there are no values."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What a later measurement of the same takes the place of."""
        return self.model, self.row, self.size

    @property
    def median(self) -> float:
        """The middle of the ratios."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The tenth and the ninetieth percentile; of a few values, nearly the extremes."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        cuts = statistics.quantiles(self.values, n=10, method="inclusive")
        return cuts[0], cuts[-1]

    @classmethod
    def of_pairs(cls, pairs: Iterable[Pair], *, per_plain: float = 1.0, **fields: Any) -> "Cell":
        """Make one of paired times.

        Args:
            pairs: Seconds of both.
            per_plain: How often what was timed of plain HF is in what the library did.
            **fields: The others.
        """
        pairs = list(pairs)
        return cls(
            values=tuple(pair.ours / pair.plain / per_plain for pair in pairs),
            processor=tuple(pair.ours_processor / pair.plain_processor / per_plain for pair in pairs),
            plain=statistics.median(pair.plain for pair in pairs) * per_plain,
            ours=statistics.median(pair.ours for pair in pairs),
            **fields,
        )


def merged(old: Iterable[Cell], new: Iterable[Cell]) -> list[Cell]:
    """Give both, new ones in the place of old ones of the same key."""
    cells = {cell.key: cell for cell in old}
    cells.update((cell.key, cell) for cell in new)
    return list(cells.values())


def read_results(path: Path) -> tuple[Mapping[str, Any], list[Cell]]:
    """Read a library's facts and cells."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["facts"], [Cell(**cell) for cell in content["cells"]]


def write_results(path: Path, facts: Mapping[str, Any], cells: Iterable[Cell]) -> None:
    """Write them, every single value included."""
    content = {"facts": dict(facts), "cells": [attrs.asdict(cell) for cell in cells]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
