"""Weights in TransformerLens' layout, as views of the live HF parameters.

A view is declared by the module that holds the weight, the columns of it, and an einops pattern. Linear weights are
seen as `[in, out]`, whichever way HF stores them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from einops import rearrange
from torch import Tensor, nn

from lens_core._offload import has_placement, loaded
from lens_core.errors import WeightError

__all__ = ["WeightView", "read_weight", "stack_weight"]


@attrs.frozen(kw_only=True)
class WeightView:
    """Where a weight is and how it is laid out."""

    name: str
    """`W_Q`, `b_O`, ..."""
    path: str
    """The module; `{layer}` stands for the block."""
    part: str = "weight"
    """The parameter of the module; a missing bias reads as zeros."""
    columns: tuple[int, int] | None = None
    """Which outputs of a fused projection (the last axis)."""
    pattern: str | None = None
    """An einops pattern, such as `"d (h e) -> h d e"`."""
    sizes: Mapping[str, int] = attrs.field(factory=dict[str, int])
    function: Callable[[Tensor], Tensor] | None = None
    """What is made of the parameter (`A = -exp(A_log)`): the weight is then a new tensor, not a view."""
    layers: tuple[int, ...] | None = None
    """The blocks that have it; None for all."""
    width: int | None = None
    """Length of the zeros that stand for a missing bias."""

    @property
    def per_layer(self) -> bool:
        """Whether every block has its own."""
        return "{layer}" in self.path


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
        tensor = getattr(module, view.part, None)
        if tensor is None:
            zeros = torch.zeros(view.width or 0, dtype=module.weight.dtype, device=module.weight.device)
            return rearrange(zeros, view.pattern, **view.sizes) if view.pattern else zeros
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise WeightError(
                f"{view.name} of {type(module).__name__} is quantised or replaced; it has no plain weight to show. "
                "Dequantise the model before taking weights apart"
            )
        if isinstance(module, nn.Linear) and view.part == "weight":
            tensor = tensor.T
        if tensor.is_meta:
            raise WeightError(f"{view.name} is on the meta device: the model has no weights loaded")
        if has_placement(module):
            tensor = tensor.clone()  # a loaded copy: the module goes back to the meta device
    if view.columns is not None:
        tensor = tensor[..., slice(*view.columns)]
    if view.function is not None:
        tensor = view.function(tensor)
    return rearrange(tensor, view.pattern, **view.sizes) if view.pattern else tensor


def stack_weight(view: WeightView, find_module: Callable[[str], nn.Module], n_layers: int) -> Tensor:
    """Stack a per-layer weight over layers (a copy), or read the one there is."""
    if not view.per_layer:
        return read_weight(view, find_module)
    return torch.stack([read_weight(view, find_module, layer) for layer in range(n_layers)])
