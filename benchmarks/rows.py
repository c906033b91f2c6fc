"""One line of the table: what was measured, in which unit, against which goal, and how it came out."""

import statistics
from collections.abc import Iterable

import attrs

from benchmarks.pairs import Pair

__all__ = ["Row", "difference_row", "ratio_row"]


@attrs.frozen(kw_only=True)
class Row:
    """A measurement with its repetitions."""

    group: str
    name: str
    unit: str
    values: tuple[float, ...]
    goal: float | None = None
    """The most that the median may be; None where no goal was set."""
    processor: tuple[float, ...] = ()
    """The same from processor time, which does not grow while other programs have the cores."""

    @property
    def median(self) -> float:
        """The middle of the repetitions."""
        return statistics.median(self.values)

    @property
    def processor_median(self) -> float | None:
        """The middle of the repetitions in processor time; None where it was not taken."""
        return statistics.median(self.processor) if self.processor else None

    @property
    def quartiles(self) -> tuple[float, float]:
        """Where the middle half of the repetitions lies."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    @property
    def verdict(self) -> str:
        """`met`, the gap between median and goal, or nothing without a goal."""
        if self.goal is None:
            return ""
        gap = self.median - self.goal
        return "met" if gap <= 0 else f"gap {self.text(gap)}"

    def text(self, value: float) -> str:
        """Write a value with as many digits as its unit bears."""
        digits = 0 if self.unit == "modules" else 1 if self.unit.startswith("µs") else 3
        return f"{value:.{digits}f}"

    def record(self) -> dict[str, object]:
        """Give everything, for JSON."""
        return {
            "group": self.group,
            "name": self.name,
            "unit": self.unit,
            "goal": self.goal,
            "median": self.median,
            "quartiles": list(self.quartiles),
            "min": min(self.values),
            "max": max(self.values),
            "processor_median": self.processor_median,
            "pairs": len(self.values),
            "verdict": self.verdict,
            "values": list(self.values),
            "processor_values": list(self.processor),
        }


def ratio_row(group: str, name: str, pairs: Iterable[Pair], *, goal: float | None = None) -> Row:
    """Make a row of ours over plain HF's."""
    pairs = list(pairs)
    return Row(
        group=group,
        name=name,
        unit="× HF",
        goal=goal,
        values=tuple(pair.ours / pair.plain for pair in pairs),
        processor=tuple(pair.ours_processor / pair.plain_processor for pair in pairs),
    )


def difference_row(
    group: str, name: str, pairs: Iterable[Pair], *, unit: str, scale: float, goal: float | None = None
) -> Row:
    """Make a row of ours less the other's; `scale` brings seconds to the unit."""
    pairs = list(pairs)
    return Row(
        group=group,
        name=name,
        unit=unit,
        goal=goal,
        values=tuple((pair.ours - pair.plain) * scale for pair in pairs),
        processor=tuple((pair.ours_processor - pair.plain_processor) * scale for pair in pairs),
    )
