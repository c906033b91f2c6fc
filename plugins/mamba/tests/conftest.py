"""Put the repository's `tests` on the import path: the golden forwards and tiny models there serve plugins."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))
