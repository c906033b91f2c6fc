#!/usr/bin/env python
"""Write the hook points of each architecture into docs/hooks.md, from what its plugin declares.

python scripts/hook_tables.py            # write them
python scripts/hook_tables.py --check    # exit 1 where one is out of date
"""

import sys
from pathlib import Path

from generated import update
from transformers import AutoConfig

from lens_core._discovery import PluginStatus
from lens_core._registry import active_registry, load_implementation
from lens_core.hook_points import HookPoint
from lens_core.plugin import Architecture

PAGE = Path(__file__).parents[1] / "docs" / "hooks.md"


def table(architecture: Architecture) -> str:
    """Give the table in Markdown; block 0 stands for all blocks, and the first model type for its kin."""
    declaration = load_implementation(architecture)(AutoConfig.for_model(architecture.model_types[0]))
    rows = [_row(point) for point in declaration.points if not point.layer]
    return "\n".join(("| hook point | shape | equation |", "|---|---|---|", *rows))


def _row(point: HookPoint) -> str:
    name = point.name if point.layer is None else f"blocks.L.{point.part}"
    star = "" if point.default else " \\*"
    equation = point.equation.replace("|", "\\|").replace("*", "\\*")
    return f"| `{name}`{star} | `{point.shape}` | {equation} |"


if __name__ == "__main__":
    found = [
        architecture
        for record in active_registry().records
        if record.status is PluginStatus.OK
        for architecture in record.architectures
    ]
    is_check = "--check" in sys.argv[1:]
    sys.exit(max(update(PAGE, f"{one.name} hook points", table(one), check=is_check) for one in found))
