"""A live model's weights as passes see them: a matrix by its path, the axis that it reads, whether it is plain."""

from typing import Any

import attrs
import torch
from torch import Tensor, nn

from lens_core._offload import has_placement

__all__ = ["Matrix", "find_matrix", "find_parameter", "has_hidden_bias", "has_matrix", "is_tied", "problem", "wide"]

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@attrs.frozen(kw_only=True)
class Matrix:
    """A linear map: its weight's path, the axes of its inputs and outputs, and its bias' path."""

    weight: str
    reads: int
    writes: int
    bias: str | None
    """Where its bias is, or would be; None where it cannot have one."""


def find_matrix(root: nn.Module, path: str) -> Matrix:
    """Find a linear map by the path of its module, or of the parameter that stacks experts.

    Raises:
        AttributeError: There is nothing.
    """
    owner, _, name = path.rpartition(".")
    beside = _own(root.get_submodule(owner))
    if name in beside:
        experts: Any = root.get_submodule(owner)
        reads, writes = (-2, -1) if getattr(experts, "is_transposed", False) else (-1, -2)
        bias = f"{path}_bias" if f"{name}_bias" in beside else None
        return Matrix(weight=path, reads=reads, writes=writes, bias=bias)
    module: Any = root.get_submodule(path)
    has_bias = "bias" in _own(module) or getattr(module.__class__, "forward", None) is nn.Linear.forward
    # HF's Conv1D and an embedding are stored [in, out].
    reads, writes = (-2, -1) if hasattr(module, "nf") or isinstance(module, nn.Embedding) else (-1, -2)
    return Matrix(weight=f"{path}.weight", reads=reads, writes=writes, bias=f"{path}.bias" if has_bias else None)


def has_matrix(root: nn.Module, path: str) -> bool:
    """Whether there is a linear map at a path."""
    try:
        find_matrix(root, path)
    except AttributeError:
        return False
    return True


def find_parameter(root: nn.Module, path: str) -> nn.Parameter | None:
    """Give a parameter by its path; None where there is none, or something that stands for one."""
    owner, _, name = path.rpartition(".")
    return _own(root.get_submodule(owner)).get(name)


def has_hidden_bias(root: nn.Module, path: str) -> bool:
    """Whether a module adds a bias that is no parameter of its own: under an adapter, or quantised."""
    owner, _, name = path.rpartition(".")
    bias: Any = None if find_parameter(root, path) is not None else getattr(root.get_submodule(owner), name, None)
    return (bias() if callable(bias) and not isinstance(bias, Tensor) else bias) is not None


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """Give a module's own parameters: what is one, and not made from some."""
    return dict(module.named_parameters(recurse=False))


def problem(root: nn.Module, path: str) -> str | None:
    """Say why a parameter cannot be changed in place; None if it can."""
    owner, _, _ = path.rpartition(".")
    module, parameter = root.get_submodule(owner), find_parameter(root, path)
    if parameter is None or type(parameter) is not nn.Parameter or parameter.dtype not in PLAIN:
        what = "no plain parameter" if parameter is None else f"{type(parameter).__name__} of {parameter.dtype}"
        return (
            f"{path} of {type(module).__name__} is {what}: it is quantised, adapted or spread over processes; "
            "dequantise the model, or merge its adapter, first"
        )
    if parameter.is_meta:
        where = "offloaded" if has_placement(module) else "on the meta device"
        return f"{path} is {where}, where nothing can be written; load the model without offload"
    return None


def is_tied(root: nn.Module, embed: str, unembed: str) -> bool:
    """Whether the unembedding's weight is the embedding's."""
    a, b = find_parameter(root, f"{embed}.weight"), find_parameter(root, f"{unembed}.weight")
    return a is not None and b is not None and (a is b or (not a.is_meta and a.data_ptr() == b.data_ptr()))


def wide(tensor: Tensor) -> Tensor:
    """Give values in at least float32, cut off any graph."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
