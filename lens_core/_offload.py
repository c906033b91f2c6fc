"""Weights that accelerate keeps elsewhere, brought in for a moment."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

__all__ = ["has_placement", "loaded"]


@contextmanager
def loaded(module: Any) -> Generator[None, None, None]:
    """Load an offloaded module's own weights inside the block, and put them back after; does nothing otherwise."""
    if not has_placement(module):
        yield
        return
    from accelerate.utils import align_module_device  # pyright: ignore[reportMissingTypeStubs]

    with align_module_device(module):
        yield


def has_placement(module: Any) -> bool:
    """Whether accelerate moves this module's tensors around."""
    return getattr(module, "_hf_hook", None) is not None
