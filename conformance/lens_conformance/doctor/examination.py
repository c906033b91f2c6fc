"""From a model type to a verdict: a proposal that passes the kit, or what does not fit."""

import contextlib
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs

from lens_conformance.doctor.fields import Fields, try_fields
from lens_conformance.doctor.package import Skeleton
from lens_conformance.doctor.proposal import Proposal, propose
from lens_conformance.doctor.tiny import Subject, read_config, tiny
from lens_conformance.doctor.trace import dropouts
from lens_conformance.oracle import forget_pairs
from lens_conformance.report import Outcome, Report
from lens_conformance.runner import LEVELS, Level, run
from lens_core._registry import active_registry
from lens_core.errors import ArgumentError, UnknownModelTypeError
from lens_core.testing import isolated_registry

__all__ = ["Diagnosis", "examine", "installed", "served", "written"]

_USUALLY = {
    "runs": "the description does not fit the module tree, or a place is never reached",
    "declaration": "a size, eps or norm is another than the config's field says",
    "dtypes": "a place that HF computes in another dtype, or a flattened tensor",
    "fires": "a module that HF never calls, or calls twice",
    "equations": "a factor, gate, norm or cast in between, inside attention or the MLP",
    "residual": "something is added outside of any module, or a dropout stands before the sum",
    "decompositions": "something is added outside of any module",
    "purity": "HF writes into a tensor that was read",
    "identity": "HF writes into a tensor that was read",
    "locality": "an edit reaches something that is computed before it",
    "liveness": "a place that HF computes and does not use",
    "padding": "positions are counted without regard to the padding mask",
    "split": "something other than keys and values is remembered between steps",
    "weights": "the layout of a fused projection, or a weight that is used in another way than by a product",
    "configuration": "a config field that changes nothing, or one that nobody declared",
    "capabilities": "something that is declared full does not work with this type",
}


@attrs.frozen(kw_only=True, eq=False)
class Diagnosis:
    """What was found out about a model type.

    Attributes:
        served_by: The plugin that serves it already, where that ended the examination.
        fields: Which config fields the description is right for.
        report: What the kit said; None where there was nothing to try.
    """

    model_type: str
    served_by: str | None = None
    subject: Subject | None = None
    proposal: Proposal | None = None
    fields: Fields | None = None
    skeleton: Skeleton | None = None
    report: Report | None = None

    @property
    def passed(self) -> bool:
        """Whether the type is served, or a proposal passes."""
        return self.served_by is not None or (self.report is not None and self.report.passed)

    @property
    def first_failure(self) -> Outcome | None:
        """The first check that did not hold."""
        return next(iter(self.report.failures), None) if self.report is not None else None

    def lines(self) -> Iterator[str]:
        """Say it, a line each."""
        if self.served_by is not None:
            yield f"{self.model_type} is served already, by {self.served_by}; --force proposes all the same"
            return
        assert self.proposal is not None
        assert self.subject is not None
        yield from self.subject.remarks
        if self.proposal.unfit:
            yield f"{self.model_type}: no Decoder describes it."
            yield from (f"  - {told}" for told in self.proposal.unfit)
            yield from (f"    ({told})" for told in self.proposal.remarks)
            yield "A plugin gives such a place hook points of its own (Decoder.own), or seams: see docs/plugins.md."
            return
        assert self.report is not None
        assert self.skeleton is not None
        assert self.fields is not None
        tried = [outcome for outcome in self.report.outcomes if outcome.status not in ("absent", "not judged")]
        verdict = "passes" if self.passed else "does not pass"
        yield f"{self.model_type}: this {verdict} the kit at level {self.report.level}, {len(tried)} checks."
        yield from ("", self.skeleton.declaration())
        yield from (f"  - {told}" for told in self.proposal.remarks)
        for name, told in self.fields.changing.items():
            yield f"  - {name}={told}; it is left out of config_handled, so that such models refuse to load"
        if (failure := self.first_failure) is not None:
            yield f"First of {len(self.report.failures)} that fail: {failure.name}, {failure.title}:"
            yield f"  {failure.reason}"
            if failure.name in _USUALLY:
                yield f"That usually means: {_USUALLY[failure.name]}."

    def to_json(self) -> dict[str, Any]:
        """Give it as plain values."""
        proposal, report = self.proposal, self.report
        return {
            "model_type": self.model_type,
            "passed": self.passed,
            "served_by": self.served_by,
            "proposal": None if proposal is None or proposal.unfit else dict(proposal.fields),
            "source": None if self.skeleton is None else self.skeleton.declaration(),
            "unfit": [] if proposal is None else list(proposal.unfit),
            "remarks": [] if proposal is None else list(proposal.remarks),
            "changing_fields": {} if self.fields is None else dict(self.fields.changing),
            "report": None if report is None else report.to_json(),
        }


def served(model_type: str) -> str | None:
    """Name the plugin that serves a model type; None where none does."""
    registry = active_registry()
    try:
        architecture = registry.resolve(model_type)
    except UnknownModelTypeError:
        return None
    return next(record.label for record in registry.records if architecture in record.architectures)


def examine(
    model: str, *, level: Level = "fast", force: bool = False, progress: Callable[[str], None] | None = None
) -> Diagnosis:
    """Propose a `Decoder` for a model type, and try it.

    Args:
        model: A model type of transformers, or a checkpoint's id or folder, of which the config is read.
        level: How many examples of each check are tried.
        force: Whether to do so for a type that a plugin serves, too.
        progress: Called with what begins.

    Raises:
        ArgumentError: Unknown level; no model type, none of a causal decoder, or one that HF cannot build.
    """
    if level not in LEVELS:
        raise ArgumentError(f"level is {', '.join(LEVELS)}; got {level!r}")
    begin = progress if progress is not None else _silent
    begin("reading the config")
    config, remarks = read_config(model)
    kind = config.model_type
    if not force and (label := served(kind)) is not None:
        return Diagnosis(model_type=kind, served_by=label)
    begin("building tiny models")
    subject = tiny(config, remarks)
    begin("trying equations")
    proposal = propose(subject)
    if proposal.unfit:
        return Diagnosis(model_type=kind, subject=subject, proposal=proposal)
    begin("turning the config's flags")
    fields = try_fields(subject, proposal)
    skeleton = written(subject, proposal, fields)
    with installed(skeleton) as family:
        report = run(family, level=level, progress=begin)
    forget_pairs()
    return Diagnosis(
        model_type=kind, subject=subject, proposal=proposal, fields=fields, skeleton=skeleton, report=report
    )


def written(subject: Subject, proposal: Proposal, fields: Fields) -> Skeleton:
    """Put a proposal into words."""
    return Skeleton(
        model_type=subject.model_type,
        proposal=proposal,
        handled=fields.handled,
        config=subject.fields,
        axes=fields.axes,
        dropout=dropouts(subject) if proposal.in_training else {},
    )


def _silent(what: str) -> None:
    pass


@contextlib.contextmanager
def installed(skeleton: Skeleton) -> Iterator[Any]:
    """Write a skeleton into a folder of its own, serve its type from there, and give its family; then forget it."""
    name = skeleton.package
    with tempfile.TemporaryDirectory() as folder, _modules_of(name):
        skeleton.write(Path(folder))
        sys.path.insert(0, folder)
        try:
            importlib.invalidate_caches()
            module: ModuleType = importlib.import_module(name)
            family = importlib.import_module(f"{name}.family").FAMILY
            with isolated_registry(module):
                yield family
        finally:
            sys.path.remove(folder)


@contextlib.contextmanager
def _modules_of(package: str) -> Iterator[None]:
    """Put a package's modules aside, where one of that name is imported, and bring them back."""

    def own() -> list[str]:
        return [name for name in sys.modules if name == package or name.startswith(f"{package}.")]

    before = {name: sys.modules.pop(name) for name in own()}
    try:
        yield
    finally:
        for name in own():
            del sys.modules[name]
        sys.modules.update(before)
