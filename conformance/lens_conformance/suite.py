"""What `pytest --lens-conformance TYPE` runs: every check of every model type that was named."""

import pytest

from lens_conformance._pytest import try_one
from lens_conformance.checks import all_checks


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each check for each model type."""
    wanted = metafunc.config.getoption("--lens-conformance")
    metafunc.parametrize(("model_type", "check"), [(one, check) for one in wanted for check in all_checks()])


def test_conformance(model_type: str, check: str, request: pytest.FixtureRequest) -> None:
    """Hold a model type to one check."""
    try_one(model_type, check, request.config, "default")
