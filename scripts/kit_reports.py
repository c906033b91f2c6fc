#!/usr/bin/env python
"""Write what the conformance kit's reports say into the documentation.

`make drift` and `make certificates` leave reports in benchmarks/conformance, by release and in `certificates`.

python scripts/kit_reports.py            # write the tables
python scripts/kit_reports.py --check    # exit 1 where one is out of date
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from generated import update
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parents[1]
REPORTS, PAGE = ROOT / "benchmarks" / "conformance", ROOT / "docs" / "conformance.md"


def reports(folder: Path) -> dict[str, dict[str, Any]]:
    """Give the reports of a folder by model type."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def releases() -> list[Path]:
    """Give the folders of transformers' releases, oldest first."""

    def release(folder: Path) -> Version | None:
        try:
            return Version(folder.name)
        except InvalidVersion:
            return None

    found = [(version, folder) for folder in REPORTS.iterdir() if (version := release(folder)) is not None]
    return [folder for _, folder in sorted(found)]


def drift() -> Iterator[str]:
    """Give a row for each model type: what failed on each release, or how many properties held."""
    found = {folder.name: reports(folder) for folder in releases()}
    yield f"| model type | {' | '.join(found)} |"
    yield f"|---|{'---|' * len(found)}"
    for model_type in sorted({name for release in found.values() for name in release}):
        yield f"| `{model_type}` | {' | '.join(_held(release.get(model_type)) for release in found.values())} |"


def _held(report: dict[str, Any] | None) -> str:
    if report is None:
        return "not there"
    failed = [outcome["name"] for outcome in report["outcomes"] if outcome["status"] in ("failed", "raised")]
    held = sum(outcome["status"] in ("passed", "known") for outcome in report["outcomes"])
    whole = "" if report["is_whole"] else ", not whole"
    return f"{held}{whole}" + (f"; **fails** {', '.join(failed)}" if failed else "")


def certificates() -> Iterator[str]:
    """Give a row for each model type: level, examples, what judged, and the errors nearest to their bounds."""
    yield "| model type | level | made | examples | by HF | by laws | by golden | nearest to its bound | failed |"
    yield "|---|---|---|---|---|---|---|---|---|"
    folders = (reports(REPORTS / name) for name in ("certificates", "thorough"))
    for model_type, report in ((name, report) for folder in folders for name, report in folder.items()):
        tried = [outcome for outcome in report["outcomes"] if outcome["examples"]]
        judged = [sum(outcome["judge"] == judge for outcome in tried) for judge in ("hf", "law", "golden")]
        bounded = [outcome for outcome in tried if outcome["worst"]["bound"]]
        worst = max(bounded, key=lambda outcome: outcome["worst"]["off"] / outcome["worst"]["bound"])
        told = f"`{worst['name']}`: {worst['worst']['off']:.0e} of {worst['worst']['bound']:.0e}"
        failed = [o["name"] for o in report["outcomes"] if o["status"] in ("failed", "raised")]
        cells = (report["level"], report["made"], sum(o["examples"] for o in tried), *judged, told, ", ".join(failed))
        yield f"| `{model_type}` | {' | '.join(map(str, cells))} |"


_SIGNS = {"passed": "+", "absent": "·", "not judged": "o", "known": "k", "blocked": "-"}


def properties() -> Iterator[str]:
    """Give a row for each model type and a column for each check, by its number or its name."""
    found = reports(REPORTS / "certificates")
    checks = list(dict.fromkeys(outcome["name"] for report in found.values() for outcome in report["outcomes"]))
    yield f"| model type | level | transformers | {' | '.join(checks)} |"
    yield f"|---|---|---|{'---|' * len(checks)}"
    for model_type, report in found.items():
        held = {outcome["name"]: _SIGNS.get(outcome["status"], "**F**") for outcome in report["outcomes"]}
        cells = (report["level"], report["versions"]["transformers"], *(held.get(check, " ") for check in checks))
        yield f"| `{model_type}` | {' | '.join(cells)} |"


if __name__ == "__main__":
    is_check = "--check" in sys.argv[1:]
    made = [
        update(PAGE, "drift", "\n".join(drift()), check=is_check),
        update(PAGE, "certificates", "\n".join(certificates()), check=is_check),
        update(ROOT / "docs" / "types.md", "properties", "\n".join(properties()), check=is_check),
    ]
    sys.exit(max(made))
