"""The residual stream taken apart: what the embeddings and each part of a block added, and what a norm makes of it.

Everything here is linear in the stream, given the scales that the run had, so that parts sum to the whole. What is
computed is in at least float32, whatever the cached dtype; a plain stack keeps the cached dtype. Weights count as
constants: gradients flow through cached values only. The functions are methods of `ActivationCache`.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core._decomposition import (
    Decomposition,
    Measure,
    declaration_of,
    model_of,
    norm_at,
    read_layer,
    read_values,
    sliced,
    stream_name,
)
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache

__all__ = ["accumulated_resid", "apply_ln_to_stack", "decompose_resid", "stack_activation"]


@checks_arguments
def accumulated_resid(
    cache: "ActivationCache",
    layer: int | None = None,
    incl_mid: bool = False,
    apply_ln: bool = False,
    pos_slice: Any = None,
    mlp_input: bool = False,
    return_labels: bool = False,
) -> Any:
    """Stack the residual stream as it enters each block, up to a layer.

    Args:
        cache: The cache.
        layer: The last block, which is entered; None, -1 and `n_layers` go on to what enters the final norm.
        incl_mid: Whether `hook_resid_mid` of the blocks before `layer` is there too.
        apply_ln: Whether to normalise: with the cached scale of `layer`'s own norm, or, at the end, each entry by the
            whole final norm, its gain and bias included, on the entry's own statistics: `stack @ model.W_U` (plus
            `b_U`) is then the logit lens.
        pos_slice: Positions along the cached axis: an int drops the axis; a slice or ints keep it.
        mlp_input: Go on to what the MLP of `layer` reads.
        return_labels: Give `(stack, labels)`.

    Returns:
        `[entry, batch, pos, d_model]` in the cached dtype (normalised: at least float32), without the axes that were
        dropped; labels such as `0_pre`, `0_mid`, `final_post`.

    Raises:
        CacheError: A value that it needs was not cached.
        ArgumentError: No such layer or position.
    """
    last = read_layer(cache, layer, mlp_input=mlp_input)
    names, labels = list[str](), list[str]()
    for index in range(last + 1):
        names.append(stream_name(cache, index))
        labels.append("final_post" if index == cache.table.n_layers else f"{index}_pre")
        middle = f"blocks.{index}.hook_resid_mid"
        if middle in cache.table and (incl_mid if index < last else mlp_input):
            names.append(middle)
            labels.append(f"{index}_mid")
    values = [sliced(value, -2, pos_slice) for value in read_values(cache, names)]
    stack = torch.stack([value.to(values[0].device) for value in values])
    if apply_ln:
        is_final = last == cache.table.n_layers
        stack = apply_ln_to_stack(cache, stack, last, mlp_input, pos_slice, recompute_ln=is_final)
    return (stack, labels) if return_labels else stack


@checks_arguments
def decompose_resid(
    cache: "ActivationCache",
    layer: int | None = None,
    mlp_input: bool = False,
    mode: str = "all",
    apply_ln: bool = False,
    pos_slice: Any = None,
    incl_embeds: bool = True,
    return_labels: bool = False,
    *,
    incl_remainder: bool = False,
) -> Any:
    """Stack what the embeddings and the parts of the blocks added to the residual stream that enters a layer.

    With `mode="all"` and the embeddings, the entries sum to that stream. Where a hook edited the stream itself, such as
    a `hook_resid_mid`, they sum to it only with the remainder.

    Args:
        cache: The cache.
        layer: The block that is entered; None, -1 and `n_layers` stand for the final norm.
        mlp_input: Stop at what the MLP of `layer` reads.
        mode: `"all"`, or one kind of part: `"attn"`, `"mlp"`, or another that the architecture has.
        apply_ln: Whether to centre and divide as the norm that reads this stream did, gain and bias left out.
        pos_slice: Positions along the cached axis: an int drops the axis; a slice or ints keep it.
        incl_embeds: Whether the embeddings are there.
        return_labels: Give `(stack, labels)`.
        incl_remainder: Whether a last entry holds what the others leave of the stream.

    Returns:
        `[entry, batch, pos, d_model]` in at least float32, without the axes that were dropped; labels such as `embed`,
        `pos_embed`, `0_attn_out`, `0_mlp_out`, `remainder`. In half precision the sum differs from the stream by the
        model's own rounding of the stream.

    Raises:
        CacheError: A value that it needs was not cached, or the cache has no model.
        ArgumentError: No such layer, mode or position.
    """
    kinds = {writer: writer.removeprefix("hook_").removesuffix("_out") for writer in declaration_of(cache).writers}
    if mode != "all" and mode not in kinds.values():
        raise ArgumentError(f"mode is 'all' or one of {', '.join(map(repr, kinds.values()))}; got {mode!r}")
    parts = Decomposition(cache, layer, mlp_input=mlp_input, apply_ln=apply_ln, pos_slice=pos_slice)
    if incl_embeds:
        parts.add_embeddings()
    parts.add_writes([(at, writer) for at, writer in parts.writes() if mode in ("all", kinds[writer])])
    return parts.stacked(incl_remainder=incl_remainder, return_labels=return_labels)


@checks_arguments
def apply_ln_to_stack(
    cache: "ActivationCache",
    residual_stack: Tensor,
    layer: int | None = None,
    mlp_input: bool = False,
    pos_slice: Any = None,
    batch_slice: Any = None,
    has_batch_dim: bool = True,
    recompute_ln: bool = False,
) -> Tensor:
    """Normalise parts of the residual stream as the run normalised the whole: centred if it did, over the cached scale.

    Parts that sum to the stream then sum to the norm's `hook_normalized`. Gain and bias are left out.

    Args:
        cache: The cache.
        residual_stack: `[entry, batch, pos, d_model]`, without the axes that an int slice dropped.
        layer: The block whose norm it is; None, -1 and `n_layers` stand for the final norm.
        mlp_input: The norm before the MLP instead of the one before attention.
        pos_slice: What the stack's positions were sliced by; here it is applied to the scale only.
        batch_slice: Rows to take, of the scale and of a stack with a batch axis.
        has_batch_dim: Whether the stack has a batch axis; without one, `batch_slice` names its row of the cache.
        recompute_ln: Apply the whole norm to each entry instead, on the entry's own statistics, gain and bias
            included: what the norm would hand on if the stream ended there.

    Returns:
        A stack in at least float32.

    Raises:
        CacheError: The scale was not cached, or the cache has no model.
        ArgumentError: The stack does not fit the scale; no such layer, row or position.
    """
    at = read_layer(cache, layer, mlp_input=mlp_input)
    if batch_slice is not None and not cache.has_batch_dim:
        raise ArgumentError(f"this cache has no batch axis to take {batch_slice!r} of")
    stack = sliced(residual_stack, 1, batch_slice) if has_batch_dim and cache.has_batch_dim else residual_stack
    prefix, place = norm_at(cache, at, mlp_input=mlp_input)
    if recompute_ln:
        module = model_of(cache).bare_model.get_submodule(place.path.format(layer=at))
        with torch.set_grad_enabled(torch.is_grad_enabled() and stack.requires_grad):
            centred, scale = place.kind.split(module, stack)
            return place.kind.affine(module, centred / scale)
    (scale,) = read_values(cache, [f"{prefix}.hook_scale"])
    scale = sliced(scale, -2, pos_slice)
    if cache.has_batch_dim:
        scale = sliced(scale, 0, batch_slice)
        if not has_batch_dim and not isinstance(batch_slice, int) and scale.shape[0] == 1:
            scale = scale[0]
    if stack.shape[1:-1] != scale.shape[:-1] or stack.ndim != scale.ndim + 1:
        raise ArgumentError(
            f"a stack of shape {list(stack.shape)} does not fit the cached scale of shape {list(scale.shape)} at "
            f"'{prefix}.hook_scale': its axes are entry, batch, pos, d_model, without those that int slices dropped; "
            "give pos_slice and batch_slice as the stack was sliced"
        )
    return Measure(centres=place.kind.centres, scale=scale, device=stack.device).part(stack)


@checks_arguments
def stack_activation(
    cache: "ActivationCache", activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
) -> Tensor:
    """Stack one activation over the layers before `layer`, as it was cached.

    Args:
        cache: The cache.
        activation_name: A short form or the name below `blocks.L.`; layers that have no such place are left out.
        layer: Layers strictly before it; None, -1 and `n_layers` take all.
        sublayer_type: The part, where several share the short form: `("scale", "ln1")`.

    Returns:
        `[layer, ...]`: a copy.

    Raises:
        UnknownHookError: No layer has such a place.
        CacheError: A layer's value was not cached.
    """
    last = read_layer(cache, layer)
    key = activation_name if sublayer_type is None else (activation_name, None, sublayer_type)
    points = [cache.table[name] for name in cache.table.select(key).names]
    names = [point.name for point in points if point.layer is not None and point.layer < last]
    if not names:
        raise ArgumentError(f"layer {last} leaves no layer of {activation_name!r} to stack")
    values = read_values(cache, names)
    return torch.stack([value.to(values[0].device) for value in values])
