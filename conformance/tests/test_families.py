"""Every family that the kit knows, held to every check; `--lens-level` asks for more or fewer examples.

Where it does not, a type of each family gets the default's number, and its kin the fast level's: all at the default
take a quarter of an hour, which `make conformance ARGS="--lens-level default"` does.
"""

import pytest
from lens_conformance._pytest import try_one
from lens_conformance.checks import all_checks
from lens_conformance.families import known_families

FIRST = ("gpt2", "llama", "mamba", "mamba2")


@pytest.mark.parametrize("model_type", list(known_families()))
@pytest.mark.parametrize("check", list(all_checks()))
def test_conformance(model_type, check, request):
    """A check that is absent or not judged is a skip with its reason."""
    try_one(model_type, check, request, "default" if model_type in FIRST else "fast")
