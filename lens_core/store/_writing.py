"""The run of a harvest: rows into batches, batches through the model, values to their place in a shard."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import attrs
import torch
from torch import Tensor

from lens_core.store._corpus import Corpus
from lens_core.store._layout import COLUMNS, Manifest, Record, records
from lens_core.store._pipeline import Writer, ahead
from lens_core.store._ranks import Ranks
from lens_core.store._rows import Row, Rows, rows_of_unit, stacked
from lens_core.store._shard import Shard
from lens_core.store._take import Take, fitting

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["Job", "Progress", "run"]

T = TypeVar("T")
_WAITING = 4
"""Batches that wait for the disk; beyond, the model waits."""


@attrs.frozen(kw_only=True)
class Progress:
    """How far a harvest is, in this process.

    Attributes:
        documents: Documents done, of the `n_documents` that fall to this process; those of earlier runs count.
        tokens: Tokens that went through the model since it began, padding left out.
        seconds: Since it began.
    """

    documents: float
    n_documents: int
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


@attrs.frozen(kw_only=True)
class Job:
    """What a process harvests."""

    model: "LensModel"
    corpus: Corpus
    manifest: Manifest
    folder: Path
    batch_size: int
    mine: Ranks
    """Which share of the documents falls to this process."""
    writes: bool = True
    """Whether it writes what it computes: of the processes of a model that is cut over them, the first alone does."""
    report: Callable[[Progress], None] | None

    def units(self) -> range:
        """The units that fall to this process: whatever the number of processes, each to one of them."""
        return range(self.mine.index, self.manifest.sources[0].n_units, self.mine.count)

    def n_documents(self, unit: int) -> int:
        """Count the documents of a unit."""
        return len(self.manifest.sources[0].documents(unit))


@attrs.frozen(kw_only=True)
class _Part:
    """Rows that become a shard; `documents` are done when it begins and when it ends."""

    unit: int
    part: int
    is_last: bool
    rows: Sequence[Row]
    cut: int
    documents: tuple[float, float]


def run(job: Job) -> None:
    """Write every shard of this process's that is not there yet."""
    take = Take({point.name: point.torch_dtype for point in job.manifest.points})
    meter = _Meter(sum(map(job.n_documents, job.units())), job.report)
    with ExitStack() as stack, torch.no_grad():
        unfinished = set[Shard]()
        stack.callback(lambda: [shard.discard() for shard in unfinished])
        writer = stack.enter_context(Writer(_WAITING))
        parts = stack.enter_context(ahead(_parts(job, records(job.folder))))
        live: Any = None
        for part in parts:
            rows = stacked(part.rows, job.manifest.rows)
            if live is None and bool(rows.kept.any()):
                live = stack.enter_context(job.model.running((), (take,)))
            _write(job, part, rows, take, writer, unfinished, meter)


def _parts(job: Job, done: Sequence[Record]) -> Iterator[_Part]:
    """Make the rows of what is not done yet."""
    some = {(record.unit, record.part) for record in done}
    sizes = {record.unit: record.part + 1 for record in done if record.is_last}
    whole = {unit for unit, size in sizes.items() if all((unit, part) in some for part in range(size))}
    documents = 0
    for unit in job.units():
        here, before = job.n_documents(unit), documents
        documents += here
        if unit in whole:
            continue
        rows, cut = rows_of_unit(job.model, job.corpus, job.manifest, unit)
        chunks = _chunks(rows, job.manifest.sources[0].shard_rows) or [[]]
        for index, chunk in enumerate(chunks):
            if (unit, index) in some:
                continue
            is_last = index == len(chunks) - 1
            share = (before + here * index / len(chunks), before + here * (index + 1) / len(chunks))
            yield _Part(unit=unit, part=index, is_last=is_last, rows=chunk, cut=cut if is_last else 0, documents=share)


def _write(
    job: Job, part: _Part, rows: Rows, take: Take, writer: Writer, unfinished: set[Shard], meter: "_Meter"
) -> None:
    """Run the rows of one shard, long ones first, and give the writer what there is to write."""
    counts: list[int] = cast("Any", rows.kept.sum(1)).tolist()
    starts = [0, *accumulate(counts)]
    lengths = rows.lengths
    record = partial(
        Record,
        source=0,
        unit=part.unit,
        part=part.part,
        is_last=part.is_last,
        rows=len(lengths),
        width=rows.tokens.shape[1],
        tokens=sum(lengths),
        entries=starts[-1],
        cut=part.cut,
    )
    shard = _begun(job, record(nbytes=0, sha256=""), rows) if job.writes else None
    if shard is not None:
        unfinished.add(shard)
        writer.do(partial(_place_rows, shard, rows))
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for batch in _chunks(order, job.batch_size):
        pieces = _forward(job.model, rows, batch, lengths[batch[0]], take)
        if shard is not None:
            writer.do(partial(_place, shard, pieces, _runs([(starts[row], counts[row]) for row in batch])))
        meter.add(sum(lengths[row] for row in batch), part.documents, len(batch) / len(lengths))

    def commit(shard: Shard) -> None:
        digest = shard.commit()
        unfinished.discard(shard)
        record(nbytes=shard.nbytes, sha256=digest).write(job.folder)

    if shard is not None:
        writer.do(partial(commit, shard))
    meter.end(part.documents[1])


def _begun(job: Job, record: Record, rows: Rows) -> Shard:
    """Make the file of a shard, with a place for everything."""
    return Shard(
        record.file(job.folder),
        {name: (dtype, tuple(rows.tokens.shape)) for name, dtype in COLUMNS.items()}
        | {point.name: (point.torch_dtype, (record.entries, *point.shape)) for point in job.manifest.points},
        {"format": "lens activation store, a shard"},
    )


def _place_rows(shard: Shard, rows: Rows) -> None:
    for name in COLUMNS:
        shard.write(name, getattr(rows, name))


def _forward(model: "LensModel", rows: Rows, batch: list[int], width: int, take: Take) -> dict[str, Tensor]:
    """Run rows, padded on the right to the longest, and give what is kept of each point, `[entry, ...]`."""
    tokens, kept = rows.tokens[batch, :width], rows.kept[batch, :width]
    if not bool(kept.any()):
        return {}
    mask = tokens >= 0
    padding: dict[str, Any] = {} if bool(mask.all()) else {"attention_mask": mask.long().to(model.input_device)}
    take.aim(kept)
    model.forward(tokens.clamp(min=0).long().to(model.input_device), return_type=None, **padding)
    return take.pieces


def _chunks(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _runs(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join spans (start, count) that follow each other.

    Example:
        >>> _runs([(0, 4), (4, 4), (20, 3)])
        [(0, 8), (20, 3)]
    """
    breaks = [0, *(i for i, (a, b) in enumerate(pairwise(spans), 1) if sum(a) != b[0]), len(spans)]
    return [(spans[i][0], sum(count for _, count in spans[i:j])) for i, j in pairwise(breaks)]


def _place(shard: Shard, pieces: dict[str, Tensor], runs: Sequence[tuple[int, int]]) -> None:
    """Write the entries of a batch, which belong to these runs of the shard's."""
    for name, value in pieces.items():
        plain, at = fitting(name, value), 0
        for start, count in runs:
            shard.write(name, plain[at : at + count], start)
            at += count


class _Meter:
    """Counts, and tells whoever wants to know."""

    def __init__(self, n_documents: int, report: Callable[[Progress], None] | None) -> None:
        self._report, self._n_documents = report, n_documents
        self._began, self._tokens, self._share = time.monotonic(), 0, 0.0

    def add(self, tokens: int, documents: tuple[float, float], share: float) -> None:
        """Count a batch, which is so much of a part."""
        self._tokens += tokens
        self._share += share
        self._tell(documents[0] + (documents[1] - documents[0]) * min(self._share, 1.0))

    def end(self, documents: float) -> None:
        """Count a part."""
        self._share = 0.0
        self._tell(documents)

    def _tell(self, documents: float) -> None:
        if self._report is not None:
            self._report(
                Progress(
                    documents=documents,
                    n_documents=self._n_documents,
                    tokens=self._tokens,
                    seconds=time.monotonic() - self._began,
                )
            )
