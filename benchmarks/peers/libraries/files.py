"""Activations in one safetensors file a batch: what a library's users write where it has no store of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["first_rows", "write_batch"]


def write_batch(folder: Path, number: int, layers: Sequence[int], values: Sequence[Tensor]) -> None:
    """Write what was read after each layer, `[batch, pos, d_model]`."""
    tensors: Mapping[str, Tensor] = {
        str(layer): value.contiguous() for layer, value in zip(layers, values, strict=True)
    }
    save_file(dict(tensors), folder / f"{number:06}.safetensors")


def first_rows(folder: Path, layer: int, count: int) -> Tensor:
    """Read the first `[count, d_model]` after a layer."""
    found: list[Tensor] = []
    for path in sorted(folder.glob("*.safetensors")):
        found.append(load_file(path)[str(layer)].flatten(0, 1))
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]
