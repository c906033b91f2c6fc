"""Entries that are kept of many: a random sample, and those with the largest values; both can be merged in any order.

An entry is known by the number of its shard in the source (source, unit and part in one) and its number in the shard,
which stay as they are while a store grows. The sample holds the entries with the smallest hash of seed and entry: which
these are depends neither on the order in which shards are seen nor on how many at a time.
"""

import attrs
import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

__all__ = ["Sample", "Top", "hashes"]


def hashes(seed: int, shard: int, count: int) -> Int[Tensor, " entry"]:
    """Give a number from 0 to 2^63 - 1 for each entry of a shard.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), over seed, shard and entry in turn.
    """
    mixed = _mixed(_mixed(np.array([seed % 2**64], dtype=np.uint64)) ^ np.uint64(shard))
    return torch.as_tensor((_mixed(mixed ^ np.arange(count, dtype=np.uint64)) >> np.uint64(1)).astype(np.int64))


def _mixed(x: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@attrs.frozen(kw_only=True, eq=False)
class Sample:
    """The entries with the smallest hashes, by hash.

    Attributes:
        size: The most entries.
    """

    size: int
    keys: Int[Tensor, "entry 3"]
    """Hash, shard, entry."""
    values: Shaped[Tensor, "entry feature"]

    def wanted(self, found: Int[Tensor, " entry"]) -> Int[Tensor, " chosen"]:
        """Say which hashes of a shard may come in, in the order of the shard."""
        chosen = found.argsort(stable=True)[: self.size]
        if len(self.keys) == self.size:
            chosen = chosen[found[chosen] <= self.keys[-1, 0]] if self.size else chosen[:0]
        return chosen.sort().values

    def merged(self, keys: Int[Tensor, "entry 3"], values: Shaped[Tensor, "entry feature"]) -> "Sample":
        """Give the sample of these entries too."""
        every, rows = torch.cat([self.keys, keys]), torch.cat([self.values, values])
        order = torch.arange(len(every))
        for column in (2, 1, 0):
            order = order[every[order, column].argsort(stable=True)]
        order = order[: self.size]
        return Sample(size=self.size, keys=every[order], values=rows[order])


@attrs.frozen(kw_only=True, eq=False)
class Top:
    """For each feature the entries with the largest values, largest first; of equal ones, those of earlier entries.

    Attributes:
        size: The most entries for a feature.
        shards: -1 where a feature has fewer.
    """

    size: int
    values: Shaped[Tensor, "k feature"]
    shards: Int[Tensor, "k feature"]
    entries: Int[Tensor, "k feature"]

    @classmethod
    def none(cls, size: int, features: int, dtype: torch.dtype) -> "Top":
        """Give those of no entries."""
        none = torch.empty(0, features, dtype=torch.int64)
        return cls(size=size, values=torch.empty(0, features, dtype=dtype), shards=none, entries=none)

    @classmethod
    def of(cls, size: int, values: Shaped[Tensor, "entry feature"], shard: int, first: int) -> "Top":
        """Give those of entries of a shard that follow each other; what is not a number is never among them."""
        plain = values.nan_to_num(float("-inf"), float("inf"), float("-inf")) if values.is_floating_point() else values
        size_here = min(size, len(plain))
        if not size_here:
            return attrs.evolve(cls.none(size, plain.shape[1], plain.dtype))
        least = plain.topk(size_here, dim=0).values[-1]
        above, equal = plain > least, plain == least
        places = size_here - above.sum(0)
        chosen = above | (equal & (equal.cumsum(0) <= places))  # exactly so many in each column
        rows = chosen.T.nonzero()[:, 1].reshape(plain.shape[1], size_here).T
        top = cls(
            size=size,
            values=plain.gather(0, rows),
            shards=torch.full_like(rows, shard),
            entries=rows + first,
        )
        return top.merged(cls.none(size, plain.shape[1], plain.dtype))

    def merged(self, other: "Top") -> "Top":
        """Give those of both."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("entries", "shards", "values")]
        entries, shards, values = (torch.cat(pair) for pair in pairs)
        order = entries.argsort(dim=0, stable=True)
        order = order.gather(0, shards.gather(0, order).argsort(dim=0, stable=True))
        order = order.gather(0, values.gather(0, order).argsort(dim=0, descending=True, stable=True))
        order = order[: self.size]
        return Top(
            size=self.size,
            values=values.gather(0, order),
            shards=shards.gather(0, order),
            entries=entries.gather(0, order),
        )
