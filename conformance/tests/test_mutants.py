"""The kit must be able to fail: every mutant is killed by each check that is named for it, in each family."""

import pytest
from lens_conformance._pytest import try_mutant
from lens_conformance.checks import all_checks
from lens_conformance.mutants import all_mutants

TYPES = ("gpt2", "llama", "mamba", "mamba2")


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("mutant", list(all_mutants()))
def test_a_mutant_is_killed(model_type, mutant, request):
    """A survivor fails; where the family has not what it breaks, the reason is told."""
    try_mutant(model_type, mutant, request)


def test_every_check_kills():
    """No check is without a mutant that it must notice, and no mutant names a check that is not there."""
    killers = {killer for mutant in all_mutants().values() for killer in mutant.killers}
    assert killers == set(all_checks())
