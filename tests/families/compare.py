"""Runs of a pair, and comparison with golden's in units of the value's own scale."""

from collections.abc import Sequence
from typing import Any

import torch
from families.subject import Pair, Subject
from lens_conformance.case import TIGHT, difference
from lens_conformance.edits import Edit
from torch import Tensor

TOLERANCE = TIGHT


def error(ours: Tensor, expected: Tensor) -> float:
    """Give the largest difference over the largest value (at least 1); infinite where shapes or masked cells differ."""
    seen = expected.detach().double()
    scale = float(seen.masked_fill(seen == -torch.inf, 0).abs().max()) if seen.numel() else 1.0
    return difference(ours, expected) / max(1.0, scale)


def same(name: str, ours: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Assert that a value is golden's, and say what is off."""
    assert tuple(ours.shape) == tuple(expected.shape), f"{name}: shape {tuple(ours.shape)}, not {tuple(expected.shape)}"
    off = error(ours, expected)
    assert off <= tolerance, f"{name}: off by {off:.2e}"


def part(subject: Subject, name: str, value: Tensor, start: int, stop: int) -> Tensor:
    """Cut a whole run's value down to a call's positions, and to the keys that exist by then."""
    pos, key = subject.pos_axis(name), subject.key_axis(name)
    value = value if pos is None else value.narrow(pos, start, stop - start)
    return value if key is None else value.narrow(key, 0, stop)


def real_part(subject: Subject, name: str, value: Tensor, row: int, real: Tensor) -> Tensor:
    """Take one row's real positions, and real keys where there is a key axis."""
    value = value[row : row + 1]
    for axis in (subject.pos_axis(name), subject.key_axis(name)):
        value = value if axis is None else value.index_select(axis, real)
    return value


def run(
    one: Pair, tokens: Tensor, entries: Sequence[Any] = (), names: Sequence[str] | None = None, **options: Any
) -> tuple[Tensor, Any]:
    """Run with the entries and cache the names (all of them by default), without a graph."""
    with torch.no_grad(), one.model.hooks(fwd_hooks=list(entries)):
        return one.model.run_with_cache(tokens, names_filter=list(names or one.names()), **options)


def check(one: Pair, tokens: Tensor, entries: Sequence[Any], edits: dict[str, Edit], **options: Any) -> None:
    """Compare logits and every value with golden's under the same edits, and see that the edits do something."""
    plain = one.plain_logits(tokens, **options)
    expected, values = one.golden(tokens, edits=edits, **options)
    assert (expected - plain).abs().max() > 1e-3, f"{list(edits)}: the edit moves nothing, so it tests nothing"
    logits, cache = run(one, tokens, entries, **options)
    off = {name: error(cache[name], values[name]) for name in one.names()}
    off = {name: value for name, value in off.items() if not value <= TOLERANCE}
    off |= {"logits": error(logits, expected)} if not error(logits, expected) <= TOLERANCE else {}
    assert not off, f"edit at {list(edits)}: off at {off}"
