"""What is measured in one process: a library's way of each row by turns with plain HF's, and whether it is right."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from benchmarks.pairs import interleaved
from benchmarks.peers.adapter import Adapter, Cannot
from benchmarks.peers.record import Cell
from benchmarks.peers.reference import Reference
from benchmarks.peers.settings import SIZED, Settings

__all__ = ["Bench", "cells"]


@attrs.frozen(kw_only=True)
class Bench:
    """A model in HF's hands and in a library's."""

    model: str
    reference: Reference
    library: Adapter
    settings: Settings

    def tokens(self, rows: int, positions: int, seed: int = 1) -> Tensor:
        """Draw token ids `[rows, positions]`, none of them special."""
        draws = torch.Generator().manual_seed(seed)
        return torch.randint(1, self.reference.model.config.vocab_size, (rows, positions), generator=draws)

    @property
    def middle(self) -> int:
        """The layer in the middle."""
        return len(self.reference.blocks) // 2

    @property
    def vector(self) -> Tensor:
        """What is added to the residual stream `[d_model]`."""
        return torch.randn(self.reference.model.config.hidden_size, generator=torch.Generator().manual_seed(2))


def cells(bench: Bench, wanted: Sequence[str]) -> Iterator[Cell]:
    """Measure the rows of that name; no gradients."""
    with torch.no_grad():
        for row in wanted:
            if row in SIZED:
                for number in range(len(bench.settings.sizes)):
                    yield _or_reason(_sized, bench, row, number)
            else:
                yield _or_reason(_SINGLE[row], bench, row)


def _or_reason(measure: Callable[..., Cell], bench: Bench, row: str, *more: Any) -> Cell:
    try:
        return measure(bench, row, *more)
    except Cannot as reason:
        size = _size(*bench.settings.sizes[more[0]]) if more else ""
        return Cell(model=bench.model, row=row, size=size, cannot=str(reason))


def _size(rows: int, positions: int) -> str:
    return f"{rows} × {positions} tokens"


def _furthest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Give the largest difference over the largest of HF's values, of as many tensors of the same shapes."""
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            raise RuntimeError(f"a value has the shape {tuple(one.shape)}, where HF's has {tuple(other.shape)}")
    largest = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
    return largest / max(float(other.abs().max()) for other in expected)


# ---------------------------------------------------------------- one call, on inputs of two sizes


def _sized(bench: Bench, row: str, number: int) -> Cell:
    settings, library, reference = bench.settings, bench.library, bench.reference
    shape, middle, new_tokens = settings.sizes[number], bench.middle, settings.new_tokens
    tokens = bench.tokens(*shape)
    ways: dict[str, Callable[[], Any]] = {
        "forward": partial(library.forward, tokens),
        "hook": partial(library.hook, tokens, middle),
        "cache": partial(library.cache, tokens),
        "residuals": partial(library.residuals, tokens),
        "generate": partial(library.generate, tokens, new_tokens, middle, bench.vector),
    }
    if row == "generate":
        plain: Callable[[], Any] = partial(reference.generate, tokens, new_tokens)
    else:
        plain = partial(reference.forward, tokens)
    difference, note = _checked(row, ways[row](), bench, tokens)
    pairs = interleaved(plain, ways[row], seconds=settings.seconds[number], at_least=settings.at_least)
    return Cell.of_pairs(pairs, model=bench.model, row=row, size=_size(*shape), difference=difference, note=note)


def _checked(row: str, found: Any, bench: Bench, tokens: Tensor) -> tuple[float, str]:
    """Compare with HF's values; what a cache holds by default is told, as each holds something else."""
    reference, middle = bench.reference, bench.middle
    if row == "generate":
        expected = reference.generate_edited(tokens, bench.settings.new_tokens, middle, bench.vector)
        return float((found != expected).sum()), ""
    if row == "forward":
        return _furthest([found], [reference.forward(tokens)]), ""
    streams = reference.residuals(tokens)
    if row == "hook":
        return _furthest([found], [streams[middle]]), ""
    if row == "residuals":
        return _furthest(found, streams), ""
    alike = [value for value in found if value.shape == streams[middle].shape]
    nearest = min(_furthest([value], [streams[middle]]) for value in alike)
    size = sum({value.data_ptr(): value.numel() * value.element_size() for value in found}.values())
    return nearest, f"{len(found)} values, {size / 2**20:.0f} MiB"


# ---------------------------------------------------------------- many calls


def _sweep(bench: Bench, row: str) -> Cell:
    """Measure a whole sweep against as many plain forwards as one layer has cells, times the layers."""
    settings, library, reference = bench.settings, bench.library, bench.reference
    shape = (1, settings.sweep_tokens)
    clean, corrupted = bench.tokens(*shape), bench.tokens(*shape, seed=3)
    n_layers = len(reference.blocks)

    def plain() -> None:
        for _ in range(settings.sweep_tokens):
            _difference_of_logits(reference.forward(corrupted))

    ours = partial(library.sweep, clean, corrupted, _difference_of_logits)
    found = ours().reshape(n_layers, settings.sweep_tokens)
    cells_checked = [(layer, at) for layer in (0, bench.middle) for at in (0, settings.sweep_tokens - 1)]
    expected = [reference.patched(clean, corrupted, *cell, _difference_of_logits)[0] for cell in cells_checked]
    pairs = interleaved(
        plain,
        ours,
        seconds=settings.seconds[-1],
        at_least=settings.sweep_pairs,
        at_most=settings.at_least,
        is_warm=True,
    )
    return Cell.of_pairs(
        pairs,
        per_plain=n_layers,
        model=bench.model,
        row=row,
        size=f"{n_layers} × {settings.sweep_tokens} cells",
        difference=_furthest([found[cell] for cell in cells_checked], expected),
    )


def _difference_of_logits(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def _harvest(bench: Bench, row: str) -> Cell:
    """Measure against HF run to the same layer, which writes nothing."""
    settings, library, reference = bench.settings, bench.library, bench.reference
    batch, positions = settings.harvest_shape
    middle = bench.middle
    layers = tuple(dict.fromkeys((middle // 3, 2 * middle // 3, middle)))
    count = max(settings.harvest_tokens // (batch * positions), 1)
    batches = list(bench.tokens(count * batch, positions).split(batch))
    until = reference.until(middle + 1)

    def plain() -> None:
        for tokens in batches:
            until(tokens)

    def ours(tokens: Sequence[Tensor] = batches) -> float:
        with tempfile.TemporaryDirectory() as folder:
            library.harvest(tokens, layers, Path(folder))
            last = library.harvested(Path(folder), middle, batch * positions)
        expected = reference.residuals(tokens[0])[middle].flatten(0, 1)
        return _furthest([last], [expected])

    difference = ours(batches[:2])
    until(batches[0])
    pairs = interleaved(plain, ours, seconds=0, at_least=settings.sweep_pairs, is_warm=True)
    size = f"{count * batch * positions:,} tokens".replace(",", " ")
    return Cell.of_pairs(pairs, model=bench.model, row=row, size=size, difference=difference)


def _states(bench: Bench, row: str) -> Cell:
    """Measure against the plain forward; the states of every position must be HF's after that many tokens."""
    settings, library, reference = bench.settings, bench.library, bench.reference
    tokens = bench.tokens(1, settings.state_tokens)
    ours = partial(library.state if row == "state" else library.states, tokens)
    found, half = ours(), settings.state_tokens // 2
    if row == "state":
        difference = _furthest(found, reference.state(tokens))
    else:
        difference = max(
            _furthest([value[:, length - 1] for value in found], reference.state(tokens[:, :length]))
            for length in (half, settings.state_tokens)
        )
    pairs = interleaved(
        partial(reference.forward, tokens), ours, seconds=settings.seconds[-1], at_least=settings.at_least
    )
    size = _size(1, settings.state_tokens)
    return Cell.of_pairs(pairs, model=bench.model, row=row, size=size, difference=difference)


_SINGLE: dict[str, Callable[..., Cell]] = {
    "sweep": _sweep, "harvest": _harvest, "state": _states, "states": _states,
}  # fmt: skip
