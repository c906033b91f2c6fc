"""What became of each check, as a table for people and as JSON for the record."""

import datetime
import json
import math
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import attrs
from rich.markup import escape
from rich.table import Table

from lens_conformance.case import Worst
from lens_core._registry import active_registry
from lens_core.certificates import FORMAT, stamp_folder, versions_of

__all__ = ["Kill", "Outcome", "Report", "Status", "place_of", "versions"]

Status: TypeAlias = Literal["passed", "failed", "raised", "blocked", "known", "absent", "not judged"]
_COLOURS = {"passed": "green", "known": "yellow", "failed": "red", "raised": "red"}


@attrs.frozen(kw_only=True)
class Outcome:
    """One check on one model type.

    Attributes:
        status: `failed`: an assertion of the check; `raised`: an error of another kind; `blocked`: not tried, since the
            check `runs` fails. `known`: it fails where the family says so, and nowhere else. `absent`: the plugin
            declares, with a reason, that it has not what the check is about. `not judged`: what would judge it is not
            there, such as a golden forward.
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
class Kill:
    """What a check said of a mutant.

    Attributes:
        status: `killed`: by an assertion. `survived`: the check passed, or fell over with another error.
        reason: The assertion, or why it was not tried.
    """

    mutant: str
    check: str
    status: Literal["killed", "survived", "absent", "not judged"]
    reason: str = ""


@attrs.frozen(kw_only=True)
class Report:
    """Every check on one model type, or on one checkpoint.

    Attributes:
        subject: What was tried: `type gpt2`, or the checkpoint's name.
        versions: Of python, torch, transformers, the core, the kit and the plugin; and digests of the code of the last.
        made: The day.
        device: Where it ran.
        options: What else was said: of a checkpoint, the text, the examples of each check, layers and memory.
        is_whole: Whether every check was tried; a report of some is no certificate.
        mutants: Which mutants were killed, where that was tried.
    """

    model_type: str
    level: str
    seed: int
    versions: dict[str, str]
    outcomes: tuple[Outcome, ...]
    subject: str = ""
    made: str = attrs.field(factory=lambda: datetime.datetime.now(datetime.UTC).date().isoformat())
    device: str = "cpu"
    dtype: str = "each of float32, bfloat16, float16 and float64"
    options: Mapping[str, Any] = attrs.field(factory=dict)
    is_whole: bool = True
    mutants: tuple[Kill, ...] = ()

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The checks that failed; those that were blocked where none of the others did."""
        failed = tuple(outcome for outcome in self.outcomes if outcome.status in ("failed", "raised"))
        return failed or tuple(outcome for outcome in self.outcomes if outcome.status == "blocked")

    @property
    def survivors(self) -> tuple[Kill, ...]:
        """The mutants that a named check did not kill."""
        return tuple(kill for kill in self.mutants if kill.status == "survived")

    @property
    def passed(self) -> bool:
        """Whether every check was tried and none failed, and no mutant that was tried survived."""
        return bool(self.outcomes) and self.is_whole and not self.failures and not self.survivors

    def to_json(self) -> dict[str, Any]:
        """Give it as plain values."""
        return {"format": FORMAT, "passed": self.passed, **_finite(attrs.asdict(self))}

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def stamp(self) -> Path:
        """Write it where `lens plugins` looks for certificates, and say where."""
        folder = stamp_folder()
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.subject or self.model_type)
        self.save(folder / f"{name}.json")
        return folder / f"{name}.json"

    def lines(self) -> list[str]:
        """Give a line for each check, and what failed on what."""
        rows: list[str] = []
        for outcome in self.outcomes:
            rows.append(
                f"{outcome.number:2d} {outcome.name:20} {outcome.status:10} {outcome.judge:6} "
                f"{outcome.examples:4d} examples {outcome.seconds:6.1f} s  {_told(outcome)}"
            )
            if outcome in self.failures:
                rows.append(f"   {outcome.title}: {outcome.reason}")
        return rows

    def table(self) -> Table:
        """Give the same for a terminal."""
        verdict = "passed" if self.passed else "FAILED" if self.failures or self.survivors else "not whole"
        table = Table(title=f"{self.subject or self.model_type}, level {self.level}: {verdict}", caption=self._judges())
        for heading in ("", "property", "judged by", "examples", "worst error", "what became of it"):
            table.add_column(heading, overflow="fold")
        for outcome in self.outcomes:
            worst = f"{outcome.worst.off:.1e} of {outcome.worst.bound:.0e}" if outcome.worst.bound else ""
            colour = _COLOURS.get(outcome.status, "dim")
            told = f"[{colour}]{outcome.status}[/{colour}]" + (f": {escape(outcome.reason)}" if outcome.reason else "")
            table.add_row(
                str(outcome.number), escape(outcome.title), outcome.judge, str(outcome.examples or ""), worst, told
            )
        return table

    def _judges(self) -> str:
        """Say what judged how many of the checks that were tried."""
        tried = [outcome for outcome in self.outcomes if outcome.status not in ("absent", "not judged")]
        counts = {"hf": "HuggingFace", "law": "laws among the values", "golden": "an independent forward pass"}
        parts = [f"{sum(o.judge == judge for o in tried)} by {told}" for judge, told in counts.items()]
        left = len(self.outcomes) - len(tried)
        killed = f"; mutants killed: {sum(k.status == 'killed' for k in self.mutants)}" if self.mutants else ""
        return f"judged: {', '.join(parts)}; not tried: {left}{killed}"


def _finite(value: Any) -> Any:
    """Write numbers that JSON has not as text: a shape that differs is off by infinity."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _told(outcome: Outcome) -> str:
    if outcome.status in ("absent", "not judged", "known"):
        return outcome.reason
    return f"worst {outcome.worst.off:.1e} of {outcome.worst.bound:.0e}" if outcome.worst.bound else ""


def place_of(error: BaseException | None) -> str:
    """Say which line of a plugin an error passed last: the innermost frame that is not of lens, HF or the libraries."""
    frames: list[traceback.FrameSummary] = []
    while error is not None:
        frames += traceback.extract_tb(error.__traceback__)
        error = error.__cause__
    inner = ("site-packages", "dist-packages", "lens_core", "lens_conformance", "importlib", "<frozen", "contextlib")
    own = [frame for frame in frames if not any(part in frame.filename for part in inner)]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})" if own else ""


def versions(model_type: str) -> dict[str, str]:
    """Give what a result holds for: the versions, and digests of the code of the core and the plugin."""
    registry = active_registry()
    architecture = registry.resolve(model_type)
    record = next(record for record in registry.records if architecture in record.architectures)
    return versions_of(record, architecture)
