"""Weights that a library keeps in few bits, and the full ones that it says they stand for.

Only what the library itself offers is used: a tensor's own `dequantize()` (torch, torchao, optimum-quanto), a module's
method that gives such a tensor (torch's dynamic quantisation), and HF's function for bitsandbytes. For the rest (FP8
with scales of its own, GPTQ, AWQ, MXFP4, ...) HF can often load the model dequantised.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["dequantised", "is_plain"]


def is_plain(parameter: Any, module: Any) -> bool:
    """Whether a module computes with this parameter as it stands, and not with what its bits mean."""
    if not isinstance(parameter, Tensor) or not parameter.is_floating_point() or parameter.element_size() < 2:
        return False
    return not _knows_how(parameter) and getattr(module, "qweight", None) is None


def dequantised(parameter: Any, module: Any) -> Tensor | None:
    """Give the full weight that a quantised one stands for, as a copy; None where nobody offers to."""
    if callable(parameter) and not isinstance(parameter, Tensor):
        parameter = parameter()
    if not isinstance(parameter, Tensor):
        return None
    own = getattr(module, "qweight", None)  # optimum-quanto before freezing: the forward rounds the plain weight
    if isinstance(own, Tensor) and _knows_how(own):
        parameter = own
    if _knows_how(parameter):
        return parameter.dequantize()
    if type(parameter).__name__ in ("Params4bit", "Int8Params") and isinstance(parameter, nn.Parameter):
        from transformers.integrations import bitsandbytes

        untyped: Any = bitsandbytes
        return untyped.dequantize_bnb_weight(parameter, getattr(module, "state", None))
    return parameter if is_plain(parameter, module) else None


def _knows_how(tensor: Tensor) -> bool:
    """Whether a tensor has bits of its own and can be turned into a plain one."""
    return tensor.is_quantized or type(tensor).dequantize is not torch.Tensor.dequantize
