"""Edits that lens and a golden forward both take, and where a name keeps its positions.

Every edit is nonlinear where a norm could swallow an affine one (LayerNorm undoes scale and shift exactly), and moves
the logits far above rounding, so that a check which compares them cannot pass on an edit that did nothing.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["VOCAB", "affine", "bend", "edit_at", "only_at", "pos_axis", "shrink"]

VOCAB = 29
"""Vocabulary of the tiny models; 28 is no word of a text."""
Edit = Callable[..., Tensor]


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


def pos_axis(name: str) -> int:
    """Tell the axis of the queries (scores, pattern) or of the positions (all others)."""
    return 2 if name.endswith(("attn_scores", "hook_pattern")) else 1


def only_at(axis: int, edit: Edit, positions: Sequence[int]) -> Edit:
    """Restrict an edit to absolute positions, by `hook.positions`; elsewhere the value stays."""
    wanted = torch.tensor(list(positions))

    def restricted(x: Tensor, hook: object) -> Tensor:
        here = torch.isin(hook.positions.cpu(), wanted)  # type: ignore[attr-defined]
        shape = [1] * x.ndim
        shape[axis] = -1
        return torch.where(here.view(shape), edit(x, hook=hook), x)

    return restricted
