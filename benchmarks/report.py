"""The table, on the terminal, as a page of the documentation, and as JSON."""

import json
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.rows import Row

__all__ = ["as_json", "as_markdown", "show"]

HEADERS = ("measured", "goal", "median", "quartiles", "min to max", "processor time", "pairs", "result")
SMOKE = "A smoke test (`--quick`): it shows that everything runs, and the numbers mean nothing."
PAGE = """# Benchmarks

<!-- Written by `python -m benchmarks --write docs/benchmarks.md`; do not edit. -->

lens against plain HuggingFace, measured by `make bench` in one process. Every measurement of lens stands beside one of
plain HF taken just before or after it, in changing order; the table gives the median of these pairs' ratios (or
differences), the quartiles between which the middle half lies, and the extremes. `× HF` is lens over plain HF: 1.00 is
the same. A goal is the most that the median may be. "Processor time" is the median of the same ratio in seconds of all
threads instead of the wall clock: other programs on the machine move it less, and waiting does not count.

The large model has GPT-2-small's dimensions ({size}) and random weights
in float32; the tiny one has two layers of width 64, and the models of other families have {family}.
Nothing computes gradients, and forwards fill no KV cache. Rows in
`× that tensor` count the bytes of live tensors, which is the same on every machine; a tensor that is alive anyway when
HF's own peak comes adds nothing to it.

{machine}

{table}

{gaps}
"""


def _cells(row: Row) -> tuple[str, ...]:
    low, high = row.quartiles
    processor = row.processor_median
    return (
        row.name,
        "" if row.goal is None else f"{row.goal:g}",
        f"{row.text(row.median)} {row.unit}",
        f"{row.text(low)} to {row.text(high)}",
        f"{row.text(min(row.values))} to {row.text(max(row.values))}",
        "" if processor is None else row.text(processor),
        str(len(row.values)),
        row.verdict,
    )


def show(rows: Sequence[Row], facts: Mapping[str, str], *, is_quick: bool) -> None:
    """Print one table."""
    table = Table(title="lens against plain HuggingFace", caption=SMOKE if is_quick else None)
    for header in HEADERS:
        table.add_column(header, overflow="fold")
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            table.add_section()
            table.add_row(f"[bold]{group}")
        colour = {"met": "green", "": ""}.get(row.verdict, "red")
        *cells, verdict = _cells(row)
        table.add_row(*cells, f"[{colour}]{verdict}" if colour else verdict)
    console = Console(width=None if sys.stdout.isatty() else 150)
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", highlight=False)
    console.print(table)


def as_markdown(rows: Sequence[Row], facts: Mapping[str, str], *, size: str, family: str, is_quick: bool) -> str:
    """Write the page."""
    lines = ["| " + " | ".join(HEADERS) + " |", "|" + "---|" * len(HEADERS)]
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append(f"| **{group}** " + "|" * len(HEADERS))
        lines.append("| " + " | ".join(_cells(row)) + " |")
    gaps = [row for row in rows if row.verdict.startswith("gap")]
    named = [f"- {row.group}, {row.name}: {row.text(row.median)} where {row.goal:g} is the goal." for row in gaps]
    summary = "Every goal is met." if not gaps else "Goals that were not met in this run:\n\n" + "\n".join(named)
    return PAGE.format(
        size=size,
        family=family,
        machine="\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
        table="\n".join(lines),
        gaps=SMOKE if is_quick else summary,
    )


def as_json(rows: Sequence[Row], facts: Mapping[str, str], *, is_quick: bool) -> str:
    """Write every number, the single repetitions included."""
    return json.dumps({"quick": is_quick, "machine": dict(facts), "rows": [row.record() for row in rows]}, indent=1)
