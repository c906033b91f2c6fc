"""States of state-space layers: the price of capturing and editing them, and of one row of effective attention."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
import torch

from benchmarks.families import family_configs, random_family
from benchmarks.holding import account
from benchmarks.models import random_tokens
from benchmarks.pairs import interleaved
from benchmarks.rows import Row, ratio_row
from benchmarks.settings import Settings

__all__ = ["rows"]

STATE, LONGER = "blocks.0.mixer.hook_ssm_state", 4


def rows(settings: Settings) -> Iterator[Row]:
    """Measure one layer's states against the plain forward, which scans fast, then rows against the length."""
    for name in ("Mamba", "Mamba-2"):
        hf_model, model = random_family(family_configs(settings.family)[name])
        tokens = random_tokens(settings.family)
        plain = partial(hf_model, tokens, use_cache=False)
        capture = partial(model.run_with_cache, tokens, names_filter=STATE)
        ways: dict[str, Callable[[], Any]] = {
            "states of one layer cached": capture,
            "one layer's state edited at one position": partial(
                model.run_with_hooks, tokens, fwd_hooks=[(STATE, _shrink, [1])]
            ),
            "one layer's state edited at every position": partial(
                model.run_with_hooks, tokens, fwd_hooks=[(STATE, _shrink)]
            ),
        }
        group = f"{name}, states in a forward of 1 × {settings.family.n_tokens} tokens"
        with torch.no_grad():
            for way, ours in ways.items():
                pairs = interleaved(plain, ours, seconds=12 * settings.share, at_least=settings.at_least)
                yield ratio_row(group, f"{name}: {way}", pairs)
            yield _memory(group, name, plain, capture, model)
            yield _row_by_length(settings, name, model)


def _shrink(state: torch.Tensor, hook: Any) -> torch.Tensor:
    return state * 0.9


def _memory(group: str, name: str, plain: Callable[[], Any], ours: Callable[[], Any], model: Any) -> Row:
    """Compare what capturing adds to the peak with the size of what is captured."""
    own = [*model.hf_model.parameters(), *model.hf_model.buffers()]
    extra = account(ours, own)[0] - account(plain, own)[0]
    (states,) = ours()[1].values()
    value = extra / (states.numel() * states.element_size())
    title = f"{name}: added to the peak by caching one layer's states"
    return Row(group=group, name=title, unit="× those states", values=(value,))


def _row_by_length(settings: Settings, name: str, model: Any) -> Row:
    """Read what the last of some tokens reads, and the last of four times as many; linear cost gives 4."""
    caches = []
    for length in (settings.family.n_tokens, LONGER * settings.family.n_tokens):
        tokens = random_tokens(attrs.evolve(settings.family, n_tokens=length))
        caches.append(model.run_with_cache(tokens, names_filter=["delta", "B", "C", "ssm_input", "hook_y"])[1])
    short, long = (partial(cache.effective_attention, 0, target=-1) for cache in caches)
    pairs = interleaved(short, long, seconds=8 * settings.share, at_least=settings.at_least)
    title = f"{name}: one row of effective attention over {LONGER} times the length"
    return attrs.evolve(ratio_row(f"{name}, effective attention", title, pairs), unit="× the short row's time")
