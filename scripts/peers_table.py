#!/usr/bin/env python
"""Write what was measured of lens and its peers into the documentation.

python scripts/peers_table.py            # write it
python scripts/peers_table.py --check    # exit 1 where it is out of date
"""

import sys
from pathlib import Path

from generated import update

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers.report import read, table  # noqa: E402

if __name__ == "__main__":
    text = table(read(ROOT / "benchmarks" / "peers" / "results"))
    sys.exit(update(ROOT / "docs" / "performance.md", "peers", text, check="--check" in sys.argv[1:]))
