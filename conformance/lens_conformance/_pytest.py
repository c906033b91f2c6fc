"""The pytest plugin: options, and tests of a model type, one for each check. Imports neither torch nor hypothesis."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lens_conformance.family import Family

__all__ = ["conformance"]

_OUTCOMES: pytest.StashKey[list[tuple[str, Any]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the kit's options."""
    group = parser.getgroup("lens", "the conformance kit of lens")
    group.addoption(
        "--lens-conformance", action="append", metavar="TYPE", help="try this model type (may be given more than once)"
    )
    group.addoption(
        "--lens-level",
        choices=("fast", "default", "thorough"),
        default=None,
        help="about 5, 25 or 300 examples a check",
    )
    group.addoption("--lens-seed", type=int, default=0, help="of what is drawn")
    group.addoption("--lens-report", metavar="FOLDER", help="write TYPE.json for each model type that was tried")


def pytest_configure(config: pytest.Config) -> None:
    """With `--lens-conformance` and no files, run the kit's own file."""
    config.stash[_OUTCOMES] = []
    if config.getoption("--lens-conformance"):
        config.args[:] = [str(Path(__file__).parent / "suite.py")]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the reports that were asked for."""
    folder = session.config.getoption("--lens-report")
    if folder and session.config.stash[_OUTCOMES]:
        from lens_conformance.report import Report, versions

        Path(folder).mkdir(parents=True, exist_ok=True)
        by_type: dict[str, list[Any]] = {}
        for model_type, outcome in session.config.stash[_OUTCOMES]:
            by_type.setdefault(model_type, []).append(outcome)
        from lens_conformance.checks import all_checks

        for model_type, outcomes in by_type.items():
            Report(
                model_type=model_type,
                level=session.config.getoption("--lens-level") or "default",
                seed=session.config.getoption("--lens-seed"),
                versions=versions(model_type),
                outcomes=tuple(outcomes),
                is_whole={outcome.name for outcome in outcomes} == all_checks().keys(),
            ).save(Path(folder) / f"{model_type}.json")


def conformance(model: "str | Family", *, level: str = "default") -> Callable[..., None]:
    """Make a test function that holds a model type to every check of the kit, one test for each.

    Args:
        model: A model type that the kit knows, or a family of your own.
        level: `fast`, `default` or `thorough`, unless `--lens-level` says otherwise.

    Example:
        >>> test_conformance = conformance("gpt2")
    """
    from lens_conformance.checks import all_checks

    @pytest.mark.parametrize("check", list(all_checks()))
    def test_conformance(check: str, request: pytest.FixtureRequest) -> None:
        try_one(model, check, request.config, level)

    return test_conformance


def try_one(model: "str | Family", name: str, config: pytest.Config, level: str) -> None:
    """Try one check; what is absent or not judged is a skip with its reason."""
    from lens_conformance.checks import all_checks
    from lens_conformance.runner import find_family, try_check

    family = find_family(model) if isinstance(model, str) else model
    outcome = try_check(
        all_checks()[name],
        family,
        level=config.getoption("--lens-level") or level,
        seed=config.getoption("--lens-seed"),
    )
    config.stash[_OUTCOMES].append((family.model_type, outcome))
    if outcome.status == "failed":
        pytest.fail(f"{family.model_type}: property {outcome.number}, {outcome.title}\n{outcome.reason}", pytrace=False)
    if outcome.status != "passed":
        pytest.skip(f"{outcome.status}: {outcome.reason}")
