"""Measure one library on one model, in the environment that has the library: `python -m benchmarks.peers.worker`.

The driver starts it; what it finds goes to a file. Nothing here or below imports lens, but for lens' own adapter.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import attrs
import torch

from benchmarks.machine import load_average, machine
from benchmarks.peers import reference, startup
from benchmarks.peers.adapter import Cannot
from benchmarks.peers.record import Cell, write_results
from benchmarks.peers.rows import Bench, cells
from benchmarks.peers.settings import FULL, LIBRARIES, QUICK, STARTUP, Settings

__all__ = ["main", "measure"]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.worker")
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("model")
    parser.add_argument("folder", help="where that model is")
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--settings", default="{}", help="what differs from the usual settings, as JSON")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    options = parser.parse_args(argv)
    settings = attrs.evolve(QUICK if options.quick else FULL, **json.loads(options.settings))
    torch.set_num_threads(settings.threads)
    load = load_average()
    found = measure(options.library, options.model, options.folder, options.rows, settings)
    if options.library != "lens" and "lens_core" in sys.modules:
        raise RuntimeError(f"lens was imported where {options.library} was measured")
    package = LIBRARIES[options.library].package
    facts = machine(settings.threads, (package, "torch", "transformers"))
    write_results(options.json, facts | {"load": f"{load:.1f} before"}, found)


def measure(library: str, model: str, folder: str, rows: Sequence[str], settings: Settings) -> list[Cell]:
    """Give the cells of these rows."""
    module: Any = import_module(f"benchmarks.peers.libraries.{LIBRARIES[library].module}")
    found: list[Cell] = []
    if set(rows) & set(STARTUP):
        started = startup.cells(
            model, folder, (reference.IMPORT, reference.LOAD), (module.IMPORT, module.LOAD), settings
        )
        found += [cell for cell in started if cell.row in rows]
    rest = [row for row in rows if row not in STARTUP]
    if not rest:
        return found
    try:
        loaded = module.Model(folder)
    except Cannot as reason:
        return found + [Cell(model=model, row=row, cannot=str(reason)) for row in rest]
    bench = Bench(model=model, reference=reference.Reference(folder), library=loaded, settings=settings)
    for cell in cells(bench, rest):
        told = f"{cell.median:.3f}" if cell.values else "cannot"
        print(f"  {cell.model} {cell.row} {cell.size}: {told} {cell.note}", flush=True)
        found.append(cell)
    return found


if __name__ == "__main__":
    main()
