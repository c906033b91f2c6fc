"""A store as a `datasets.Dataset`: an Arrow file, written a piece at a time."""

import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lens_core._extras import need
from lens_core._tensor_file import FileKind
from lens_core.errors import StoreError

if TYPE_CHECKING:
    from lens_core.store._reader import ActivationStore

__all__ = ["to_dataset"]

_KIND = FileKind(what="data set", version=1, error=StoreError, writer="store.to_dataset(path)")
_BYTES = 1 << 25
_COLUMNS = {
    "token": "tokens",
    "document": "documents",
    "offset": "offsets",
    "position": "positions",
    "source": "sources",
}


def to_dataset(store: "ActivationStore", names: Sequence[str], path: Any) -> Any:
    """Write what `ActivationStore.to_dataset` describes, and open it."""
    datasets = need("datasets", "a data set", extra="store")
    arrow = need("pyarrow", "a data set", extra="store")
    target = _KIND.target(path)
    nbytes = sum(point.nbytes for point in store.manifest.points if point.name in names)
    size = max(_BYTES // (2 * nbytes + 64), 1)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            writer: Any = None
            for start in range(0, max(len(store), 1), size):
                piece = _piece(store, names, slice(start, start + size), arrow)
                if writer is None:
                    writer = arrow.ipc.new_stream(file, piece.schema)
                writer.write_table(piece)
            writer.close()
        part.replace(target)
    except OSError as error:
        raise StoreError(f"the data set cannot be written to {str(target)!r}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(target))


def _piece(store: "ActivationStore", names: Sequence[str], span: slice, arrow: Any) -> Any:
    entries = store.entries(span)
    columns = {name: _array(getattr(entries, field), arrow) for name, field in _COLUMNS.items()}
    return arrow.table(columns | {name: _array(store[name][span], arrow) for name in names})


def _array(values: Tensor, arrow: Any) -> Any:
    """Give an Arrow array of lists of fixed sizes; bfloat16, which Arrow does not have, as float32."""
    plain = values.to(torch.float32) if values.dtype == torch.bfloat16 else values
    found = arrow.array(plain.reshape(-1).numpy())
    for size in reversed(plain.shape[1:]):
        found = arrow.FixedSizeListArray.from_arrays(found, size)
    return found
