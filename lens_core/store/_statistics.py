"""Running statistics of what a store holds: resumable, and the same whatever the order of shards."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import attrs
import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from lens_core._arguments import checks_arguments, is_whole
from lens_core.errors import ArgumentError, StoreError
from lens_core.store._layout import Record, StoredPoint, identity
from lens_core.store._moments import Moments
from lens_core.store._picked import Sample, Top, hashes
from lens_core.store._reader import ActivationStore

__all__ = ["Examples", "Kind", "Statistics", "Tally", "number_of"]

Transform: TypeAlias = Callable[[Any], Any]
_BYTES = 1 << 26
_MANY = 1 << 22


@attrs.frozen(kw_only=True, eq=False)
class Examples:
    """The entries with the largest values of each feature, largest first; of equal values, earlier entries first.

    Attributes:
        values: The values.
        entries: Their numbers in the store: for `store.context`, `store.entries`.
    """

    values: Shaped[Tensor, "k ..."]
    entries: Int[Tensor, "k ..."]


@attrs.frozen(kw_only=True)
class Kind:
    """What is counted, and how: two tallies of one kind can be merged."""

    store: str
    """Digest of what the store holds."""
    name: str
    shape: tuple[int, ...] = attrs.field(converter=tuple)
    """Of a value, after the transform."""
    covariance: bool
    sample: int
    top: int
    seed: int


@attrs.frozen(kw_only=True, eq=False)
class Tally:
    """What was counted so far."""

    moments: Moments
    sample: Sample
    top: Top
    seen: Mapping[str, str]
    """The shards, each with the beginning of its checksum."""

    def merged(self, other: "Tally") -> "Tally":
        """Give that of both."""
        return Tally(
            moments=self.moments.merged(other.moments),
            sample=self.sample.merged(other.sample.keys, other.sample.values),
            top=self.top.merged(other.top),
            seen={**self.seen, **other.seen},
        )


class Statistics:
    """Mean, variance, covariance, quantiles, top examples of a hook point, or of what a function makes of its values.

    Moments accumulate in float64. Quantiles come from a sample of entries that seed and entry decide. A shard counts
    when all of it was read: an interruption loses that shard's work, and `update` goes on. Whatever the order of shards
    and the interruptions, sample and examples are the same, and moments to rounding.

    Example:
        >>> import tempfile, lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> texts = ["the cat sat on the mat.", "the dog ran to the park."]
        >>> store = lens.store.harvest(model, texts, tempfile.mkdtemp(), "resid_post", context=6)
        >>> statistics = Statistics.begin(store, ("resid_post", 1), covariance=True, top=2).update(store)
        >>> statistics
        Statistics(blocks.1.hook_resid_post [96], 18 entries of 1 shard)
        >>> statistics.mean.shape, statistics.covariance().shape, statistics.quantile([0.1, 0.9]).shape
        (torch.Size([96]), torch.Size([96, 96]), torch.Size([2, 96]))
        >>> store.context(statistics.examples(store).entries[0, 5], before=1, after=0).shape
        torch.Size([2])
    """

    def __init__(
        self, kind: Kind, tally: Tally, probe: Tensor, point: StoredPoint, transform: Transform | None
    ) -> None:
        self.kind, self.tally, self.probe, self.point, self._transform = kind, tally, probe, point, transform

    @classmethod
    @checks_arguments
    def begin(
        cls,
        store: ActivationStore,
        name: Any,
        *,
        transform: Transform | None = None,
        covariance: bool = False,
        sample: int = 4096,
        top: int = 0,
        seed: int = 0,
    ) -> "Statistics":
        """Make statistics of nothing yet; `update` reads.

        Args:
            store: The store that they will be of.
            name: A hook point.
            transform: Applied to values `[entry, ...]` in their stored dtype before they are counted, without
                gradients: `sae.encode`. It gives `[entry, ...]`, of any shape. What it gives for some fixed entries
                tells it from others when a file of statistics is gone on with.
            covariance: Count products too: `n_features²` float64 numbers. An entry of several axes is flattened.
            sample: Entries that are kept for quantiles, each with all its features; 0 for none.
            top: Entries that are kept for each feature, as examples.
            seed: Of the sample.

        Raises:
            UnknownHookError: The hook point is not stored.
            ArgumentError: Numbers below 0; a transform that does not keep the entries.
        """
        for what, value in (("sample", sample), ("top", top), ("seed", seed)):
            if not is_whole(value, least=0):
                raise ArgumentError(f"{what} is a number from 0 on; got {value!r}")
        point = store[name].point
        probe = _applied(transform, _probed(point))
        features = math.prod(probe.shape[1:])
        kind = Kind(
            store=identity(store.manifest),
            name=point.name,
            shape=tuple(probe.shape[1:]),
            covariance=covariance,
            sample=sample,
            top=top,
            seed=seed,
        )
        return cls(kind, _nothing(kind, features, probe.dtype), probe, point, transform)

    @property
    def count(self) -> int:
        """Entries so far."""
        return self.tally.moments.count

    @property
    def mean(self) -> Float[Tensor, "*feature"]:
        """The mean of each feature."""
        self._need_entries(1)
        return self.tally.moments.mean.reshape(self.kind.shape)

    def variance(self, correction: int = 1) -> Float[Tensor, "*feature"]:
        """Give each feature's variance; the sum of squares is divided by `count - correction`.

        Raises:
            StoreError: Too few entries.
        """
        self._need_entries(1 + correction)
        squares = self.tally.moments.squares
        squares = squares.diagonal() if self.kind.covariance else squares
        return (squares / (self.count - correction)).reshape(self.kind.shape)

    def covariance(self, correction: int = 1) -> Float[Tensor, "n n"]:
        """Give the covariance of the features, flattened.

        Raises:
            ArgumentError: It was not asked for.
            StoreError: Too few entries.
        """
        if not self.kind.covariance:
            raise ArgumentError("products were not counted: begin the statistics with covariance=True")
        self._need_entries(1 + correction)
        return self.tally.moments.squares / (self.count - correction)

    @checks_arguments
    def quantile(self, q: float | Sequence[float]) -> Float[Tensor, "..."]:
        """Give quantiles of each feature in the sample, linear between two values: `[q, ...]`, or `[...]` of a number.

        Raises:
            ArgumentError: Not from 0 to 1; no sample was asked for.
            StoreError: No entries.
        """
        wanted = np.atleast_1d(np.asarray(q, dtype=np.float64))
        if not self.kind.sample or wanted.ndim > 1 or not ((wanted >= 0) & (wanted <= 1)).all():
            raise ArgumentError(f"quantiles go from 0 to 1, and need a sample (of {self.kind.sample}); got {q!r}")
        self._need_entries(1)
        values = self.tally.sample.values
        step = max(_MANY // len(values), 1)
        parts = [
            np.quantile(values[:, at : at + step].to(torch.float64).numpy(), wanted, axis=0)
            for at in range(0, values.shape[1], step)
        ]
        found = torch.as_tensor(np.concatenate(parts, axis=1)).reshape(len(wanted), *self.kind.shape)
        return found if isinstance(q, Sequence) else found[0]

    def quantile_error(self, confidence: float = 0.99) -> float:
        """Bound the error of quantiles, in rank: that of 0.5 lies between the true ones of 0.5 - e and 0.5 + e.

        It holds for all quantiles of a feature at once, with this probability over seeds; 0 where the sample has every
        entry. Source: Dvoretzky, Kiefer and Wolfowitz 1956 with Massart's constant (1990), for draws with replacement:
        sqrt(ln(2 / (1 - confidence)) / 2n). The sample is drawn without, where the spread is smaller.
        """
        if not 0 < confidence < 1:
            raise ArgumentError(f"a confidence lies between 0 and 1; got {confidence!r}")
        if self.count <= self.kind.sample:
            return 0.0
        return math.sqrt(math.log(2 / (1 - confidence)) / (2 * self.kind.sample)) if self.kind.sample else 1.0

    def examples(self, store: ActivationStore) -> Examples:
        """Give the entries with the largest values, as the store numbers them.

        Raises:
            StoreError: Another store, or one that lacks a shard by now.
        """
        self._need_store(store)
        starts = dict(zip(map(number_of, store.records), _starts(store), strict=True))
        top = self.tally.top
        known = torch.tensor(sorted(starts), dtype=torch.int64)
        if not bool(torch.isin(top.shards, known).all()):
            raise StoreError("the store lacks shards that have examples; it is damaged, or was repaired")
        first = torch.tensor([starts[int(shard)] for shard in known], dtype=torch.int64)
        entries = first[torch.searchsorted(known, top.shards.contiguous())] + top.entries if len(known) else top.entries
        shape = (len(top.values), *self.kind.shape)
        return Examples(values=top.values.reshape(shape), entries=entries.reshape(shape))

    def update(self, store: ActivationStore, report: Callable[[int, int], None] | None = None) -> "Statistics":
        """Count the shards of a store that were not counted yet; returns these statistics.

        Args:
            store: The store that they were begun with, which may have grown.
            report: Called after each shard with the entries that are counted, and those that there are; it may save.

        Raises:
            StoreError: Another store, or a shard that was counted with other content.
            ArgumentError: The transform does not keep the entries, or gives another shape.
        """
        self._need_store(store)
        for record, start in zip(store.records, _starts(store), strict=True):
            seen = self.tally.seen.get(record.stem)
            if seen is None:
                self.tally = self.tally.merged(self._of_shard(store, record, start))
            elif seen != record.sha256[:16]:
                raise StoreError(f"the shard {record.stem} was counted with other content: begin the statistics anew")
            if report is not None and seen is None:
                report(self.count, len(store))
        return self

    def merged(self, other: "Statistics") -> "Statistics":
        """Give the statistics of both: of one store, by the same settings, of different shards.

        Raises:
            StoreError: Other settings, another transform, or a shard in both.
        """
        mine, theirs = attrs.asdict(self.kind), attrs.asdict(other.kind)
        unlike = [f"{field}: {mine[field]!r} and {theirs[field]!r}" for field in mine if mine[field] != theirs[field]]
        if unlike:
            raise StoreError(f"these statistics cannot be merged: {unlike[0]}")
        if not _alike(self.probe, other.probe):
            raise StoreError("these statistics cannot be merged: their transforms differ")
        both = sorted(set(self.tally.seen) & set(other.tally.seen))
        if both:
            raise StoreError(f"these statistics cannot be merged: both have the shard {both[0]}")
        return Statistics(self.kind, self.tally.merged(other.tally), self.probe, self.point, self._transform)

    def save(self, path: Any) -> None:
        """Write everything to a safetensors file, whole or not at all; the transform aside.

        Raises:
            StoreError: It cannot be written there.
        """
        from lens_core.store import _statistics_file

        _statistics_file.write(self, path)

    @classmethod
    @checks_arguments
    def load(cls, path: Any, transform: Transform | None = None) -> "Statistics":
        """Read what `save` wrote, to look at or to go on with.

        Args:
            path: The file.
            transform: The one that it was begun with.

        Raises:
            StoreError: Not such a file, or damaged; the transform gives something else than that it was begun with.
        """
        from lens_core.store import _statistics_file

        kind, tally, probe, point = _statistics_file.read(path)
        try:
            is_same = _alike(_applied(transform, _probed(point)), probe)
        except Exception as error:
            raise StoreError(f"the transform fails on entries of {kind.name!r}: {error}") from error
        if not is_same:
            told = "without its transform" if transform is None else "with another transform"
            raise StoreError(f"the statistics of {kind.name!r} cannot go on {told}: give the one they were begun with")
        return cls(kind, tally, probe, point, transform)

    def _of_shard(self, store: ActivationStore, record: Record, start: int) -> Tally:
        """Count a shard, a piece at a time."""
        features, shard = math.prod(self.kind.shape), number_of(record)
        tally = _nothing(self.kind, features, self.probe.dtype)
        keys = hashes(self.kind.seed, shard, record.entries)
        wanted = self.tally.sample.wanted(keys)
        values, size = store[self.kind.name], max(_BYTES // (8 * max(features, 1)), 1)
        for first in range(0, record.entries, size):
            last = min(first + size, record.entries)
            piece = _applied(self._transform, values[start + first : start + last])
            if piece.shape != (last - first, *self.kind.shape):
                raise ArgumentError(f"the transform gave {list(piece.shape)} for {last - first} entries")
            flat = piece.reshape(last - first, features)
            here = wanted[(wanted >= first) & (wanted < last)]
            drawn = torch.stack([keys[here], torch.full_like(here, shard), here], dim=1)
            tally = Tally(
                moments=tally.moments.merged(Moments.of(flat, products=self.kind.covariance)),
                sample=tally.sample.merged(drawn, flat[here - first]),
                top=tally.top.merged(Top.of(self.kind.top, flat, shard, first)) if self.kind.top else tally.top,
                seen={},
            )
        return attrs.evolve(tally, seen={record.stem: record.sha256[:16]})

    def _need_store(self, store: ActivationStore) -> None:
        if identity(store.manifest) != self.kind.store:
            raise StoreError(f"these statistics are of another store than {str(store.path)!r}")

    def _need_entries(self, least: int) -> None:
        if self.count < least:
            raise StoreError(f"there are {self.count} entries so far, and this takes {least}: update with the store")

    def __repr__(self) -> str:
        shards = f"{len(self.tally.seen)} shard{'s' * (len(self.tally.seen) != 1)}"
        return f"Statistics({self.kind.name} {list(self.kind.shape)}, {self.count} entries of {shards})"


def number_of(record: Record) -> int:
    """Number a shard, whatever else is in the store."""
    return (record.source * 10**6 + record.unit) * 10**4 + record.part


def _nothing(kind: Kind, features: int, dtype: torch.dtype) -> Tally:
    return Tally(
        moments=Moments.none(features, products=kind.covariance),
        sample=Sample(
            size=kind.sample,
            keys=torch.empty(0, 3, dtype=torch.int64),
            values=torch.empty(0, features, dtype=dtype),
        ),
        top=Top.none(kind.top, features, dtype),
        seen={},
    )


def _starts(store: ActivationStore) -> list[int]:
    """Give the number of each shard's first entry."""
    ends = np.cumsum([record.entries for record in store.records], dtype=np.int64)
    return [int(end) - record.entries for end, record in zip(ends, store.records, strict=True)]


def _probed(point: StoredPoint) -> Tensor:
    """Make some entries that are always the same, to tell transforms apart."""
    draw = np.frombuffer(b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(64)), dtype=np.uint8)
    flat = np.resize(draw.astype(np.float64) / 128 - 1, (4, math.prod(point.shape)))
    return torch.as_tensor(flat).reshape(4, *point.shape).to(point.torch_dtype)


def _applied(transform: Transform | None, values: Tensor) -> Tensor:
    """Apply a transform, and bring what it gives to the CPU.

    Raises:
        ArgumentError: It gives no tensor of so many entries.
    """
    with torch.no_grad():
        found: Any = values if transform is None else transform(values)
    if not isinstance(found, Tensor) or found.shape[:1] != values.shape[:1]:
        shown = f"one of {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ArgumentError(f"a transform gives a tensor [entry, ...] of {len(values)} entries; got {shown}")
    plain = found.to_dense() if cast("Any", found).is_sparse else found
    return plain.detach().cpu().to(torch.uint8 if plain.dtype == torch.bool else plain.dtype)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two transforms gave the same for the probe, on whatever machines."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    wide = b.to(torch.float64)
    scale = float(wide.abs().max()) if wide.numel() else 0.0
    return torch.allclose(a.to(torch.float64), wide, rtol=1e-2, atol=1e-3 * scale, equal_nan=True)
