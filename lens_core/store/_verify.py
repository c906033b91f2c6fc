"""Looking over a store: every byte of it against its records, and taking out what is damaged."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs

from lens_core._arguments import checks_arguments
from lens_core.errors import StoreError
from lens_core.store._layout import (
    MANIFEST,
    Manifest,
    Record,
    read_manifest,
    read_record,
    record_files,
    sync_folder,
    whole_units,
)
from lens_core.store._mapped import opened
from lens_core.store._ranks import Ranks, claimed

__all__ = ["Fault", "digest_of", "verify"]

_BLOCK = 1 << 22
_SHARD = re.compile(r"(\d{2}-\d{6}-\d{4})\.safetensors")
_SHOWN = 20
DAMAGED = ".damaged"


@attrs.frozen(kw_only=True)
class Fault:
    """Something that is wrong with a store.

    Attributes:
        kind: `damaged`: a shard or record whose content is not what it was; `missing`: documents that are not in it
            (harvesting goes on with them); `uncommitted`: what an interrupted process left, which nothing reads;
            `unknown`: a file that is none of the store's.
        file: Its name in the folder; of what is missing, the shards' common part.
        what: In words.
    """

    kind: str
    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.file}: {self.what}"


@checks_arguments
def verify(
    folder: str | os.PathLike[str], *, repair: bool = False, report: Callable[[int, int], None] | None = None
) -> tuple[Fault, ...]:
    """Read all of a store, and hold each shard to its checksum, its record and the manifest.

    Args:
        folder: The store.
        repair: Take damaged shards out: the record goes, and the file is renamed to `.damaged`. Harvesting again with
            the same call then makes these anew, and nothing else. Nobody may write to the store meanwhile.
        report: Called with the bytes that were read, and those that there are.

    Returns:
        What is wrong, and was before the repair; nothing for a whole store.

    Raises:
        StoreError: Not a store, or a damaged manifest; to be repaired, and being written to.

    Example:
        >>> import tempfile, lens_core as lens
        >>> model, folder = lens.load("toy:gpt2"), tempfile.mkdtemp()
        >>> _ = lens.store.harvest(model, ["the cat sat on the mat."], folder, "resid_post", context=6)
        >>> verify(folder)
        ()
    """
    target = Path(folder)
    manifest = read_manifest(target)
    with ExitStack() as held:
        if repair:
            held.enter_context(claimed(target, Ranks()))
        sound = list[Record]()
        faults = list(_damage(target, manifest, sound, report))
        broken = {Path(fault.file).stem for fault in faults}
        faults += [*_missing(manifest, sound), *_strangers(target, broken | {record.stem for record in sound})]
        if repair:
            for stem in sorted(broken):
                _take_out(target, stem)
    return tuple(faults)


def digest_of(path: Path, report: Callable[[int], None] | None = None) -> str:
    """Give the SHA-256 of a file; `report` is called with the bytes of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if report is not None:
                report(len(block))
    return digest.hexdigest()


def _damage(
    folder: Path, manifest: Manifest, sound: list[Record], report: Callable[[int, int], None] | None
) -> Iterator[Fault]:
    """Find shards that are not what they were; the sound ones are added to the list."""
    found = list[Record]()
    for path in record_files(folder):
        try:
            found.append(read_record(path))
        except StoreError as error:
            yield Fault(kind="damaged", file=path.name, what=_cause(error))
    total, done = sum(record.nbytes for record in found), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if report is not None:
            report(done, total)

    for record in found:
        what = _wrong(folder, manifest, record, count)
        if what is None:
            sound.append(record)
        else:
            yield Fault(kind="damaged", file=record.file(folder).name, what=what)


def _wrong(folder: Path, manifest: Manifest, record: Record, count: Callable[[int], None]) -> str | None:
    """Say what is wrong with a shard, or None."""
    if record.source >= len(manifest.sources) or record.unit >= manifest.sources[record.source].n_units:
        return "its documents are beyond those of the manifest"
    try:
        tensors = opened(folder, manifest, record)
        digest = digest_of(record.file(folder), count)
    except (StoreError, OSError) as error:
        return _cause(error)
    if digest != record.sha256:
        return f"its SHA-256 is {digest[:16]}…, and was {record.sha256[:16]}…"
    counts = (int((tensors["tokens"] >= 0).sum()), int(tensors["kept"].sum()))
    if counts != (record.tokens, record.entries):
        return f"it has {counts[0]} tokens and {counts[1]} kept, and its record says {record.tokens}, {record.entries}"
    return None


def _cause(error: Exception) -> str:
    """Give an error's first words: what to do about it the command says once."""
    return str(error).partition(";")[0]


def _missing(manifest: Manifest, sound: Sequence[Record]) -> Iterator[Fault]:
    """Name units that are not whole; of many, the first."""
    whole = whole_units(sound)
    units = [(number, unit) for number, source in enumerate(manifest.sources) for unit in range(source.n_units)]
    missing = [unit for unit in units if unit not in whole]
    for source, unit in missing[:_SHOWN]:
        documents = manifest.sources[source].documents(unit)
        yield Fault(
            kind="missing",
            file=f"{source:02d}-{unit:06d}",
            what=f"documents {documents[0]} to {documents[-1]} of {manifest.sources[source].label!r} are not all in it",
        )
    if len(missing) > _SHOWN:
        yield Fault(kind="missing", file="…", what=f"{len(missing) - _SHOWN} units of documents more")


def _strangers(folder: Path, stems: set[str]) -> Iterator[Fault]:
    """Name files that no record tells of."""
    for path in sorted(folder.iterdir()):
        name = path.name
        shard = _SHARD.fullmatch(name)
        if name.endswith(".part"):
            yield Fault(kind="uncommitted", file=name, what="an interrupted process left it, or one is at work")
        elif shard is not None and shard[1] not in stems:
            yield Fault(kind="uncommitted", file=name, what="it has no record, and does not count")
        elif not (
            shard or name == MANIFEST or path.stem in stems or name.startswith("lock-") or name.endswith(DAMAGED)
        ):
            yield Fault(kind="unknown", file=name, what="it is none of the store's files")


def _take_out(folder: Path, stem: str) -> None:
    """Take a shard out of a store: first its record, so that it no longer counts."""
    (folder / f"{stem}.json").unlink(missing_ok=True)
    sync_folder(folder)
    file = folder / f"{stem}.safetensors"
    if file.is_file():
        file.replace(folder / f"{file.name}{DAMAGED}")
    sync_folder(folder)
