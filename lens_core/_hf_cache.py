"""HF's caches of keys, values, convolution windows and recurrent states: how long they are, and copies of them."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import Cache, DynamicCache, cache_utils
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from lens_core.errors import StateError

__all__ = [
    "ATTENDED",
    "RECURRENT",
    "cache_argument",
    "cache_in",
    "cached_length",
    "copied",
    "copyable",
    "has_attention",
    "is_empty",
    "new_cache",
    "note_length",
    "tensors_in",
]

CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
"""What HF's forwards and outputs call their cache: the first from transformers 5.24 on; before, state space models the
last, and all others the second."""
ATTENDED = ("keys", "values")
"""A layer's tensors `[batch, heads, pos, d_head]`, which HF replaces by longer ones and never writes into."""
RECURRENT = ("conv_states", "recurrent_states")
"""A layer's tensors by their index, the batch first, which HF writes into."""
_NOTHING: Any = getattr(cache_utils, "DummyLayer", DynamicLayer)
"""What stands for a block that remembers nothing; older releases of transformers have no such kind."""
COPYABLE = (
    _NOTHING,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

_lengths: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""Positions in caches without any attention layer, which do not count them."""


def cache_argument(hf_model: Any) -> str:
    """Give the name by which a model's forward takes its cache."""
    known = inspect.signature(hf_model.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in known), CACHE_ARGUMENTS[1])


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Find the cache among the keyword arguments, or the outputs, of an HF forward."""
    known = set(arguments.keys())  # HF's outputs warn of a name that they no longer have
    return next((arguments[name] for name in CACHE_ARGUMENTS if name in known and arguments[name] is not None), None)


def new_cache(hf_model: Any) -> Any:
    """Make the empty cache that HF would make for a model."""
    return DynamicCache(config=hf_model.config.get_text_config(decoder=True))


# ---------------------------------------------------------------------- length


def has_attention(cache: Any) -> bool:
    """Whether any layer holds keys and values, which know how many they are."""
    layers: Any = getattr(cache, "layers", None)
    return not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


def cached_length(cache: Any) -> int:
    """Count the positions that a cache holds.

    Raises:
        StateError: A cache of recurrent states only, which do not count, and which no call through lens ever had. One
            that such a call had and that was advanced outside of lens since cannot be told.
    """
    if cache is None:
        return 0
    if has_attention(cache):
        return int(cache.get_seq_length())
    if not any(any(getattr(layer, "has_previous_state", {}).values()) for layer in cache.layers):
        return 0
    if cache not in _lengths:
        raise StateError(
            f"this {type(cache).__name__} holds recurrent states only, which do not say how many positions they have "
            "seen, and lens did not see them; give lens_core.State(cache=cache, length=...) instead of the cache"
        )
    return _lengths[cache]


def is_empty(cache: Any) -> bool:
    """Whether no layer holds anything."""
    return not any(True for layer in getattr(cache, "layers", ()) for _ in tensors_in(layer))


def note_length(cache: Any, length: int) -> None:
    """Write down how many positions a cache holds, if it is of a kind that does not know."""
    if isinstance(cache, Cache) and not has_attention(cache):
        _lengths[cache] = length


# ---------------------------------------------------------------------- copies


def copyable(cache: Any) -> Any:
    """See that a cache is of a kind whose copies are known to be complete, and give it back.

    Raises:
        StateError: It is not; names the kind.
    """
    kinds: list[type[Any]] = [type(cache)] if type(cache) is not DynamicCache or cache.offloading else []
    kinds += [type(layer) for layer in getattr(cache, "layers", ()) if type(layer) not in COPYABLE]
    if kinds:
        raise StateError(
            f"a state holds HF's DynamicCache; {kinds[0].__name__} (static, quantised, offloaded or a model's own) is "
            "not copied or saved. Give it as past_key_values itself: HF extends it in place"
        )
    if any(getattr(layer, "record_past", False) for layer in cache.layers):
        raise StateError("this cache records its past for assisted generation; a state holds one that does not")
    return cache


def tensors_in(layer: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield a layer's tensors, the batch first in each: `keys`, `values`, `conv_states.0`, `recurrent_states.0`."""
    for name in ATTENDED:
        tensor = getattr(layer, name, None)
        if tensor is not None and tensor.numel():
            yield name, tensor
    for name in RECURRENT:
        for index, tensor in getattr(layer, name, {}).items():
            if tensor is not None:
                yield f"{name}.{index}", tensor


def copied(cache: Any, *, length: int, repeats: int = 1, is_working: bool = False) -> Any:
    """Copy a cache; its tensors stay in the graph they are in.

    Args:
        cache: One that `copyable` lets pass.
        length: How many positions it holds.
        repeats: How often each row stands in the copy, one beside the other.
        is_working: The copy is for a call of the model, which replaces keys and values and writes into the rest: then
            keys and values may be shared.
    """

    def take(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or repeats == 1:
            return None if tensor is None else tensor.clone()
        return tensor.repeat_interleave(repeats, dim=0)

    def take_layer(layer: object) -> object:
        new = copy.copy(layer)
        for name, value in vars(layer).items():
            if name in RECURRENT:
                setattr(new, name, {index: take(tensor) for index, tensor in value.items()})
            elif isinstance(value, dict):  # flags and sizes by index
                setattr(new, name, dict(cast("dict[int, Any]", value)))
            elif name in ATTENDED and not is_working:
                setattr(new, name, take(value))
        return new

    new = copy.copy(cache)
    new.layers = [take_layer(layer) for layer in cache.layers]
    note_length(new, length)
    return new
