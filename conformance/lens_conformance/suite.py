"""What `pytest --lens-conformance TYPE` runs: every check of every model type that was named, and mutants if asked."""

import pytest

from lens_conformance._pytest import try_mutant, try_one
from lens_conformance.checks import all_checks
from lens_conformance.mutants import all_mutants


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each check, or of each mutant, for each model type."""
    wanted = list(dict.fromkeys(metafunc.config.getoption("--lens-conformance")))
    if "check" in metafunc.fixturenames:
        metafunc.parametrize(("model_type", "check"), [(one, check) for one in wanted for check in all_checks()])
    else:
        names = list(all_mutants()) if metafunc.config.getoption("--lens-mutants") else []
        metafunc.parametrize(("model_type", "mutant"), [(one, mutant) for one in wanted for mutant in names])


def test_conformance(model_type: str, check: str, request: pytest.FixtureRequest) -> None:
    """Hold a model type to one check."""
    try_one(model_type, check, request, "default")


def test_mutant(model_type: str, mutant: str, request: pytest.FixtureRequest) -> None:
    """See that one mutant is killed."""
    try_mutant(model_type, mutant, request)
