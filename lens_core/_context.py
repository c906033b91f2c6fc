"""Which runs are live in the current context (thread or task): at most one for each HF model, the innermost."""

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["activated", "active_run", "active_runs"]

_runs: ContextVar[Mapping[int, "Run"]] = ContextVar("lens_core_runs", default=MappingProxyType({}))


def active_run(hf_model: Any) -> "Run | None":
    """Give the run that is live for this model in this context."""
    return _runs.get().get(id(hf_model))


def active_runs() -> Collection["Run"]:
    """Give the live runs of all models in this context."""
    return _runs.get().values()


@contextmanager
def activated(hf_model: Any, run: "Run") -> Generator[None, None, None]:
    """Make a run the live one of its model, in this context only."""
    token = _runs.set({**_runs.get(), id(hf_model): run})
    try:
        yield
    finally:
        _runs.reset(token)
