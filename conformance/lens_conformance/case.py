"""One example of one check: what Hypothesis draws for it, and what it compares."""

import math
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from lens_conformance.family import Family
from lens_conformance.oracle import Pair, new_pair, shared_pair

__all__ = ["TIGHT", "Case", "Worst", "error", "pad", "tokens"]

TIGHT = 1e-9
"""In true float64, of a value's scale: rounding of a few hundred operations stays well below."""


@attrs.define
class Worst:
    """The largest error that a check saw, against its bound; by hook point where it compares values."""

    off: float = 0.0
    bound: float = 0.0
    by_name: dict[str, float] = attrs.field(factory=dict)

    def note(self, off: float, bound: float, name: str | None = None) -> None:
        """Take one comparison."""
        if bound and (not self.bound or off / bound >= self.off / self.bound):
            self.off, self.bound = off, bound
        elif not bound:
            self.off = max(self.off, off)
        if name is not None:
            self.by_name[name] = max(off, self.by_name.get(name, 0.0))


def error(ours: Tensor, expected: Tensor) -> float:
    """Give the largest difference over the scale (at least 1); infinite where shapes or masked cells differ."""
    if ours.shape != expected.shape or ours.is_floating_point() != expected.is_floating_point():
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(ours, expected) else math.inf
    hidden = expected == -torch.inf
    if not torch.equal(ours == -torch.inf, hidden):
        return math.inf
    ours, expected = ours.detach().double().masked_fill(hidden, 0), expected.detach().double().masked_fill(hidden, 0)
    if not ours.numel():
        return 0.0
    off = float((ours - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    return math.inf if math.isnan(off) else off


def tokens(batch: int, pos: int, seed: int = 0) -> Tensor:
    """Draw ids of words, `[batch, pos]`."""
    return torch.randint(0, 28, (batch, pos), generator=torch.Generator().manual_seed(seed))


def pad(rows: Sequence[Tensor], side: str, amount: int = 0) -> tuple[Tensor, Tensor]:
    """Pad rows of unequal lengths to a batch, `amount` columns more than needed; give ids and mask."""
    width = max(len(row) for row in rows) + amount
    ids, mask = torch.full((len(rows), width), 28), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, where], mask[index, where] = row, 1
    return ids, mask


class Case:
    """What a check is handed: draws, a pair to try them on, and a place to note errors."""

    def __init__(self, family: Family, data: st.DataObject, worst: Worst) -> None:
        self.family, self._data, self.worst = family, data, worst

    def draw(self, strategy: Any, label: str | None = None) -> Any:
        """Draw from a Hypothesis strategy; the label stands in a failing report."""
        return self._data.draw(strategy, label=label)

    def choice(self, options: Sequence[Any], label: str | None = None) -> Any:
        """Draw one of several."""
        return self.draw(st.sampled_from(list(options)), label)

    def pair(self, dtype: torch.dtype = torch.float32, *, is_own: bool = False, **overrides: Any) -> Pair:
        """Draw a config, an implementation and weights, and give a pair of them."""
        drawn = {field: self.choice(values, field) for field, values in self.family.axes.items()}
        attn = self.choice(self.family.implementations, "attention")
        make: Any = new_pair if is_own else shared_pair
        seed = 0 if is_own else self.choice((0, 1), "seed")
        return make(self.family, overrides={**drawn, **overrides}, attn=attn, seed=seed, dtype=dtype)

    def tokens(self, *, min_pos: int = 1, max_pos: int = 8, batch: int | None = None) -> Tensor:
        """Draw ids `[batch, pos]`; one row of one token, too."""
        rows = self.draw(st.integers(1, 3), "rows") if batch is None else batch
        length = self.draw(st.integers(min_pos, max_pos), "positions")
        return tokens(rows, length, self.draw(st.integers(0, 5), "words"))

    def names(self, pool: Sequence[str], *, most: int = 6) -> list[str]:
        """Draw some of the names, or all of them."""
        some = st.sets(st.sampled_from(list(pool)), min_size=1, max_size=most).map(sorted)
        return self.draw(st.one_of(st.just(list(pool)), some), "names")

    def same(self, name: str, ours: Tensor, expected: Tensor, bound: float = TIGHT) -> None:
        """Assert that two values agree, in units of the scale."""
        off = error(ours, expected)
        self.worst.note(off, bound, name)
        assert off <= bound, (
            f"{name}: off by {off:.2e} of its scale (bound {bound:.0e}); shape {tuple(ours.shape)}, "
            f"expected {tuple(expected.shape)}"
        )

    def equal(self, what: str, ours: Tensor, expected: Tensor) -> None:
        """Assert that two values are equal bit for bit."""
        if ours.shape != expected.shape or not torch.equal(ours, expected):
            off = error(ours, expected)
            self.worst.note(off, 0.0)
            raise AssertionError(f"{what} is not bit-equal: off by {off:.2e} of its scale")
