"""Bytes of tensors, counted as operations make them and as they are freed: the same on every machine."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def live_bytes(call: Callable[[], Any], model: Any) -> int:
    """Give the most bytes of tensors that are there at once during a call, the model's own aside.

    Storages are counted, so that a view costs nothing. What one operation allocates inside and frees is not seen.
    """
    call()  # what a first call sets up does not count
    with Live([*model.parameters(), *model.hf_model.buffers()]) as live:
        call()
    return live.peak


class Live(TorchDispatchMode):
    """Follows the storages that operations make, until they are freed."""

    def __init__(self, existing: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self.now = self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        where, size = storage.data_ptr(), storage.nbytes()
        if where in self.known or not size:
            return
        self.known.add(where)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._forget, where, size)

    def _forget(self, where: int, size: int) -> None:
        self.known.discard(where)
        self.now -= size
