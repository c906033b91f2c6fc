"""Documents by number: from files, from HF's data sets, or from memory."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import attrs
import numpy as np
from torch import Tensor

from lens_core._extras import need
from lens_core.errors import ArgumentError, EmptyInputError, StoreError
from lens_core.store._layout import Source

__all__ = ["Corpus", "open_corpus"]

_BUILDERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet", ".arrow": "arrow"}
_COLUMNS = ("text", "input_ids", "tokens")
_LOOKED_AT = 64


@attrs.frozen(kw_only=True)
class Corpus:
    """Documents that can be read by number, any number of times.

    Attributes:
        label: What they are called.
        n_documents: How many.
        digest: Of their number and of some of them.
        is_text: Texts, or rows of token ids.
        mean_length: Of the documents that were looked at: characters or ids.
    """

    label: str
    n_documents: int
    digest: str
    is_text: bool
    mean_length: float
    read_any: Callable[[int, int], list[Any]]

    def __len__(self) -> int:
        """Count the documents."""
        return self.n_documents

    def source(self, *, unit_documents: int, shard_rows: int) -> Source:
        """Give what a store notes of them."""
        return Source(
            label=self.label,
            n_documents=self.n_documents,
            digest=self.digest,
            unit_documents=unit_documents,
            shard_rows=shard_rows,
        )

    def read(self, start: int, stop: int) -> list[Any]:
        """Give the documents of a range: strings, or lists of ids.

        Raises:
            ArgumentError: One that is neither.
        """
        return [_document(one, start + index, self.is_text) for index, one in enumerate(self.read_any(start, stop))]


def open_corpus(
    data: Any, *, column: str | None = None, split: str | None = None, sample_by: str = "line", limit: int | None = None
) -> Corpus:
    """Open documents.

    Args:
        data: A file (`.jsonl`, `.json`, `.txt`, `.parquet`), a folder that `datasets.save_to_disk` wrote, the id of a
            data set on the hub, a `datasets.Dataset`, texts, rows of ids, or a tensor of ids `[row, pos]`.
        column: Where the text or the ids are; None for `text`, `input_ids` or `tokens`.
        split: Of a data set with several; None where there is one.
        sample_by: What a document of a text file is: a `line`, a `paragraph`, the whole `document`.
        limit: Take the first so many.

    Raises:
        StoreError: It cannot be opened.
        ArgumentError: Nothing that documents can be read from; no such column or split.
        EmptyInputError: No documents.
        MissingPackageError: Files need the package datasets.
    """
    if isinstance(data, str | os.PathLike):
        label, data = _load(str(Path(cast("Any", data))), split, sample_by)
    else:
        label = type(data).__name__
    if hasattr(data, "column_names"):
        chosen = _column(data, column)
        found: Any = data.select_columns([chosen])
        label, n_documents, read = f"{label}, {chosen}", len(found), _column_reader(found, chosen)
    elif isinstance(data, Tensor) and data.ndim == 2 and not data.is_floating_point():
        n_documents, read = len(data), _reader(data)
    elif isinstance(data, Sequence):
        listed = cast("Sequence[Any]", data)
        n_documents, read = len(listed), _reader(listed)
    else:
        raise ArgumentError(
            f"documents are read by number, again after an interruption, and a {type(data).__name__} has none: give a "
            "file, a datasets.Dataset (Dataset.from_generator makes one), texts, or rows of ids"
        )
    n_documents = n_documents if limit is None else min(limit, n_documents)
    if not n_documents:
        raise EmptyInputError("there are no documents; give at least one")
    return _looked_at(label, n_documents, read)


def _reader(rows: Any) -> Callable[[int, int], list[Any]]:
    return lambda start, stop: list(rows[start:stop])


def _column_reader(dataset: Any, column: str) -> Callable[[int, int], list[Any]]:
    return lambda start, stop: list(dataset[start:stop][column])


def _looked_at(label: str, n_documents: int, read: Callable[[int, int], list[Any]]) -> Corpus:
    """Look at some documents, evenly spaced: are they texts, how long are they, and what tells them from others?"""
    some = sorted({i * (n_documents - 1) // max(_LOOKED_AT - 1, 1) for i in range(_LOOKED_AT)})
    seen = [read(i, i + 1)[0] for i in some]
    is_text = isinstance(seen[0], str)
    plain = [_document(one, at, is_text) for at, one in zip(some, seen, strict=True)]
    digest = hashlib.sha256(json.dumps([n_documents, plain]).encode()).hexdigest()
    mean = sum(map(len, plain)) / len(plain)
    return Corpus(label=label, n_documents=n_documents, digest=digest, is_text=is_text, mean_length=mean, read_any=read)


def _document(one: Any, at: int, is_text: bool) -> Any:
    if is_text and isinstance(one, str):
        return one
    if not is_text and not isinstance(one, str):
        ids: Any = one.tolist() if hasattr(one, "tolist") else one
        ids = list(cast("Sequence[Any]", ids)) if isinstance(ids, Sequence) else [None]
        if all(type(token) is int and token >= 0 for token in ids):
            return ids
    wanted = "text, as the first" if is_text else "a list of token ids"
    raise ArgumentError(f"document {at} is not {wanted}; got {str(one)[:60]!r} ({type(one).__name__})")


def _load(name: str, split: str | None, sample_by: str) -> tuple[str, Any]:
    """Open a file, a folder or an id by `datasets`, which keeps what it makes of files in its cache."""
    if sample_by not in ("line", "paragraph", "document"):
        raise ArgumentError(f"sample_by is 'line', 'paragraph' or 'document'; got {sample_by!r}")
    path = Path(name)
    builder = _BUILDERS.get(path.suffix.lower())
    if path.is_file() and builder is None:
        raise ArgumentError(f"{name!r}: the documents of a {path.suffix or 'nameless'} file are unknown; give .jsonl, "
                            ".json, .txt or .parquet, or a folder of datasets.save_to_disk")  # fmt: skip
    if builder is not None and not path.is_file():
        raise StoreError(f"there is no file {name!r}")
    datasets = need("datasets", "reading a corpus", extra="store")
    try:
        if builder is not None:
            options = {"sample_by": sample_by} if builder == "text" else {}
            found = datasets.load_dataset(builder, data_files=str(path), split="train", **options)
        elif path.is_dir():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(name, split=split)
    except Exception as error:  # of many kinds: files, formats, the network
        raise StoreError(f"{name!r} cannot be read as documents: {str(error).strip().splitlines()[0]}") from error
    if isinstance(found, dict):
        splits = cast("dict[str, Any]", found)
        chosen = split if split is not None else next(iter(splits)) if len(splits) == 1 else None
        if chosen not in splits:
            raise ArgumentError(f"{name!r} has the splits {', '.join(splits)}; got split={split!r}")
        found = splits[chosen]
    return path.name, found


def _column(dataset: Any, column: str | None) -> str:
    names = cast("list[str]", list(dataset.column_names))
    if column is None:
        column = next((name for name in _COLUMNS if name in names), names[0] if len(names) == 1 else None)
        if column is None:
            raise ArgumentError(f"column names the text or the ids, one of {', '.join(names)}; got None")
    if column not in names:
        raise ArgumentError(f"there is no column {column!r}; there are {', '.join(names)}")
    return column


def check_ids(rows: Sequence[Any], d_vocab: int, first: int) -> None:
    """Refuse ids that the model has no embedding of.

    Raises:
        ArgumentError: One; names its document.
    """
    for index, row in enumerate(rows):
        largest = int(np.max(row, initial=0))
        if largest >= d_vocab:
            raise ArgumentError(f"document {first + index} has the token id {largest}, and the model has {d_vocab}")
