"""Llama and its kin: what each model type is, as one description of a decoder."""

from typing import Any

from lens_core.plugin import Declaration, declare
from lens_llama._dense import DENSE
from lens_llama._sparse import SPARSE


def Llama(config: Any) -> Declaration:
    """Declare one of the types of the family at one HF config."""
    return declare({**DENSE, **SPARSE}[config.model_type](config), config)
