"""Scans h_t = decay_t h_(t-1) + write_t with everything inside them shown, beside HF's own call or in its place.

Which equations decay, write and readout are is the architecture's `Scan`; when which of them is computed is decided
here. HF's own call stands unless a function replaced a value; where gradients are wanted, its value keeps its bits.
"""

from collections.abc import Callable
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lens_core._graph import gradients, with_gradient_of
from lens_core._mixer import MixerCall
from lens_core._recurrence import Stack, walk, walk_segments

__all__ = ["INSIDE_SCAN", "Scan", "run_scan"]

RECURRENCE = ("decay", "ssm_write", "ssm_state")
OUTPUT = ("y", "ssm_output")
INSIDE_SCAN = (*RECURRENCE, *OUTPUT)
"""The parts that every scan has."""


@runtime_checkable
class Scan(Protocol):
    """One call of a scan: its arguments position-first, and its equations."""

    @property
    def selection(self) -> tuple[str, ...]:
        """The parts that `select` shows."""
        ...

    @property
    def start(self) -> Tensor:
        """The state before the first position, `[batch, ...]`."""
        ...

    @property
    def is_reference(self) -> bool:
        """Whether HF's scan is the PyTorch one, of which skip and gate can be split off without changing a bit."""
        ...

    @property
    def is_step(self) -> bool:
        """Whether HF calls the function of a single position."""
        ...

    def own(self) -> tuple[Tensor, Tensor | None]:
        """Make HF's own call: its output `[batch, pos, ...]`, and the last state where HF hands it on."""
        ...

    def telling(self, take: Callable[[Tensor], None]) -> "Scan | None":
        """The same scan, whose HF call gives `take` the state before each position, and always the last state.

        None where HF's call has no such states: a fused kernel, one that scans chunks, a single step.
        """
        ...

    def select(self, call: MixerCall) -> "Scan":
        """Show what the recurrence is made of (step sizes, ...), and take what the functions return."""
        ...

    def decay(self, at: Any) -> Tensor:
        """What a state keeps, at a position or a slice of them."""
        ...

    def write(self, at: Any) -> Tensor:
        """What a state is given, at a position or a slice of them."""
        ...

    def advance(self, position: int, state: Tensor, decay: Tensor | None, write: Tensor | None) -> Tensor:
        """The state at a position, from the one before; decay and write of all positions where they were shown."""
        ...

    def readout(self, position: int, state: Tensor) -> Tensor:
        """What a state gives: y at a position."""
        ...

    def fast(self, call: MixerCall, first: int, stop: int, start: Tensor) -> tuple[Tensor, Tensor]:
        """Run HF's scan over positions without skip and gate: y `[batch, stop - first, ...]` and the last state."""
        ...

    def finish(self, call: MixerCall, y: Tensor) -> Tensor:
        """Show y and the scan's output; give what HF's own call would return, `[batch, pos, ...]`."""
        ...


def run_scan(call: MixerCall, scan: Scan) -> tuple[Tensor, Tensor | None]:
    """Show everything inside a scan; give what HF's call would, and the last state unless that call has seen to it."""
    parts = (*scan.selection, *INSIDE_SCAN)
    with gradients(call.needs_graph(*parts)):
        scan = scan.select(call)
        decay, write = _given(call, scan)
    if (overheard := _overheard(call, scan)) is not None:
        return overheard
    with gradients(call.needs_graph(*parts)):
        found = _recur(call, scan, decay, write)
    if found is None and scan.is_reference and not scan.is_step and call.watched(*OUTPUT):
        y, last = scan.fast(call, 0, call.n_pos, scan.start)  # HF's own scan, only cut open: one run, the same bits
        return scan.finish(call, y), last
    explicit = None
    with gradients(call.needs_graph(*parts)):
        if found is None and call.watched(*OUTPUT):
            found = _plain(call, scan)
        if found is not None:
            explicit = scan.finish(call, found[0])
    if found is not None and explicit is not None and call.edited(*parts):
        return explicit, found[1]
    out, last = scan.own()
    if found is not None and explicit is not None and call.changed(*parts):
        out = with_gradient_of(explicit.to(out.dtype), out)
        last = None if last is None else with_gradient_of(found[1].to(last.dtype), last)
    return out, last


def _given(call: MixerCall, scan: Scan) -> tuple[Tensor | None, Tensor | None]:
    """Show decay and write of all positions, where they are asked for."""
    whole = slice(None)
    decay = call.fire("decay", scan.decay(whole)) if call.watched("decay") else None
    write = call.fire("ssm_write", scan.write(whole)) if call.watched("ssm_write") else None
    return decay, write


def _overheard(call: MixerCall, scan: Scan) -> tuple[Tensor, Tensor | None] | None:
    """Run HF's own scan, which tells each state once, for caches that only keep them; None where that cannot be."""
    watch = call.watches.get("ssm_state")
    if watch is None or watch.entries or watch.needs_graph or call.changed(*scan.selection, "decay", "ssm_write"):
        return None
    states, heard = Stack(call.n_pos), count()

    def take(state: Tensor) -> None:
        if next(heard):  # the first is where it starts
            with torch.no_grad():
                states.add(state)

    telling = scan.telling(take)
    if telling is None:
        return None
    shows_output = call.watched(*OUTPUT)
    out, last = telling.fast(call, 0, call.n_pos, scan.start) if shows_output else telling.own()
    if last is not None:
        take(last)
    if states.count != call.n_pos:
        return None
    watch.begin_positions()
    watch.end_positions(states.whole())
    return (scan.finish(call, out) if shows_output else out), last


def _recur(call: MixerCall, scan: Scan, decay: Tensor | None, write: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Show the state; give y and the last state where anything so far was changed."""
    is_open, is_selected = call.changed("decay", "ssm_write"), call.changed(*scan.selection)

    def advance(position: int, state: Tensor) -> Tensor:
        return scan.advance(position, state, decay, write)

    watch = call.watches.get("ssm_state")
    if watch is None and not is_open:
        return _plain(call, scan) if is_selected else None
    if watch is not None and not scan.is_step and not watch.wants_all and not is_open:
        found = walk_segments(
            call, "ssm_state", scan.start, lambda first, stop, h: scan.fast(call, first, stop, h), scan.readout
        )
    else:
        needs_y = is_selected or is_open or (watch is not None and (bool(watch.entries) or watch.needs_graph))
        y, last = walk(call, "ssm_state", scan.start, advance, scan.readout if needs_y else None)
        found = None if y is None else (y, last)
    return found if call.changed(*scan.selection, *RECURRENCE) else None


def _plain(call: MixerCall, scan: Scan) -> tuple[Tensor, Tensor]:
    """Give y and the last state without looking inside the recurrence."""
    if not scan.is_step:
        return scan.fast(call, 0, call.n_pos, scan.start)
    state = scan.advance(0, scan.start, None, None)
    return scan.readout(0, state)[:, None], state
