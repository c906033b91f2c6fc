"""Patching sweeps: every layer and position of the residual stream, against one plain forward for each cell."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from benchmarks.models import random_model
from benchmarks.pairs import Pair, interleaved
from benchmarks.rows import Row
from benchmarks.settings import Settings
from lens_core.analysis.patching import patch_sweep

__all__ = ["rows"]

N_TOKENS = 24
GOAL = 1 / 11


def rows(settings: Settings) -> Iterator[Row]:
    """Measure both engines; the forwards beside each sweep are as many as a layer has cells."""
    size = attrs.evolve(settings.large, n_tokens=min(N_TOKENS, settings.large.n_tokens))
    hf_model, model = random_model(size)
    draws = torch.Generator().manual_seed(1)
    clean, corrupted = torch.randint(0, size.d_vocab, (2, 1, size.n_tokens), generator=draws)
    group = f"patching {size.n_layers} layers × {size.n_tokens} positions, metric at the last"

    def forwards() -> None:
        for _ in range(size.n_tokens):
            _difference(hf_model(corrupted, use_cache=False).logits)

    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter="resid_pre")
        sweep = partial(patch_sweep, model, corrupted, cache, _difference, positions=-1)
        for name, goal, options in (("`patch_sweep`", GOAL, {}), ("`patch_sweep(exact=True)`", None, {"exact": True})):
            ours = partial(sweep, **options)
            pairs = interleaved(forwards, ours, seconds=60 * settings.share, at_least=settings.at_least, at_most=9)
            yield from _ratios(group, name, pairs, n_layers=size.n_layers, goal=goal)
            yield _difference_row(group, name, model, corrupted, cache, ours(), n_layers=size.n_layers)


def _difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def _ratios(group: str, name: str, pairs: list[Pair], *, n_layers: int, goal: float | None) -> Iterator[Row]:
    """Give the sweep's time as a share of all forwards', and how many times faster that is."""
    share = Row(
        group=group,
        name=f"{name}, one forward for each cell being 1",
        unit="× HF",
        goal=goal,
        values=tuple(pair.ours / pair.plain / n_layers for pair in pairs),
        processor=tuple(pair.ours_processor / pair.plain_processor / n_layers for pair in pairs),
    )
    yield share
    yield Row(
        group=group,
        name=f"{name}, times faster than one forward for each cell",
        unit="times",
        values=tuple(1 / value for value in share.values),
        processor=tuple(1 / value for value in share.processor),
    )


def _difference_row(
    group: str, name: str, model: Any, corrupted: Tensor, cache: Any, found: Any, *, n_layers: int
) -> Row:
    """Compare the cells of three layers with forwards of their own."""
    layers = sorted({0, n_layers // 2, n_layers - 1})
    errors: list[float] = []
    for layer in layers:
        place = f"blocks.{layer}.hook_resid_pre"
        for position in range(corrupted.shape[1]):

            def patch(value: Tensor, hook: Any, at: int = position) -> Tensor:
                value[:, at] = cache[hook.name][:, at]
                return value

            alone = _difference(model.run_with_hooks(corrupted, fwd_hooks=[(place, patch)]))
            errors.append(float((found.values[layer, position] - alone).abs().max()))
    scale = float(found.values.abs().max())
    title = f"{name}, largest difference from a forward of its own, layers {', '.join(map(str, layers))}"
    return Row(group=group, name=title, unit="× 1e-6 of the scale", values=(max(errors) / scale * 1e6,))
