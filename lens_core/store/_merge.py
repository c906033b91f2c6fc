"""Several stores of one kind made one: shards are copied or linked, and renumbered by source."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs

from lens_core._arguments import checks_arguments
from lens_core.errors import ArgumentError, StoreError
from lens_core.store._layout import (
    REPAIR,
    Manifest,
    Record,
    Source,
    check_size,
    difference,
    has_manifest,
    read_manifest,
    records,
    sync_folder,
)
from lens_core.store._ranks import Ranks, claimed
from lens_core.store._reader import ActivationStore
from lens_core.store._verify import digest_of

__all__ = ["merge"]

_MOST_SOURCES = 100  # two digits in a shard's name


@checks_arguments
def merge(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    link: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> ActivationStore:
    """Make one store of several: of the same model, hook points, dtypes, and rules for rows, of different documents.

    The sources stand one after the other, and entries with them; a document is known by its source and number. Every
    shard is held to its checksum on the way. An interrupted merge goes on by the same call. Nothing can be harvested
    into the result.

    Args:
        folders: The stores, complete ones, in order.
        out: A new folder.
        link: Make hard links, which take no room, instead of copies; on the same file system only.
        report: Called with the bytes that are done, and those that there are.

    Raises:
        StoreError: Stores that differ, by the first field in which they do; one that is not complete or is damaged; the
            same documents twice; a folder that holds something else, is in use, or cannot be written to.
        ArgumentError: Less than two stores.

    Example:
        >>> import tempfile, lens_core as lens
        >>> model, folders = lens.load("toy:gpt2"), [tempfile.mkdtemp() for _ in range(3)]
        >>> for text, folder in zip(["the cat sat.", "the dog ran."], folders):
        ...     _ = lens.store.harvest(model, [text], folder, "resid_post", context=6)
        >>> merge(folders[:2], folders[2])
        ActivationStore(10 entries of 2 hook points, 10 tokens, complete)
    """
    if isinstance(folders, str) or len(folders) < 2:
        raise ArgumentError(f"a merge takes at least two stores; got {folders!r}")
    target, given = Path(out), [Path(folder) for folder in folders]
    if target.resolve() in [folder.resolve() for folder in given]:
        raise ArgumentError(f"{os.fspath(target)!r} is one of the stores to merge; give a new folder")
    stores = [ActivationStore(folder) for folder in given]
    manifest = _joined(stores)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with claimed(target, Ranks()):
            _begin(target, manifest)
            _transfer(list(_renumbered(stores)), target, _linked if link else _copied, report)
    except OSError as error:
        hint = "; without links it can be copied" if link else ""
        raise StoreError(
            f"the merge into {os.fspath(target)!r} cannot go on ({error.strerror or error}){hint}: what is done stays, "
            "and the same call goes on after it"
        ) from error
    return ActivationStore(target)


def _joined(stores: Sequence[ActivationStore]) -> Manifest:
    """Give the manifest of all.

    Raises:
        StoreError: They do not belong together.
    """
    first = stores[0]
    sources = tuple(source for store in stores for source in store.manifest.sources)
    whole = attrs.evolve(first.manifest, sources=sources)
    for store in stores:
        shown = os.fspath(store.path)
        where = difference(attrs.evolve(store.manifest, sources=sources), whole)
        if where is not None:
            raise StoreError(f"{shown!r} and {os.fspath(first.path)!r} cannot be merged, as they differ in {where}")
        if not store.is_complete:
            raise StoreError(
                f"{shown!r} lacks {len(store.missing)} of {store.n_units} units of documents: finish its harvest first"
            )
    twice = [source.label for i, source in enumerate(sources) if _documents(source) in map(_documents, sources[:i])]
    if twice:
        raise StoreError(f"the documents of {twice[0]!r} would be in the merged store twice")
    if len(sources) > _MOST_SOURCES:
        raise StoreError(f"a store has at most {_MOST_SOURCES} sources, and these have {len(sources)}")
    return whole


def _documents(source: Source) -> tuple[int, str]:
    return source.n_documents, source.digest


def _renumbered(stores: Sequence[ActivationStore]) -> Iterator[tuple[Path, Record, Record]]:
    """Give the folder of each shard, its record, and the record that it gets."""
    before = 0
    for store in stores:
        for record in store.records:
            yield store.path, record, attrs.evolve(record, source=record.source + before)
        before += len(store.manifest.sources)


def _begin(target: Path, manifest: Manifest) -> None:
    if not has_manifest(target):
        others = sorted(path.name for path in target.iterdir() if not path.name.startswith((".", "lock-")))
        if others:
            raise StoreError(f"{os.fspath(target)!r} has other files ({', '.join(others[:3])}): give a new folder")
        manifest.write(target)
    where = difference(read_manifest(target), manifest)
    if where is not None:
        raise StoreError(f"{os.fspath(target)!r} was begun with something else ({where}): give another folder")
    for left in target.glob(".*.part"):
        left.unlink(missing_ok=True)


def _transfer(
    shards: Sequence[tuple[Path, Record, Record]],
    target: Path,
    transferred: Callable[[Path, Path, Callable[[int], None]], str],
    report: Callable[[int, int], None] | None,
) -> None:
    """Bring over every shard that is not there yet; its record comes last."""
    there = {record.stem: record for record in records(target)}
    total, done = sum(record.nbytes for _, record, _ in shards), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if report is not None:
            report(done, total)

    for folder, old, new in shards:
        if there.get(new.stem) == new:
            check_size(new, target)
            count(new.nbytes)
            continue
        part = target / f".{new.stem}.safetensors.part"
        digest = transferred(old.file(folder), part, count)
        if digest != old.sha256:
            part.unlink()
            raise StoreError(f"the shard {os.fspath(old.file(folder))!r} is damaged; {REPAIR}")
        part.replace(new.file(target))
        sync_folder(target)
        new.write(target)


def _copied(source: Path, part: Path, count: Callable[[int], None]) -> str:
    """Copy a file, see it to the disk, and give the digest of what was written."""
    with source.open("rb") as given, part.open("wb") as file:
        shutil.copyfileobj(given, file, 1 << 22)
        file.flush()
        os.fsync(file.fileno())
    return digest_of(part, count)


def _linked(source: Path, part: Path, count: Callable[[int], None]) -> str:
    """Link a file, and give its digest."""
    part.hardlink_to(source)
    return digest_of(part, count)
