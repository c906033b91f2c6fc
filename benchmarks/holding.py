"""Memory that caching one name takes, counted tensor by tensor: the same on every machine."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import random_model, random_tokens
from benchmarks.rows import Row
from benchmarks.settings import Settings

__all__ = ["account", "rows"]

BATCH = 8  # rows, so that activations are larger than what a call allocates besides


def rows(settings: Settings) -> Iterator[Row]:
    """Cache one name in a forward, and compare the memory with the plain forward's: at its peak, and after."""
    hf_model, model = random_model(settings.tiny)
    tokens = random_tokens(settings.tiny, batch=BATCH)
    own = [*hf_model.parameters(), *hf_model.buffers(), tokens]
    names = ("blocks.0.hook_resid_post", "blocks.0.attn.hook_q")  # q is a third of what HF's module returns
    with torch.no_grad(), _no_collection():
        plain_peak, plain_kept, _ = account(lambda: hf_model(tokens, use_cache=False), own)
        for name in names:
            peak, kept, dropped = account(lambda n=name: model.run_with_cache(tokens, names_filter=n), own)
            size = _bytes_of(model.run_with_cache(tokens, names_filter=name)[1][name])
            for what, extra, goal in (
                ("added to the peak", peak - plain_peak, 1.0),
                ("kept after the call", kept - plain_kept, 1.0),
                ("left when the cache is dropped, before any garbage collection", dropped, 0.0),
            ):
                values = (extra / size,)
                yield Row(
                    group=f"memory of caching `{name}`", name=what, unit="× that tensor", values=values, goal=goal
                )


def account(call: Callable[[], Any], existing: list[Tensor]) -> tuple[int, int, int]:
    """Give the bytes of tensors at the peak of a call, after it with its results held, and with them dropped."""
    call()  # what a first call sets up does not count
    with _Live(existing) as live:
        held = call()
    kept = live.bytes
    del held
    return live.peak, kept, live.bytes


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Live(TorchDispatchMode):
    """Follows the storages that operations make, until they are freed."""

    def __init__(self, existing: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self.bytes = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        where, size = storage.data_ptr(), storage.nbytes()
        if where in self.known or not size:
            return
        self.known.add(where)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, where, size)

    def _forget(self, where: int, size: int) -> None:
        self.known.discard(where)
        self.bytes -= size
