"""Reading a store: `ActivationStore`."""

import os
from pathlib import Path

from lens_core.store._layout import read_manifest, records

__all__ = ["ActivationStore"]


class ActivationStore:
    """Activations on disk."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        self.manifest = read_manifest(self.path)
        self.records = records(self.path)

    def __len__(self) -> int:
        return sum(record.entries for record in self.records)
