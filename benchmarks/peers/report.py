"""The results as a table, with what each library cannot do, where one is ahead of lens, and how far values are off."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from benchmarks.peers.record import Cell, read_results
from benchmarks.peers.settings import FULL, LIBRARIES, ROWS

__all__ = ["Results", "read", "table"]

MODELS: Mapping[str, str] = {"gpt2": "GPT-2 small", "smollm2": "SmolLM2-135M", "mamba": "Mamba"}
AGREES = 1e-4
"""What a value may be off by, HF's largest being 1, before the table says so."""
PICTURE = "![Ratios to plain HF, by model and row](images/performance.png)"

# By library and row, why that peer is ahead of lens there, known from reading both; nothing is said of the others.
_OWN_SCAN = (
    "It runs a scan of its own in place of HF's, and the bits of what follows are not HF's; lens leaves HF's scan "
    "where it is, and keeps the states that it computes."
)
REASONS: Mapping[tuple[str, str], str] = {
    (
        "transformer-lens-4",
        "cache",
    ): "It loads every model with eager attention, whose scores and patterns are there to "
    "be kept; lens leaves HF's fused attention as it is and computes them beside it.",
    (
        "nnsight",
        "cache",
    ): "It keeps what modules return: no scores or patterns, which HF's fused attention does not have "
    "and lens computes beside it, and no scales of norms.",
    ("transformer-lens-4", "state"): _OWN_SCAN,
    ("transformer-lens-4", "states"): _OWN_SCAN,
}


@attrs.frozen(kw_only=True)
class Results:
    """What was measured: cells of each library, and the machine and versions that they are from."""

    facts: Mapping[str, Mapping[str, Any]]
    cells: Mapping[str, Mapping[tuple[str, str, str], Cell]]

    @property
    def keys(self) -> list[tuple[str, str, str]]:
        """The rows of the table, in its order; small inputs stand before large ones, as they were measured."""
        found = dict.fromkeys(key for cells in self.cells.values() for key in cells)
        # What could not be loaded has no size: its reason stands in each row of that kind.
        sizes = {key[:2] for key in found if key[2]}
        rows = list(ROWS)
        kept = [key for key in found if key[2] or key[:2] not in sizes]
        return sorted(kept, key=lambda key: (rows.index(key[1]), list(MODELS).index(key[0])))

    def cell(self, library: str, key: tuple[str, str, str]) -> Cell | None:
        """Give a cell, if it was measured."""
        cells = self.cells.get(library, {})
        return cells.get(key) or cells.get((*key[:2], ""))


def read(folder: Path) -> Results:
    """Read the results of all libraries that there are."""
    facts: dict[str, Mapping[str, Any]] = {}
    cells: dict[str, Mapping[tuple[str, str, str], Cell]] = {}
    for library in LIBRARIES:
        path = folder / f"{library}.json"
        if path.exists():
            facts[library], found = read_results(path)
            cells[library] = {cell.key: cell for cell in found}
    return Results(facts=facts, cells=cells)


def table(results: Results) -> str:
    """Write everything that the page says of the results."""
    if not results.cells:
        return "Nothing has been measured yet."
    libraries = list(results.cells)
    lines = ["| | " + " | ".join(LIBRARIES[library].title for library in libraries) + " |"]
    lines.append("|---|" + "---|" * len(libraries))
    last = None
    for key in results.keys:
        if key[1] != last:
            last = key[1]
            lines.append(f"| **{title(last)}** |" + " |" * len(libraries))
        lines.append(f"| {_place(key)} | " + " | ".join(_texts(results, libraries, key)) + " |")
    parts = [PICTURE, "\n".join(lines), _section("What a library cannot do", _cannot(results))]
    parts += [_section("Where a peer is ahead of lens", _ahead(results))]
    parts += [_section("Values", _differences(results)), _section("Measured on", _measured_on(results))]
    return "\n\n".join(parts)


def title(row: str) -> str:
    """Give a row's name."""
    return ROWS[row].format(new_tokens=FULL.new_tokens)


def _place(key: tuple[str, str, str]) -> str:
    model, _, size = key
    return f"{MODELS[model]}, {size}" if size else MODELS[model]


def _texts(results: Results, libraries: Iterable[str], key: tuple[str, str, str]) -> Iterator[str]:
    """Write a row's cells; the smallest ratio is bold, of those that give HF's values."""
    found = {library: results.cell(library, key) for library in libraries}
    right = [cell.median for cell in found.values() if cell is not None and cell.values and is_right(cell)]
    best = min(right, default=None)
    for cell in found.values():
        if cell is None:
            yield "not measured"
        elif not cell.values:
            yield "cannot"
        else:
            low, high = cell.spread
            median = f"{cell.median:.2f}"
            shown = f"**{median}**" if is_right(cell) and best is not None and median == f"{best:.2f}" else median
            wrong = "" if is_right(cell) else f", wrong by {cell.difference:.1g}"
            note = f", {cell.note}" if cell.note else ""
            yield f"{shown} ({low:.2f} to {high:.2f}{note}{wrong})"


def is_right(cell: Cell) -> bool:
    """Say whether a cell's values are HF's; what has none, such as an import, is."""
    most = 0.0 if cell.row == "generate" else AGREES
    return cell.difference is None or cell.difference <= most


def _cannot(results: Results) -> Iterator[str]:
    for library, cells in results.cells.items():
        reasons: dict[str, list[str]] = {}
        for cell in cells.values():
            if cell.cannot and title(cell.row) not in reasons.setdefault(cell.cannot, []):
                reasons[cell.cannot].append(title(cell.row))
        for reason, rows in reasons.items():
            yield f"{LIBRARIES[library].title}: {'; '.join(rows)}. {reason[0].upper()}{reason[1:]}."


def _ahead(results: Results) -> Iterator[str]:
    """Name every peer with a smaller median than lens; no reason is made up for one."""
    for key in results.keys:
        ours = results.cell("lens", key)
        if ours is None or not ours.values:
            continue
        for library in results.cells:
            cell = results.cell(library, key)
            if cell is None or not cell.values or not is_right(cell) or round(cell.median, 2) >= round(ours.median, 2):
                continue
            spreads = "the spreads overlap" if cell.spread[1] >= ours.spread[0] else "the spreads are apart"
            reason = REASONS.get((library, key[1]), "")
            yield (
                f"{title(key[1])}, {_place(key)}: {LIBRARIES[library].title} has {cell.median:.2f}, "
                f"lens {ours.median:.2f}; {spreads}.{' ' + reason if reason else ''}"
            )


def _differences(results: Results) -> Iterator[str]:
    for library, cells in results.cells.items():
        values = [cell.difference for cell in cells.values() if cell.row != "generate" and cell.difference is not None]
        tokens = [cell.difference for cell in cells.values() if cell.row == "generate" and cell.difference is not None]
        if values:
            other = f"; of generated tokens, {sum(tokens):.0f} differ" if tokens else ""
            yield f"{LIBRARIES[library].title}: off by {max(values):.1g} at most, HF's largest value being 1{other}."


def _measured_on(results: Results) -> Iterator[str]:
    shared = [set(facts.items()) for facts in results.facts.values()]
    common = set.intersection(*shared)
    for name in next(iter(results.facts.values())):
        if (name, next(iter(results.facts.values()))[name]) in common:
            yield f"{name}: {next(iter(results.facts.values()))[name]}"
    for library, facts in results.facts.items():
        own = [f"{name} {fact}" for name, fact in facts.items() if (name, fact) not in common]
        if own:
            yield f"{LIBRARIES[library].title}: {'; '.join(own)}"


def _section(heading: str, lines: Iterable[str]) -> str:
    body = "\n".join(f"- {line}" for line in lines) or "None."
    return f"**{heading}**\n\n{body}" if body != "None." else f"**{heading}**: none."
