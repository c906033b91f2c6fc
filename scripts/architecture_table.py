#!/usr/bin/env python
"""Write the table of architectures into the README, from the descriptors of the installed plugins.

python scripts/architecture_table.py            # write it
python scripts/architecture_table.py --check    # exit 1 where it is out of date
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from generated import update

from lens_core._discovery import PluginRecord, PluginStatus
from lens_core._registry import active_registry
from lens_core.plugin import Architecture, Support

README = Path(__file__).parents[1] / "README.md"


def table() -> str:
    """Give the table in Markdown: a row for each architecture of each plugin that serves."""
    rows = [
        _row(record, architecture)
        for record in active_registry().records
        if record.status is PluginStatus.OK
        for architecture in record.architectures
    ]
    return "\n".join(
        ("| architecture | model types | install | transformers | not in full |", "|---|---|---|---|---|", *rows)
    )


def _row(record: PluginRecord, architecture: Architecture) -> str:
    cells = (
        architecture.name,
        ", ".join(f"`{name}`" for name in architecture.model_types),
        f"`{record.distribution}`",
        f"`{architecture.transformers}`",
        "<br>".join(_lacks(architecture)) or "nothing",
    )
    return f"| {' | '.join(cells)} |"


def _lacks(architecture: Architecture) -> Iterator[str]:
    for capability, given in architecture.capabilities.items():
        if given.support is not Support.FULL:
            yield f"`{capability.value}` is {given.support.value}: {given.reason}"


if __name__ == "__main__":
    sys.exit(update(README, "architectures", table(), check="--check" in sys.argv[1:]))
