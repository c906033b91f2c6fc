"""What is measured in one process: a library's way of each row by turns with plain HF's, and whether it is right."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import torch
from torch import Tensor

from benchmarks.pairs import Pair, Side, interleaved, timed
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
    """Measure two whole sweeps, each beside as many plain forwards as one layer has cells, times the layers."""
    settings, library, reference = bench.settings, bench.library, bench.reference
    positions, n_layers = settings.sweep_tokens, len(reference.blocks)
    clean, corrupted = bench.tokens(1, positions), bench.tokens(1, positions, seed=3)
    found: list[Tensor] = []
    pairs = interleaved(
        lambda: [_difference_of_logits(reference.forward(corrupted)) for _ in range(positions)],
        lambda: found.append(library.sweep(clean, corrupted, _difference_of_logits)),
        seconds=0,
        at_least=2,
        is_warm=True,
    )
    checked = [(layer, at) for layer in (0, bench.middle) for at in (0, positions - 1)]
    values = found[-1].reshape(n_layers, positions)
    expected = [reference.patched(clean, corrupted, *cell, _difference_of_logits)[0] for cell in checked]
    return Cell.of_pairs(
        pairs,
        per_plain=n_layers,
        model=bench.model,
        row=row,
        size=f"{n_layers} × {positions} cells",
        difference=_furthest([values[cell] for cell in checked], expected),
    )


def _difference_of_logits(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def _harvest(bench: Bench, row: str) -> Cell:
    """Measure in eighths of the tokens: each goes through HF, to the same layer and to no disk, and to the library."""
    settings, library, reference = bench.settings, bench.library, bench.reference
    batch, positions = settings.harvest_shape
    last = bench.middle - 1
    layers = tuple(dict.fromkeys((last // 3, 2 * last // 3, last)))
    count = max(settings.harvest_tokens // (batch * positions), 1)
    batches = list(bench.tokens(count * batch, positions).split(batch))
    until = reference.until(last + 1)
    expected = reference.residuals(batches[0])[last].flatten(0, 1)
    pairs = list[Pair]()
    with TemporaryDirectory() as folder:
        library.harvest(batches[:2], layers, _folder(folder, "warm"))
        until(batches[0])
        share = -(-count // 8)
        for start in range(0, count, share):
            part, target = batches[start : start + share], _folder(folder, start)
            sides = [
                Side(call=lambda part=part: [until(tokens) for tokens in part]),
                Side(call=partial(library.harvest, part, layers, target)),
            ]
            is_second = start // share % 2
            times = [timed(side, 1) for side in (reversed(sides) if is_second else sides)]
            plain, ours = reversed(times) if is_second else times
            pairs.append(Pair(plain[0], ours[0], plain[1], ours[1]))
        found = library.harvested(_folder(folder, 0), last, len(expected))
    return Cell.of_pairs(
        pairs,
        model=bench.model,
        row=row,
        size=f"{count * batch * positions:,} tokens".replace(",", " "),
        difference=_furthest([found], [expected]),
    )


def _folder(base: str, name: object) -> Path:
    folder = Path(base) / str(name)
    folder.mkdir(exist_ok=True)
    return folder


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
