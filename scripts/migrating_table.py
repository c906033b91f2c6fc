#!/usr/bin/env python
"""Write the list of docs/migrating.md, what TransformerLens offers and where it is, from docs/transformerlens.toml.

python scripts/migrating_table.py            # write it
python scripts/migrating_table.py --check    # exit 1 where it is out of date
"""

import inspect
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from generated import update

DOCS = Path(__file__).parents[1] / "docs"
VERDICTS = ("same", "renamed", "better", "refused", "not yet")
NAME = re.compile(r"(?P<path>\w+(?:\.\w+)*)(?:\((?P<arguments>[\w, ]+)\))?")


def sections() -> list[Mapping[str, Any]]:
    """Read the list."""
    return tomllib.loads((DOCS / "transformerlens.toml").read_text(encoding="utf-8"))["sections"]


def mistakes(row: list[str], roots: Mapping[str, Any]) -> Iterator[str]:
    """Say what is wrong with a row: `roots` are the objects that our names begin with."""
    theirs, verdict, ours, remark = row
    if verdict not in VERDICTS:
        yield f"{theirs}: the verdict is one of {', '.join(VERDICTS)}; got {verdict!r}"
    if verdict in ("better", "refused") and not remark:
        yield f"{theirs}: {verdict}, and nothing says why"
    if verdict in ("same", "renamed") and not ours and not remark:
        yield f"{theirs}: {verdict}, and nothing says where it is"
    for name in NAME.finditer(ours):
        try:
            found = _find(name["path"], roots)
        except (AttributeError, ModuleNotFoundError) as error:
            yield f"{theirs}: there is no {name['path']}: {error}"
            continue
        wanted = {argument.strip() for argument in (name["arguments"] or "").split(",")} - {""}
        for argument in sorted(wanted - set(_arguments(found) if wanted else ())):
            yield f"{theirs}: {name['path']} has no argument {argument}"


def _find(path: str, roots: Mapping[str, Any]) -> Any:
    root, *rest = path.split(".")
    found = roots[root]
    for name in rest:
        if inspect.ismodule(found) and not hasattr(found, name):
            import_module(f"{found.__name__}.{name}")
        found = getattr(found, name)
    return found


def _arguments(function: Any) -> Iterator[str]:
    yield from inspect.signature(function).parameters


def lines() -> Iterator[str]:
    """Give the list as Markdown: how many of each verdict, and a table for each section."""
    counts = Counter(row[1] for section in sections() for row in section["rows"])
    yield ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS) + "."
    for section in sections():
        yield from (
            "",
            f"### {section['title']}",
            "",
            "| TransformerLens | lens | where | remark |",
            "|---|---|---|---|",
        )
        for theirs, verdict, ours, remark in section["rows"]:
            where = ", ".join(f"`{name[0].removeprefix('lens.')}`" for name in NAME.finditer(ours))
            yield f"| {theirs} | {verdict} | {where} | {remark} |"


if __name__ == "__main__":
    sys.exit(update(DOCS / "migrating.md", "transformerlens", "\n".join(lines()), check="--check" in sys.argv[1:]))
