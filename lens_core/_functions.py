"""Slots that HF code looks up by name, filled for a run by a dispatcher and given back as they were.

A slot is one key of a namespace: a module's globals, or an instance's `__dict__`. While any run needs it, the slot
holds one dispatcher that asks the current context which run, if any, wants the call; runs of other threads and other
models see the original. The first run puts the dispatcher in, the last one takes it out.
"""

import threading
from collections.abc import Callable, MutableMapping
from typing import Any

import attrs

from lens_core._context import active_runs

__all__ = ["Slot", "function_slot", "give_back", "take"]

_ABSENT: Any = object()
_lock = threading.Lock()
_taken: dict[tuple[int, str], "_Taken"] = {}


@attrs.frozen(kw_only=True, eq=False)
class Slot:
    """A key of a namespace that HF code reads at call time."""

    namespace: MutableMapping[str, Any]
    name: str
    make: Callable[["Slot", Any], Any]
    """Makes the dispatcher from this slot and the original (what a call would have reached)."""
    original: Any = None
    """What a call reaches when the namespace has no such key (a method, seen from an instance's `__dict__`)."""

    @property
    def key(self) -> tuple[int, str]:
        """Identify the slot, for a run's table of handlers."""
        return (id(self.namespace), self.name)


@attrs.define
class _Taken:
    slot: Slot
    previous: Any
    runs: int = 1


def function_slot(namespace: MutableMapping[str, Any], name: str, *, original: Any = None) -> Slot:
    """Describe a slot of a plain function; a run's handler is called as `handler(original, *args, **kwargs)`."""
    return Slot(namespace=namespace, name=name, make=_function_dispatcher, original=original)


def _function_dispatcher(slot: Slot, original: Any) -> Any:
    key = slot.key

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        for run in active_runs():
            handler = run.handlers.get(key)
            if handler is not None:
                return handler(original, *args, **kwargs)
        return original(*args, **kwargs)

    return dispatch


def take(slot: Slot) -> None:
    """Put the slot's dispatcher in, or count one more run that needs it."""
    with _lock:
        taken = _taken.get(slot.key)
        if taken is not None:
            taken.runs += 1
            return
        previous = slot.namespace.get(slot.name, _ABSENT)
        original = slot.original if previous is _ABSENT else previous
        _taken[slot.key] = _Taken(slot, previous)  # holds the namespace, so its id stays unique
        slot.namespace[slot.name] = slot.make(slot, original)


def give_back(slot: Slot) -> None:
    """Count one run less; the last one restores what was there."""
    with _lock:
        taken = _taken[slot.key]
        taken.runs -= 1
        if taken.runs:
            return
        del _taken[slot.key]
        if taken.previous is _ABSENT:
            del slot.namespace[slot.name]
        else:
            slot.namespace[slot.name] = taken.previous
