"""Which runs are live in the current context (thread or task): at most one for each HF model, the innermost."""

from collections.abc import Collection, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["activate", "active_run", "active_runs", "retire"]

_runs: ContextVar[Mapping[int, "Run"]] = ContextVar("lens_core_runs", default=MappingProxyType({}))


def active_run(hf_model: Any) -> "Run | None":
    """Give the run that is live for this model in this context."""
    return _live(_runs.get().get(id(hf_model)))


def active_runs() -> Collection["Run"]:
    """Give the live runs of all models in this context."""
    return [live for run in _runs.get().values() if (live := _live(run)) is not None]


def activate(run: "Run") -> None:
    """Make a run the live one of its model, in this context only."""
    _runs.set({**_runs.get(), id(run.hf_model): run})


def retire(run: "Run") -> None:
    """Drop a run that is over from this context; what lies inside of it stays live.

    A block need not end in the context that it began in: a generator may be closed by another thread. What is left
    there is told by `is_over`.
    """
    known = _runs.get()
    if id(run.hf_model) in known:
        live = active_run(run.hf_model)
        others = {key: other for key, other in known.items() if key != id(run.hf_model)}
        _runs.set(others if live is None else {**others, id(run.hf_model): live})


def _live(run: "Run | None") -> "Run | None":
    while run is not None and run.is_over:
        run = run.parent
    return run
