#!/usr/bin/env python
"""Write the table of architectures into the README, from the descriptors of the installed plugins.

python scripts/architecture_table.py            # write it
python scripts/architecture_table.py --check    # exit 1 where it is out of date
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from generated import update

from lens_core._discovery import PluginRecord, PluginStatus
from lens_core._registry import active_registry
from lens_core.plugin import Architecture, Support

README = Path(__file__).parents[1] / "README.md"


def table() -> str:
    """Give the table in Markdown: a row for the architectures of one plugin that lack the same."""
    rows = [
        _row(record, list(alike))
        for record in active_registry().records
        if record.status is PluginStatus.OK
        for _, alike in groupby(sorted(record.architectures, key=_key), key=_key)
    ]
    return "\n".join(
        ("| architecture | model types | install | transformers | not in full |", "|---|---|---|---|---|", *rows)
    )


def _key(architecture: Architecture) -> tuple[str, str]:
    return architecture.transformers, "<br>".join(_lacks(architecture)) or "nothing"


def _row(record: PluginRecord, alike: Sequence[Architecture]) -> str:
    transformers, lacks = _key(alike[0])
    cells = (
        ", ".join(architecture.name for architecture in alike),
        ", ".join(f"`{name}`" for architecture in alike for name in architecture.model_types),
        f"`{record.distribution}`",
        f"`{transformers}`",
        lacks,
    )
    return f"| {' | '.join(cells)} |"


def _lacks(architecture: Architecture) -> Iterator[str]:
    for capability, given in architecture.capabilities.items():
        if given.support is not Support.FULL:
            yield f"`{capability.value}` is {given.support.value}: {given.reason}"


if __name__ == "__main__":
    sys.exit(update(README, "architectures", table(), check="--check" in sys.argv[1:]))
