"""Importing a library and loading a model with it, each time in a fresh process, by turns with plain HF."""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping

from benchmarks.machine import PEAK
from benchmarks.peers.record import Cell
from benchmarks.peers.settings import Settings

__all__ = ["cells"]

PROGRAM = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
folder = sys.argv[1]
start = time.perf_counter()
{imports}
imported = time.perf_counter()
{load}
ready = time.perf_counter()
{peak}
print(json.dumps({{"import": imported - start, "ready": ready - start, "memory": peak / 1024}}))
"""


def cells(model: str, folder: str, plain: tuple[str, str], ours: tuple[str, str], settings: Settings) -> list[Cell]:
    """Give the three rows; one start of each is not measured, so that files are in the system's memory.

    Args:
        model: The model's name in the results.
        folder: Where it is.
        plain: HF's statements that import, and that load.
        ours: The library's.
        settings: How often.
    """
    starts: list[tuple[Mapping[str, float], Mapping[str, float]]] = []
    for turn in range(settings.starts + 1):
        first = _start(plain, folder) if turn % 2 == 0 else None
        measured = _start(ours, folder)
        starts.append((first or _start(plain, folder), measured))
    starts = starts[1:]
    return [
        Cell(
            model=model,
            row=row,
            values=tuple(measured[row] / reference[row] for reference, measured in starts),
            plain=statistics.median(reference[row] for reference, _ in starts),
            ours=statistics.median(measured[row] for _, measured in starts),
        )
        for row in ("import", "ready", "memory")
    ]


def _start(statements: tuple[str, str], folder: str) -> Mapping[str, float]:
    program = PROGRAM.format(imports=statements[0], load=statements[1], peak=PEAK)
    done = subprocess.run([sys.executable, "-c", program, folder], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"starting {statements[0]!r} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
