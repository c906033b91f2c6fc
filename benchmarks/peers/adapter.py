"""What a library does for the rows, and how it says that it cannot."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

__all__ = ["Adapter", "Cannot", "Metric"]

Metric = Callable[[Tensor], Tensor]
"""Logits `[batch, pos, d_vocab]` to a number for each row `[batch]`."""


class Cannot(Exception):  # noqa: N818
    """A library has no way to do a row; the message says why, for the table."""


class Adapter(Protocol):
    """A model in a library's hands; made from a folder that HF's `save_pretrained` wrote.

    Layers count from 0, and the residual stream "after" one is what its block returns.
    """

    IMPORT: str
    """What a user imports first, as a statement."""
    LOAD: str
    """What loads the folder of that name into `model`, as statements."""

    def __init__(self, folder: str) -> None: ...

    def forward(self, tokens: Tensor) -> Tensor:
        """Give the logits."""
        ...

    def hook(self, tokens: Tensor, layer: int) -> Tensor:
        """Read the residual stream after a layer by a hook, in a forward to the end."""
        ...

    def cache(self, tokens: Tensor) -> Sequence[Tensor]:
        """Cache what the library caches when nothing is said, and give it all."""
        ...

    def residuals(self, tokens: Tensor) -> Sequence[Tensor]:
        """Cache the residual stream after each layer."""
        ...

    def generate(self, tokens: Tensor, new_tokens: int, layer: int, vector: Tensor) -> Tensor:
        """Choose the likeliest tokens, the vector being added after the layer at each step; prompt included."""
        ...

    def sweep(self, clean: Tensor, corrupted: Tensor, metric: Metric) -> Tensor:
        """Give the metric for each layer and position at which the clean residual stream enters the layer."""
        ...

    def harvest(self, batches: Iterable[Tensor], layers: Sequence[int], folder: Path) -> None:
        """Write the residual stream after some layers, from the tokens of many batches."""
        ...

    def harvested(self, folder: Path, layer: int, count: int) -> Tensor:
        """Read back the first `[count, d_model]` of what was written, row after row."""
        ...

    def state(self, tokens: Tensor) -> Sequence[Tensor]:
        """Give each layer's state after the last token `[batch, d_inner, d_state]`."""
        ...

    def states(self, tokens: Tensor) -> Sequence[Tensor]:
        """Give each layer's state after every token `[batch, pos, d_inner, d_state]`."""
        ...
