"""Draw the figures of the documentation."""

import sys
from importlib import import_module
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
PAGES = sorted(file.stem for file in FOLDER.glob("*.py") if not file.stem.startswith("_"))

for page in sys.argv[1:] or PAGES:
    torch.manual_seed(0)
    for name, figure in import_module(f"docs.figures.{page}").draw().items():
        figure.savefig(FOLDER.parent / "images" / f"{name}.png", dpi=110, metadata={"Software": None})
        print(f"docs/images/{name}.png")  # noqa: T201
