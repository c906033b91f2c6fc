"""The pytest plugin: options, and tests of a model type, one for each check. Imports neither torch nor hypothesis."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lens_conformance.family import Family

__all__ = ["conformance"]


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
    group.addoption("--lens-mutants", action="store_true", help="also see that each mutant is killed")
    group.addoption("--lens-report", metavar="FOLDER", help="write TYPE.json for each model type that was tried")
    group.addoption("--lens-stamp", action="store_true", help="write the certificate where `lens plugins` looks for it")


def pytest_configure(config: pytest.Config) -> None:
    """With `--lens-conformance` and no files, run the kit's own file; collect what tests tell in the main process."""
    if config.getoption("--lens-conformance"):
        config.args[:] = [str(Path(__file__).parent / "suite.py")]
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Collector(config))


class _Collector:
    """Gathers what tests told, which may have run in other processes, and writes the certificates asked for."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.found: dict[str, dict[str, list[Any]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect, by model type and kind."""
        for name, told in report.user_properties if report.when == "call" else ():
            if name == "lens":
                self.found.setdefault(told["model_type"], {}).setdefault(told["kind"], []).append(told["facts"])

    def pytest_sessionfinish(self) -> None:
        """Write."""
        folder, stamps = self.config.getoption("--lens-report"), self.config.getoption("--lens-stamp")
        for model_type, told in self.found.items() if folder or stamps else ():
            report = self._report(model_type, told)
            if folder:
                Path(folder).mkdir(parents=True, exist_ok=True)
                report.save(Path(folder) / f"{model_type}.json")
            if stamps:
                report.stamp()

    def _report(self, model_type: str, told: dict[str, list[Any]]) -> Any:
        from lens_conformance.case import Worst
        from lens_conformance.checks import all_checks
        from lens_conformance.report import Kill, Outcome, Report, versions

        order = list(all_checks())
        outcomes = [Outcome(**{**facts, "worst": Worst(**facts["worst"])}) for facts in told.get("outcomes", [])]
        return Report(
            model_type=model_type,
            subject=f"type {model_type}",
            level=self.config.getoption("--lens-level") or "default",
            seed=self.config.getoption("--lens-seed"),
            versions=versions(model_type),
            outcomes=tuple(sorted(outcomes, key=lambda outcome: order.index(outcome.name))),
            is_whole=len(outcomes) == len(order),
            mutants=tuple(Kill(**facts) for facts in told.get("mutants", [])),
        )


def conformance(model: "str | Family", *, level: str = "default") -> Callable[..., None]:
    """Make a test function that holds a model type to every check of the kit, one test for each.

    `pytest --lens-conformance TYPE --lens-mutants` also sees that the kit would notice if the plugin were wrong.

    Args:
        model: A model type that the kit knows, or a family of your own.
        level: `fast`, `default` or `thorough`, unless `--lens-level` says otherwise.

    Example:
        >>> test_conformance = conformance("gpt2")
    """
    from lens_conformance.checks import all_checks

    @pytest.mark.parametrize("check", list(all_checks()))
    def test_conformance(check: str, request: pytest.FixtureRequest) -> None:
        try_one(model, check, request, level)

    return test_conformance


def _family(model: "str | Family") -> "Family":
    from lens_conformance.runner import find_family

    return find_family(model) if isinstance(model, str) else model


def _tell(request: pytest.FixtureRequest, model_type: str, kind: str, record: Any) -> None:
    import attrs

    told = {"model_type": model_type, "kind": kind, "facts": attrs.asdict(record)}
    request.node.user_properties.append(("lens", told))


def try_one(model: "str | Family", name: str, request: pytest.FixtureRequest, level: str) -> None:
    """Try one check; what is absent or not judged is a skip with its reason."""
    from lens_conformance.checks import all_checks
    from lens_conformance.runner import try_after

    family, config = _family(model), request.config
    chosen, seed = config.getoption("--lens-level") or level, config.getoption("--lens-seed")
    outcome = try_after(all_checks()[name], family, level=chosen, seed=seed)
    _tell(request, family.model_type, "outcomes", outcome)
    if outcome.status in ("failed", "raised"):
        told = f"{family.model_type}: property {outcome.number}, {outcome.title}\n{outcome.reason}"
        again = f"pytest --lens-conformance {family.model_type} --lens-level {chosen} --lens-seed {seed} -k '{name}'"
        pytest.fail(f"{told}\nThe same again: {again}", pytrace=False)
    if outcome.status in ("absent", "not judged"):
        pytest.skip(f"{outcome.status}: {outcome.reason}")


def try_mutant(model: "str | Family", name: str, request: pytest.FixtureRequest) -> None:
    """See that every check that is named for a mutant kills it."""
    from lens_conformance.mutants import all_mutants, kills

    family = _family(model)
    found = kills(all_mutants()[name], family, seed=request.config.getoption("--lens-seed"))
    for kill in found:
        _tell(request, family.model_type, "mutants", kill)
    survived = [f"{kill.check}: {kill.reason}" for kill in found if kill.status == "survived"]
    if survived:
        pytest.fail(f"{family.model_type}: {all_mutants()[name].title} survived\n" + "\n".join(survived), pytrace=False)
    if all(kill.status != "killed" for kill in found):
        pytest.skip(f"{found[0].status}: {found[0].reason}")
