"""Norms taken apart: the centred input, its scale, and what gain and bias make of the normalized input."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_core._graph import with_gradient_of
from lens_core._offload import loaded

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["LAYER_NORM", "RMS_NORM", "RMS_NORM_GAIN_FIRST", "RMS_NORM_OFFSET", "Gain", "NormKind", "norm_of_copy"]


@attrs.frozen(kw_only=True)
class Gain:
    """Where a norm keeps what its normalized input is multiplied by, and what is then added; parameters of the module.

    A norm whose gain is 1 and whose bias is 0 hands on its normalized input: its weight is then `1 - offset`.
    """

    weight: str | None = "weight"
    """The parameter; None where there is none, as in OLMo. One that is not there reads as ones."""
    offset: float = 0.0
    """What is added to the parameter to give the gain: 1 for Gemma."""
    bias: str | None = None


@attrs.frozen(kw_only=True)
class NormKind:
    """How one kind of norm computes; each function is given the live module."""

    name: str
    split: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    """Input to (centred input, scale), both in at least float32."""
    affine: Callable[[nn.Module, Tensor], Tensor]
    """Normalized input to what the norm hands on, in the normalized input's dtype."""
    centres: bool
    """Whether the mean is subtracted first."""
    equation: str = "normalized * gain"
    """What the norm hands on."""
    gain: Gain | None = None
    """Where gain and bias are; None where nobody says: such a norm is not folded into the weights that read it."""


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _layer_norm_split(
    module: Any, x: Float[Tensor, "*batch d_model"]
) -> tuple[Float[Tensor, "*batch d_model"], Float[Tensor, "*batch 1"]]:
    """Centre, and take sqrt(var + eps) (torch `nn.LayerNorm`, biased variance)."""
    x = _at_least_float32(x)
    centred = x - x.mean(-1, keepdim=True)
    return centred, (centred.pow(2).mean(-1, keepdim=True) + module.eps).sqrt()


def _layer_norm_affine(module: Any, normalized: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Multiply the gain and add the bias, rounding once as torch's kernel does."""
    with loaded(module):
        out = _at_least_float32(normalized)
        if module.weight is not None:
            out = out * module.weight.to(out.device)
        if module.bias is not None:
            out = out + module.bias.to(out.device)
    return out.to(normalized.dtype)


LAYER_NORM = NormKind(
    name="LN",
    split=_layer_norm_split,
    affine=_layer_norm_affine,
    centres=True,
    equation="normalized * gain + bias",
    gain=Gain(bias="bias"),
)


def _rms_split(
    module: Any, x: Float[Tensor, "*batch d_model"]
) -> tuple[Float[Tensor, "*batch d_model"], Float[Tensor, "*batch 1"]]:
    """Take sqrt(mean(x^2) + eps), uncentred (Zhang and Sennrich 2019, eq. 4)."""
    x = _at_least_float32(x)
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return x, (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _rms_affine(module: Any, normalized: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Multiply the gain in the model's dtype, as `LlamaRMSNorm` does after its cast."""
    with loaded(module):
        return module.weight.to(normalized.device) * normalized


def _rms_affine_gain_first(module: Any, normalized: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Multiply the gain before the cast, as `Olmo2RMSNorm` does."""
    with loaded(module):
        return (module.weight.to(normalized.device) * _at_least_float32(normalized)).to(normalized.dtype)


def _rms_affine_offset(module: Any, normalized: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Multiply 1 + gain before the cast, as `GemmaRMSNorm` does."""
    with loaded(module):
        gain = 1.0 + _at_least_float32(module.weight.to(normalized.device))
        return (_at_least_float32(normalized) * gain).to(normalized.dtype)


RMS_NORM = NormKind(name="RMS", split=_rms_split, affine=_rms_affine, centres=False, gain=Gain())
RMS_NORM_GAIN_FIRST = NormKind(name="RMS", split=_rms_split, affine=_rms_affine_gain_first, centres=False, gain=Gain())
RMS_NORM_OFFSET = NormKind(
    name="RMS",
    split=_rms_split,
    affine=_rms_affine_offset,
    centres=False,
    equation="normalized * (1 + gain)",
    gain=Gain(offset=1.0),
)


def norm_of_copy(run: "Run", path: str, copy: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Apply a block's norm to a copy of what it read, without its hooks, which have fired.

    The copy has a scale of its own; but where a function stopped the gradient of the norm's scale (`NormInside` says
    so), it flows through no copy's scale either: else reading a copy's gradient would change that of the stream.
    """
    module = run.module(path)
    out: Tensor = module.forward(copy)
    kind: NormKind | None = run.now.scratch.get((path, "stopped"))
    if kind is None or not out.requires_grad:
        return out
    centred, scale = kind.split(module, copy)
    return with_gradient_of(kind.affine(module, (centred / scale.detach()).to(copy.dtype)), out)
