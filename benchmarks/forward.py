"""Forward passes and generation of a model of GPT-2-small's size, as ratios to plain HF."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import lens_core as lens
from benchmarks.models import random_model, random_tokens
from benchmarks.pairs import Side, interleaved
from benchmarks.rows import Row, ratio_row
from benchmarks.settings import Settings

__all__ = ["rows"]


def rows(settings: Settings) -> Iterator[Row]:
    """Measure one forward under each kind of use, then generation; no gradients."""
    size = settings.large
    hf_model, model = random_model(size)
    tokens = random_tokens(size)
    place = f"blocks.{size.n_layers // 2}.hook_resid_post"

    def plain() -> Any:
        return hf_model(tokens, use_cache=False)  # as lens calls it

    ways: list[tuple[str, float | None, Callable[[], Any]]] = [
        ("HF against itself (the noise of this machine)", None, plain),
        ("plain forward", 1.02, lambda: model(tokens)),
        ("one residual edited", 1.03, lambda: model.run_with_hooks(tokens, fwd_hooks=[(place, _zero_a_position)])),
        ("all default names cached", 1.25, lambda: model.run_with_cache(tokens)),
        ("one name cached", None, lambda: model.run_with_cache(tokens, names_filter=place)),
        ("patterns of all layers cached", None, lambda: model.run_with_cache(tokens, names_filter="pattern")),
    ]
    group = f"forward of 1 × {size.n_tokens} tokens"
    with torch.no_grad():
        for name, goal, ours in ways:
            pairs = interleaved(plain, ours, seconds=16 * settings.share, at_least=settings.at_least)
            yield ratio_row(group, name, pairs, goal=goal)
        yield from _generation(settings, hf_model, model, tokens, place)


def _zero_a_position(value: Tensor, hook: Any) -> None:
    value[:, 3] = 0.0


def _add_nothing_much(value: Tensor, hook: Any) -> Tensor:
    return value + 0.01


def _generation(settings: Settings, hf_model: Any, model: lens.LensModel, tokens: Tensor, place: str) -> Iterator[Row]:
    n = settings.new_tokens
    mask = torch.ones_like(tokens)

    def plain() -> Any:
        return hf_model.generate(tokens, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0)

    def ours() -> Any:
        return model.generate(tokens, max_new_tokens=n, do_sample=False, stop_at_eos=False)

    hooked = Side(call=ours, around=lambda: model.hooks(fwd_hooks=[(place, _add_nothing_much)]))
    ways: list[tuple[str, float | None, Any]] = [
        ("no hook", None, ours),
        ("one residual edited at every step", 1.1, hooked),
    ]
    for name, goal, way in ways:
        pairs = interleaved(plain, way, seconds=20 * settings.share, at_least=settings.at_least)
        yield ratio_row(f"generation of {n} tokens", name, pairs, goal=goal)
