#!/usr/bin/env python
"""Write the tables of architectures into README and docs, from the descriptors of the installed plugins.

python scripts/architecture_table.py            # write them
python scripts/architecture_table.py --check    # exit 1 where one is out of date
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from generated import update

from lens_core._discovery import PluginRecord, PluginStatus
from lens_core._registry import active_registry
from lens_core.plugin import Architecture, Support

ROOT = Path(__file__).parents[1]


def served() -> list[PluginRecord]:
    """Give the plugins that serve."""
    return [record for record in active_registry().records if record.status is PluginStatus.OK]


def plugins() -> Iterator[str]:
    """Give a row for each plugin and each range of transformers: the model types that it serves."""
    yield "| install | transformers | model types |"
    yield "|---|---|---|"
    for record in served():
        by_range = sorted(record.architectures, key=lambda architecture: architecture.transformers)
        for transformers, alike in groupby(by_range, key=lambda architecture: architecture.transformers):
            types = ", ".join(f"`{name}`" for architecture in alike for name in architecture.model_types)
            yield f"| `{record.distribution}` | `{transformers}` | {types} |"


def architectures() -> Iterator[str]:
    """Give a row for the architectures of one plugin that lack the same."""
    yield "| architecture | model types | install | not in full |"
    yield "|---|---|---|---|"
    for record in served():
        for lacks, alike in groupby(sorted(record.architectures, key=_lacks), key=_lacks):
            yield _row(record, list(alike), lacks)


def _row(record: PluginRecord, alike: Sequence[Architecture], lacks: str) -> str:
    names = ", ".join(architecture.name for architecture in alike)
    types = ", ".join(f"`{name}`" for architecture in alike for name in architecture.model_types)
    return f"| {names} | {types} | `{record.distribution}` | {lacks} |"


def _lacks(architecture: Architecture) -> str:
    lacks = (
        f"`{capability.value}` is {given.support.value}: {given.reason}"
        for capability, given in architecture.capabilities.items()
        if given.support is not Support.FULL
    )
    return "<br>".join(lacks) or "nothing"


if __name__ == "__main__":
    is_check = "--check" in sys.argv[1:]
    made = [
        update(ROOT / "README.md", "architectures", "\n".join(plugins()), check=is_check),
        update(ROOT / "docs" / "types.md", "architectures", "\n".join(architectures()), check=is_check),
    ]
    sys.exit(max(made))
