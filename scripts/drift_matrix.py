#!/usr/bin/env python
"""Say what the kit found on each transformers release, from the reports that `make drift` left.

python scripts/drift_matrix.py                          # print it
python scripts/drift_matrix.py --write docs/drift.md    # put it between the marks of a document
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from generated import update
from packaging.version import Version

REPORTS = Path(__file__).parents[1] / "benchmarks" / "drift"


def reports() -> dict[str, dict[str, Any]]:
    """Give the reports by release and model type, oldest release first."""
    folders = sorted((folder for folder in REPORTS.iterdir() if folder.is_dir()), key=lambda f: Version(f.name))
    return {
        folder.name: {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
        for folder in folders
    }


def table() -> Iterator[str]:
    """Give a row for each model type: what failed on each release, or how many properties held."""
    found = reports()
    yield f"| model type | {' | '.join(found)} |"
    yield f"|---|{'---|' * len(found)}"
    for model_type in sorted({name for release in found.values() for name in release}):
        yield f"| `{model_type}` | {' | '.join(_cell(release.get(model_type)) for release in found.values())} |"


def _cell(report: dict[str, Any] | None) -> str:
    if report is None:
        return "not there"
    failed = [outcome["name"] for outcome in report["outcomes"] if outcome["status"] in ("failed", "raised")]
    held = sum(outcome["status"] in ("passed", "known") for outcome in report["outcomes"])
    whole = "" if report["is_whole"] else ", not whole"
    return f"{held} hold" + whole + (f"; **fails** {', '.join(failed)}" if failed else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", metavar="FILE")
    options = parser.parse_args()
    text = "\n".join(table())
    print(text)
    if options.write:
        update(Path(options.write), "drift", text, check=False)
