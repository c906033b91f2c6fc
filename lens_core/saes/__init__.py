"""Sparse autoencoders: read from disk, spliced into the model, and judged.

`with model.saes([sae]):` makes an SAE's features hook points like any other. `load_sae` reads SAELens' files; any
module with `encode` and `decode` will do.
"""

from lens_core.saes._activations import TopActivations, top_activations
from lens_core.saes._attribution import FeatureAttribution, feature_attribution
from lens_core.saes._config import SaeConfig
from lens_core.saes._file import load_sae
from lens_core.saes._module import SparseAutoencoder
from lens_core.saes._quality import SaeQuality, reconstruction_quality

__all__ = [
    "FeatureAttribution",
    "SaeConfig",
    "SaeQuality",
    "SparseAutoencoder",
    "TopActivations",
    "feature_attribution",
    "load_sae",
    "reconstruction_quality",
    "top_activations",
]
