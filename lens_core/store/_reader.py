"""Reading a store: `ActivationStore`."""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import attrs
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments, is_whole
from lens_core.errors import ArgumentError, UnknownHookError
from lens_core.hook_points import HookPoint, HookTable, NameFilter
from lens_core.store._arrow import to_dataset
from lens_core.store._batches import StoreDataset, Stream, batches_of
from lens_core.store._layout import StoredPoint, check_size, read_manifest, records, whole_units
from lens_core.store._mapped import Shards, distinct, numbers
from lens_core.store._rows import Rows

__all__ = ["ActivationStore", "Entries", "StoredActivations"]

_LAYER = 1  # blocks.L.PART
_CHUNK = 1 << 14


@attrs.frozen(kw_only=True, eq=False)
class Entries:
    """What is at entries of a store: where their values come from; of a single entry, tensors without an axis.

    Attributes:
        tokens: Token ids.
        documents: Which document of the source, 0-based; -1 for BOS and separators that packing added.
        offsets: Which of the document's tokens, 0-based; -1 for those.
        positions: Position in the row that was run, 0-based.
        rows: The row's number in the store.
        sources: Which of the manifest's sources, 0-based.
    """

    tokens: Int[Tensor, "*entry"]
    documents: Int[Tensor, "*entry"]
    offsets: Int[Tensor, "*entry"]
    positions: Int[Tensor, "*entry"]
    rows: Int[Tensor, "*entry"]
    sources: Int[Tensor, "*entry"]


class StoredActivations:
    """The values of one hook point, on disk; indexing reads them.

    Example:
        >>> import tempfile, lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> store = lens.store.harvest(model, ["the cat sat on the mat."], tempfile.mkdtemp(), "resid_post", context=6)
        >>> values = store["resid_post", 0]
        >>> values.shape, values[-1].shape, values[[5, 0]].shape
        ((9, 96), torch.Size([96]), torch.Size([2, 96]))
    """

    def __init__(self, shards: Shards, point: StoredPoint) -> None:
        self._shards, self.point = shards, point

    @property
    def shape(self) -> tuple[int, ...]:
        """Entries, then the axes of one."""
        return (len(self), *self.point.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.point.torch_dtype

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._shards)

    def __getitem__(self, index: Any) -> Shaped[Tensor, "..."]:
        """Copy entries, in the order asked: by number, slice, numbers or mask."""
        chosen, is_single = numbers(index, len(self))
        values = self._shards.read(self.point.name, chosen)
        return values[0] if is_single else values

    def __iter__(self) -> Iterator[Shaped[Tensor, "..."]]:
        """Give one entry after the other."""
        size = max(_CHUNK // max(self.point.nbytes, 1), 1)
        for start in range(0, len(self), size):
            yield from self[start : start + size]

    def __repr__(self) -> str:
        return f"StoredActivations({self.point.name}, {self.point.dtype}{list(self.shape)}: entry {self.point.axes})"


class ActivationStore:
    """Activations of a corpus on disk, as `harvest` or `merge` wrote them.

    An entry is a position that was kept, of a row that was run; entries stand in the order of the corpus. Opening reads
    the manifest and the records of the shards that are complete at that moment. Shards are mapped when they are read,
    and values copied: memory holds what was asked for, whatever the size of the store. May be pickled, and read by
    several threads.

    Attributes:
        path: The folder.
        manifest: What is stored: points, model, sources, rules of its rows.
        records: A record for each complete shard, in order.

    Raises:
        StoreError: No store, of another version, or damaged; a shard that is missing or cut short.

    Example:
        >>> import tempfile, lens_core as lens
        >>> model, folder = lens.load("toy:gpt2"), tempfile.mkdtemp()
        >>> texts = ["the cat sat on the mat.", "the dog ran to the park."]
        >>> _ = lens.store.harvest(model, texts, folder, ["resid_post", ("z", 1)], context=6)
        >>> store = ActivationStore(folder)
        >>> store
        ActivationStore(18 entries of 3 hook points, 18 tokens, complete)
        >>> store["z", 1][2:5].shape
        torch.Size([3, 4, 24])
        >>> model.to_str_tokens(store.context(3, before=2, after=1))
        ['the', ' cat', ' sat', ' on']
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        self.manifest = read_manifest(self.path)
        self.records = tuple(records(self.path))
        for record in self.records:
            check_size(record, self.path)
        self._shards = Shards(self.path, self.manifest, self.records)
        self._table = table_of(point.name for point in self.manifest.points)

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._shards)

    @property
    def names(self) -> tuple[str, ...]:
        """The hook points that are stored, in the order of computation."""
        return tuple(point.name for point in self.manifest.points)

    @property
    def n_tokens(self) -> int:
        """Tokens that were run, kept or not; padding is none."""
        return sum(record.tokens for record in self.records)

    @property
    def n_rows(self) -> int:
        """Rows that were run."""
        return sum(record.rows for record in self.records)

    @property
    def nbytes(self) -> int:
        """Size of the shards."""
        return sum(record.nbytes for record in self.records)

    @property
    def n_units(self) -> int:
        """Units of documents, complete or not."""
        return sum(source.n_units for source in self.manifest.sources)

    @cached_property
    def missing(self) -> tuple[tuple[int, int], ...]:
        """The units (source, unit) of documents that are not complete: harvesting goes on with them."""
        whole = whole_units(self.records)
        units = (range(source.n_units) for source in self.manifest.sources)
        return tuple((source, unit) for source, of in enumerate(units) for unit in of if (source, unit) not in whole)

    @property
    def is_complete(self) -> bool:
        """Whether every document is in it."""
        return not self.missing

    @checks_arguments
    def select(self, names: NameFilter) -> tuple[str, ...]:
        """Resolve a name, short form, glob, or a list of these, to hook points of the store; None is all.

        Raises:
            UnknownHookError: One that is not stored.
            EmptyFilterError: A glob that matches nothing.
        """
        return select(self._table, names)

    def __getitem__(self, name: Any) -> StoredActivations:
        """Give the values of a hook point by name or short form; layers count among those stored.

        Raises:
            UnknownHookError: It is not stored, or stands for several.
        """
        found = self.select(cast("Any", name if isinstance(name, tuple) else str(name)))
        if len(found) != 1:
            raise UnknownHookError(f"{name!r} stands for {len(found)} hook points of this store: {_listed(found)}")
        return StoredActivations(self._shards, next(p for p in self.manifest.points if p.name == found[0]))

    def __contains__(self, name: object) -> bool:
        """Whether a name or short form is stored."""
        try:
            return bool(self.select(name))  # pyright: ignore[reportArgumentType]  # whatever it is
        except (UnknownHookError, ArgumentError):
            return False

    def entries(self, index: Any) -> Entries:
        """Say what is at entries: token, document, position in its row.

        Args:
            index: A number, a slice, numbers, or a mask of all.

        Raises:
            ArgumentError: Out of range, or no index.
        """
        chosen, is_single = numbers(index, len(self))
        columns = self._shards.columns(chosen)
        return Entries(**{name: value[0] if is_single else value for name, value in columns.items()})

    @checks_arguments
    def context(self, index: Any, before: int = 8, after: int = 4) -> Int[Tensor, "*entry window"]:
        """Give the token ids around entries, in the row that was run; -1 where it has none.

        Args:
            index: A number, a slice, numbers, or a mask of all.
            before: How many before each; column `before` is the entry's own.
            after: How many after.

        Raises:
            ArgumentError: Out of range, or no index.
        """
        if not is_whole(before, least=0) or not is_whole(after, least=0):
            raise ArgumentError(f"before and after count tokens, 0 or more; got {before!r} and {after!r}")
        chosen, is_single = numbers(index, len(self))
        columns = self._shards.columns(chosen)
        rows, which = distinct(columns["rows"])
        tokens = self._shards.row_columns(rows)["tokens"]
        at = columns["positions"][:, None] + torch.arange(-before, after + 1)
        is_inside = (at >= 0) & (at < tokens.shape[1])
        windows = torch.where(is_inside, tokens[which[:, None], at.clamp(0, max(tokens.shape[1] - 1, 0))], -1)
        return windows[0] if is_single else windows

    def rows(self, index: Any) -> Rows:
        """Give rows as they were run: `tokens`, `documents`, `offsets` and `kept`, each `[row, pos]`, -1 beyond a row.

        Args:
            index: As `Entries.rows` numbers them: a number (then one row), a slice, numbers, or a mask of all.

        Raises:
            ArgumentError: Out of range, or no index.
        """
        chosen, _ = numbers(index, self.n_rows, "row")
        return Rows(**self._shards.row_columns(chosen))

    @checks_arguments
    def batches(
        self,
        names: NameFilter,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
        buffer: int | None = None,
        block: int = 64,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        skip: int = 0,
    ) -> Stream:
        """Give every entry once, in batches, in an order that is random and known.

        Blocks of entries that are contiguous on disk come in a random order; `buffer` entries are in memory at a time,
        a batch aside, and their order is random among them. The sequence follows from `seed`, `epoch`, `buffer` and
        `block`, by torch's `randperm`, which may change with torch's version. Processes, and the workers of a
        `DataLoader`, divide it: each entry is in one batch of one of them.

        Args:
            names: Hook points: a name, short form, glob, a list of these, or None for all.
            batch_size: Entries in a batch; the last of an epoch may have fewer.
            shuffle: False gives the entries in the store's order.
            seed: Of the order.
            epoch: Another order of the same entries for each.
            buffer: Entries in memory, in whole blocks; None is as many as take 256 MiB. Workers share it out.
            block: Entries that are read from one place: larger ones are read faster, smaller ones mixed better.
            rank: This process, of those that share the batches; each has one batch more at most than another.
            world: How many there are.
            drop_last: Leave out what does not give every process as many whole batches.
            skip: Batches of this process to leave out, unread: an interrupted epoch goes on after those it had.

        Returns:
            An iterable of `Batch`, with a length; a torch `IterableDataset`, for a `DataLoader` with `batch_size=None`.

        Raises:
            UnknownHookError: A hook point that is not stored.
            ArgumentError: Sizes below 1, or a rank that there is not.

        Example:
            >>> import tempfile, lens_core as lens
            >>> model = lens.load("toy:gpt2")
            >>> texts = ["the cat sat on the mat.", "the dog ran to the park."]
            >>> store = lens.store.harvest(model, texts, tempfile.mkdtemp(), "resid_post", context=6)
            >>> [tuple(batch["resid_post", 1].shape) for batch in store.batches("resid_post", 8)]
            [(8, 96), (8, 96), (2, 96)]
        """
        return batches_of(
            self,
            names,
            batch_size,
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

    @checks_arguments
    def dataset(self, names: NameFilter = None) -> StoreDataset:
        """Give entries by number as a torch `Dataset`, each `{hook point: value}`; None is all hook points.

        Example:
            >>> import tempfile, torch, lens_core as lens
            >>> model = lens.load("toy:gpt2")
            >>> store = lens.store.harvest(model, ["the cat sat."], tempfile.mkdtemp(), "resid_post", context=6)
            >>> loader = torch.utils.data.DataLoader(store.dataset(("resid_post", 1)), batch_size=3)
            >>> [tuple(batch["blocks.1.hook_resid_post"].shape) for batch in loader]
            [(3, 96), (2, 96)]
        """
        return StoreDataset(self, self.select(names))

    @checks_arguments
    def to_dataset(self, path: Any, names: NameFilter = None) -> Any:
        """Write entries to an Arrow file, a piece at a time, and give it as a `datasets.Dataset`, which maps it.

        Columns are `token`, `document`, `offset`, `position`, `source`, as `Entries` has them, and one for each hook
        point under its canonical name, in lists of fixed size; bfloat16 becomes float32.

        Args:
            path: The file, replaced if it is there.
            names: Hook points: a name, short form, glob, a list of these, or None for all.

        Raises:
            MissingPackageError: The package datasets is not installed.
            StoreError: The file cannot be written.

        Example:
            >>> import tempfile, lens_core as lens
            >>> model = lens.load("toy:gpt2")
            >>> store = lens.store.harvest(model, ["the cat sat."], tempfile.mkdtemp(), ("resid_post", 1), context=6)
            >>> found = store.to_dataset(tempfile.mkdtemp() + "/acts.arrow")
            >>> found.num_rows, len(found[2]["blocks.1.hook_resid_post"])
            (5, 96)
        """
        return to_dataset(self, self.select(names), path)

    def __repr__(self) -> str:
        units = self.n_units
        state = "complete" if self.is_complete else f"{len(self.missing)} of {units} units of documents missing"
        return f"ActivationStore({len(self)} entries of {len(self.names)} hook points, {self.n_tokens} tokens, {state})"

    def _repr_html_(self) -> str:
        lines = [
            [point.name, f"entry {point.axes}".strip(), " × ".join(map(str, (len(self), *point.shape))), point.dtype]
            for point in self.manifest.points
        ]
        columns = ["hook point", "axes", "shape", "dtype"]
        return view.table(lines, columns, title=repr(self))._repr_html_()  # pyright: ignore[reportPrivateUsage]


def table_of(names: Any) -> HookTable:
    """Index names, so that short forms find them."""
    points: list[HookPoint] = []
    for name in names:
        bits = name.split(".")
        layer = int(bits[_LAYER]) if bits[0] == "blocks" and len(bits) > 2 and bits[_LAYER].isdecimal() else None
        points.append(HookPoint(name=name, shape="batch pos", equation="", seam=None, layer=layer))
    return HookTable(points)


@checks_arguments
def select(table: HookTable, names: NameFilter) -> tuple[str, ...]:
    """Resolve a filter over what is stored; None is all.

    Raises:
        UnknownHookError: A name that is not stored; says what is.
    """
    try:
        return table.select(names).names
    except UnknownHookError as error:
        raise UnknownHookError(f"{names!r} is not in this store, which has {_listed(tuple(table))}") from error


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(repr, names[:8])) + more
