"""What each attention head and each MLP neuron added to the residual stream.

Heads come from their cached results, or from z and W_O; neurons from what W_out multiplies. With `project_output_onto`
the weights are projected first, so nothing of size `[neurons, d_model]` is made for each position. The functions are
methods of `ActivationCache`.
"""

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core._decomposition import Decomposition, model_of, read_values, sliced
from lens_core.errors import ArgumentError, CacheError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache

__all__ = [
    "Onward",
    "compute_head_results",
    "get_full_resid_decomposition",
    "get_neuron_results",
    "onward_of",
    "stack_head_results",
    "stack_neuron_results",
]


@checks_arguments
def compute_head_results(cache: "ActivationCache") -> None:
    """Put `attn.hook_result` of every layer into the cache, from z and W_O, where it was not cached.

    Other functions here do not need it. It costs `n_heads` residual streams a layer.

    Raises:
        CacheError: A layer's z was not cached, or the cache has no model.
    """
    for layer in _layers_with(cache, "attn.hook_z", needed="attention heads"):
        name = f"blocks.{layer}.attn.hook_result"
        if name not in cache:
            (z,) = read_values(cache, [f"blocks.{layer}.attn.hook_z"])
            wide = torch.promote_types(z.dtype, torch.float32)
            weight = model_of(cache).weight("W_O", layer).detach().to(z.device, wide)
            cache.derive(name, torch.einsum("...he,hed->...hd", z.to(wide), weight).to(z.dtype))


@checks_arguments
def stack_head_results(
    cache: "ActivationCache",
    layer: int | None = -1,
    return_labels: bool = False,
    incl_remainder: bool = False,
    pos_slice: Any = None,
    apply_ln: bool = False,
    *,
    project_output_onto: Tensor | None = None,
) -> Any:
    """Stack what each attention head before a layer added to the residual stream.

    `attn.hook_result` is taken where it is cached, and computed from `attn.hook_z` elsewhere.

    Args:
        cache: The cache.
        layer: Heads of the layers before it; None, -1 and `n_layers` take all.
        return_labels: Give `(stack, labels)`.
        incl_remainder: Whether a last entry holds what the heads leave of the stream that enters `layer`: embeddings,
            output biases and all other parts.
        pos_slice: Positions along the cached axis: an int drops the axis; a slice or ints keep it.
        apply_ln: Whether to centre and divide as the norm that reads this stream did, gain and bias left out.
        project_output_onto: Directions `[d_model]` or `[d_model, k]`; the last axis is then dropped, or k long.

    Returns:
        `[layer * head, batch, pos, d_model]` in at least float32; labels such as `L0H3`, `remainder`.

    Raises:
        CacheError: Neither result nor z of a layer was cached, or the cache has no model.
        ArgumentError: No such layer or position; directions of another shape.
    """
    parts = Decomposition(cache, layer, apply_ln=apply_ln, pos_slice=pos_slice, project_output_onto=project_output_onto)
    for at in _layers_with(cache, "attn.hook_z", needed="attention heads"):
        if at < parts.layer:
            _add_heads(parts, at)
    return parts.stacked(incl_remainder=incl_remainder, return_labels=return_labels)


@checks_arguments
def get_neuron_results(
    cache: "ActivationCache",
    layer: int,
    neuron_slice: Any = None,
    pos_slice: Any = None,
    project_output_onto: Tensor | None = None,
) -> Tensor:
    """Give what each MLP neuron of one layer added to the residual stream.

    Args:
        cache: The cache.
        layer: The layer; negative counts from the end.
        neuron_slice: Neurons: an int drops the axis.
        pos_slice: Positions along the cached axis: an int drops the axis.
        project_output_onto: Directions `[d_model]` or `[d_model, k]`: only dot products with these are made, so the
            result has the neurons' own size (times k).

    Returns:
        `[batch, pos, neuron, d_model]`, or `[batch, pos, neuron]` and `[batch, pos, neuron, k]` with directions, in at
        least float32. Without directions this is `d_mlp` residual streams.

    Raises:
        CacheError: `mlp.hook_post` of the layer was not cached, or the cache has no model.
        ArgumentError: No such layer, neuron or position; directions of another shape.
    """
    n_layers = cache.table.n_layers
    if isinstance(layer, bool) or not isinstance(layer, int) or not -n_layers <= layer < n_layers:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"layer is {-n_layers} to {n_layers - 1}; got {layer!r}")
    parts = Decomposition(cache, None, pos_slice=pos_slice, project_output_onto=project_output_onto)
    acts, rows, onward = _neurons(parts, layer % n_layers)
    acts, rows = sliced(acts, -1, neuron_slice), sliced(rows, 0, neuron_slice)
    results = acts[..., None] * rows
    if onward.scale is not None:
        results = results / (onward.scale if isinstance(neuron_slice, int) else onward.scale[..., None])
    return results.squeeze(-1) if project_output_onto is not None and project_output_onto.ndim == 1 else results


@checks_arguments
def stack_neuron_results(
    cache: "ActivationCache",
    layer: int | None = None,
    pos_slice: Any = None,
    neuron_slice: Any = None,
    return_labels: bool = False,
    incl_remainder: bool = False,
    apply_ln: bool = False,
    project_output_onto: Tensor | None = None,
    mlp_input: bool = False,
) -> Any:
    """Stack what each MLP neuron before a layer added to the residual stream.

    Without `project_output_onto` this is `layer * d_mlp` residual streams: choose neurons or positions.

    Args:
        cache: The cache.
        layer: Neurons of the layers before it; None, -1 and `n_layers` take all.
        pos_slice: Positions along the cached axis: an int drops the axis; a slice or ints keep it.
        neuron_slice: Neurons of each layer; an int is one neuron of each.
        return_labels: Give `(stack, labels)`.
        incl_remainder: Whether a last entry holds what these neurons leave of the stream that is read.
        apply_ln: Whether to centre and divide as the norm that reads this stream did, gain and bias left out.
        project_output_onto: Directions `[d_model]` or `[d_model, k]`; the last axis is then dropped, or k long.
        mlp_input: The stream is what the MLP of `layer` reads (for the remainder and the norm).

    Returns:
        `[layer * neuron, batch, pos, d_model]` in at least float32; labels such as `L0N12`, `remainder`.

    Raises:
        CacheError: `mlp.hook_post` of a layer was not cached, or the cache has no model.
        ArgumentError: No such layer, neuron or position; directions of another shape.
    """
    parts = Decomposition(
        cache,
        layer,
        mlp_input=mlp_input,
        apply_ln=apply_ln,
        pos_slice=pos_slice,
        project_output_onto=project_output_onto,
    )
    for at in _layers_with(cache, "mlp.hook_post", needed="MLP neurons"):
        if at < parts.layer:
            _add_neurons(parts, at, neuron_slice)
    return parts.stacked(incl_remainder=incl_remainder, return_labels=return_labels)


@checks_arguments
def get_full_resid_decomposition(
    cache: "ActivationCache",
    layer: int | None = None,
    mlp_input: bool = False,
    expand_neurons: bool = True,
    apply_ln: bool = False,
    pos_slice: Any = None,
    return_labels: bool = False,
    project_output_onto: Tensor | None = None,
    *,
    incl_remainder: bool = False,
) -> Any:
    """Stack everything that makes up the residual stream at a layer: heads, neurons, embeddings and output biases.

    The entries sum to the stream; heads and neurons count with the post-norm (at the scale that the run had) or factor
    that their branch goes through. Where a hook edited more than what they are computed from (an `attn_out`, a
    `resid_mid`), they sum to it with the remainder.

    Args:
        cache: The cache.
        layer: The block that is entered; None, -1 and `n_layers` stand for the final norm.
        mlp_input: Stop at what the MLP of `layer` reads.
        expand_neurons: Whether each neuron is an entry, or each MLP. Every entry is a whole residual stream unless
            `project_output_onto` is given.
        apply_ln: Whether to centre and divide as the norm that reads this stream did, gain and bias left out.
        pos_slice: Positions along the cached axis: an int drops the axis; a slice or ints keep it.
        return_labels: Give `(stack, labels)`.
        project_output_onto: Directions `[d_model]` or `[d_model, k]`; the last axis is then dropped, or k long.
        incl_remainder: Whether a last entry holds what the others leave of the stream.

    Returns:
        `[entry, batch, pos, d_model]` in at least float32. Labels in order: heads (`L0H0`), neurons (`L0N0`) or parts
        that are not expanded (`0_mlp_out`), `embed`, `pos_embed`, `bias` (the sum of b_O, and of b_out where neurons
        are entries), `remainder`.

    Raises:
        CacheError: A value that it needs was not cached, or the cache has no model.
        ArgumentError: No such layer or position; directions of another shape.
    """
    parts = Decomposition(
        cache,
        layer,
        mlp_input=mlp_input,
        apply_ln=apply_ln,
        pos_slice=pos_slice,
        project_output_onto=project_output_onto,
    )
    heads, neurons, bias = _layers_with(cache, "attn.hook_z"), _layers_with(cache, "mlp.hook_post"), _Bias(parts)
    writes = parts.writes()
    for at, writer in writes:
        if writer == "hook_attn_out" and at in heads:
            _add_heads(parts, at)
            bias.add("b_O", at, writer)
    for at, writer in writes:
        if writer == "hook_mlp_out" and at in neurons and expand_neurons:
            _add_neurons(parts, at)
            bias.add("b_out", at, writer)
        elif writer != "hook_attn_out" or at not in heads:
            parts.add_writes([(at, writer)])
    parts.add_embeddings()
    parts.add_constant(bias.total, "bias")
    return parts.stacked(incl_remainder=incl_remainder, return_labels=return_labels)


class _Bias:
    """The sum of the output biases of the parts that were expanded, measured as parts are."""

    def __init__(self, parts: Decomposition) -> None:
        self._parts = parts
        self._model = model_of(parts.cache)
        self._declared = {view.name for view in self._model.declaration.weights}
        self.total = parts.measure.part(torch.zeros(self._model.cfg.d_model, device=parts.cache.device))

    def add(self, name: str, layer: int, writer: str) -> None:
        if name in self._declared:
            onward = onward_of(self._parts, layer, writer)
            vector = onward.rows(self._model.weight(name, layer).detach())
            self.total = self.total + onward.scaled(self._parts.measure.part(vector))


@attrs.frozen(kw_only=True, eq=False)
class Onward:
    """What a branch's output goes through before it is added: a factor, and a post-norm at the run's own scale."""

    factor: float
    gain: Tensor | None = None
    centres: bool = False
    scale: Tensor | None = None
    """`[batch, pos, 1]`, without the axes that were dropped."""

    def rows(self, vectors: Tensor) -> Tensor:
        """Centre, and multiply gain and factor, in at least float32."""
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        if self.centres:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        return vectors * self.factor if self.gain is None else vectors * self.gain.to(vectors.device) * self.factor

    def scaled(self, parts: Tensor) -> Tensor:
        """Divide parts `[..., batch, pos, x]` by the scale."""
        return parts if self.scale is None else parts / self.scale.to(parts.device)


def onward_of(parts: Decomposition, layer: int, writer: str) -> Onward:
    """Say what a writer's module output goes through; `writer` is its hook name below the block."""
    model = model_of(parts.cache)
    norm = "ln2_post" if writer == "hook_mlp_out" else "ln1_post"
    factor, name = model.declaration.factor_of(writer), f"blocks.{layer}.{norm}.hook_scale"
    if name not in parts.cache.table:
        return Onward(factor=factor)
    kind, module = (
        model.declaration.norms[norm].kind,
        model.bare_model.get_submodule(model.declaration.norms[norm].path.format(layer=layer)),
    )
    (scale,) = parts.values(name)
    zeros = torch.zeros(model.cfg.d_model, device=scale.device, dtype=torch.promote_types(scale.dtype, torch.float32))
    with torch.no_grad():
        gain = kind.affine(module, zeros + 1) - kind.affine(module, zeros)
    return Onward(factor=factor, gain=gain, centres=kind.centres, scale=scale)


def _layers_with(cache: "ActivationCache", part: str, *, needed: str = "") -> list[int]:
    """List the layers that have a place: some, in a hybrid; without any, `needed` says what is missing."""
    layers = [layer for layer in range(cache.table.n_layers) if f"blocks.{layer}.{part}" in cache.table]
    if needed and not layers:
        raise CacheError(f"this needs {needed}, and no block has a {part!r}")
    return layers


def _add_heads(parts: Decomposition, layer: int) -> None:
    """Take the heads of one layer."""
    onward = onward_of(parts, layer, "hook_attn_out")
    result = f"blocks.{layer}.attn.hook_result"
    if result in parts.cache:  # what the run had there, an edit included
        (value,) = parts.values(result, axis=-3)
        heads = parts.measure.part(onward.rows(value).movedim(-2, 0))
    else:
        (z,) = parts.values(f"blocks.{layer}.attn.hook_z", axis=-3)
        rows = parts.measure.rows(onward.rows(model_of(parts.cache).weight("W_O", layer).detach()))
        dtype = torch.promote_types(z.dtype, rows.dtype)
        heads = parts.measure.scaled(torch.einsum("...he,hed->h...d", z.to(rows.device, dtype), rows.to(dtype)))
    parts.add(onward.scaled(heads), [f"L{layer}H{head}" for head in range(len(heads))])


def _add_neurons(parts: Decomposition, layer: int, neuron_slice: Any = None) -> None:
    """Take the neurons of one layer, or some of them."""
    acts, rows, onward = _neurons(parts, layer)
    if isinstance(neuron_slice, int):
        neuron_slice = [neuron_slice]
    index = [int(neuron) for neuron in sliced(torch.arange(acts.shape[-1]), 0, neuron_slice)]
    acts, rows = sliced(acts, -1, neuron_slice), sliced(rows, 0, neuron_slice)
    neurons = parts.measure.scaled(torch.einsum("...n,nd->n...d", acts, rows))
    parts.add(onward.scaled(neurons), [f"L{layer}N{neuron}" for neuron in index])


def _neurons(parts: Decomposition, layer: int) -> tuple[Tensor, Tensor, Onward]:
    """Give the activations `[batch, pos, neuron]`, each neuron's measured output `[neuron, x]`, and what follows it."""
    name = f"blocks.{layer}.mlp.hook_post"
    if name not in parts.cache.table:
        raise CacheError(f"block {layer} has no MLP neurons")
    (acts,) = parts.values(name)
    onward = onward_of(parts, layer, "hook_mlp_out")
    rows = parts.measure.rows(onward.rows(model_of(parts.cache).weight("W_out", layer).detach()))
    dtype = torch.promote_types(acts.dtype, rows.dtype)
    return acts.to(rows.device, dtype), rows.to(dtype), onward
