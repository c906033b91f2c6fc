"""Settings of the documentation. `make docs` builds it with warnings as errors, and without a network."""

import re
from typing import Any

from sphinx.application import Sphinx

import lens_core

project = "lens"
author = "lens contributors"
copyright = author
version = release = lens_core.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"lens {release}"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_attr_annotations = False
python_maximum_signature_line_length = 90

nitpicky = True
nitpick_ignore_regex = [
    # Other projects: their inventories would have to be fetched.
    (r"py:class", r"Tensor|(collections|contextlib|jaxtyping|os|pathlib|rich|torch|transformers)\..*"),
    # What a report is made of, shown under its public name.
    (r"py:class", r"lens_conformance\.(case|report)\..*"),
    # What a store is made of, described by what shows it.
    (r"py:class", r"lens_core\.store\._(layout|mapped|rows|statistics)\..*"),
    # What a seam is handed when it is installed, shown under its public name; and a type variable.
    (r"py:class", r"Run|lens_core\._(plan|views|watch|call|cache_file|choice)\..*|lens_core\._pieces\._Model"),
]


def _read_markdown(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Bring a docstring to what Sphinx reads: our code spans are Markdown's, and napoleon misreads attributes."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # an empty comment: napoleon takes `What: ...` in the first line for a type
    span = re.compile(r"(?<!`)`([^`]+)`(?!`)(?=(\w?))")
    lines[:] = [span.sub(lambda m: f"``{m[1]}``" + ("\\ " if m[2] else ""), line) for line in lines]


def setup(app: Sphinx) -> None:
    """Read our docstrings before napoleon does."""
    app.connect("autodoc-process-docstring", _read_markdown, priority=400)
