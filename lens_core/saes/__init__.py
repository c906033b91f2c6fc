"""Sparse autoencoders: read from disk, spliced into the model, and judged.

`with model.saes([sae]):` makes an SAE's features hook points like any other. `load_sae` reads SAELens' files; any
module with `encode` and `decode` will do.
"""

from lens_core.saes._config import SaeConfig
from lens_core.saes._file import load_sae
from lens_core.saes._module import SparseAutoencoder

__all__ = ["SaeConfig", "SparseAutoencoder", "load_sae"]
