"""Weights of several blocks, and what they make together: methods of `LensModel`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core.analysis import composition
from lens_core.errors import ArgumentError, WeightError
from lens_core.factored import FactoredMatrix
from lens_core.weights import WeightView, stack_weight

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = [
    "WeightMethods",
    "view_of",
    "whole_stack",
]

_PRODUCTS = {"QK": ("W_Q", "W_K"), "OV": ("W_V", "W_O")}
_BIASES = {
    "hook_attn_out": ("b_O", "ln1_post"),
    "hook_mixer_out": ("b_out_proj", "ln1_post"),
    "hook_mlp_out": ("b_out", "ln2_post"),
}
"""What a block adds, to the bias of its output and the norm that may stand behind it."""


def view_of(model: Any, name: str) -> WeightView:
    """Find how a weight is declared.

    Raises:
        WeightError: The model has no such weight.
    """
    views = {view.name: view for view in model.declaration.weights}
    if name not in views:
        raise WeightError(f"no weight {name!r} in {model.architecture.name}; there are {', '.join(views)}")
    return views[name]


def whole_stack(model: Any, name: str) -> Tensor:
    """Stack a weight over all blocks, or read the one there is.

    Raises:
        WeightError: Some blocks have none: names the method that stacks the others.
    """
    view = view_of(model, name)
    if view.per_layer:
        _refuse_gaps(model, name, view)
    return stack_weight(view, model.bare_model.get_submodule, range(model.declaration.cfg.n_layers))


def _refuse_gaps(model: Any, name: str, view: WeightView) -> None:
    if view.layers is not None:
        missing = [layer for layer in range(model.declaration.cfg.n_layers) if layer not in view.layers]
        raise WeightError(
            f"block{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of this model "
            f"{'have' if len(missing) > 1 else 'has'} no {name}; layers, stack = model.stacked_weight({name!r}) gives "
            "those that have, with their numbers"
        )


@checks_arguments
def stacked_weight(model: "LensModel", name: str, *, dequantize: bool = False) -> tuple[tuple[int, ...], Any]:
    """Stack a weight over the blocks that have it, which in a hybrid are some.

    Args:
        model: The model.
        name: A weight of the blocks, one of `weight_names`, or `"QK"` or `"OV"`.
        dequantize: As in `weight`.

    Returns:
        `(layers, stack)`: the blocks, 0-based, and a copy of their weights `[layer, ...]`, row i for block
        `layers[i]`; of QK and OV a `FactoredMatrix`.

    Raises:
        WeightError: No such weight, one that is not of the blocks, one whose shape differs from block to block, or a
            quantised one.

    Example:
        >>> import lens_core as lens
        >>> layers, W_out = lens.load("toy:llama").stacked_weight("W_out")
        >>> layers, W_out.ndim
        ((0, 1), 3)
    """
    if name in _PRODUCTS:
        layers, first = stacked_weight(model, _PRODUCTS[name][0], dequantize=dequantize)
        _, second = stacked_weight(model, _PRODUCTS[name][1], dequantize=dequantize)
        return layers, _product(name, first, second)
    view = view_of(model, name)
    if not view.per_layer:
        raise WeightError(f"{name} is not of the blocks; model.{name} is the one there is")
    layers = tuple(range(model.declaration.cfg.n_layers)) if view.layers is None else view.layers
    return layers, stack_weight(view, model.bare_model.get_submodule, layers, dequantize=dequantize)


@checks_arguments
def factored_weight(
    model: "LensModel", name: Literal["QK", "OV"], layer: int, *, dequantize: bool = False
) -> FactoredMatrix:
    """Give QK or OV of one block's heads, `[n_heads, d_model, d_model]`; the factors are views where they can be.

    Args:
        model: The model.
        name: `"QK"` or `"OV"`, as the properties of these names.
        layer: The block, 0-based, negative from the end.
        dequantize: As in `weight`.

    Raises:
        WeightError: No such block, one without attention, or quantised weights.
        ArgumentError: Another name.

    Example:
        >>> import lens_core as lens
        >>> lens.load("toy:gpt2").factored_weight("OV", 1)[0].svd()[1].shape
        torch.Size([24])
    """
    if name not in _PRODUCTS:
        raise ArgumentError(f"name is 'QK' or 'OV'; got {name!r}")
    return _product(name, *(model.weight(part, layer, dequantize=dequantize) for part in _PRODUCTS[name]))


def _product(name: str, first: Tensor, second: Tensor) -> FactoredMatrix:
    right = second.mT if name == "QK" else second
    n_heads = max(first.shape[-3], second.shape[-3])
    return FactoredMatrix(_for_each_query(first, n_heads), _for_each_query(right, n_heads))


def _for_each_query(weight: Float[Tensor, "*layer heads rows columns"], n_heads: int) -> Tensor:
    """Repeat the weights of key and value heads for the query heads that read them: h reads h // (n_heads / heads)."""
    heads = weight.shape[-3]
    if heads == n_heads:
        return weight
    if heads == 1:
        return weight.expand(*weight.shape[:-3], n_heads, *weight.shape[-2:])
    return weight.repeat_interleave(n_heads // heads, dim=-3)


def QK(model: "LensModel") -> FactoredMatrix:
    """Give `W_Q W_K^T` of every head, `[layer, n_heads, d_model, d_model]` of rank d_head.

    `x_query QK x_key^T` is the attention score between two normed streams before it is scaled (by `1/sqrt(d_head)` as
    a rule), biases left out. With rotary embeddings it is the part that does not depend on position: the score at
    distance zero. A norm of queries and keys, where there is one, is left out too. Under grouped-query attention each
    query head has the keys that it reads. For one layer, without stacking, see `factored_weight`.

    Raises:
        WeightError: Some blocks have no attention (`stacked_weight("QK")` gives the others), or none has, or the
            weights are quantised.
    """
    return _over_all(model, "QK")


def OV(model: "LensModel") -> FactoredMatrix:
    """Give `W_V W_O` of every head, `[layer, n_heads, d_model, d_model]` of rank d_head.

    `x OV` is what the head adds to `attn.hook_out` from a position that it attends to fully, whose normed stream is x;
    biases left out, as well as what stands between `attn.hook_out` and the residual stream in some types (a post-norm,
    a factor). Under grouped-query attention each query head has the values that it reads.

    Raises:
        WeightError: As for `QK`.
    """
    return _over_all(model, "OV")


def _over_all(model: "LensModel", name: str) -> FactoredMatrix:
    part = _PRODUCTS[name][0]
    if part not in model.weight_names:
        raise WeightError(f"{name} is of attention heads, and no block of this model has any (no {part})")
    _refuse_gaps(model, name, view_of(model, part))
    return stacked_weight(model, name)[1]


def W_E_pos(model: "LensModel") -> Float[Tensor, "row d_model"]:
    """Give the embeddings of tokens, and below them those of positions: `[d_vocab + n_ctx, d_model]`, a copy.

    Raises:
        WeightError: Positions have no embedding that is added to the stream.
    """
    names = model.weight_names
    if "W_pos" not in names:
        kind = model.cfg.positional_embedding_type
        raise WeightError(f"positions have no embedding of their own in this model (positions: {kind}); W_E is all")
    tokens = model.weight("W_E")
    return torch.cat([tokens, model.weight("W_pos").to(tokens.device)])


def n_params_total(model: "LensModel") -> int:
    """Count the elements of all parameters, embeddings included; a tied one counts once."""
    return sum(parameter.numel() for parameter in model.hf_model.parameters())


def all_head_labels(model: "LensModel") -> list[str]:
    """Label every attention head, `L0H0`, `L0H1`, ...; blocks without attention have none.

    Raises:
        WeightError: No block has attention.

    Example:
        >>> import lens_core as lens
        >>> lens.load("toy:gpt2").all_head_labels[:2]
        ['L0H0', 'L0H1']
    """
    if "W_O" not in model.weight_names:
        raise WeightError("no block of this model has attention heads to label")
    layers = view_of(model, "W_O").layers
    return [
        f"L{layer}H{head}"
        for layer in (range(model.cfg.n_layers) if layers is None else layers)
        for head in range(model.cfg.n_heads or 0)
    ]


@checks_arguments
def accumulated_bias(
    model: "LensModel", layer: int | None, mlp_input: bool = False, include_mlp_biases: bool = True
) -> Float[Tensor, " d_model"]:
    """Sum what every input adds to the residual stream before a layer: the output biases of attention, mixers and MLPs.

    It is the stream that enters `layer` if nothing is embedded and no head, channel or neuron is active. Factors that a
    branch goes through count, as does the bias of a post-norm. The biases of single experts do not: which of them are
    added is up to the input.

    Args:
        model: The model.
        layer: The block that is entered; None, -1 and `n_layers` stand for the final norm.
        mlp_input: Stop at what the MLP of `layer` reads: attention's bias of that layer is in.
        include_mlp_biases: Whether those of MLPs count.

    Returns:
        `[d_model]` in at least float32; zeros where there are no biases.

    Raises:
        ArgumentError: No such layer.
        WeightError: An output bias stands before a post-norm, which divides it by what depends on the input.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> bool((model.accumulated_bias(1) == model.b_O[0] + model.b_out[0]).all())
        True
    """
    at = _entered(model, layer, mlp_input=mlp_input)
    like = model.weight("W_E")
    total = torch.zeros(model.cfg.d_model, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    for block, writer in _writes_before(model, at, mlp_input=mlp_input):
        if writer in _BIASES and (include_mlp_biases or writer != "hook_mlp_out"):
            total = total + _constant(model, block, writer).to(total)
    return total


def _entered(model: "LensModel", layer: Any, *, mlp_input: bool) -> int:
    n_layers = model.cfg.n_layers
    at = n_layers if layer is None or layer == -1 else layer
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at <= n_layers:
        raise ArgumentError(
            f"layer is 0 to {n_layers}, where {n_layers}, -1 and None are the final norm; got {layer!r}"
        )
    if mlp_input and at == n_layers:
        raise ArgumentError(f"mlp_input is about one block: give its layer, 0 to {n_layers - 1}")
    return at


def _writes_before(model: "LensModel", at: int, *, mlp_input: bool) -> Iterator[tuple[int, str]]:
    """Go through what writes to the stream before it enters a block, or its MLP, as (block, hook name)."""
    names, writers = list(model.table), model.declaration.writers
    for block in range(at):
        yield from ((block, writer) for writer in writers if f"blocks.{block}.{writer}" in model.table)
    middle = f"blocks.{at}.hook_resid_mid"
    if mlp_input and middle in model.table:
        before = set(names[: names.index(middle)])
        yield from ((at, writer) for writer in writers if f"blocks.{at}.{writer}" in before)


def _constant(model: "LensModel", block: int, writer: str) -> Tensor:
    """Give what a branch adds whatever it reads."""
    bias_name, norm = _BIASES[writer]
    factor = model.declaration.factor_of(writer)
    view = next((view for view in model.declaration.weights if view.name == bias_name), None)
    has_bias = view is not None and (view.layers is None or block in view.layers)
    bias = model.weight(bias_name, block) if has_bias else torch.zeros(model.cfg.d_model)
    if f"blocks.{block}.{norm}.hook_scale" not in model.table:
        return bias * factor
    if bias.any():
        raise WeightError(
            f"{bias_name} of block {block} goes through {norm}, which divides it by a scale that depends on the input: "
            "what it adds is no constant. For one run see cache.get_full_resid_decomposition"
        )
    place = model.declaration.norms[norm]
    return place.kind.affine(model.bare_model.get_submodule(place.path.format(layer=block)), bias) * factor


class WeightMethods:
    """What a model can tell of its weights beyond single views."""

    QK = property(QK)
    OV = property(OV)
    W_E_pos = property(W_E_pos)
    n_params_total = property(n_params_total)
    all_head_labels = property(all_head_labels)
    accumulated_bias = accumulated_bias
    stacked_weight = stacked_weight
    factored_weight = factored_weight
    all_composition_scores = composition.all_composition_scores
