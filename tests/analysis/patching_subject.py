"""Sweeps the slow way: one forward of the model for each cell, with a hook that writes one slice."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from torch import Tensor

import lens_core as lens

FAMILIES = ("gpt2", "llama", "mamba", "mamba2")
N_POS = 6
CORRUPTED, CLEAN = random_tokens(2, N_POS), random_tokens(2, N_POS, seed=7)


def difference(logits: Tensor) -> Tensor:
    """Give a logit difference at the last position, for each row."""
    return logits[:, -1, 3] - logits[:, -1, 5]


def subject(family: str, **overrides: Any) -> lens.LensModel:
    """Build a tiny model of a family."""
    makers = {"gpt2": tiny_gpt2, "llama": tiny_llama}
    return lens.load(makers[family](**overrides) if family in makers else tiny_ssm(family, **overrides))


def one_by_one(
    model: lens.LensModel,
    corrupted: Tensor,
    clean: Mapping[str, Tensor],
    metric: Callable[[Tensor], Tensor],
    name: str,
    ranges: Sequence[Sequence[Any]],
    place: Callable[..., tuple[Any, ...]],
    **options: Any,
) -> Tensor:
    """Patch one cell after the other, `[*ranges, batch]`; `place` gives the slice of a cell, the layer is first."""
    cells = []
    for cell in itertools.product(*ranges):
        full = model.table.canonical((name, cell[0]) if cell[0] is not None else name)
        where = place(*cell[1:])

        def patch(value, hook, full=full, where=where):
            if value.shape[1] == 1 and full.endswith("ssm_state"):  # one position after the other
                value[:, 0] = clean[full][where]
            else:
                value[where] = clean[full][where]
            return value

        entry = (full, patch, [cell[1]]) if full.endswith("ssm_state") else (full, patch)
        with torch.no_grad():
            cells.append(metric(model.run_with_hooks(corrupted, fwd_hooks=[entry], **options)))
    return torch.stack(cells).reshape(*(len(one) for one in ranges), -1)


def assert_close(found: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    """Compare as a share of the largest value."""
    assert found.shape == expected.shape
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= share, error
