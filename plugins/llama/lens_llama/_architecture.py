"""Llama and its kin: what each model type is, as one description of a decoder."""

from typing import Any

import attrs

from lens_core.plugin import Declaration, declare
from lens_llama._dense import DENSE
from lens_llama._sparse import SPARSE


def Llama(config: Any) -> Declaration:
    """Declare one of the types of the family at one HF config; of a model that also takes images, its text stack."""
    text = config.get_text_config(decoder=True)
    found = declare({**DENSE, **SPARSE}[config.model_type](text), text)
    return attrs.evolve(found, cfg=attrs.evolve(found.cfg, model_type=config.model_type))
