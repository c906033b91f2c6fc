#!/usr/bin/env python
"""Write the hook points of each plugin's first architecture into its page, from what the plugin declares.

python scripts/hook_tables.py            # write them
python scripts/hook_tables.py --check    # exit 1 where one is out of date
"""

import sys
from pathlib import Path

from generated import update
from transformers import AutoConfig

from lens_core._registry import active_registry, load_implementation
from lens_core.hook_points import HookPoint
from lens_core.plugin import Architecture, LensConfig

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {"gpt2": "hooks.md", **{name: f"models/{name}.md" for name in ("llama", "mamba", "mamba2")}}
CONFIGS = {"llama": {"num_key_value_heads": 8}}
"""What a config holds beside HF's defaults, to show every name."""


def table(architecture: Architecture) -> str:
    """Give the table in Markdown; block 0 stands for all blocks, and the first model type for its kin."""
    model_type = architecture.model_types[0]
    config = AutoConfig.for_model(model_type, **CONFIGS.get(model_type, {}))
    declaration = load_implementation(architecture)(config)
    widths = _widths(declaration.cfg)
    rows = [_row(point, widths) for point in declaration.points if not point.layer]
    return "\n".join(("| hook point | shape | equation |", "|---|---|---|", *rows))


def _widths(cfg: LensConfig) -> dict[str, str]:
    """Say what the widths of an SSM's fused projections are made of."""
    if cfg.d_inner is None:
        return {}
    if cfg.n_groups is None:
        words = {2 * cfg.d_inner: "2·d_inner", (cfg.dt_rank or 0) + 2 * (cfg.d_state or 0): "dt_rank+2·d_state"}
    else:
        shared, heads = 2 * cfg.n_groups * (cfg.d_state or 0), cfg.n_heads or 0
        words = {
            cfg.d_inner + shared: "d_inner+2·n_groups·d_state",
            2 * cfg.d_inner + shared + heads: "2·d_inner+2·n_groups·d_state+n_heads",
        }
    return {str(width): word for width, word in words.items()}


def _row(point: HookPoint, widths: dict[str, str]) -> str:
    shape = " ".join(widths.get(axis, axis) for axis in point.shape.split())
    name = point.name if point.layer is None else f"blocks.L.{point.part}"
    star = "" if point.default else " \\*"
    equation = point.equation.replace("|", "\\|").replace("*", "\\*")
    return f"| `{name}`{star} | `{shape}` | {equation} |"


if __name__ == "__main__":
    is_check = "--check" in sys.argv[1:]
    first = {record.entry_name: record.architectures[0] for record in active_registry().records if record.architectures}
    written = [
        update(DOCS / page, f"{first[name].name} hook points", table(first[name]), check=is_check)
        for name, page in PAGES.items()
    ]
    sys.exit(max(written))
