"""One example of one check: what is chosen for it, and what it compares."""

import contextlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from hypothesis import assume
from torch import Tensor

from lens_conformance.family import Family, KnownFailure
from lens_conformance.float64 import true_float64
from lens_conformance.oracle import Pair, Variant, new_pair, shared_pair

__all__ = ["TIGHT", "Case", "Deck", "NotThereError", "Worst", "difference", "error", "pad", "tokens"]

TIGHT = 1e-9
"""In true float64, of a value's scale: rounding of a few hundred operations stays well below."""


class NotThereError(Exception):
    """A type has not what a check is about, as HF's own config or code shows; says what."""


@attrs.define
class Worst:
    """The largest error that a check saw, against its bound; by hook point where it compares values.

    `note` takes the hook point's name, or a message that begins with it.
    """

    off: float = 0.0
    bound: float = 0.0
    by_name: dict[str, float] = attrs.field(factory=dict)

    def note(self, off: float, bound: float, name: str | None = None) -> None:
        """Take one comparison."""
        if bound and (not self.bound or off / bound >= self.off / self.bound):
            self.off, self.bound = off, bound
        elif not bound:
            self.off = max(self.off, off)
        place = (name or "").partition(" ")[0].rstrip(",:")  # what a message begins with
        if "hook_" in place or place == "logits":
            self.by_name[place] = max(off, self.by_name.get(place, 0.0))


def difference(ours: Tensor, expected: Tensor) -> float:
    """Give the largest difference; infinite where shapes, masked cells or numbers that are none differ."""
    if ours.shape != expected.shape or ours.is_floating_point() != expected.is_floating_point():
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(ours, expected) else math.inf
    hidden = expected == -torch.inf
    if not torch.equal(ours == -torch.inf, hidden):
        return math.inf
    off = (ours.detach().double() - expected.detach().double()).masked_fill(hidden, 0).abs()
    return math.inf if bool(off.isnan().any()) else float(off.max()) if off.numel() else 0.0


def error(ours: Tensor, expected: Tensor) -> float:
    """Give the largest difference over the scale; infinite where shapes or masked cells differ.

    The scale is the root of the mean square, at least 0.1: the largest value would let one channel of thousands, which
    real models have, hide all others.
    """
    seen = expected.detach().double()
    seen = seen.masked_fill(seen == -torch.inf, 0)
    scale = float(seen.square().mean().sqrt()) if expected.is_floating_point() and seen.numel() else 0.1
    return difference(ours, expected) / max(0.1, scale)


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


class Deck:
    """Deals options so that over the examples of a check each comes up as often as any other.

    Drawn one by one, a third of a hundred names is left out after a hundred draws; Hypothesis' own draws, which repeat
    parts of earlier examples on purpose, left half of them out. What a label stands for is dealt until all were there,
    and then anew in another order.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._left: dict[str, list[Any]] = {}

    def deal(self, label: str, pool: Sequence[Any], count: int = 1) -> list[Any]:
        """Give some of a pool, no one twice; pools of one label may differ, as names do with the config."""
        left, found = self._left.setdefault(label, []), list[Any]()
        while len(found) < min(count, len(pool)):
            wanted = next((option for option in left if option in pool and option not in found), None)
            if wanted is None:
                left += self._random.sample(pool, len(pool))  # what only other pools have stays on top
            else:
                left.remove(wanted)
                found.append(wanted)
        return found


class Case:
    """What a check is handed: choices, a pair to try them on, and a place to note errors.

    Hypothesis draws the number that an example's chances come from; everything else follows from it and the deck.
    """

    def __init__(
        self,
        family: Family,
        number: int,
        worst: Worst,
        *,
        deck: Deck,
        variants: Sequence[Variant],
        check: str = "",
        on: KnownFailure | None = None,
    ) -> None:
        self.family, self.worst = family, worst
        self._random, self._deck, self._variants = random.Random(number), deck, variants
        self._on, self._elsewhere = on, [known for known in family.known_failures if known.check == check]
        self.is_paired = False
        self.drawn: list[tuple[str, Any]] = []
        """What was chosen, for a failing report."""

    def exact(self) -> contextlib.AbstractContextManager[None]:
        """Let HF compute in float64 where its code asks for float32, so that wrong by 1e-8 is visible."""
        return true_float64()

    def bound(self, tight: float) -> float:
        """Give the bound for an error that would be `tight` in the dtype that a check asked for."""
        return tight

    def choice(self, options: Sequence[Any], label: str) -> Any:
        """Give one of several; over the examples, each as often as the others."""
        return self._told(label, options[self._deck.deal(label, range(len(options)))[0]])

    def flag(self, label: str) -> bool:
        """Give True or False."""
        return self.choice((False, True), label)

    def integer(self, least: int, most: int, label: str) -> int:
        """Give a number from `least` to `most`, both included; over the examples, each as often as the others."""
        return self._told(label, self._deck.deal(label, range(least, most + 1))[0])

    def some(self, pool: Sequence[Any], label: str, *, least: int = 1, most: int | None = None) -> list[Any]:
        """Give several different ones, in their order in the pool."""
        count = self._random.randint(least, min(len(pool), most or len(pool)))
        chosen = set(self._random.sample(range(len(pool)), count))
        return self._told(label, [option for at, option in enumerate(pool) if at in chosen])

    def deal(self, pool: Sequence[str], count: int = 1) -> list[str]:
        """Give names; over the examples, each as often as the others."""
        return self._told("names", self._deck.deal("names", pool, count))

    def names(self, pool: Sequence[str], *, most: int = 6) -> list[str]:
        """Give some of the names, or all of them."""
        return list(pool) if self.flag("every name") else self.deal(pool, self.integer(1, most, "how many"))

    def _told(self, label: str, value: Any) -> Any:
        self.drawn.append((label, value))
        return value

    def pair(self, dtype: torch.dtype = torch.float32, *, is_own: bool = False, **overrides: Any) -> Pair:
        """Draw a config, an implementation and weights, and give a pair of them."""
        self.is_paired = True
        variant = self._variants[self._deck.deal("variant", range(len(self._variants)))[0]]
        drawn = {**variant.overrides, **overrides}
        if self._on is not None:
            drawn |= self._on.witness
        else:
            config = {**self.family.config, **drawn}
            assume(not any(known.witness.items() <= config.items() for known in self._elsewhere))
        self.drawn += [*drawn.items(), ("attention", variant.attn), ("dtype", dtype)]
        make: Any = new_pair if is_own else shared_pair
        return make(self.family, overrides=drawn, attn=variant.attn, seed=variant.seed, dtype=dtype)

    def tokens(self, *, min_pos: int = 1, max_pos: int = 8, batch: int | None = None) -> Tensor:
        """Draw ids `[batch, pos]`; one row of one token, too."""
        rows = self.integer(1, 3, "rows") if batch is None else batch
        length = self.integer(min_pos, max_pos, "positions")
        return tokens(rows, length, self._told("words", self._random.randint(0, 5)))

    def batch(self, longest: int = 6) -> tuple[Tensor, dict[str, Tensor]]:
        """Give ids, and with them a mask where rows of two lengths are padded on a side that the type takes."""
        side = self.choice(("none", *self.family.paddings), "padding")
        if side == "none":
            return self.tokens(max_pos=longest), {}
        texts = [self.tokens(min_pos=2, max_pos=longest, batch=1)[0] for _ in range(2)]
        ids, mask = pad(texts, side, self.integer(0, 2, "more padding"))
        return ids, {"attention_mask": mask}

    def rows(self, options: Mapping[str, Tensor]) -> list[tuple[int, Tensor] | None]:
        """Give each row of a padded batch with its real positions; one None for a batch without padding."""
        mask = options.get("attention_mask")
        return [None] if mask is None else [(at, row.nonzero().flatten()) for at, row in enumerate(mask)]

    def real(self, name: str, row: tuple[int, Tensor] | None, *values: Tensor) -> list[Tensor]:
        """Cut values down to a row's real positions, and real keys where there is a key axis."""
        if row is None:
            return list(values)
        axes = [axis for axis in (self.family.pos_axis(name), self.family.key_axis(name)) if axis is not None]
        found = [value[row[0] : row[0] + 1] for value in values]
        for axis in axes:
            found = [value.index_select(axis, row[1]) for value in found]
        return found

    def same(self, name: str, ours: Tensor, expected: Tensor, bound: float = TIGHT) -> None:
        """Assert that two values agree, in units of the scale."""
        off, bound = error(ours, expected), self.bound(bound)
        self.worst.note(off, bound, name)
        assert off <= bound, (
            f"{name} is off by {off:.2e} of its scale (bound {bound:.0e}); shape {tuple(ours.shape)}, "
            f"expected {tuple(expected.shape)}"
        )

    def equal(self, what: str, ours: Tensor, expected: Tensor) -> None:
        """Assert that two values are equal bit for bit."""
        if ours.shape != expected.shape or not torch.equal(ours, expected):
            off = error(ours, expected)
            self.worst.note(off, 0.0)
            raise AssertionError(f"{what} is not bit-equal: off by {off:.2e} of its scale")
