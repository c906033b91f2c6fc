"""Weights in TransformerLens' layout, as views of the live HF parameters.

A view is declared by the module that holds the weight, the columns of it, and an einops pattern. Linear weights are
seen as `[in, out]`, whichever way HF stores them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from einops import rearrange
from torch import Tensor, nn

from lens_core._offload import has_placement, loaded
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
    """What is made of the parameter (`A = -exp(A_log)`): the weight is then a new tensor, not a view."""
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


def read_weight(view: WeightView, find_module: Callable[[str], nn.Module], layer: int | None = None) -> Tensor:
    """Read one weight: a view of the live parameter, or a loaded copy where the module is offloaded.

    Raises:
        WeightError: A layer is missing, or the module is quantised or adapted and its weight is not a plain matrix.
    """
    if view.per_layer and layer is None:
        raise WeightError(f"{view.name} has one entry for each layer: give the layer")
    if view.layers is not None and layer not in view.layers:
        raise WeightError(f"block {layer} has no {view.name}; blocks {', '.join(map(str, view.layers))} have")
    module: Any = find_module(view.path.format(layer=layer))
    with loaded(module):
        tensor: Any = getattr(module, view.part, None)
        if tensor is None and view.part == "bias":
            tensor = torch.zeros(_n_outputs(module), dtype=module.weight.dtype, device=module.weight.device)
        else:
            tensor = _plain(tensor, view, module)
    if view.columns is not None:
        tensor = view.columns.pick(tensor)
    if view.function is not None:
        tensor = view.function(tensor)
    return rearrange(tensor, view.pattern, **view.sizes) if view.pattern else tensor


def _plain(tensor: Any, view: WeightView, module: nn.Module) -> Tensor:
    """See that a parameter is an ordinary tensor that is there; linear weights turn to `[in, out]`."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise WeightError(
            f"{view.name} of {type(module).__name__} is quantised or replaced; it has no plain weight to show. "
            "Dequantise the model before taking weights apart"
        )
    if tensor.is_meta:
        raise WeightError(f"{view.name} is on the meta device: the model has no weights loaded")
    if isinstance(module, nn.Linear) and view.part == "weight":
        tensor = tensor.T
    return tensor.clone() if has_placement(module) else tensor  # a loaded copy: the module goes back to the meta device


def _n_outputs(module: Any) -> int:
    """Count what a linear map or a convolution gives, under the name that its class has for it."""
    names = ("out_features", "out_channels", "nf")
    return next((getattr(module, name) for name in names if hasattr(module, name)), module.weight.shape[0])


def stack_weight(view: WeightView, find_module: Callable[[str], nn.Module], n_layers: int) -> Tensor:
    """Stack a per-layer weight over layers (a copy), or read the one there is."""
    if not view.per_layer:
        return read_weight(view, find_module)
    return torch.stack([read_weight(view, find_module, layer) for layer in range(n_layers)])
