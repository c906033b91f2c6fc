"""What became of each check, as a table for people and as JSON for the record."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import attrs

from lens_conformance.case import Worst

__all__ = ["Outcome", "Report", "Status", "versions"]

Status: TypeAlias = Literal["passed", "failed", "absent", "not judged"]
FORMAT = 1


@attrs.frozen(kw_only=True)
class Outcome:
    """One check on one model type.

    Attributes:
        status: `absent`: the plugin declares, with a reason, that it has not what the check is about. `not judged`: it
            needs a golden forward, and the family has none.
        reason: Why, where it did not pass.
        examples: That ran to the end.
        worst: The largest error against its bound.
    """

    number: int
    name: str
    title: str
    judge: str
    status: Status
    reason: str = ""
    examples: int = 0
    seconds: float = 0.0
    worst: Worst = attrs.field(factory=Worst)


@attrs.frozen(kw_only=True)
class Report:
    """Every check on one model type.

    Attributes:
        versions: Of python, torch, transformers, the core, the kit and the plugin.
        is_whole: Whether every check was tried; a report of some is no certificate.
    """

    model_type: str
    level: str
    seed: int
    versions: dict[str, str]
    outcomes: tuple[Outcome, ...]
    is_whole: bool = True

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The checks that failed."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")

    @property
    def passed(self) -> bool:
        """Whether every check was tried and none failed."""
        return self.is_whole and not self.failures

    def to_json(self) -> dict[str, Any]:
        """Give it as plain values."""
        return {"format": FORMAT, "passed": self.passed, **attrs.asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    def lines(self) -> list[str]:
        """Give a line for each check, and what failed on what."""
        rows: list[str] = []
        for outcome in self.outcomes:
            worst = f"worst {outcome.worst.off:.1e} of {outcome.worst.bound:.0e}" if outcome.worst.bound else ""
            told = outcome.reason if outcome.status in ("absent", "not judged") else worst
            rows.append(
                f"{outcome.number:2d} {outcome.name:20} {outcome.status:10} {outcome.judge:6} "
                f"{outcome.examples:4d} examples {outcome.seconds:6.1f} s  {told}"
            )
            if outcome.status == "failed":
                rows.append(f"   {outcome.title}: {outcome.reason}")
        return rows


def versions(model_type: str) -> dict[str, str]:
    """Give the versions that a result holds for."""
    from lens_core._registry import active_registry

    package = active_registry().resolve(model_type).implementation.partition(".")[0].partition(":")[0]
    names = {
        "torch": "torch",
        "transformers": "transformers",
        "lens-core": "lens-core",
        "lens-conformance": "lens-conformance",
        "plugin": package.replace("_", "-"),
    }
    found = {"python": platform.python_version()}
    for name, distribution in names.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
