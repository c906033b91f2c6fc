"""A cache that is written to its file as the run goes: no activation stays in memory.

The file is the one that `cache.save` writes. Room for its header is left free at first, since shapes are not known
until values come; the header is written last, with spaces up to the first tensor. Safetensors allows no gaps between
tensors, so where the next one would not stand at a multiple of its item size, a tensor of a few bytes comes between.
"""

import json
import os
import secrets
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lens_core._cache_file import FILL, KIND, metadata_of
from lens_core._cache_sink import moved
from lens_core._call import Call
from lens_core._choice import Choice, Part
from lens_core._positions import leaves_gaps
from lens_core._tensor_file import DTYPE_NAMES
from lens_core.errors import CacheFileError
from lens_core.hook_points import HookPoint, Selection

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache

__all__ = ["CacheStream"]

ENTRY_BYTES = 400
"""At most this much of a header tells of one tensor and of the bytes before it, names aside."""


class CacheStream:
    """Writes the values of one call to a cache file, as they come; a context that ends with the run."""

    is_optional = False
    keeps_graph = False
    wants_gradient = False

    def __init__(
        self, cache: "ActivationCache", names: Selection, path: Any, *, dtype: torch.dtype | None, choice: Choice
    ) -> None:
        """Read the path; nothing is written before the block begins.

        Raises:
            CacheFileError: The path of a folder.
            ArgumentError: Not a path.
        """
        self._target = KIND.target(path)
        self.names, self.exact = names.names, names.exact
        self._cache, self._dtype, self._choice = cache, dtype, choice
        cache.has_gaps, cache.heads = leaves_gaps(choice.positions), choice.heads
        self._header: dict[str, Any] = {}
        self._size = 0
        self._calls = 0
        self._room = 0
        self._file: Any = None
        self._part = self._target.with_name(f".{self._target.name}.{secrets.token_hex(4)}.part")

    # ------------------------------------------------------------------ the file

    def __enter__(self) -> "CacheStream":
        """Make a file beside the target, with room for the header."""
        most = len(self._metadata(self.names)) + sum(len(json.dumps(name)) + ENTRY_BYTES for name in self.names)
        self._room = _rounded(most + ENTRY_BYTES)
        self._write(self._open)
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        """Write the header and put the file in the target's place; or, after an error, take it away."""
        try:
            if kind is None:
                self._write(self._finish)
        finally:
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()
            with suppress(OSError):
                self._part.unlink(missing_ok=True)

    def _open(self) -> None:
        self._file = self._opened()
        self._file.seek(8 + self._room)

    def _opened(self) -> Any:
        return self._part.open("xb", buffering=0)

    def _finish(self) -> None:
        metadata = json.loads(self._metadata([name for name in self._header if not name.startswith(FILL)]))
        text = json.dumps({"__metadata__": metadata, **self._header}).encode()
        self._file.seek(0)
        _write_all(self._file, struct.pack("<Q", self._room) + text.ljust(self._room))
        self._file.close()
        self._part.replace(self._target)

    def _metadata(self, names: Any) -> str:
        return json.dumps(KIND.marked(metadata_of(self._cache, list(names))))

    def _write(self, step: Callable[..., None], *given: Any) -> None:
        try:
            step(*given)
        except OSError as error:
            shown = os.fspath(self._target)
            raise CacheFileError(f"the cache cannot be written to {shown!r}: {error.strerror or error}") from error

    # ------------------------------------------------------------------ a sink

    def begin(self, call: Call) -> None:
        """See that the file holds one call only.

        Raises:
            CacheFileError: It is another one.
        """
        self._calls += 1
        if self._calls > 1:
            raise CacheFileError(
                f"{os.fspath(self._target)!r} is written as the model runs, and takes one call of it; this is another. "
                "Cache several calls in memory (device='cpu', dtype=, pos_slice=) and save the cache"
            )

    def part(self, call: Call, n_heads: int) -> Part | None:
        """Say what it needs of scores and patterns; None for all of them."""
        return self._choice.part(call, n_heads)

    def store(
        self,
        point: HookPoint,
        value: Tensor,
        call: Call,
        *,
        is_foreign: bool,
        by_position: bool = False,
        part: Part | None = None,
    ) -> None:
        """Write a value; nobody else can change it later, and none of it stays."""
        if point.name in self._header:
            raise CacheFileError(
                f"{point.name!r} was reached twice in one call, and a file that is written as the model runs has place "
                "for one value; cache it in memory"
            )
        kept = moved(self._choice.of(value.detach(), point, call, part=part), "cpu", self._dtype).contiguous()
        if kept.dtype not in DTYPE_NAMES:
            raise CacheFileError(f"{point.name!r} is of dtype {kept.dtype}, which a cache file cannot hold")
        filler = -self._size % kept.itemsize
        if filler:
            self._add(f"{FILL}{len(self._header)}", torch.zeros(filler, dtype=torch.uint8))
        self._add(point.name, kept)

    def store_gradient(self, point: HookPoint, gradient: Tensor, call: Call, *, position: int | None = None) -> None:
        """Do nothing: gradients are not asked for."""

    def _add(self, name: str, value: Tensor) -> None:
        end = self._size + value.nbytes
        self._header[name] = {
            "dtype": DTYPE_NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [self._size, end],
        }
        if value.numel():
            data: Any = value.reshape(-1).view(torch.uint8).numpy()
            self._write(_write_all, self._file, data)
        self._size = end


def _write_all(file: Any, data: Any) -> None:
    """Write bytes; the system may take some of them at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _rounded(size: int) -> int:
    """Round up, so that data begins where every dtype may."""
    return -(-size // 64) * 64
