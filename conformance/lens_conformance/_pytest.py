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
    """With `--lens-conformance`, run the kit's own file, beside files that were named; collect what tests tell."""
    wanted, folder = config.getoption("--lens-conformance"), config.getoption("--lens-report")
    if folder and Path(folder).exists() and not Path(folder).is_dir():
        raise pytest.UsageError(f"--lens-report {folder} is a file; name a folder")
    if wanted:
        _check_types(wanted)
        named = config.args if config.args_source is pytest.Config.ArgsSource.ARGS else []
        config.args[:] = [*named, str(Path(__file__).parent / "suite.py")]
    elif config.getoption("--lens-mutants"):
        raise pytest.UsageError("--lens-mutants is for --lens-conformance TYPE")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Collector(config))


def _check_types(wanted: list[str]) -> None:
    from lens_conformance.runner import find_family
    from lens_core.errors import ArgumentError

    for model_type in wanted:
        try:
            find_family(model_type)
        except ArgumentError as error:
            raise pytest.UsageError(f"--lens-conformance {model_type}: {error}") from error


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
            try:
                report = self._report(model_type, told)
            except Exception as error:  # another type's report must not be lost
                lost = f"no report of {model_type}: {type(error).__name__}: {error}"
                self.config.get_terminal_writer().line(lost)
                continue
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
        given = told.get("outcomes", [])
        levels = {facts.pop("level") for facts in given}
        outcomes = [Outcome(**{**facts, "worst": Worst(**facts["worst"])}) for facts in given]
        return Report(
            model_type=model_type,
            subject=f"type {model_type}",
            level=" and ".join(sorted(levels)),
            seed=self.config.getoption("--lens-seed"),
            versions=versions(model_type),
            outcomes=tuple(sorted(outcomes, key=lambda outcome: order.index(outcome.name))),
            is_whole=sorted(outcome.name for outcome in outcomes) == sorted(order),
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
    from lens_conformance.runner import LEVELS

    if level not in LEVELS:
        raise ValueError(f"level is {', '.join(LEVELS)}; got {level!r}")

    @pytest.mark.parametrize("check", list(all_checks()))
    def test_conformance(check: str, request: pytest.FixtureRequest) -> None:
        try_one(model, check, request, level)

    return test_conformance


def _family(model: "str | Family") -> "Family":
    from lens_conformance.runner import check_known_failures, find_family
    from lens_core.errors import LensError

    try:
        family = find_family(model) if isinstance(model, str) else model
        check_known_failures(family)
    except LensError as error:
        pytest.fail(str(error), pytrace=False)
    return family


def _tell(request: pytest.FixtureRequest, model_type: str, kind: str, facts: dict[str, Any]) -> None:
    request.node.user_properties.append(("lens", {"model_type": model_type, "kind": kind, "facts": facts}))


def try_one(model: "str | Family", name: str, request: pytest.FixtureRequest, level: str) -> None:
    """Try one check; what is absent or not judged is a skip with its reason."""
    import attrs

    from lens_conformance.checks import all_checks
    from lens_conformance.runner import try_after

    family, config = _family(model), request.config
    chosen, seed = config.getoption("--lens-level") or level, config.getoption("--lens-seed")
    outcome = try_after(all_checks()[name], family, level=chosen, seed=seed)
    _tell(request, family.model_type, "outcomes", {**attrs.asdict(outcome), "level": chosen})
    others = [item.nodeid.replace("runs", name) for item in request.session.items if "runs" in item.nodeid]
    is_told = outcome.status == "blocked" and request.node.nodeid in others  # `runs` is tried, and fails, too
    if outcome.status in ("failed", "raised") or (outcome.status == "blocked" and not is_told):
        told = f"{family.model_type}: property {outcome.number}, {outcome.title}\n{outcome.reason}"
        again = f"pytest '{request.node.nodeid}' --lens-level {chosen} --lens-seed {seed}"
        if "lens_conformance/suite.py" in request.node.nodeid:
            again = f"{again} --lens-conformance {family.model_type}"
        pytest.fail(f"{told}\nThe same again: {again}", pytrace=False)
    if outcome.status in ("absent", "not judged", "blocked"):
        pytest.skip(f"{outcome.status}: {outcome.reason}")


def try_mutant(model: "str | Family", name: str, request: pytest.FixtureRequest) -> None:
    """See that every check that is named for a mutant kills it."""
    import attrs

    from lens_conformance.mutants import all_mutants, kills

    family, config = _family(model), request.config
    level = config.getoption("--lens-level") or "default"
    found = kills(all_mutants()[name], family, level=level, seed=config.getoption("--lens-seed"))
    for kill in found:
        _tell(request, family.model_type, "mutants", attrs.asdict(kill))
    survived = [f"{kill.check}: {kill.reason}" for kill in found if kill.status == "survived"]
    if survived:
        pytest.fail(f"{family.model_type}: {all_mutants()[name].title} survived\n" + "\n".join(survived), pytrace=False)
    if all(kill.status != "killed" for kill in found):
        pytest.skip(f"{found[0].status}: {found[0].reason}")
