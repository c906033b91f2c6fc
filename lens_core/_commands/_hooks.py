"""`lens hooks`: the hook points of a model, from its config alone; no weights are read."""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from lens_core._commands._given import MODEL_HELP, folder_of
from lens_core._commands._terminal import console, progress
from lens_core.errors import EmptyFilterError, UnknownHookError
from lens_core.hook_points import HookPoint, HookTable

if TYPE_CHECKING:
    from lens_core._declaration import Declaration


_WIDE = 120  # columns that a row needs without wrapping


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--names", metavar="NAMES", action="append", help="a name, short form or glob; may be repeated")
    parser.add_argument("--layer", metavar="N", type=int, help="the points of one block; negative from the last")
    parser.add_argument("--all", action="store_true", help="a row for each layer, not one for all that are alike")
    parser.add_argument("--revision", metavar="NAME", help="the hub's branch, tag or commit")
    parser.add_argument("--json", action="store_true", help="print every point as a JSON list")
    parser.epilog = "Quote a glob: --names '*hook_z'."


def run(arguments: argparse.Namespace) -> int:
    """Print a table of the hook points, or their records as JSON."""
    with progress(1) as begin:
        begin("reading the config")
        declaration = read_declaration(arguments.model, arguments.revision)
    table = HookTable(declaration.points, aliases=declaration.aliases)
    points = _chosen(table, arguments.names, arguments.layer)
    if arguments.json:
        print(json.dumps([_document(point) for point in points], indent=2))
        return 0
    rows = [(point.name, point) for point in points] if arguments.all else collapsed(points)
    out = console()
    out.print(_table(rows, width=out.width))
    sizes = ", ".join(f"{name} {size}" for name, size in declaration.cfg.sizes.items() if size)
    print(f"\n{arguments.model}: {declaration.cfg.n_layers} layers, {sizes}")
    if not all(point.default for point in points):
        print("* costs memory or time: cached only when asked for")
    return 0


def read_declaration(source: str, revision: str | None = None) -> "Declaration":
    """Read what an architecture declares about a model, without the model.

    Raises:
        ModelNotFoundError: No such id or folder.
        UnsupportedConfigError: A config that cannot be read, or of sizes that no model has.
        PluginError: No plugin serves it.
    """
    from lens_core import _loading

    return _loading.read_declaration(folder_of(source), source, {"revision": revision} if revision else {})


def _chosen(table: HookTable, names: Sequence[str] | None, layer: int | None) -> list[HookPoint]:
    points = [table[name] for name in (table.select(list(names)).names if names else table)]
    if layer is None:
        return points
    if not -table.n_layers <= layer < table.n_layers:
        raise UnknownHookError(f"layer {layer} does not exist: this model's layers are 0 to {table.n_layers - 1}")
    points = [point for point in points if point.layer == layer % table.n_layers]
    if not points:
        raise EmptyFilterError(f"layer {layer} has no hook point that --names {' '.join(names or ())} matches")
    return points


def _document(point: HookPoint) -> dict[str, Any]:
    fields = ("name", "layer", "shape", "equation", "default")
    return {**{field: getattr(point, field) for field in fields}, "seam": _kind(point)}


def _kind(point: HookPoint) -> str:
    """Name the kind of seam: `module input`, `attention`, ..."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(point.seam).__name__.removesuffix("Seam")).lower()


def collapsed(points: Iterable[HookPoint]) -> list[tuple[str, HookPoint]]:
    """Give one row to points that differ by their layer only, named as `blocks.{0..11}.attn.hook_q`.

    The order is that of the first of each.
    """
    alike: dict[tuple[Any, ...], list[HookPoint]] = {}
    for point in points:
        key = (point.name,) if point.layer is None else (point.part, point.shape, point.equation, _kind(point))
        alike.setdefault(key, []).append(point)
    rows: list[tuple[str, HookPoint]] = []
    for group in alike.values():
        layers = [point.layer for point in group if point.layer is not None]
        name = group[0].name if len(group) == 1 else f"blocks.{{{_ranges(layers)}}}.{group[0].part}"
        rows.append((name, group[0]))
    return rows


def _ranges(layers: Sequence[int]) -> str:
    """Write ascending layers shortly: `0..3,7`."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][-1] + 1:
            spans[-1][1:] = [layer]
        else:
            spans.append([layer])
    return ",".join("..".join(map(str, span)) for span in spans)


def _table(rows: Iterable[tuple[str, HookPoint]], *, width: int) -> Table:
    """Set the rows; a narrow terminal wraps the equations, never the names, and does without the seams."""
    is_wide = width >= _WIDE
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("hook point", no_wrap=True)
    table.add_column("shape", no_wrap=is_wide)
    table.add_column("equation")
    if is_wide:
        table.add_column("seam", no_wrap=True)
    for name, point in rows:
        cells = (name if point.default else f"{name} *", point.shape, point.equation, _kind(point))
        table.add_row(*map(Text, cells[: len(table.columns)]))
    return table
