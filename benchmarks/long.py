"""Peak memory of reading parts of a long context, counted tensor by tensor: the same on every machine."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import lens_core as lens
from benchmarks.holding import account
from benchmarks.models import random_model, random_tokens
from benchmarks.rows import Row
from benchmarks.settings import Settings
from lens_core._cache_stream import CacheStream
from lens_core._choice import Choice
from lens_core.analysis.log_probs import log_probs

__all__ = ["rows"]


def rows(settings: Settings) -> Iterator[Row]:
    """Compare peaks with that of plain HF's forward of the same tokens, the model's weights left out of both."""
    yield from _attention(settings)
    yield from _vocabulary(settings)


def _attention(settings: Settings) -> Iterator[Row]:
    size = settings.deep
    hf_model, model = random_model(size)
    tokens = random_tokens(size)

    def cache(names: Any, **options: Any) -> Callable[[], Any]:
        return lambda: model.run_with_cache(tokens, names_filter=names, return_type=None, **options)

    with tempfile.TemporaryDirectory() as folder:
        yield from _ratios(
            f"peak memory, 1 × {size.n_tokens} tokens, {size.n_layers} layers, {size.n_heads} heads",
            model,
            lambda: hf_model(tokens, use_cache=False),
            {
                "pattern of one layer": cache(("pattern", 0)),
                "pattern of one layer, one head": cache(("pattern", 0), heads=0),
                "pattern of one layer, the last query": cache(("pattern", 0), pos_slice=-1),
                "pattern of all layers, one head and the last query": cache("pattern", heads=0, pos_slice=-1),
                "residual stream of all layers": cache("resid_post"),
                "residual stream of all layers, the last position": cache("resid_post", pos_slice=-1),
                "residual stream of all layers, in bfloat16": cache("resid_post", dtype=torch.bfloat16),
                "residual stream of all layers, to disk as it runs": lambda: _stream(model, tokens, Path(folder)),
            },
        )


def _vocabulary(settings: Settings) -> Iterator[Row]:
    size = settings.wide
    hf_model, model = random_model(size)
    tokens = random_tokens(size)
    yield from _ratios(
        f"peak memory, 1 × {size.n_tokens} tokens, a vocabulary of {size.d_vocab}",
        model,
        lambda: hf_model(tokens, use_cache=False),
        {
            "loss of each token, `return_type='loss'`": lambda: model(tokens, "loss", loss_per_token=True),
            "loss of each token, `log_probs`": lambda: log_probs(model, tokens),
        },
    )


def _stream(model: lens.LensModel, tokens: torch.Tensor, folder: Path) -> None:
    """Write a cache without mapping the file afterwards, which the count would take for memory."""
    names = model.table.select("resid_post")
    stream = CacheStream(model.new_cache(), names, folder / "cache", dtype=None, choice=Choice())
    with stream, model.running((), (stream,)):
        model(tokens, None)


def _ratios(
    group: str, model: lens.LensModel, plain: Callable[[], Any], calls: dict[str, Callable[[], Any]]
) -> Iterator[Row]:
    own = [*model.parameters(), *model.hf_model.buffers()]
    with torch.no_grad():
        least = account(plain, own)[0]
        for name, call in calls.items():
            yield Row(group=group, name=name, unit="× HF", values=(account(call, own)[0] / least,))
