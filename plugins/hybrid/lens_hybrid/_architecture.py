"""Hybrids: what each model type is, as one description of a decoder."""

from typing import Any

import attrs

from lens_core.plugin import Declaration, declare
from lens_hybrid._falcon_h1 import FalconH1
from lens_hybrid._types import TYPES


def Hybrid(config: Any) -> Declaration:
    """Declare one of the types at one HF config."""
    if config.model_type == "falcon_h1":
        return FalconH1(config)
    declared = declare(TYPES[config.model_type](config), config)
    return attrs.evolve(declared, restarts_positions=config.model_type == "bamba")
