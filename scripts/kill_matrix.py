#!/usr/bin/env python
"""Break lens in every way that the conformance kit knows, and say which checks notice: `make mutants`.

Without options the checks named for each mutant are tried in each family, as in the tests. `--all` tries all checks,
and `--write` puts the tables into a document between its marks. Exit code 1 where a mutant survives.
"""

import argparse
import os
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from generated import update
from rich.console import Console
from rich.progress import track
from rich.table import Table

TYPES = ("gpt2", "llama", "mamba", "mamba2")
MARKS = {"killed": "✓", "survived": "SURVIVED", "absent": "–", "not judged": "not judged"}


def tried(job: tuple[str, str, bool]) -> tuple[str, str, list[Any]]:
    """Plant one mutant in one family; give what its checks, or all, say."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from lens_conformance.checks import all_checks
    from lens_conformance.mutants import all_mutants, kills, verdict
    from lens_conformance.runner import find_family

    name, model_type, is_all = job
    mutant, family = all_mutants()[name], find_family(model_type)
    found = kills(mutant, family)
    if is_all and found[0].status != "absent":
        others = [check for check in all_checks() if check not in mutant.killers]
        found += [verdict(mutant, check, family, level="fast") for check in others]
    return name, model_type, found


def main() -> int:
    """Run, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="TYPE", help=f"default: {' '.join(TYPES)}")
    parser.add_argument("--all", action="store_true", help="try every check, not only those named for a mutant")
    parser.add_argument("--write", metavar="FILE", help="a Markdown document with the marks `kill-matrix`")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default: 2)")
    options = parser.parse_args()
    from lens_conformance.mutants import all_mutants

    jobs = [(name, model_type, options.all) for name in all_mutants() for model_type in options.types]
    found: dict[str, dict[str, list[Any]]] = defaultdict(dict)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for name, model_type, kills in track(pool.map(tried, jobs), "breaking", total=len(jobs), transient=True):
            found[name][model_type] = kills
    rows = [_row(mutant, found[name], options.types) for name, mutant in all_mutants().items()]
    headings = ["mutant", "what is broken", "must be noticed by", *options.types, *(["also by"] if options.all else [])]
    table = Table(title="Mutants")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    survivors = [row[0] for row in rows if any("SURVIVED" in cell for cell in row)]
    print(f"{len(rows)} mutants, {len(survivors)} survived{': ' if survivors else ''}{', '.join(survivors)}")
    if options.write:
        lines = [headings, ["---"] * len(headings), *rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        update(Path(options.write), "kill matrix", text, check=False)
    return 1 if survivors else 0


def _row(mutant: Any, found: dict[str, list[Any]], types: list[str]) -> list[str]:
    cells = []
    for model_type in types:
        named = [kill for kill in found[model_type] if kill.check in mutant.killers]
        survived = [kill.check for kill in named if kill.status == "survived"]
        killed = any(kill.status == "killed" for kill in named)
        status = "survived" if survived else "killed" if killed else named[0].status
        cells.append(MARKS[status] + (f" {', '.join(survived)}" if survived else ""))
    others = {
        kill.check: None
        for kills in found.values()
        for kill in kills
        if kill.status == "killed" and kill.check not in mutant.killers
    }
    is_all = any(len(kills) > len(mutant.killers) for kills in found.values())
    return [
        f"`{mutant.name}`",
        mutant.title,
        ", ".join(mutant.killers),
        *cells,
        *([", ".join(others)] if is_all else []),
    ]


if __name__ == "__main__":
    sys.exit(main())
