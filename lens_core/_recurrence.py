"""Recurrences h_t = advance(t, h_(t-1)) with hook functions inside: a function's state is where the next one starts."""

from collections.abc import Callable

import torch
from torch import Tensor

from lens_core._mixer import MixerCall
from lens_core._watch import Watch

__all__ = ["Stack", "walk", "walk_segments"]


def walk(
    call: MixerCall,
    part: str,
    start: Tensor,
    advance: Callable[[int, Tensor], Tensor],
    readout: Callable[[int, Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Run a recurrence one position after the other and show every state that somebody asks for.

    Args:
        call: The mixer's forward.
        part: What the state is called; it need not be watched.
        start: The state before the first position, `[batch, ...]`.
        advance: From a position (0-based in this call) and the state before it, the state at it.
        readout: From a position and its state, after the functions, what the state gives there `[batch, ...]`.

    Returns:
        What `readout` gave, `[batch, pos, ...]` (None without one), and the last state.
    """
    watch = call.watches.get(part)
    keeps = watch is not None and bool(watch.sinks)
    if watch is not None:
        watch.begin_positions()
    state, states, given = start, Stack(call.n_pos), Stack(call.n_pos)
    for position in range(call.n_pos):
        state = advance(position, state)
        if watch is not None:
            state = _shown(call, watch, position, state)
        if keeps:
            states.add(state)
        if readout is not None:
            given.add(readout(position, state))
    if watch is not None:
        watch.end_positions(states.whole() if keeps else None)
    return given.whole() if readout is not None else None, state


def walk_segments(
    call: MixerCall,
    part: str,
    start: Tensor,
    scan: Callable[[int, int, Tensor], tuple[Tensor, Tensor]],
    readout: Callable[[int, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Run a recurrence by a fast scan from one position that a function asks for to the next.

    Args:
        call: The mixer's forward.
        part: What the state is called; functions at it name the positions they ask for, and no cache wants them all.
        start: The state before the first position, `[batch, ...]`.
        scan: From first and stop (0-based in this call) and the state before them: what the states of these positions
            give `[batch, stop - first, ...]`, and the last of them.
        readout: As in `walk`.

    Returns:
        What the states give, `[batch, pos, ...]`, and the last state.
    """
    watch = call.watches[part]
    watch.begin_positions()
    first, state, given = 0, start, list[Tensor]()
    for position in watch.positions_asked():
        values, state = scan(first, position + 1, state)
        state = _shown(call, watch, position, state)
        given += [values[:, :-1], readout(position, state)[:, None].to(values.dtype)]
        first = position + 1
    if first < call.n_pos:
        values, state = scan(first, call.n_pos, state)
        given.append(values)
    watch.end_positions(None)
    return torch.cat(given, dim=1), state


def _shown(call: MixerCall, watch: Watch, position: int, state: Tensor) -> Tensor:
    real = None if call.real is None else call.real[:, position : position + 1]
    return watch.fire_position(position, state[:, None], real=real)[:, 0]


class Stack:
    """Values of one position each, joined along a new axis 1; without gradients they are written where they belong."""

    def __init__(self, n_pos: int) -> None:
        self.n_pos = n_pos
        self.values: list[Tensor] = []
        self.joined: Tensor | None = None
        self.count = 0

    def add(self, value: Tensor) -> None:
        """Take the next position's; any after the last is counted and not kept."""
        self.count += 1
        if self.count > self.n_pos:
            return
        if torch.is_grad_enabled():
            self.values.append(value)
            return
        if self.joined is None:
            self.joined = value.new_empty((value.shape[0], self.n_pos, *value.shape[1:]))
        self.joined[:, self.count - 1] = value

    def whole(self) -> Tensor:
        """Give all of them, `[batch, pos, ...]`."""
        return torch.stack(self.values, dim=1) if self.joined is None else self.joined
