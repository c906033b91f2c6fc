"""What a norm does to every input alike: its gain and its centring, multiplied into the weights beside it.

A norm also divides by a scale that depends on the input. That leaves directions as they are, so matrices made this way
say where a weight reads from the residual stream and writes to it, up to a factor.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["as_read", "as_written", "norm_before"]


def norm_before(model: "LensModel", layer: int, *candidates: str) -> str | None:
    """Find the norm through which a branch of a block reads the stream: the first of these that it has."""
    found = (name for name in candidates if f"blocks.{layer}.{name}.hook_scale" in model.table)
    return next((name for name in found if name in model.declaration.norms), None)


def as_read(
    model: "LensModel", weight: Float[Tensor, "*axes d_model out"], norm: str | None, layer: int | None = None
) -> Float[Tensor, "*axes d_model out"]:
    """Give a weight that reads a norm's output as it reads the stream: gain times rows, then centred as the norm is."""
    if norm is None:
        return weight
    gain = _gain(model, norm, layer).to(weight)
    read = gain[:, None] * weight
    return read - read.mean(-2, keepdim=True) if model.declaration.norms[norm].kind.centres else read


def as_written(
    model: "LensModel", weight: Float[Tensor, "*axes d_in d_model"], norm: str | None, layer: int | None = None
) -> Float[Tensor, "*axes d_in d_model"]:
    """Give a weight that writes to a post-norm as it writes to the stream."""
    if norm is None:
        return weight
    centred = weight - weight.mean(-1, keepdim=True) if model.declaration.norms[norm].kind.centres else weight
    return centred * _gain(model, norm, layer).to(weight)


def _gain(model: "LensModel", norm: str, layer: int | None) -> Float[Tensor, " d_model"]:
    """Read the gain, whatever way the norm's kind writes it."""
    place = model.declaration.norms[norm]
    module = model.bare_model.get_submodule(place.path.format(layer=layer))
    dtype = torch.promote_types(model.bare_model.dtype, torch.float32)
    zeros = torch.zeros(model.cfg.d_model, device=model.input_device, dtype=dtype)
    with torch.no_grad():
        return place.kind.affine(module, zeros + 1) - place.kind.affine(module, zeros)
