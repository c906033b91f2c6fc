"""Trying a model type: every check, as many examples as the level says, gated by what the plugin declares."""

import time
from collections.abc import Callable, Collection
from functools import lru_cache, partial
from typing import Any, Literal, TypeAlias

import attrs
import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException, StopTest

from lens_conformance.case import Case, Deck, NotThereError, Worst
from lens_conformance.checks import Check, all_checks
from lens_conformance.families import known_families
from lens_conformance.family import Family, KnownFailure
from lens_conformance.oracle import variants
from lens_conformance.report import Outcome, Report, Status, place_of, versions
from lens_core._registry import active_registry
from lens_core.errors import ArgumentError
from lens_core.plugin import Support

__all__ = ["LEVELS", "Level", "check_known_failures", "find_family", "run", "try_after", "try_check", "try_on"]

Level: TypeAlias = Literal["fast", "default", "thorough"]
LEVELS: dict[str, int] = {"fast": 5, "default": 25, "thorough": 300}
"""Examples of a check of share 1."""
VARIANTS: dict[str, int] = {"fast": 6, "default": 8, "thorough": 48}
"""Tiny models of a type that the examples are tried on."""


def find_family(model_type: str) -> Family:
    """Find a family by model type.

    Raises:
        ArgumentError: Neither the kit nor an installed distribution knows it.
    """
    families = known_families()
    if model_type not in families:
        raise ArgumentError(
            f"no family {model_type!r}; known are {', '.join(sorted(families))}. Give a lens_conformance.Family with a "
            "tiny config, or announce one by an entry point of the group 'lens_conformance.families'"
        )
    return families[model_type]


def run(
    model: str | Family,
    *,
    level: Level = "default",
    only: Collection[str] = (),
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Try every check on a model type.

    Args:
        model: A model type that the kit knows, or a family of your own.
        level: `fast`, `default` or `thorough`: about 5, 25 or 300 examples of each check.
        only: Names of checks; all if empty. A report of some is no certificate.
        seed: Of what is drawn; the same one draws the same.
        progress: Called with each check's title before it is tried.

    Returns:
        What became of each check; `.passed`, `.failures`, `.save(path)`.

    Raises:
        ArgumentError: An unknown model type, level or check.
    """
    if level not in LEVELS:
        raise ArgumentError(f"level is {', '.join(LEVELS)}; got {level!r}")
    checks = all_checks()
    only = (only,) if isinstance(only, str) else only
    unknown = sorted(set(only) - checks.keys())
    if unknown:
        raise ArgumentError(f"no check {unknown[0]!r}; there are {', '.join(checks)}")
    family = model if isinstance(model, Family) else find_family(model)
    check_known_failures(family)
    made_with = versions(family.model_type)  # before anything is tried: no plugin may be there
    outcomes: list[Outcome] = []
    for name, check in checks.items():
        if only and name not in only:
            continue
        if progress is not None:
            progress(check.title)
        outcomes.append(try_after(check, family, level=level, seed=seed))
    return Report(
        model_type=family.model_type,
        subject=f"type {family.model_type}",
        level=level,
        seed=seed,
        versions=made_with,
        outcomes=tuple(outcomes),
        is_whole=not only,
    )


def check_known_failures(family: Family) -> None:
    """See that known failures name checks that there are.

    Raises:
        ArgumentError: One does not.
    """
    for known in family.known_failures:
        if known.check not in all_checks():
            raise ArgumentError(
                f"{family.model_type} has a known failure of {known.check!r}, and there is no such check; there are "
                f"{', '.join(all_checks())}"
            )


def try_after(check: Check, family: Family, *, level: str = "default", seed: int = 0) -> Outcome:
    """Try one check, unless the model does not even run: one cause is then told as one failure."""
    if check.name == "runs" or _runs(family).status in ("passed", "absent"):
        return try_check(check, family, level=level, seed=seed)
    fixed = Outcome(number=check.number, name=check.name, title=check.title, judge=check.judge, status="blocked")
    return attrs.evolve(fixed, reason=f"nothing else is tried while the check `runs` fails: {_runs(family).reason}")


@lru_cache(maxsize=64)
def _runs(family: Family) -> Outcome:
    return try_check(all_checks()["runs"], family, level="fast")


def try_check(check: Check, family: Family, *, level: str = "default", seed: int = 0) -> Outcome:
    """Try one check on as many examples as the level gives it.

    Where the family declares a known failure of it, the check must fail on that witness and pass beside it.
    """
    models = variants(family, count=VARIANTS[level], seed=seed)

    made: list[Case] = []

    def case(number: int, worst: Worst, deck: Deck, on: KnownFailure | None = None) -> Case:
        made.append(Case(family, number, worst, deck=deck, variants=models, check=check.name, on=on))
        return made[-1]

    outcome = try_on(check, family, case, count=max(1, round(LEVELS[level] * check.share)), seed=seed)
    for known in family.known_failures:
        if known.check == check.name and outcome.status in ("passed", "known"):
            made.clear()
            witnessed = try_on(check, family, partial(case, on=known), count=LEVELS["fast"], seed=seed)
            if not any(one.is_paired for one in made):
                witnessed = attrs.evolve(witnessed, status="raised", reason="this check takes no config to fail on")
            outcome = _with_known(outcome, known, witnessed)
    return outcome


def try_on(
    check: Check,
    family: Family,
    case: Callable[[int, Worst, Deck], Case],
    *,
    count: int,
    seed: int,
    no_golden: str = "the family has no golden forward",
) -> Outcome:
    """Try one check on so many cases, each made from a number that Hypothesis draws."""
    fixed = Outcome(number=check.number, name=check.name, title=check.title, judge=check.judge, status="passed")
    if check.needs is not None:
        declared = active_registry().resolve(family.model_type).capabilities[check.needs]
        if declared.support is Support.ABSENT:  # that it is absent indeed, the check `capabilities` tries
            return attrs.evolve(fixed, status="absent", reason=declared.reason)
    if check.judge == "golden" and family.golden is None:
        return attrs.evolve(fixed, status="not judged", reason=no_golden)
    worst, deck, ran, told = Worst(), Deck(seed), 0, list[tuple[str, Any]]()
    failure: BaseException | None = None

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=(Phase.generate,),  # examples are small as they are, and to shrink one runs it hundreds of times
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**62))
    def prove(number: int) -> None:
        nonlocal ran, failure
        if failure is not None:  # Hypothesis runs a failing example again
            raise failure
        example = case(number, worst, deck)
        try:
            check.prove(example)
        except (KeyboardInterrupt, HypothesisException, StopTest):
            raise
        except BaseException as error:  # whatever a plugin raises is a failure of the check; a skip, too
            failure, told[:] = error, example.drawn
            raise
        ran += 1

    start = time.perf_counter()
    try:
        prove()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        failure = failure or error
    status, reason = _judge(failure, told, ran=ran)
    seconds = time.perf_counter() - start
    return attrs.evolve(fixed, status=status, reason=reason, examples=ran, seconds=seconds, worst=worst)


def _with_known(outcome: Outcome, known: KnownFailure, witnessed: Outcome) -> Outcome:
    """Say whether a known failure is still one."""
    told = f"on {dict(known.witness)}, since {known.since}: {known.reason}"
    if witnessed.status == "passed":
        return attrs.evolve(outcome, status="failed", reason=f"passes where it is known to fail; delete that: {told}")
    if witnessed.status != "failed":
        reason = f"cannot be tried where it is known to fail ({witnessed.reason}): {told}"
        return attrs.evolve(outcome, status="failed", reason=reason)
    return attrs.evolve(outcome, status="known", reason="; ".join(filter(None, (outcome.reason, told))))


def _judge(failure: BaseException | None, drawn: list[tuple[str, Any]], *, ran: int) -> tuple[Status, str]:
    """Say what became of a check: what happened, and on what."""
    if failure is None:
        return ("passed", "") if ran else ("failed", "no valid example was drawn, so nothing was shown")
    if isinstance(failure, NotThereError):
        return "absent", str(failure)
    on_what = "; ".join(f"{label} = {value!r}" for label, value in drawn)
    kind = "" if isinstance(failure, AssertionError) else f"{type(failure).__name__}: "
    kind_of_place = "" if isinstance(failure, AssertionError) else place_of(failure)
    told = f"{kind}{failure}{kind_of_place}" + (f"\n  drawn: {on_what}" if on_what else "")
    return "failed" if isinstance(failure, AssertionError) else "raised", told
