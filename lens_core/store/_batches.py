"""Batches of entries in a random order, under bounded memory.

The entries are cut into blocks that are contiguous on disk. Blocks are put in a random order; as many as a buffer holds
are read together, each from one place, and their entries given in a random order. Which entry comes when follows from
the seed, the epoch, and the sizes of store, block and buffer: a process of several, and a worker of several, take their
batches out of that one sequence, and read no others.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from lens_core._arguments import checks_arguments, is_whole
from lens_core.errors import ArgumentError
from lens_core.hook_points import HookTable, NameFilter

if TYPE_CHECKING:
    from lens_core.store._reader import ActivationStore

__all__ = ["Batch", "Batches", "StoreDataset", "batches_of"]

_BUFFER = 1 << 28
_BLOCK = 64

if TYPE_CHECKING:
    Stream: TypeAlias = "Batches"
    _Iterable: TypeAlias = IterableDataset["Batch"]
    _Mapped: TypeAlias = Dataset[dict[str, Tensor]]
else:
    Stream = Any  # torch writes IterableDataset's base in a way that the tests' run-time type checks refuse
    _Iterable, _Mapped = IterableDataset, Dataset


@attrs.frozen(kw_only=True, eq=False)
class Batch:
    """Some entries.

    Attributes:
        entries: Their numbers in the store.
        values: Their values by hook point, each `[entry, ...]`.
    """

    entries: Int[Tensor, " entry"]
    values: Mapping[str, Tensor] = attrs.field(repr=False)

    def __len__(self) -> int:
        """Count the entries."""
        return len(self.entries)

    def __getitem__(self, name: Any) -> Shaped[Tensor, "entry ..."]:
        """Give the values of a hook point by name or short form; layers count among those of the batch.

        Raises:
            UnknownHookError: It is not in the batch, or the name stands for several.
        """
        return self.values[name] if name in self.values else self.values[_table(tuple(self.values)).canonical(name)]

    @property
    def value(self) -> Shaped[Tensor, "entry ..."]:
        """The values, where there is one hook point.

        Raises:
            ArgumentError: There are several.
        """
        if len(self.values) != 1:
            raise ArgumentError(f"the batch has {len(self.values)} hook points, {', '.join(self.values)}: name one")
        return next(iter(self.values.values()))

    def to(self, *args: Any, **kwargs: Any) -> "Batch":
        """Give the batch with its values on a device or in a dtype, as `Tensor.to` does."""
        return attrs.evolve(self, values={name: value.to(*args, **kwargs) for name, value in self.values.items()})

    def pin_memory(self) -> "Batch":
        """Give the batch in pinned memory; `DataLoader(pin_memory=True)` calls this."""
        return attrs.evolve(self, values={name: value.pin_memory() for name, value in self.values.items()})


@lru_cache(maxsize=8)
def _table(names: tuple[str, ...]) -> HookTable:
    from lens_core.store._reader import table_of

    return table_of(names)


@attrs.frozen(kw_only=True)
class _Order:
    """Entries in the order of an epoch, in groups of blocks that a buffer holds."""

    count: int
    block: int
    blocks: int
    """Blocks in a group."""
    seed: int
    epoch: int
    shuffle: bool

    def _generator(self, what: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {self.epoch} {what}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def permuted(self) -> Int[Tensor, " block"]:
        """Give the blocks in order."""
        n_blocks = -(-self.count // self.block)
        return torch.randperm(n_blocks, generator=self._generator("blocks")) if self.shuffle else torch.arange(n_blocks)

    def groups(self, first: int, last: int) -> Iterator[tuple[int, Int[Tensor, " entry"]]]:
        """Give the groups that have some of the places from `first` to `last`: place of the first entry, and all."""
        blocks = self.permuted()
        at, short = 0, len(blocks) * self.block - self.count
        for group, start in enumerate(range(0, len(blocks), self.blocks)):
            chosen = blocks[start : start + self.blocks]
            size = len(chosen) * self.block - short * bool((chosen == len(blocks) - 1).any())
            if at >= last:
                return
            if at + size > first:
                entries = (chosen[:, None] * self.block + torch.arange(self.block)).reshape(-1)
                entries = entries[entries < self.count]
                if self.shuffle:
                    entries = entries[torch.randperm(len(entries), generator=self._generator(f"group {group}"))]
                yield at, entries
            at += size


class Batches(_Iterable):
    """Batches of a store: iterate, or give it to a `DataLoader` with `batch_size=None`.

    Whatever the number of workers, a `DataLoader` gives the same batches in the same order (`in_order`, its default).

    Attributes:
        names: The hook points.
    """

    def __init__(self, store: "ActivationStore", names: Sequence[str], **options: Any) -> None:
        super().__init__()
        self._store, self.names, self._options = store, tuple(names), options

    def epoch(self, epoch: int, skip: int = 0) -> Stream:
        """Give the batches of another epoch: the same entries, in another order."""
        return Batches(self._store, self.names, **{**self._options, "epoch": epoch, "skip": skip})

    @cached_property
    def _span(self) -> range:
        """The batches of the whole sequence that fall to this process."""
        options, size = self._options, self._options["batch_size"]
        rank, world = options["rank"], options["world"]
        if options["drop_last"]:
            each = len(self._store) // size // world
            span = range(rank * each, (rank + 1) * each)
        else:
            whole = -(-len(self._store) // size)
            span = range(whole * rank // world, whole * (rank + 1) // world)
        return span[options["skip"] :]

    def __len__(self) -> int:
        """Count the batches of this process, those skipped left out."""
        return len(self._span)

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches; in a worker of a `DataLoader`, those that fall to it."""
        worker = get_worker_info()
        mine = self._span if worker is None else self._span[worker.id :: worker.num_workers]
        return _read(self._store, self.names, self._order(), self._options["batch_size"], mine)

    def _order(self) -> _Order:
        options = self._options
        return _Order(
            count=len(self._store),
            block=options["block"],
            blocks=max(options["buffer"] // options["block"], 1),
            seed=options["seed"],
            epoch=options["epoch"],
            shuffle=options["shuffle"],
        )


@attrs.frozen(kw_only=True, eq=False)
class _Held:
    """Entries in memory, in the store's order, and the place of each of those that were asked for."""

    asked: Int[Tensor, " entry"]
    places: Int[Tensor, " entry"]
    values: Mapping[str, Tensor]

    def taken(self, start: int, stop: int) -> Batch:
        """Copy some of them, in the order asked."""
        places = self.places[start:stop]
        return Batch(
            entries=self.asked[start:stop], values={name: value[places] for name, value in self.values.items()}
        )


def _read(store: "ActivationStore", names: Sequence[str], order: _Order, size: int, mine: range) -> Iterator[Batch]:
    """Read a group's share of some batches at once, and give it out; a batch may go on in the next group."""
    if not mine:
        return
    ends = partial(min, order.count)
    waiting = list[Batch]()
    for start, entries in order.groups(mine[0] * size, ends((mine[-1] + 1) * size)):
        stop = start + len(entries)
        here = _between(mine, start // size, -(-stop // size))
        spans = [(max(at * size, start) - start, min((at + 1) * size, stop) - start) for at in here]
        if not spans:
            continue
        held = _held(store, names, torch.cat([entries[first:last] for first, last in spans]))
        taken = 0
        for at, (first, last) in zip(here, spans, strict=True):
            waiting.append(held.taken(taken, taken + last - first))
            taken += last - first
            if ends((at + 1) * size) <= stop:
                yield _joined(waiting)
                waiting = []
        del held  # before the next is read


def _held(store: "ActivationStore", names: Sequence[str], asked: Int[Tensor, " entry"]) -> _Held:
    entries, order = asked.sort()
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return _Held(asked=asked, places=places, values={name: store[name][entries] for name in names})


def _between(mine: range, first: int, last: int) -> range:
    """Give those of a range that lie in another.

    Example:
        >>> list(_between(range(3, 40, 5), 8, 19))
        [8, 13, 18]
    """
    before, upto = (max(-(-(end - mine.start) // mine.step), 0) for end in (first, last))
    return mine[before:upto]


def _joined(parts: Sequence[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
    return Batch(entries=torch.cat([part.entries for part in parts]), values=values)


@checks_arguments
def batches_of(
    store: "ActivationStore",
    names: NameFilter,
    batch_size: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    epoch: int = 0,
    buffer: int | None = None,
    block: int = _BLOCK,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = False,
    skip: int = 0,
) -> Stream:
    """Make the batches that `ActivationStore.batches` describes."""
    chosen = store.select(names)
    if buffer is None:
        nbytes = sum(point.nbytes for point in store.manifest.points if point.name in chosen)
        buffer = max(_BUFFER // max(nbytes, 1), 1)
    for name, value in (("batch_size", batch_size), ("buffer", buffer), ("block", block), ("world", world)):
        if not is_whole(value):
            raise ArgumentError(f"{name} is a positive number; got {value!r}")
    for name, value in (("seed", seed), ("epoch", epoch), ("skip", skip), ("rank", rank)):
        if not is_whole(value, least=0):
            raise ArgumentError(f"{name} is a number from 0 on; got {value!r}")
    if rank >= world:
        raise ArgumentError(f"rank counts processes from 0 to {world - 1}, world being {world}; got {rank}")
    return Batches(
        store,
        chosen,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        epoch=epoch,
        buffer=buffer,
        block=block,
        rank=rank,
        world=world,
        drop_last=drop_last,
        skip=skip,
    )


class StoreDataset(_Mapped):
    """Entries by number, for a `DataLoader` or a sampler: each `{hook point: value}`.

    A `DataLoader` asks for a batch at once, which is then read in one go; but its random order reads every entry from
    another place of the disk. `ActivationStore.batches` reads blocks.
    """

    def __init__(self, store: "ActivationStore", names: Sequence[str]) -> None:
        super().__init__()
        self._store, self.names = store, tuple(names)

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._store)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Copy an entry."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # by which plain iteration ends
        return {name: self._store[name][index] for name in self.names}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Copy entries, in the order asked."""
        values = {name: self._store[name][list(indices)] for name in self.names}
        return [{name: value[at] for name, value in values.items()} for at in range(len(indices))]
