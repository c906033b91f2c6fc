"""Weights in TransformerLens' layout, as views of the live HF parameters.

A view is declared by the module that holds the weight, the columns of it, and an einops pattern. Linear weights are
seen as `[in, out]`, whichever way HF stores them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from einops import rearrange
from torch import Tensor, nn

from lens_core._offload import has_placement, loaded
from lens_core._quantised import dequantised, is_plain
from lens_core._shards import whole_parameter
from lens_core._views import Columns
from lens_core.errors import WeightError

__all__ = ["WeightView", "read_weight", "stack_weight", "weight_and_bias"]


@attrs.frozen(kw_only=True)
class WeightView:
    """Where a weight is and how it is laid out."""

    name: str
    """`W_Q`, `b_O`, ..."""
    path: str
    """The module; `{layer}` stands for the block."""
    part: str = "weight"
    """The parameter of the module; a bias that is not there reads as zeros."""
    columns: Columns | None = None
    """Which outputs (the last axis), and into how many heads they are cut."""
    pattern: str | None = None
    """An einops pattern, such as `"(h e) d -> h e d"`, of what `columns` and `function` give."""
    sizes: Mapping[str, int] = attrs.field(factory=dict[str, int])
    function: Callable[[Tensor], Tensor] | None = None
    """What is made of the parameter (`A = -exp(A_log)`): the weight is then a new tensor, unless it only slices."""
    layers: tuple[int, ...] | None = None
    """The blocks that have it; None for all."""

    @property
    def per_layer(self) -> bool:
        """Whether every block has its own."""
        return "{layer}" in self.path


def weight_and_bias(
    name: str,
    path: str,
    *,
    columns: Columns | None = None,
    pattern: str | None = None,
    sizes: Mapping[str, int] | None = None,
    layers: tuple[int, ...] | None = None,
) -> Iterator[WeightView]:
    """Give the views `W_name` and `b_name` of a linear module.

    Args:
        name: `Q`, `in`, ...
        path: The module; `{layer}` stands for the block.
        columns: Which outputs; if they are cut into heads, the weight is `[head, in, width]` and the bias
            `[head, width]`.
        pattern: Of the weight, where that is not all.
        sizes: Of the pattern's axes.
        layers: The blocks that have it; None for all.

    Example:
        >>> from lens_core.plugin import Columns
        >>> for view in weight_and_bias("V", "h.{layer}.qkv", columns=Columns(start=64, heads=4)):
        ...     print(view.name, view.part, view.pattern)
        W_V weight d h e -> h d e
        b_V bias None
    """
    if pattern is None and columns is not None and columns.heads is not None:
        pattern = "d h e -> h d e"
    yield WeightView(name=f"W_{name}", path=path, columns=columns, pattern=pattern, sizes=sizes or {}, layers=layers)
    yield WeightView(name=f"b_{name}", path=path, part="bias", columns=columns, layers=layers)


def read_weight(
    view: WeightView, find_module: Callable[[str], nn.Module], layer: int | None = None, *, dequantize: bool = False
) -> Tensor:
    """Read one weight: a view of the live parameter, or a whole copy where that is offloaded or cut over processes.

    Args:
        view: Where it is.
        find_module: Gives a module by its path.
        layer: The block.
        dequantize: Whether a quantised weight is turned into the full one that it stands for, a copy, by the library
            that quantised it.

    Raises:
        WeightError: A layer is missing, or the module is quantised or adapted and its weight is not a plain matrix.
    """
    if view.per_layer and layer is None:
        raise WeightError(f"{view.name} has one entry for each layer: give the layer")
    if view.layers is not None and layer not in view.layers:
        raise WeightError(f"block {layer} has no {view.name}; blocks {', '.join(map(str, view.layers))} have")
    module: Any = find_module(view.path.format(layer=layer))
    with loaded(module):
        tensor = _parameter(view, module, dequantize=dequantize)
    if view.columns is not None:
        tensor = view.columns.pick(tensor)
    if view.function is not None:
        tensor = view.function(tensor)
    return rearrange(tensor, view.pattern, **view.sizes) if view.pattern else tensor


def _parameter(view: WeightView, module: Any, *, dequantize: bool) -> Tensor:
    """Give the parameter as an ordinary tensor that is there; linear weights turn to `[in, out]`."""
    if hasattr(module, "base_layer"):
        module = _below_adapter(view, module)
    tensor: Any = whole_parameter(getattr(module, view.part, None))
    if view.part == "bias":
        if callable(tensor) and not isinstance(tensor, Tensor):  # torch's quantised modules
            tensor = tensor()
        tensor = _no_bias(module) if tensor is None else tensor
    tensor = _full(tensor, view, module, dequantize=dequantize)
    if tensor.is_meta:
        raise WeightError(f"{view.name} is on the meta device: the model has no weights loaded")
    if view.part == "weight" and _is_linear(module, tensor):
        tensor = tensor.T
    return tensor.clone() if has_placement(module) else tensor  # a loaded copy: the module goes back to the meta device


def _below_adapter(view: WeightView, module: Any) -> Any:
    """Give the module that an adapter wraps, where the adapted one computes with that one's weight alone.

    Raises:
        WeightError: The adapter adds to it.
    """
    is_merged, is_off = (bool(getattr(module, name, False)) for name in ("merged", "disable_adapters"))
    if is_merged == is_off:
        raise WeightError(
            f"{view.name} is under an adapter ({type(module).__name__}), which adds to the weight that it wraps; call "
            "merge_adapter() of the PEFT model (unmerge_adapter() takes it back) to see the sum, or look inside "
            "`with peft_model.disable_adapter()` for the weight below"
        )
    return module.base_layer


def _full(tensor: Any, view: WeightView, module: nn.Module, *, dequantize: bool) -> Tensor:
    if is_plain(tensor, module if view.part == "weight" else None):
        return tensor
    found = dequantised(tensor, module) if dequantize else None
    if found is None:
        kind = type(module).__name__ if type(tensor) in _PLAIN else f"{type(module).__name__} ({type(tensor).__name__})"
        hint = (
            "nothing here dequantises it; load the model dequantised (HF's quantisation configs take dequantize=True), "
            "or dequantise hf_model"
            if dequantize
            else "model.weight(name, layer, dequantize=True) gives the full weight that it stands for, as a copy"
        )
        raise WeightError(f"{view.name} of {kind} is quantised or replaced; it has no plain weight to show: {hint}")
    return found


def _no_bias(module: Any) -> Tensor:
    weight: Any = module.weight
    if not isinstance(weight, Tensor):
        return torch.zeros(_n_outputs(module))
    dtype = weight.dtype if weight.is_floating_point() else None
    return torch.zeros(_n_outputs(module), dtype=dtype, device=weight.device)


_PLAIN = (type(None), Tensor, nn.Parameter)


def _is_linear(module: Any, weight: Tensor) -> bool:
    """Whether a weight is stored `[out, in]`; quantised linear modules need not be `nn.Linear`."""
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return isinstance(module, nn.Linear) or tuple(weight.shape) == sizes


def _n_outputs(module: Any) -> int:
    """Count what a linear map or a convolution gives, under the name that its class has for it."""
    names = ("out_features", "out_channels", "nf")
    named = next((name for name in names if hasattr(module, name)), None)
    return module.weight.shape[0] if named is None else getattr(module, named)


def stack_weight(
    view: WeightView, find_module: Callable[[str], nn.Module], layers: Sequence[int], *, dequantize: bool = False
) -> Tensor:
    """Stack a per-layer weight over layers (a copy, on the first one's device), or read the one there is.

    Raises:
        WeightError: A layer does not have it, or the layers' shapes differ.
    """
    if not view.per_layer:
        return read_weight(view, find_module, dequantize=dequantize)
    each = [read_weight(view, find_module, layer, dequantize=dequantize) for layer in layers]
    odd = next((place for place, one in enumerate(each) if one.shape != each[0].shape), None)
    if odd is not None:
        raise WeightError(
            f"{view.name} is {list(each[0].shape)} in block {layers[0]} and {list(each[odd].shape)} in block "
            f"{layers[odd]}, which do not stack; model.weight({view.name!r}, layer) gives each"
        )
    return torch.stack([one.to(each[0].device) for one in each])
