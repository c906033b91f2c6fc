"""Edits that golden and lens both take, and where a name keeps its positions.

Every edit is nonlinear where a norm could swallow an affine one (LayerNorm undoes scale and shift exactly), and moves
the logits far above rounding, so that a test which compares them cannot pass on an edit that did nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lens_conformance.golden.gpt2 import Edit

VOCAB = 29


def bend(x: Tensor, hook: object = None) -> Tensor:
    """Return a smooth nonlinear change of every element."""
    return x * x * 0.3 + x * 0.5 + 0.1


def affine(x: Tensor, hook: object = None) -> Tensor:
    """Return 0.7 x + 0.03; a score of -inf stays -inf."""
    return x * 0.7 + 0.03


def shrink(x: Tensor, hook: object = None) -> Tensor:
    """Return a change that keeps zeros: no weight for keys that a query may not see."""
    return x * x * 0.7


def next_token(x: Tensor, hook: object = None) -> Tensor:
    """Return the following id, cyclically."""
    return (x + 1) % VOCAB


def edit_at(name: str, *, causal: bool = False) -> Edit:
    """Choose the edit for a name; a causal one gives no weight to later keys, so that decoding can follow it."""
    if name == "hook_tokens":
        return next_token
    if name.endswith("attn_scores"):
        return affine
    if name.endswith("hook_pattern"):
        return shrink if causal else affine
    return bend


def in_place(edit: Edit) -> Edit:
    """Turn an edit that returns into one that writes into its argument and returns None."""

    def write(x: Tensor, hook: object = None) -> None:
        x.copy_(edit(x.clone(), hook=hook))

    return write


def pos_axis(name: str) -> int | None:
    """Tell the axis of the queries (scores, pattern) or of the positions; None for keys that query heads see."""
    if name.endswith(("k_rep", "v_rep")):
        return None
    return 2 if name.endswith(("attn_scores", "hook_pattern")) else 1


def key_axis(name: str) -> int | None:
    """Tell the axis of the keys, all real positions so far."""
    if name.endswith(("k_rep", "v_rep")):
        return 1
    return 3 if name.endswith(("attn_scores", "hook_pattern")) else None


def only_at(name: str, edit: Edit, positions: Sequence[int]) -> Edit:
    """Restrict an edit to absolute positions, by `hook.positions`; elsewhere the value stays."""
    wanted = torch.tensor(list(positions))

    def restricted(x: Tensor, hook: object) -> Tensor:
        here = torch.isin(hook.positions.cpu(), wanted)
        shape = [1] * x.ndim
        shape[pos_axis(name)] = -1
        return torch.where(here.view(shape), edit(x, hook=hook), x)

    return restricted


def only_head(edit: Edit, head: int, axis: int = 2) -> Edit:
    """Restrict an edit to one head; `axis` is 1 for scores and patterns."""

    def restricted(x: Tensor, hook: object = None) -> Tensor:
        here = torch.arange(x.shape[axis]) == head
        shape = [1] * x.ndim
        shape[axis] = -1
        return torch.where(here.view(shape), edit(x, hook=hook), x)

    return restricted


def at_steps(name: str, value: Tensor, positions: Sequence[int] | slice) -> Tensor:
    """Cut a whole run's value down to a call's positions and to the keys that exist by then."""
    if isinstance(positions, slice):
        positions = list(range(positions.start, positions.stop))
    index = torch.as_tensor(list(positions))
    value = value.index_select(pos_axis(name), index)
    return value[..., : int(index[-1]) + 1] if pos_axis(name) == 2 else value
