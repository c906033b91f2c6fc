"""A shard as it is written: a safetensors file whose sizes are known before its values are.

safetensors' own writer takes whole tensors; here values come a batch at a time and go to their place in the file, so
that memory holds a batch and not a shard.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from lens_core._tensor_file import DTYPE_NAMES
from lens_core.store._layout import sync_folder

__all__ = ["Shard"]

_BLOCK = 1 << 22


@attrs.frozen
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def item(self) -> int:
        """Bytes of one element along the first axis."""
        return self.dtype.itemsize * torch.Size(self.shape[1:]).numel()

    @property
    def nbytes(self) -> int:
        return self.item * self.shape[0]


class Shard:
    """A file in work beside its target; `commit` gives it its name, `discard` takes it away."""

    def __init__(
        self, target: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self.target, self.part = target, target.with_name(f".{target.name}.part")
        header, self._places, self.nbytes = _laid_out(tensors, metadata)
        self._file = self.part.open("w+b")
        try:
            self._file.write(header)
            self._file.truncate(self.nbytes)
        except OSError:
            self.discard()
            raise

    def write(self, name: str, value: Tensor, at: int = 0) -> None:
        """Write elements along the first axis, from `at` on."""
        place = self._places[name]
        plain = value.detach().to("cpu").contiguous()
        flat: Any = plain.reshape(-1).view(torch.uint8).numpy()
        raw = memoryview(flat)
        self._file.seek(place.start + at * place.item)
        self._file.write(raw)

    def commit(self) -> str:
        """See the file to the disk, give it its name, and return its SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        digest = hashlib.sha256()
        self._file.seek(0)
        while block := self._file.read(_BLOCK):
            digest.update(block)
        self._file.close()
        self.part.replace(self.target)
        sync_folder(self.target.parent)
        return digest.hexdigest()

    def discard(self) -> None:
        """Take the file away, if it has no name yet."""
        with suppress(OSError):  # a full disk may refuse even the last of what is buffered
            self._file.close()
        with suppress(OSError):
            self.part.unlink(missing_ok=True)


def _laid_out(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, _Place], int]:
    """Give the header, the place of each tensor, and the size of the file.

    Tensors stand by the size of their items, wide ones first: each is aligned.
    """
    order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    at, starts = 0, dict[str, int]()
    for name in order:
        dtype, shape = tensors[name]
        size = dtype.itemsize * torch.Size(shape).numel()
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        starts[name], at = at, at + size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    places = {name: _Place(*tensors[name], first + starts[name]) for name in order}
    return len(text).to_bytes(8, "little") + text, places, first + at
