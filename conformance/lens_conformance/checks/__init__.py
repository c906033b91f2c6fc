"""The properties of the kit: one record each, in the order of their numbers.

A check takes a case, draws what it tries, and raises AssertionError. What judges it: `hf`, a fresh HF model; `law`, the
model's own values among each other; `golden`, the family's golden forward, without which it is not tried.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import attrs

from lens_conformance.case import Case
from lens_core.plugin import Capability

__all__ = ["Check", "Judge", "all_checks", "check"]

Judge: TypeAlias = Literal["hf", "law", "golden"]
_CHECKS: dict[str, "Check"] = {}


@attrs.frozen(kw_only=True)
class Check:
    """One property.

    Attributes:
        number: Its number in the kit's table.
        name: What reports and mutants call it.
        title: What holds, in a line.
        judge: What judges it.
        prove: Tries one example.
        share: Of the level's number of examples; costly checks try fewer.
        needs: A capability without which it is not tried; then its names must be absent.
    """

    number: int
    name: str
    title: str
    judge: Judge
    prove: Callable[[Case], None]
    share: float = 1.0
    needs: Capability | None = None


def check(
    number: int, title: str, *, judge: Judge, share: float = 1.0, needs: Capability | None = None
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register a function as the check of a property; its name is the check's."""

    def register(prove: Callable[[Case], None]) -> Callable[[Case], None]:
        name = prove.__name__
        if name in _CHECKS:
            raise ValueError(f"two checks are called {name}")
        _CHECKS[name] = Check(number=number, name=name, title=title, judge=judge, prove=prove, share=share, needs=needs)
        return prove

    return register


def all_checks() -> dict[str, Check]:
    """Give every check by name, in the order of the numbers."""
    from lens_conformance.checks import (  # noqa: F401 - they register
        capabilities,
        declaration,
        decoding,
        editing,
        equations,
        gradients,
        model,
        passes,
        reading,
        ssm,
        weights,
    )

    first = ("runs", "declaration", "dtypes")  # in whose messages the others' failures often have their cause
    order = {name: at - len(first) for at, name in enumerate(first)}
    return dict(sorted(_CHECKS.items(), key=lambda item: (order.get(item[0], item[1].number), item[1].number, item[0])))
