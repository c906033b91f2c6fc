"""Norms that a single type of the family has."""

from typing import Any

import torch
from torch import Tensor

from lens_core.plugin import LAYER_NORM, Gain, NormKind, loaded

__all__ = ["LAYER_NORM_OFFSET", "LAYER_NORM_PLAIN", "LAYER_NORM_UNBIASED"]


def _split(eps: Any) -> Any:
    def split(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = x - x.mean(-1, keepdim=True)
        return centred, (centred.pow(2).mean(-1, keepdim=True) + eps(module)).sqrt()

    return split


def _same(module: Any, normalized: Tensor) -> Tensor:
    return normalized


def _unbiased(module: Any, normalized: Tensor) -> Tensor:
    with loaded(module):
        wide = normalized.to(torch.promote_types(normalized.dtype, torch.float32))
        return (module.weight.to(wide) * wide).to(normalized.dtype)


def _offset(module: Any, normalized: Tensor) -> Tensor:
    with loaded(module):
        wide = normalized.to(torch.promote_types(normalized.dtype, torch.float32))
        return (wide * (module.weight + 1).to(wide) + module.bias.to(wide)).to(normalized.dtype)


LAYER_NORM_PLAIN = NormKind(
    name="LN",
    split=_split(lambda module: 1e-5),
    affine=_same,
    centres=True,
    equation="normalized",
    gain=Gain(weight=None),
)
"""OLMo's, without parameters; its eps is a literal in `OlmoLayerNorm.forward`."""
LAYER_NORM_UNBIASED = NormKind(
    name="LN",
    split=_split(lambda module: module.variance_epsilon),
    affine=_unbiased,
    centres=True,
    gain=Gain(),
)
"""Cohere's."""
LAYER_NORM_OFFSET = NormKind(
    name="LN",
    split=LAYER_NORM.split,
    affine=_offset,
    centres=True,
    equation="normalized * (1 + gain) + bias",
    gain=Gain(offset=1.0, bias="bias"),
)
"""Nemotron's (`NemotronLayerNorm1P`)."""
