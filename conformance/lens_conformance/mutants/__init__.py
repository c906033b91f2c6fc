"""Deliberate breaks of the core and of a plugin's declaration, each with the checks that must notice it.

A kit is worth what it can catch. Each mutant is planted, the checks named for it are tried, and each must fail by an
assertion; a mutant that survives is a failing test. They break no file: what is replaced is put back.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator

import attrs
import pytest

from lens_conformance import oracle
from lens_conformance.checks import all_checks
from lens_conformance.family import Family
from lens_conformance.report import Kill
from lens_conformance.runner import try_check

__all__ = ["Mutant", "all_mutants", "kills", "mutant", "planted"]

Plant = Callable[[pytest.MonkeyPatch, Family], None]
_MUTANTS: dict[str, "Mutant"] = {}


@attrs.frozen(kw_only=True)
class Mutant:
    """One break.

    Attributes:
        name: What the matrix calls it.
        title: What it breaks, in a line.
        plant: Breaks it, by a patch that is taken back.
        killers: Names of the checks each of which must fail.
        needs: Ends of hook names, one of which a type must have for the break to be one.
    """

    name: str
    title: str
    plant: Plant
    killers: tuple[str, ...]
    needs: tuple[str, ...] = ()


def mutant(title: str, *, killers: Collection[str], needs: Collection[str] = ()) -> Callable[[Plant], Plant]:
    """Register a function as a mutant; its name is the mutant's."""

    def register(plant: Plant) -> Plant:
        name = plant.__name__.replace("_", "-")
        if name in _MUTANTS:
            raise ValueError(f"two mutants are called {name}")
        _MUTANTS[name] = Mutant(name=name, title=title, plant=plant, killers=tuple(killers), needs=tuple(needs))
        return plant

    return register


def all_mutants() -> dict[str, Mutant]:
    """Give every mutant by name."""
    from lens_conformance.mutants import core, declared, passes, shown  # noqa: F401 - they register

    return dict(_MUTANTS)


@contextlib.contextmanager
def planted(mutant: Mutant, family: Family) -> Iterator[None]:
    """Plant a mutant until the block ends; models built before or inside are not shared across its bounds."""
    oracle.forget_pairs()
    try:
        with pytest.MonkeyPatch.context() as patch:
            mutant.plant(patch, family)
            yield
    finally:
        oracle.forget_pairs()


def kills(mutant: Mutant, family: Family, *, level: str = "default", seed: int = 0) -> list[Kill]:
    """Plant a mutant and try each check that is named for it."""
    names = oracle.new_pair(family).names()
    if mutant.needs and not any(name.endswith(mutant.needs) for name in names):
        reason = f"{family.model_type} has no {' or '.join(mutant.needs)}"
        return [Kill(mutant=mutant.name, check=killer, status="absent", reason=reason) for killer in mutant.killers]
    return [verdict(mutant, killer, family, level=level, seed=seed) for killer in mutant.killers]


def verdict(mutant: Mutant, check: str, family: Family, *, level: str = "default", seed: int = 0) -> Kill:
    """Plant a mutant and try one check, whether it is named for it or not."""
    with planted(mutant, family):
        outcome = try_check(all_checks()[check], family, level=level, seed=seed)
    if outcome.status in ("absent", "not judged"):
        return Kill(mutant=mutant.name, check=check, status=outcome.status, reason=outcome.reason)
    reason = outcome.reason.partition("\n")[0] if outcome.reason else f"passed {outcome.examples} examples"
    return Kill(
        mutant=mutant.name, check=check, status="killed" if outcome.status == "failed" else "survived", reason=reason
    )
