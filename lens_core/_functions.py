"""Slots that HF code looks up by name, filled for a run by a dispatcher and given back as they were.

A slot is one key of a namespace: a module's globals, or an instance's `__dict__`. While any run needs it, the slot
holds one dispatcher that asks the current context which run, if any, wants the call; runs of other threads and other
models see the original. The first run puts the dispatcher in, the last one takes it out.
"""

import os
import threading
from collections.abc import Callable, MutableMapping
from typing import Any

import attrs

from lens_core._context import active_runs

__all__ = ["Slot", "function_slot", "give_back", "take"]

_ABSENT: Any = object()
_taken: dict[tuple[int, str], "_Taken"] = {}
# Reentrant: a block may end inside of `take`, when the garbage collector closes a generator there.
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # no other thread is left in the child, to give back what it holds
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


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
    takers: list[object]


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


def take(slot: Slot, taker: object) -> None:
    """Put the slot's dispatcher in, or note one more run that needs it."""
    with _lock:
        taken = _taken.get(slot.key)
        if taken is None:
            previous = slot.namespace.get(slot.name, _ABSENT)
            original = slot.original if previous is _ABSENT else previous
            dispatcher = slot.make(slot, original)
            _taken[slot.key] = _Taken(slot, previous, [taker])  # holds the namespace, so its id stays unique
            slot.namespace[slot.name] = dispatcher
        elif taker not in taken.takers:
            taken.takers.append(taker)


def give_back(slot: Slot, taker: object) -> None:
    """Note that a run needs the slot no longer, if it has taken it; after the last one what was there is restored."""
    with _lock:
        taken = _taken.get(slot.key)
        if taken is None:
            return
        taken.takers[:] = [other for other in taken.takers if other is not taker]
        if taken.takers:
            return
        if taken.previous is _ABSENT:
            slot.namespace.pop(slot.name, None)
        else:
            slot.namespace[slot.name] = taken.previous
        _taken.pop(slot.key)
