"""Time two ways of doing the same, turn by turn.

On a shared machine the speed drifts within seconds. So each measurement of ours stands beside one of plain HF, taken
just before or after it (the order changes every turn), and only ratios or differences of such pairs are summed up.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs

__all__ = ["Pair", "Side", "interleaved", "timed"]


@attrs.frozen(kw_only=True)
class Side:
    """One of the two ways."""

    call: Callable[[], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Entered before the clock starts and left after it stopped."""


@attrs.frozen
class Pair:
    """Seconds by the wall clock and of the processor (all threads), for plain HF and for lens."""

    plain: float
    ours: float
    plain_processor: float
    ours_processor: float


def interleaved(
    plain: Callable[[], Any] | Side,
    ours: Callable[[], Any] | Side,
    *,
    seconds: float,
    at_least: int,
    at_most: int = 60,
    calls: int = 1,
    clock: Callable[[Side, int], tuple[float, float]] | None = None,
    is_warm: bool = False,
) -> list[Pair]:
    """Measure pairs until the time is over, after one call of each that is not measured.

    Args:
        plain: What is compared with.
        ours: What is measured.
        seconds: When to stop, once there are `at_least` pairs.
        at_least: Pairs in any case.
        at_most: Pairs that are enough.
        calls: Calls that make up one measurement, for what is too short to be timed alone.
        clock: Gives wall and processor seconds of one call, where the process itself does not do the work.
        is_warm: Leave out the calls that are not measured: something like them has run.
    """
    measure = clock or timed
    sides = [side if isinstance(side, Side) else Side(call=side) for side in (plain, ours)]
    for side in () if is_warm else sides:
        measure(side, 1)
    pairs: list[Pair] = []
    end = time.perf_counter() + seconds
    while len(pairs) < at_least or (time.perf_counter() < end and len(pairs) < at_most):
        first, second = _turn(len(pairs))
        taken = {first: measure(sides[first], calls), second: measure(sides[second], calls)}
        (plain_wall, plain_cpu), (ours_wall, ours_cpu) = taken[0], taken[1]
        pairs.append(Pair(plain_wall, ours_wall, plain_cpu, ours_cpu))
    return pairs


def _turn(number: int) -> Iterator[int]:
    return iter((0, 1) if number % 2 == 0 else (1, 0))


def timed(side: Side, calls: int) -> tuple[float, float]:
    """Give wall and processor seconds of one call."""
    with side.around():
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(calls):
            side.call()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return wall / calls, processor / calls
