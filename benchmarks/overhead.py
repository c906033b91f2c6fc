"""What hooks cost by themselves: microseconds on a model so small that nothing else counts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import random_model, random_tokens
from benchmarks.pairs import Side, interleaved
from benchmarks.rows import Row, difference_row
from benchmarks.settings import Settings

__all__ = ["rows"]

COMPUTED = ("hook_attn_scores", "hook_pattern", "hook_scale", "hook_normalized")  # computed beside HF's own kernels


def rows(settings: Settings) -> Iterator[Row]:
    """Measure calls with hooks against the same calls of plain HF, per hook."""
    hf_model, model = random_model(settings.tiny)
    tokens = random_tokens(settings.tiny)
    place = f"blocks.{settings.tiny.n_layers - 1}.hook_resid_post"
    default = [point.name for point in model.hook_points() if point.default]
    shown = [name for name in default if not name.endswith(COMPUTED)]  # HF's own tensors, as they pass
    norms = [name for name in default if name.endswith(COMPUTED[2:])]
    inside = [name for name in default if name.endswith(COMPUTED[:2])]

    def hooked(names: list[str]) -> Any:
        return model.hooks(fwd_hooks=[(names, _do_nothing)])

    def in_a_block(names: list[str]) -> None:
        with hooked(names):
            model(tokens)

    def plain() -> Any:
        return hf_model(tokens, use_cache=False)  # as lens calls it

    def caching(names: list[str]) -> Callable[[], Any]:
        return lambda: model.run_with_cache(tokens, names_filter=names)

    def held(names: list[str]) -> Side:
        return Side(call=lambda: model(tokens), around=lambda: hooked(names))

    edit = [(place, _zero_a_position)]
    ways: list[tuple[str, int, Any, Any]] = [
        ("plain call", 0, plain, lambda: model(tokens)),
        ("one residual edited, all told", 0, plain, lambda: model.run_with_hooks(tokens, fwd_hooks=edit)),
        ("hooks that do nothing, while they are installed", len(shown), plain, held(shown)),
        ("enter and leave `model.hooks` with one hook", 0, held([place]), lambda: in_a_block([place])),
        ("enter and leave `model.hooks` with many", len(shown), held(shown), lambda: in_a_block(shown)),
        ("names cached that HF computes, all told", len(shown), plain, caching(shown)),
        ("names cached inside norms, all told", len(norms), plain, caching(norms)),
        ("scores and patterns cached, all told", len(inside), plain, caching(inside)),
    ]
    calls = 1 if settings.is_quick else 10
    with torch.no_grad(), _one_thread():  # tensors this small are never split over threads
        for name, count, other, ours in ways:
            pairs = interleaved(
                other, ours, seconds=5 * settings.share, at_least=settings.at_least, at_most=200, calls=calls
            )
            unit = f"µs per name ({count})" if count else "µs per call"
            yield difference_row("two tiny layers, one thread", name, pairs, unit=unit, scale=1e6 / (count or 1))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _do_nothing(value: Tensor, hook: Any) -> None:
    pass


def _zero_a_position(value: Tensor, hook: Any) -> None:
    value[:, 3] = 0.0
