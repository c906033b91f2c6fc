"""Scores and pattern of chosen heads and query rows, beside HF's kernel: the cells of all others are never made."""

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lens_core._choice import Part
from lens_core._graph import during, gradients
from lens_core._softmax import Enough, InsideSoftmax, additive_mask, masked_cells
from lens_core._watch import Watch

__all__ = ["fire_part"]

BY_HEAD = ("sinks",)
"""Parameters of an attention module, one number for each query head, that HF's eager functions read."""


def fire_part(
    part: Part,
    scores: Watch | None,
    pattern: Watch | None,
    eager: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> None:
    """Run the module's own eager function on the part's queries, and the keys of its heads, as far as its softmax."""
    watch = scores or pattern
    assert watch is not None
    n_heads, n_query = query.shape[1:3]
    rows = _index(part.rows, n_query, query.device)
    heads = _index(part.heads, n_heads, query.device)
    with gradients(False):
        additive, length = additive_mask(module, query, key, mask, kwargs, past=watch.run.now.past, rows=rows)
        key, value = key[:, :, :length], value[:, :, :1]  # the softmax comes before any value is read
        if heads is not None:
            groups = n_heads // key.shape[1]
            module = _of_heads(module, heads, n_heads)
            query, key, value = query[:, heads], key[:, heads // groups], value[:, heads // groups]
            additive = additive[:, heads] if additive is not None and additive.shape[1] == n_heads else additive
        query = query if rows is None else query[:, :, rows]
        inside = InsideSoftmax(scores, pattern, is_real=False, masked=masked_cells(additive), stops=True, part=part)
        with suppress(Enough), during(inside):
            eager(module, query, key, value, additive, **kwargs)
    inside.check(module)


def _index(chosen: Sequence[int], total: int, device: torch.device) -> Tensor | None:
    """Give the chosen ones to index by; None where these are all."""
    return None if list(chosen) == list(range(total)) else torch.tensor(chosen, dtype=torch.long, device=device)


def _of_heads(module: nn.Module, heads: Tensor, n_heads: int) -> nn.Module:
    """Give a module like this one for some of its query heads, each with keys of its own."""
    own: Any = copy.copy(module)
    own.num_key_value_groups = 1
    parameters = dict(module.named_parameters(recurse=False))
    own._parameters = {name: value for name, value in parameters.items() if name not in BY_HEAD}
    for name in BY_HEAD:
        if name in parameters and parameters[name].shape == (n_heads,):
            setattr(own, name, parameters[name][heads])
    return own
