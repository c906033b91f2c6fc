"""A few numbers of every weight, to tell one model from another of the same shape."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["sample_of", "unlike_sample"]

_EACH = 8  # numbers of a parameter
_COARSE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def sample_of(model: "LensModel") -> dict[str, Tensor]:
    """Give a few numbers of each floating parameter that is there, evenly spread, by HF's name."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.bare_model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and parameter.numel():
            step = max(1, parameter.numel() // _EACH)
            at = torch.arange(0, parameter.numel(), step, device=parameter.device)[:_EACH]
            index = torch.unravel_index(at, parameter.shape)
            found[name] = parameter.detach()[index].cpu()
    return found


def unlike_sample(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """Tell the first weight that differs by more than the rounding of the coarser dtype; empty if none does."""
    for name in sorted(theirs.keys() & ours.keys()):
        one, other = theirs[name], ours[name]
        coarse = min(one.dtype, other.dtype, key=lambda dtype: _COARSE.index(dtype) if dtype in _COARSE else 9)
        if one.shape != other.shape or not torch.equal(one.to(coarse), other.to(coarse)):
            return f"{name[:120]!r} differs"
    missing = theirs.keys() ^ ours.keys()
    both = theirs.keys() & ours.keys()
    return "" if both else f"no weight is in both, and {sorted(missing)[0][:120]!r} is in one" if missing else ""
