"""Put the repository's `tests` on the import path: tiny models and golden forwards are there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))
