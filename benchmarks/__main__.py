"""Run the benchmarks: `python -m benchmarks`."""

import argparse
import os
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import attrs

from benchmarks.settings import FULL, QUICK

# In the order of the table; each module has `rows(settings)`.
GROUPS = ("importing", "forward", "loading", "holding", "overhead", "families", "states", "sweep", "long")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write it."""
    options = _parser().parse_args(argv)
    settings = QUICK if options.quick else FULL
    if options.threads:
        settings = attrs.evolve(settings, threads=options.threads)
    # Threads that wait for each other sleep. By default they spin, and on a busy machine a forward then takes seconds.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    from rich.progress import Progress

    from benchmarks.machine import load_average, machine
    from benchmarks.report import as_json, as_markdown, show

    torch.set_num_threads(settings.threads)
    facts = machine(settings.threads)
    before, start = load_average(), time.perf_counter()
    rows = []
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=None)
        for group in options.only or GROUPS:
            progress.update(task, description=group)
            for row in import_module(f"benchmarks.{group}").rows(settings):
                rows.append(row)
                progress.update(task, description=f"{row.group}: {row.name}")
    facts["load"] = f"{before:.1f} before and {load_average():.1f} after, this run included"
    facts["took"] = f"{time.perf_counter() - start:.0f} s"
    show(rows, facts, is_quick=settings.is_quick)
    large = settings.large
    family = settings.family
    size = f"{large.n_layers} layers, width {large.d_model}, {large.n_heads} heads, {large.d_vocab} tokens"
    other = f"{family.n_layers} layers, width {family.d_model}, {family.d_vocab} tokens"
    _write(options.write, as_markdown(rows, facts, size=size, family=other, is_quick=settings.is_quick))
    _write(options.json, as_json(rows, facts, is_quick=settings.is_quick))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure lens against plain HuggingFace.")
    parser.add_argument("--quick", action="store_true", help="a smoke test on tiny models; its numbers mean nothing")
    parser.add_argument("--threads", type=int, help="torch's threads (default: 2, with --quick 1)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="measure only these groups")
    parser.add_argument("--write", type=Path, default=Path("build/benchmarks.md"), help="where the page goes")
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks.json"), help="where every number goes")
    return parser


if __name__ == "__main__":
    main()
