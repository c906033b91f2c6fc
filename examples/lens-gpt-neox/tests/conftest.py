"""Put this distribution and the repository's `tests` on the import path, and let lens know this plugin alone."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[2] / "tests")]


@pytest.fixture(scope="session", autouse=True)
def _registered():
    """Register the plugin as an installed one would be."""
    from lens_core.testing import isolated_registry

    import lens_gpt_neox

    with isolated_registry(lens_gpt_neox):
        yield
