"""`run_with_cache`: one run of a model, and what is kept of it, in memory or on disk."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core._cache_stream import CacheStream
from lens_core.cache import ActivationCache, CacheSink
from lens_core.errors import ArgumentError
from lens_core.hook_points import NameFilter

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["run_with_cache"]


@checks_arguments
def run_with_cache(
    model: "LensModel",
    input: Any,
    *,
    names_filter: NameFilter = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    remove_batch_dim: bool = False,
    incl_bwd: bool = False,
    pos_slice: Any = None,
    heads: Any = None,
    file: Any = None,
    reset_hooks_end: bool = True,
    clear_contexts: bool = False,
    return_cache_object: bool = True,
    **kwargs: Any,
) -> Any:
    """Run the model and cache activations; gives `(output, cache)`.

    Args:
        model: What runs; the method of this name takes the arguments that follow.
        input: As in `forward`.
        names_filter: A name, short form, glob, list of names or predicate; None for the default names. The
            starred names of the contract cost memory or time and are cached only when asked for.
        device: Where to keep the activations; the model stays.
        dtype: Kept dtype of floating activations.
        remove_batch_dim: Drop the batch axis of a batch of one.
        incl_bwd: Call `backward()` on the output, which must be a scalar (`return_type="loss"`), and keep the
            gradients in `cache.grad`.
        pos_slice: Positions to keep; the axis stays. In scores and patterns, of those that attend.
        heads: Heads to keep of scores and patterns (int, slice or ints); the axis stays. Other values keep all of
            theirs. Beside a fused kernel the scores of other heads and rows are never computed; `cache.heads` tells
            which ones are there.
        file: The path of a cache file. Activations are written as they come, and none stays in memory; the cache that
            is returned is mapped from the file, as `ActivationCache.load` gives it. A file is there when the run has
            come to its end, or not at all.
        reset_hooks_end: TransformerLens' name; the cache's own taps always go, and added hooks always stay.
        clear_contexts: Whether every `ctx` is emptied at the end.
        return_cache_object: False gives a dictionary instead.
        **kwargs: As in `forward`.

    Raises:
        ArgumentError: `heads` or `pos_slice` that is none, heads where no scores and no pattern are kept, or `file`
            beside `device` or `incl_bwd`, which keep values or gradients in memory.
        CacheFileError: The file cannot be written there, or an activation cannot be stored.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> logits, cache = model.run_with_cache("the cat sat", names_filter="pattern", heads=[1], pos_slice=-1)
        >>> cache["pattern", 1].shape[1:3]
        torch.Size([1, 1])
    """
    if file is not None and (device is not None or incl_bwd):
        raise ArgumentError(
            f"file={file!r} keeps values on disk, and {'incl_bwd' if incl_bwd else 'device'} keeps some in memory; "
            "leave one of them out, or call cache.save(path) afterwards"
        )
    cache, names = model.new_cache(), model.table.select(names_filter)
    choice = model.choice(names, pos_slice, heads)
    stream: Any = nullcontext() if file is None else CacheStream(cache, names, file, dtype=dtype, choice=choice)
    try:
        with stream as written:
            sink = written or CacheSink(cache, names, incl_bwd=incl_bwd, device=device, dtype=dtype, choice=choice)
            with model.running((), (sink,)):
                output = model.forward(input, **kwargs)
                if incl_bwd:
                    _backward(output[0] if kwargs.get("return_state") else output)
    finally:
        if clear_contexts:
            model.clear_contexts()
    if file is not None:
        cache = ActivationCache.load(file, model=model)
    if remove_batch_dim:
        cache.remove_batch_dim()
    return output, cache if return_cache_object else dict(cache)


def _backward(output: Any) -> None:
    if not isinstance(output, Tensor) or output.numel() != 1 or not output.requires_grad:
        raise ArgumentError("incl_bwd needs a scalar output with gradients: return_type='loss', no torch.no_grad()")
    torch.autograd.backward(output)
