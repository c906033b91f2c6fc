"""What an activation store is on disk: a manifest, and shards that exist once their record does.

    FOLDER/manifest.json               what is stored and how its rows are made: written first, never changed
    FOLDER/00-000012-0003.safetensors  a shard: source, unit of documents, part of the unit
    FOLDER/00-000012-0003.json         its record, written last: a shard without one does not count
    FOLDER/lock-0                      held by process 0 while it writes

A shard holds `tokens`, `documents`, `offsets` and `kept` `[row, pos]`, and for each hook point `[entry, ...]`: an entry
is a kept position, in the order of `kept.nonzero()`. What a store holds follows from its manifest and records alone:
nothing is appended to, so any number of processes may write at once, and being killed costs no more than the shard in
work.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import attrs
import torch

from lens_core.errors import StoreError

__all__ = [
    "COLUMNS",
    "DTYPES",
    "Manifest",
    "Record",
    "RowRules",
    "Source",
    "StoredPoint",
    "read_manifest",
    "records",
    "whole_units",
]

FORMAT, VERSION = "lens activation store", 1
MANIFEST = "manifest.json"

COLUMNS: Mapping[str, torch.dtype] = {
    "documents": torch.int64,
    "tokens": torch.int32,
    "offsets": torch.int32,
    "kept": torch.bool,
}
"""What a shard says about its rows, `[row, pos]`."""

DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float64", "int64", "float32", "int32", "bfloat16", "float16", "int16", "int8", "uint8", "bool")
}
"""What may be stored, by name, wide ones first: so each tensor of a shard begins at a multiple of its item's size."""

_STEM = re.compile(r"(\d{2})-(\d{6})-(\d{4})")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,300}")
T = TypeVar("T")


@attrs.frozen(kw_only=True)
class StoredPoint:
    """A hook point of a store.

    Attributes:
        axes: The axes of an entry, `batch pos` left out, such as `head d_head`; empty for a single number.
        shape: Their sizes.
        dtype: As stored.
        equation: What the value is.
    """

    name: str
    axes: str
    shape: tuple[int, ...] = attrs.field(converter=tuple)
    dtype: str = attrs.field(validator=attrs.validators.in_(DTYPES))
    equation: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """The size of one entry."""
        return self.torch_dtype.itemsize * torch.Size(self.shape).numel()


@attrs.frozen(kw_only=True)
class Source:
    """The documents that a store was made from.

    Attributes:
        label: What they are called: a file, a folder, a data set.
        n_documents: How many, empty ones included.
        digest: Of their number and of some of them: whether a resumed harvest goes on with the same.
        unit_documents: Documents in a unit; a unit is packed by itself, so that any process can make any of them.
        shard_rows: Rows in a shard; the last of a unit may have fewer.
    """

    label: str
    n_documents: int
    digest: str
    unit_documents: int
    shard_rows: int

    @property
    def n_units(self) -> int:
        """Count the units."""
        return -(-self.n_documents // self.unit_documents)

    def documents(self, unit: int) -> range:
        """Number the documents of a unit."""
        return range(unit * self.unit_documents, min((unit + 1) * self.unit_documents, self.n_documents))


@attrs.frozen(kw_only=True)
class RowRules:
    """How documents become rows of token ids, and which positions are kept.

    Attributes:
        context: The most tokens in a row.
        pack: Whether documents are put one after the other, and cut into rows; otherwise each is a row, cut short.
        prepend_bos: As in `forward`; None is what the tokenizer does.
        bos: The id that begins each packed row; None for none.
        separator: The id between two packed documents; None for none.
        positions: Absolute positions that are kept, negative from a row's end; `[start, stop, step]` for a slice, in
            a mapping `{"slice": ...}`; None for all.
        skipped: Ids whose positions are not kept.
    """

    context: int
    pack: bool
    prepend_bos: bool | None
    bos: int | None
    separator: int | None
    positions: Any
    skipped: tuple[int, ...] = attrs.field(converter=tuple)


@attrs.frozen(kw_only=True)
class Manifest:
    """What a store holds.

    Attributes:
        points: In the order of computation.
        origin: Model, revision, digest of its weights, passes over them, plugin, versions.
        sources: One, or several after a merge.
        rows: How rows are made.
    """

    points: tuple[StoredPoint, ...]
    origin: Mapping[str, str]
    sources: tuple[Source, ...]
    rows: RowRules

    @property
    def entry_bytes(self) -> int:
        """The size of one entry at all hook points."""
        return sum(point.nbytes for point in self.points)

    def write(self, folder: Path) -> None:
        """Write the manifest of a new store."""
        write_json(folder / MANIFEST, {"format": FORMAT, "format_version": VERSION, **attrs.asdict(self)})


@attrs.frozen(kw_only=True, order=True)
class Record:
    """A shard that is complete.

    Attributes:
        source: Which of the manifest's sources, 0-based.
        unit: Which unit of documents, 0-based.
        part: Which part of the unit, 0-based.
        is_last: Whether the unit ends with it.
        rows: Rows in it.
        width: Positions of its longest row.
        tokens: Real tokens in it.
        entries: Kept positions.
        cut: Tokens of its documents that found no place in a row.
        nbytes: Size of the file.
        sha256: Of the file.
    """

    source: int
    unit: int
    part: int
    is_last: bool
    rows: int
    width: int
    tokens: int
    entries: int
    cut: int
    nbytes: int
    sha256: str

    @property
    def stem(self) -> str:
        """The shard's name without a suffix."""
        return f"{self.source:02d}-{self.unit:06d}-{self.part:04d}"

    def file(self, folder: Path) -> Path:
        """Give the path of the shard."""
        return folder / f"{self.stem}.safetensors"

    def write(self, folder: Path) -> None:
        """Write the record: now the shard counts."""
        write_json(folder / f"{self.stem}.json", attrs.asdict(self))


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Write a small file whole or not at all, and see it to the disk."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
        sync_folder(target.parent)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """See the names of files to the disk, where the system can."""
    with suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def has_manifest(folder: Path) -> bool:
    """Whether a folder is a store."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a store.

    Raises:
        StoreError: Not a store, damaged, or of another format version.
    """
    if not has_manifest(folder):
        what = "there is no folder" if not folder.is_dir() else "no activation store (no manifest.json) is in"
        raise StoreError(f"{what} {os.fspath(folder)!r}; `lens harvest` makes one")
    found = _parsed(folder / MANIFEST)
    if found.get("format") != FORMAT:
        raise StoreError(f"{os.fspath(folder / MANIFEST)!r} is not the manifest of an activation store")
    if found.get("format_version") != VERSION:
        raise StoreError(
            f"{os.fspath(folder)!r} has format version {str(found.get('format_version'))[:40]}, and this lens-core "
            f"reads {VERSION}; use the lens-core that wrote it, or harvest again"
        )
    try:
        manifest = Manifest(
            points=tuple(_record(StoredPoint, point) for point in found["points"]),
            origin={str(key): str(value) for key, value in found["origin"].items()},
            sources=tuple(_record(Source, source) for source in found["sources"]),
            rows=_record(RowRules, found["rows"]),
        )
        is_sound = all(map(_is_sound, manifest.points)) and all(map(_is_whole_source, manifest.sources))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{os.fspath(folder / MANIFEST)!r} is damaged: {error!r}") from error
    if not is_sound or not manifest.points or not manifest.sources:
        raise StoreError(f"{os.fspath(folder / MANIFEST)!r} is damaged: it names no sound hook points and sources")
    return manifest


def records(folder: Path) -> list[Record]:
    """Read what is complete, in the order of source, unit and part.

    Raises:
        StoreError: A record that is damaged.
    """
    return [read_record(path) for path in record_files(folder)]


def record_files(folder: Path) -> list[Path]:
    """List the records, damaged ones included, in the order of source, unit and part."""
    return sorted(path for path in folder.glob("*.json") if _STEM.fullmatch(path.stem) is not None)


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        StoreError: It is damaged.
    """
    try:
        record = _record(Record, _parsed(path))
        is_sound = record.stem == path.stem and min(record.rows, record.entries, record.nbytes) >= 0
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the record {os.fspath(path)!r} is damaged: {error!r}; {REPAIR}") from error
    if not is_sound:
        raise StoreError(f"the record {os.fspath(path)!r} is of another shard, or damaged; {REPAIR}")
    return record


def whole_units(done: Iterable[Record]) -> set[tuple[int, int]]:
    """Give the units (source, unit) of which every part is there: the last, and all before it."""
    parts = dict[tuple[int, int], int]()
    ends = dict[tuple[int, int], int]()
    for record in done:
        unit = (record.source, record.unit)
        parts[unit] = parts.get(unit, 0) + 1
        if record.is_last:
            ends[unit] = record.part
    return {unit for unit, last in ends.items() if parts[unit] == last + 1}


def check_size(record: Record, folder: Path) -> None:
    """See that a complete shard is there, in the size that it had: a cheap look, which reads nothing.

    Raises:
        StoreError: It is not.
    """
    file = record.file(folder)
    size = file.stat().st_size if file.is_file() else None
    if size != record.nbytes:
        found = "is missing" if size is None else f"has {size} bytes, and had {record.nbytes}"
        raise StoreError(f"the shard {os.fspath(file)!r} {found}; {REPAIR}")


REPAIR = "`lens store verify --repair` takes what is damaged out, and harvesting again makes it anew"


def _is_whole_source(source: Source) -> bool:
    sizes = (source.n_documents, source.unit_documents, source.shard_rows)
    return all(type(n) is int and n > 0 for n in sizes)


def _is_sound(point: StoredPoint) -> bool:
    return _NAME.fullmatch(point.name) is not None and all(type(n) is int and n >= 0 for n in point.shape)


def _record(kind: type[T], given: Any) -> T:
    """Make a record from what JSON holds, with its fields and no others."""
    fields = {field.name for field in attrs.fields(cast("Any", kind))}
    if not isinstance(given, dict) or set(cast("dict[str, Any]", given)) != fields:
        raise ValueError(f"a {kind.__name__} has {', '.join(sorted(fields))}")
    return kind(**cast("dict[str, Any]", given))


def _parsed(path: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{os.fspath(path)!r} cannot be read: {error}; {REPAIR}") from error
    if not isinstance(found, dict):
        raise StoreError(f"{os.fspath(path)!r} is damaged: not a JSON object; {REPAIR}")
    return cast("dict[str, Any]", found)


def difference(stored: Manifest, asked: Manifest) -> str | None:
    """Say where two manifests differ, or None.

    Versions of torch and transformers may differ: a store may outlive an upgrade.
    """
    a, b = ({**attrs.asdict(one), "origin": _identity(one.origin)} for one in (stored, asked))
    return next((f"{where}: {x!r} there, {y!r} here" for where, x, y in _leaves("", a, b) if x != y), None)


def identity(manifest: Manifest) -> str:
    """Give a digest of what a store holds, complete or not; versions of torch and transformers aside."""
    fields = {**attrs.asdict(manifest), "origin": _identity(manifest.origin)}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def _identity(origin: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in origin.items() if key not in ("torch", "transformers", "lens_core", "plugin")}


def _leaves(at: str, a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        x, y = cast("dict[str, Any]", a), cast("dict[str, Any]", b)
        return [leaf for key in {**x, **y} for leaf in _leaves(f"{at}.{key}".lstrip("."), x.get(key), y.get(key))]
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str):
        x, y = list(cast("Sequence[Any]", a)), list(cast("Sequence[Any]", b))
        if len(x) == len(y):
            return [leaf for i, pair in enumerate(zip(x, y, strict=True)) for leaf in _leaves(f"{at}[{i}]", *pair)]
        return [(at, x, y)]
    return [(at, a, b)]
