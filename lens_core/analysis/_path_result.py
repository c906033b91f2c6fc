"""What patching paths found: by sender, by position, by example."""

import re
from typing import Any

import attrs
from jaxtyping import Float
from torch import Tensor

from lens_core import view
from lens_core._extras import need

__all__ = ["PathPatching"]


@attrs.frozen(kw_only=True, eq=False)
class PathPatching:
    """What patching paths did to a metric.

    Attributes:
        values: The metric of each patched run; one position where all were patched together.
        baseline: The metric of the run that is patched, with nothing patched.
        senders: A label for each row of `values`; several labels joined by `+` were patched together.
        positions: The position of each column, 0-based; None where all were patched together.
        receivers: What heard the senders.
    """

    values: Float[Tensor, "sender position batch"] = attrs.field(repr=False)
    baseline: Float[Tensor, " batch"] = attrs.field(repr=False)
    senders: tuple[str, ...]
    positions: tuple[int, ...] | None = None
    receivers: tuple[str, ...]

    @property
    def effect(self) -> Float[Tensor, "sender position batch"]:
        """How much each patch moved the metric, in its unit."""
        return self.values - self.baseline

    def top(self, k: int = 10) -> list[tuple[str, int | None, float]]:
        """List the `k` largest effects, by size: sender, position, and the effect's mean over the rows."""
        mean = self.effect.mean(-1)
        largest: Any = mean.abs().flatten().argsort(descending=True)[:k]
        order: list[int] = largest.tolist()
        columns = mean.shape[1]
        return [
            (
                self.senders[index // columns],
                None if self.positions is None else self.positions[index % columns],
                float(mean.flatten()[index]),
            )
            for index in order
        ]

    def to_dataframe(self) -> Any:
        """Give a pandas frame: one line for each sender, position and row of the batch.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas = need("pandas", "a data frame")
        positions = self.positions or (None,)
        lines = [
            (sender, position, row, float(self.values[i, j, row]), float(self.effect[i, j, row]))
            for i, sender in enumerate(self.senders)
            for j, position in enumerate(positions)
            for row in range(len(self.baseline))
        ]
        return pandas.DataFrame(lines, columns=["sender", "position", "row", "value", "effect"])

    def heatmap(self, title: str | None = None, unit: str = "") -> view.Picture:
        """Draw the mean effect: senders by positions, or the layers by their heads, MLPs and mixers.

        Args:
            title: Stands above the picture; None names the receivers.
            unit: Of the metric, such as `logits`.
        """
        mean: Any = self.effect.mean(-1)
        shown = self.receivers if len(self.receivers) <= 4 else (*self.receivers[:3], "...")
        title = title or f"Direct effect on {', '.join(shown)}"
        if self.positions is not None:
            return view.grid(self.senders, [str(p) for p in self.positions], mean.tolist(), title=title, unit=unit)
        places = [_place(label) for label in self.senders]
        rows = list(dict.fromkeys(row for row, _ in places))
        columns = sorted({column for _, column in places}, key=_column_order)
        cells: list[list[float | None]] = [[None] * len(columns) for _ in rows]
        for (row, column), value in zip(places, mean[:, 0].tolist(), strict=True):
            cells[rows.index(row)][columns.index(column)] = value
        return view.grid(rows, columns, cells, title=title, unit=unit)

    def _repr_html_(self) -> str:
        return self.heatmap()._repr_html_()  # pyright: ignore[reportPrivateUsage]


def _place(label: str) -> tuple[str, str]:
    """Find a sender's row and column in the picture: its layer, and what it is there."""
    matched = re.fullmatch(r"L(\d+)(?:H(\d+)|\.(\w+))", label)
    if matched is None:
        return label, ""
    return f"layer {matched[1]}", f"head {matched[2]}" if matched[2] is not None else matched[3]


def _column_order(column: str) -> tuple[int, str]:
    number = column.removeprefix("head ")
    return (int(number), "") if number.isdigit() else (-1 if not column else 10**6, column)
