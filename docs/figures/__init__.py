"""The figures of the documentation, each made by running what its page says.

`python -m docs.figures` draws all of them into docs/images, `python -m docs.figures patching lenses` some. It needs
matplotlib, which `make .venv/.real` puts beside the environment: `PYTHONPATH=.venv/real`. A module of this package is
a page of the documentation, and its `draw()` gives figures by the name of their file.
"""
