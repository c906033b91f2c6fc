"""Run the command line as `python -m lens_core`."""

import sys

from lens_core._cli import main

sys.exit(main())
