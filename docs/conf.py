"""Settings of the documentation. `make docs` builds it with warnings as errors, and without a network."""

import lens_core

project = "lens"
author = "lens contributors"
copyright = author  # noqa: A001 - Sphinx' name
version = release = lens_core.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"lens {release}"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 90

nitpicky = True
nitpick_ignore_regex = [
    # Other projects: their inventories would have to be fetched.
    (r"py:.*", r"(attrs?|collections|jaxtyping|pathlib|torch|transformers|typing)\..*"),
]
