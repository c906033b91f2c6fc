"""Activations of a corpus on disk: `harvest` writes them, `ActivationStore` reads them."""

from lens_core.store._batches import Batch, Batches, StoreDataset
from lens_core.store._harvest import harvest
from lens_core.store._merge import merge
from lens_core.store._reader import ActivationStore, Entries, StoredActivations
from lens_core.store._statistics import Examples, Statistics
from lens_core.store._verify import Fault, verify
from lens_core.store._writing import Progress

__all__ = [
    "ActivationStore",
    "Batch",
    "Batches",
    "Entries",
    "Examples",
    "Fault",
    "Progress",
    "Statistics",
    "StoreDataset",
    "StoredActivations",
    "harvest",
    "merge",
    "verify",
]
