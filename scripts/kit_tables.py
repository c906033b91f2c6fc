#!/usr/bin/env python
"""Write the table of the conformance kit's properties into the documentation.

python scripts/kit_tables.py            # write it
python scripts/kit_tables.py --check    # exit 1 where it is out of date
"""

import sys
from pathlib import Path

from generated import update
from lens_conformance.checkpoint import CHECKPOINT_CHECKS
from lens_conformance.checks import all_checks
from lens_conformance.mutants import all_mutants

PAGE = Path(__file__).parents[1] / "docs" / "conformance.md"


def table() -> str:
    """Give a row for each check: what holds, what judges it, on a checkpoint too, and how many mutants it must kill."""
    killers = [killer for mutant in all_mutants().values() for killer in mutant.killers]
    rows = ["| | check | what holds | judged by | needs | on a checkpoint | mutants |", "|---|---|---|---|---|---|---|"]
    for name, check in all_checks().items():
        needs = check.needs.value if check.needs else ""
        checkpoint = "yes" if name in CHECKPOINT_CHECKS else ""
        cells = (check.number or "", f"`{name}`", check.title, check.judge, needs, checkpoint, killers.count(name))
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(update(PAGE, "checks", table(), check="--check" in sys.argv[1:]))
