"""Kinds of norms beyond the core's four; what a plugin that has one writes into a module of its own."""

from typing import Any

import torch
from torch import Tensor

from lens_core.plugin import LAYER_NORM, RMS_NORM, NormKind, loaded

__all__ = ["LAYER_NORM_OFFSET", "LAYER_NORM_PLAIN", "LAYER_NORM_UNBIASED", "RMS_NORM_PLAIN"]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _split(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = _wide(x)
    centred = x - x.mean(-1, keepdim=True)
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), 1e-5)
    return centred, (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _same(module: Any, normalized: Tensor) -> Tensor:
    return normalized


def _unbiased(module: Any, normalized: Tensor) -> Tensor:
    with loaded(module):
        return (module.weight.to(_wide(normalized)) * _wide(normalized)).to(normalized.dtype)


def _offset(module: Any, normalized: Tensor) -> Tensor:
    with loaded(module):
        wide = _wide(normalized)
        return (wide * (module.weight + 1).to(wide) + module.bias.to(wide)).to(normalized.dtype)


LAYER_NORM_PLAIN = NormKind(name="LN", split=_split, affine=_same, centres=True, equation="normalized")
LAYER_NORM_UNBIASED = NormKind(name="LN", split=_split, affine=_unbiased, centres=True)
LAYER_NORM_OFFSET = NormKind(
    name="LN", split=LAYER_NORM.split, affine=_offset, centres=True, equation="normalized * (1 + gain) + bias"
)
RMS_NORM_PLAIN = NormKind(name="RMS", split=RMS_NORM.split, affine=_same, centres=False, equation="normalized")
