"""Run a corpus through a model and write what is at some hook points: `harvest`."""

import errno
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lens_core._arguments import checks_arguments, is_whole
from lens_core._positions import read_positions
from lens_core._shards import find_shards
from lens_core.errors import ArgumentError, StoreError
from lens_core.hook_points import NameFilter
from lens_core.store._corpus import Corpus, open_corpus
from lens_core.store._layout import (
    DTYPES,
    Manifest,
    RowRules,
    StoredPoint,
    check_size,
    difference,
    has_manifest,
    read_manifest,
    records,
)
from lens_core.store._origin import origin_of
from lens_core.store._ranks import Ranks, claimed, ranks
from lens_core.store._reader import ActivationStore
from lens_core.store._rows import row_rules
from lens_core.store._take import chosen_points, probed
from lens_core.store._writing import Job, Progress, run

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["harvest"]

_SHARD_BYTES = 1 << 28
_CHARACTERS = 4  # of a token, in the mean: a guess


@checks_arguments
def harvest(
    model: "LensModel",
    data: Any,
    folder: str | os.PathLike[str],
    names: NameFilter,
    *,
    context: int | None = None,
    pack: bool = True,
    prepend_bos: bool | None = None,
    positions: Any = None,
    skip_special: bool = False,
    dtype: Any = None,
    batch_size: int = 8,
    column: str | None = None,
    split: str | None = None,
    sample_by: str = "line",
    limit: int | None = None,
    unit_documents: int | None = None,
    shard_rows: int | None = None,
    report: Callable[[Progress], None] | None = None,
) -> ActivationStore:
    """Run documents through a model and store what is at some hook points, at each position that is kept.

    Each forward ends at the last of the hook points: what comes after it, logits among it, is not computed. Documents
    are read and tokenised ahead, and values written behind, while the model runs; memory holds a few batches whatever
    the size of the corpus. Hooks that are live, such as those of a `model.hooks(...)` block, act: what is stored
    follows from them, and nothing in the store says so.

    Interrupted in any way, the same call goes on with the first shard that is not complete, and ends with the same
    store, bit for bit where the model's own forward gives the same bits. Processes that `accelerate launch` or
    `torchrun` started share the work, whatever their number each time; where they run one model together, by tensor
    parallelism, the first of them writes.

    Args:
        model: The model, in evaluation mode.
        data: A file (`.jsonl`, `.json`, `.txt`, `.parquet`), a folder that `datasets.save_to_disk` wrote, the id of a
            data set on the hub, a `datasets.Dataset`, texts, rows of ids, or a tensor of ids `[row, pos]`; ids are
            taken as they are.
        folder: Where the store is made, or goes on.
        names: Hook points whose axes begin with `batch pos`: a name, short form, glob, a list of these.
        context: The most tokens in a row; None is 512, or the model's own where that is less.
        pack: Put documents one after the other, the tokenizer's EOS (else BOS) between, and cut into rows of `context`,
            each beginning with BOS if texts do. Tokens see those of other documents in their row, as in most
            pretraining. False gives each document a row, which ends at `context`.
        prepend_bos: As in `forward`; not with ids.
        positions: Which positions of each row are kept: an int, ints or a slice; negative from the row's end.
        skip_special: Leave out the tokenizer's special tokens, such as BOS: they are run and not kept.
        dtype: What floating values are stored in, a torch dtype or its name; None is the model's own.
        batch_size: Rows in a forward.
        column: Where a data set has its text or ids; None for `text`, `input_ids` or `tokens`.
        split: Of a data set with several.
        sample_by: What a document of a text file is: a `line`, a `paragraph`, the whole `document`.
        limit: Take the first so many documents.
        unit_documents: Documents that are packed together, and fall to one process; None decides by their length.
        shard_rows: Rows in a shard, the least that an interruption loses; None makes shards of about 256 MiB.
        report: Called after each batch.

    Returns:
        The store, all processes' work included.

    Raises:
        StoreError: The folder holds a store that was begun with something else, is being written to, or cannot be
            written, as on a full disk. What is complete stays, and the same call goes on.
        ArgumentError: What makes no sense together; training mode.
        UnsupportedHookError: A hook point without positions.

    Example:
        >>> import tempfile, lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> folder = tempfile.mkdtemp()
        >>> store = harvest(model, ["the cat sat on the mat.", "the dog"], folder, ("resid_post", 0), context=6)
        >>> len(store)
        12
    """
    for name, value in (("batch_size", batch_size), ("limit", limit), ("unit_documents", unit_documents),
                        ("shard_rows", shard_rows)):  # fmt: skip
        if value is not None and not is_whole(value):
            raise ArgumentError(f"{name} is a positive number; got {value!r}")
    if model.bare_model.training:
        raise ArgumentError("the model is in training mode, where dropout draws; call model.eval() first")
    target, mine, is_cut = Path(folder), ranks(), _is_cut(model)
    corpus = open_corpus(data, column=column, split=split, sample_by=sample_by, limit=limit)
    rules = row_rules(
        model,
        corpus,
        context=context,
        pack=pack,
        prepend_bos=prepend_bos,
        positions=read_positions(positions),
        skip_special=skip_special,
    )
    points = _stored(model, names, _dtype(dtype))
    begun = read_manifest(target) if has_manifest(target) else None
    if unit_documents is None:
        unit_documents = _unit_documents(corpus, rules) if begun is None else begun.sources[0].unit_documents
    if shard_rows is None:
        shard_rows = _shard_rows(points, rules.context) if begun is None else begun.sources[0].shard_rows
    manifest = Manifest(
        points=points,
        origin=origin_of(model),
        sources=(corpus.source(unit_documents=unit_documents, shard_rows=shard_rows),),
        rows=rules,
    )
    job = Job(
        model=model,
        corpus=corpus,
        manifest=manifest,
        folder=target,
        batch_size=batch_size,
        mine=Ranks() if is_cut else mine,
        writes=not is_cut or mine.index == 0,
        report=report,
    )
    with _ready(target, manifest, mine):
        try:
            run(job)
        except OSError as error:
            raise StoreError(_refusal(error, target)) from error
        mine.wait()
    return ActivationStore(target)


# ---------------------------------------------------------------------- before the run


def _is_cut(model: "LensModel") -> bool:
    """Whether these processes run one model together: each then runs all rows, and the first writes."""
    shards = find_shards(model.bare_model)
    distributed: Any = torch.distributed
    if shards is not None and shards.count != distributed.get_world_size():
        raise ArgumentError(
            f"the model is cut over {shards.count} of {distributed.get_world_size()} processes; a harvest takes one "
            "model over all of them, or a whole model in each"
        )
    return shards is not None


def _dtype(given: Any) -> torch.dtype | None:
    found = DTYPES.get(given) if isinstance(given, str) else given
    if given is None or (isinstance(found, torch.dtype) and found.is_floating_point and found in DTYPES.values()):
        return found
    floating = ", ".join(name for name, dtype in DTYPES.items() if dtype.is_floating_point)
    raise ArgumentError(f"dtype is one of {floating}; got {given!r}")


def _stored(model: "LensModel", names: NameFilter, dtype: torch.dtype | None) -> tuple[StoredPoint, ...]:
    """Describe what is stored, after a run of one token."""
    points = chosen_points(model, names)
    values = probed(model, [point.name for point in points], dtype)
    return tuple(
        StoredPoint(
            name=point.name,
            axes=" ".join(point.shape.split()[2:]),
            shape=tuple(values[point.name].shape[1:]),
            dtype=str(values[point.name].dtype).removeprefix("torch."),
            equation=point.equation,
        )
        for point in points
    )


def _unit_documents(corpus: Corpus, rules: RowRules) -> int:
    """Choose a unit: 64 rows at least, as its last row is short, 1024 at most, and one of 64 of the corpus between."""
    tokens = max(corpus.mean_length / (_CHARACTERS if corpus.is_text else 1), 1)
    in_row = rules.context / tokens if rules.pack else 1
    least, most = in_row * 64, in_row * 1024
    return min(max(int(min(max(len(corpus) / 64, least), most)), 1), len(corpus))


def _shard_rows(points: Sequence[StoredPoint], context: int) -> int:
    rows = _SHARD_BYTES // (context * sum(point.nbytes for point in points))
    return rows // 16 * 16 if rows >= 16 else max(rows, 1)


@contextmanager
def _ready(folder: Path, manifest: Manifest, mine: Ranks) -> Generator[None, None, None]:
    """Hold the folder, with the manifest in it, and without what interrupted processes left."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(_refusal(error, folder)) from error
    with claimed(folder, mine):
        error: Exception | None = None
        if mine.index == 0:
            try:
                _prepare(folder, manifest)
            except (StoreError, OSError) as caught:
                error = caught if isinstance(caught, StoreError) else StoreError(_refusal(caught, folder))
        mine.agree(error)
        yield


def _prepare(folder: Path, manifest: Manifest) -> None:
    if not has_manifest(folder):
        others = [path.name for path in folder.iterdir() if not path.name.startswith((".", "lock-"))]
        if others:
            raise StoreError(
                f"{os.fspath(folder)!r} has other files ({', '.join(sorted(others)[:3])}) and no manifest.json: give "
                "a new or empty folder"
            )
        manifest.write(folder)
    where = difference(read_manifest(folder), manifest)
    if where is not None:
        raise StoreError(
            f"{os.fspath(folder)!r} was begun with something else ({where}): ask for the same to go on, or give "
            "another folder"
        )
    for record in records(folder):
        check_size(record, folder)
    for left in folder.glob(".*.part"):
        left.unlink(missing_ok=True)


def _refusal(error: OSError, folder: Path) -> str:
    """Say what the system did not allow, and that nothing is lost."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "there is no more room" if is_full else "the system refuses"
    todo = "make room, and" if is_full else "mend that, and"
    return (
        f"{what} for {os.fspath(folder)!r} ({error.strerror or error}): the shards that are complete stay; {todo} the "
        "same call goes on after them"
    )
