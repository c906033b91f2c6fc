"""What `import lens_core` adds to an empty program."""

import resource
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.pairs import Side, interleaved
from benchmarks.rows import Row, difference_row
from benchmarks.settings import Settings

__all__ = ["rows"]

GROUP = "import"
HEAVY = "import lens_core, sys; print(sum(name.split('.')[0] in ('torch', 'transformers') for name in sys.modules))"


def rows(settings: Settings) -> Iterator[Row]:
    """Measure in fresh processes."""
    pairs = interleaved(
        Side(call=lambda: _run("pass")),
        Side(call=lambda: _run("import lens_core")),
        seconds=10 * settings.share,
        at_least=settings.at_least,
        at_most=30,
        clock=_timed_child,
    )
    yield difference_row(GROUP, "`import lens_core`, added to `python -c pass`", pairs, unit="s", scale=1.0, goal=0.2)
    heavy = float(_run(HEAVY))
    yield Row(
        group=GROUP, name="modules of torch and transformers that it loads", unit="modules", values=(heavy,), goal=0
    )


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def _timed_child(side: Side, calls: int) -> tuple[float, float]:
    before, wall = _children_seconds(), time.perf_counter()
    for _ in range(calls):
        side.call()
    return (time.perf_counter() - wall) / calls, (_children_seconds() - before) / calls


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
