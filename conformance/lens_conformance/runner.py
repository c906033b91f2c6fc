"""Trying a model type: every check, as many examples as the level says, gated by what the plugin declares."""

import time
from collections.abc import Callable, Collection
from typing import Any, Literal, TypeAlias

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lens_conformance.case import Case, Worst
from lens_conformance.checks import Check, all_checks
from lens_conformance.families import known_families
from lens_conformance.family import Family
from lens_conformance.report import Outcome, Report, versions
from lens_core.errors import ArgumentError
from lens_core.plugin import Architecture, Support

__all__ = ["LEVELS", "Level", "find_family", "run", "try_check"]

Level: TypeAlias = Literal["fast", "default", "thorough"]
LEVELS: dict[str, int] = {"fast": 5, "default": 25, "thorough": 300}
"""Examples of a check of share 1."""


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
    unknown = sorted(set(only) - checks.keys())
    if unknown:
        raise ArgumentError(f"no check {unknown[0]!r}; there are {', '.join(checks)}")
    family = model if isinstance(model, Family) else find_family(model)
    outcomes: list[Outcome] = []
    for name, check in checks.items():
        if only and name not in only:
            continue
        if progress is not None:
            progress(check.title)
        outcomes.append(try_check(check, family, level=level, seed=seed))
    return Report(
        model_type=family.model_type,
        level=level,
        seed=seed,
        versions=versions(family.model_type),
        outcomes=tuple(outcomes),
        is_whole=not only,
    )


def architecture_of(model_type: str) -> Architecture:
    """Find the plugin's descriptor."""
    from lens_core._registry import active_registry

    return active_registry().resolve(model_type)


def try_check(check: Check, family: Family, *, level: str = "default", seed: int = 0) -> Outcome:
    """Try one check on as many examples as the level gives it."""
    facts: dict[str, Any] = {"number": check.number, "name": check.name, "title": check.title, "judge": check.judge}
    if check.needs is not None:
        declared = architecture_of(family.model_type).capabilities[check.needs]
        if declared.support is Support.ABSENT:
            return Outcome(**facts, status="absent", reason=declared.reason)
    if check.judge == "golden" and family.golden is None:
        return Outcome(**facts, status="not judged", reason="the family has no golden forward")
    worst, ran = Worst(), 0

    @hypothesis.seed(seed)
    @settings(
        max_examples=max(1, round(LEVELS[level] * check.share)),
        deadline=None,
        database=None,
        print_blob=False,
        phases=(Phase.generate,),  # examples are small as they are, and to shrink one runs it hundreds of times
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def prove(data: st.DataObject) -> None:
        nonlocal ran
        check.prove(Case(family, data, worst))
        ran += 1

    start = time.perf_counter()
    try:
        prove()
    except Exception as error:  # whatever a plugin raises is a failure of the check
        return Outcome(
            **facts,
            status="failed",
            reason=_told(error),
            examples=ran,
            seconds=time.perf_counter() - start,
            worst=worst,
        )
    status, reason = ("passed", "") if ran else ("failed", "no valid example was drawn, so nothing was shown")
    return Outcome(
        **facts, status=status, reason=reason, examples=ran, seconds=time.perf_counter() - start, worst=worst
    )


def _told(error: BaseException) -> str:
    """Say what happened and on what: the message, and what Hypothesis had drawn."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("Draw ")]
    drawn = "; ".join(note.partition(" (")[2].replace("):", " =", 1) for note in notes if "(" in note)
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return f"{kind}{error}" + (f"\n  drawn: {drawn}" if drawn else "")
