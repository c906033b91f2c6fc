"""HF's caches of keys, values, convolution windows and recurrent states: their length, their layers, copies of them."""

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from lens_core.errors import StateError

__all__ = ["cache_argument", "cache_in", "cached_length", "has_attention", "note_length"]

CACHE_ARGUMENTS = ("past_key_values", "cache_params")
"""What HF's forwards call their cache: attention models and hybrids the first, pure state space models the second."""

_lengths: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""Positions in caches without any attention layer, which do not count them."""


def cache_argument(hf_model: Any) -> str:
    """Give the name by which a model's forward takes its cache."""
    known = inspect.signature(hf_model.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in known), CACHE_ARGUMENTS[0])


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Find the cache among the keyword arguments, or the outputs, of an HF forward."""
    return next((arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)


def has_attention(cache: Any) -> bool:
    """Whether any layer holds keys and values, which know how many they are."""
    layers: Any = getattr(cache, "layers", None)
    return not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


def cached_length(cache: Any) -> int:
    """Count the positions that a cache holds.

    Raises:
        StateError: A cache of recurrent states only, which do not count, advanced where lens did not see it.
    """
    if cache is None:
        return 0
    if has_attention(cache):
        return int(cache.get_seq_length())
    if not any(any(layer.has_previous_state.values()) for layer in cache.layers):
        return 0
    if cache not in _lengths:
        raise StateError(
            f"this {type(cache).__name__} holds recurrent states only, which do not say how many positions they have "
            "seen, and lens did not see them; give lens_core.State(cache=cache, length=...) instead of the cache"
        )
    return _lengths[cache]


def note_length(cache: Any, length: int) -> None:
    """Write down how many positions a cache holds, if it is of a kind that does not know."""
    if isinstance(cache, Cache) and not has_attention(cache):
        _lengths[cache] = length
