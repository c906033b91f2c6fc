"""The weight of a linear module as a matrix, wherever it lives."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lens_core._offload import loaded
from lens_core._quantised import is_plain
from lens_core._shards import whole_parameter

__all__ = ["linear_weight"]


@contextmanager
def linear_weight(module: Any) -> Generator[tuple[Tensor, Tensor | None] | None, None, None]:
    """Give a linear module's weight as `[in, out]` and its bias; None where the module is not a plain linear map.

    Plain are `nn.Linear` and HF's `Conv1D` with an ordinary weight: torchao leaves the module and puts a tensor of its
    own in, which says it is floating and need not transpose. An offloaded weight is loaded for the block and put
    back, and one that is cut over processes is gathered; the tensors are views of the live parameters otherwise, on
    autograd's graph.
    """
    from transformers.pytorch_utils import Conv1D

    if type(module) not in (nn.Linear, Conv1D) or not is_plain(module.weight, module):
        yield None
        return
    with loaded(module):
        weight, bias = whole_parameter(module.weight), whole_parameter(module.bias)
        yield (weight.T if type(module) is nn.Linear else weight), bias
