"""What GPT-NeoX has where lens-core has no seam: fused projections cut by heads, and its own name for HF's cache.

Glossary: `query_key_value` returns [head][q | k | v] along its last axis; `layer_past` is the cache.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import attrs
import torch
from lens_core.plugin import Columns, HeadsFirst, ModuleCall, ModuleStep, Run, Watch
from torch import Tensor


@attrs.frozen(kw_only=True)
class HeadPart:
    """q, k or v (`part` 0, 1, 2) of every head in what `query_key_value` returns: `[batch, pos, heads, d_head]`."""

    heads: int
    part: int

    def read(self, tensor: Tensor, run: Run | None = None) -> Tensor:
        """Show the part, as a view."""
        return tensor.unflatten(-1, (self.heads, 3, -1))[..., self.part, :]

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Put a new part between the old ones, in a new tensor."""
        parts = list(tensor.unflatten(-1, (self.heads, 3, -1)).unbind(-2))
        parts[self.part] = value
        return torch.stack(parts, dim=-2).flatten(-3)


@attrs.frozen(kw_only=True)
class WholeHeads(Columns):
    """The same for `HeadInput`, which takes contiguous columns: it computes all parts of a head, and one is kept."""

    own: HeadPart

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Put back the own part alone."""
        return self.own.write(tensor, self.own.read(value.flatten(-2)))


@attrs.frozen(kw_only=True)
class RotatedKeys:
    """Rotated keys as the attention module hands them to its cache, so that an edit is there for later steps."""

    path: str
    group = "rotated keys"

    def steps(self, watches: Sequence[Watch], run: Run) -> Iterator[ModuleStep]:
        """Stand between each module and its cache."""
        for watch in watches:
            yield ModuleStep(path=watch.point.seam.path, when="pre", act=partial(_tap, watch))


def _tap(watch: Watch, call: ModuleCall) -> None:
    cache: Any = call.kwargs["layer_past"]

    def update(key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        shown = key.transpose(1, 2)  # batch pos head d_head
        new = watch.fire(shown)
        key = key if new is shown else HeadsFirst().write(key, new)
        return (key, value) if cache is None else cache.update(key, value, layer)

    call.kwargs = {**call.kwargs, "layer_past": SimpleNamespace(update=update)}
    call.input_changed = True
