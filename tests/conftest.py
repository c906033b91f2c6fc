"""Put `tests` on the import path, so that any test can say `from golden.gpt2 import golden`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
