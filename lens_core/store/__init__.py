"""Activations of a corpus on disk: `harvest` writes them, `ActivationStore` reads them."""

from lens_core.store._harvest import harvest
from lens_core.store._reader import ActivationStore
from lens_core.store._writing import Progress

__all__ = ["ActivationStore", "Progress", "harvest"]
