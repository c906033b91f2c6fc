"""Running a sweep: which engine takes which cells, what the metric is handed, and what is kept on disk."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from jaxtyping import Bool, Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lens_core.analysis._sweep_file import Saved
from lens_core.analysis._sweep_grid import Cell, Cells
from lens_core.analysis._sweep_packed import agrees, can_pack, is_packable, run_packed, suffix_length
from lens_core.analysis._sweep_run import Baseline, depth_of, head, is_hooked, prepare, run_rows
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["Engine", "Metric", "Outcome", "Request", "run_sweep"]

Engine = Literal["exact", "packed"]
Metric = Callable[[Float[Tensor, "batch n d_vocab"]], Float[Tensor, " batch"] | Float[Tensor, ""]]
AT_ONCE = {"cpu": 640}
"""How many positions run at once, all rows counted, if the user does not say; more do not make a CPU faster."""
MANY = 16384
"""The same on other devices."""
LOGITS = 2**24
"""How many logits are computed at once; more of the unembedding's rows at a time cost less each."""
WORTH = 0.8
"""Suffixes are packed where they are no longer than this share of whole rows."""
SAVES_EVERY = 64
"""Cells after which a resumable sweep is written to its file again, at least."""


@attrs.frozen(kw_only=True, eq=False)
class Request:
    """How a sweep is run."""

    metrics: Mapping[str, Metric]
    positions: Any = None
    exact: bool = False
    batch_size: int | None = None
    progress: bool | None = None
    resume: Any = None
    identity: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    """What makes two sweeps the same, for the file of a sweep."""
    options: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    """How the input is read."""


@attrs.frozen(kw_only=True, eq=False)
class Outcome:
    """What a sweep gave, by metric: values `[cell, batch]` and baselines `[batch]`; the batch of a scalar one is 1."""

    values: Mapping[str, Float[Tensor, "cell batch"]]
    baselines: Mapping[str, Float[Tensor, " batch"]]
    is_scalar: Mapping[str, bool]
    engine: Engine
    n_run: int
    """How many cells were run; the others cannot differ from the baseline, or were in the file."""


def run_sweep(model: "LensModel", corrupted: Tensor, grid: Cells, request: Request) -> Outcome:
    """Run every cell of a grid and measure it."""
    if request.batch_size is not None and (isinstance(request.batch_size, bool) or request.batch_size < 1):
        raise ArgumentError(f"batch_size is how many cells run at once, 1 or more; got {request.batch_size!r}")
    with torch.no_grad():
        cells = list(grid.cells())
        points = list({cell.point.name: cell.point for cell in cells}.values())
        hooked = is_hooked(model)
        may_pack = not request.exact and not hooked and all(is_packable(model, point) for point in points)
        may_pack = may_pack and can_pack(model, corrupted.shape[1])
        baseline = prepare(model, corrupted, points, request.positions, keeps_cache=may_pack, **request.options)
        sweep = _Sweep(baseline, grid, request, n_cells=len(cells))
        left = sweep.begin(cells)
        engine: Engine = "exact"
        if may_pack and _is_worth(baseline, left):
            engine = "packed" if agrees(baseline, grid, left) else "exact"
        with _bar(request.progress) as progress:
            task = progress.add_task("patching", total=len(left))
            for chunk in _chunks(baseline, left, request.batch_size if not hooked else 1, engine):
                if engine == "packed":
                    sweep.take(chunk, run_packed(baseline, grid, chunk))
                elif hooked or depth_of(model, chunk[0].point) == model.cfg.n_layers:
                    sweep.measure(chunk, run_rows(baseline, grid, chunk, to_logits=True, is_whole=hooked))
                else:
                    sweep.take(chunk, run_rows(baseline, grid, chunk))
                progress.advance(task, len(chunk))
            sweep.finish()
        return sweep.outcome(engine, len(left))


def _is_worth(baseline: Baseline, cells: Sequence[Cell]) -> bool:
    """Whether the suffixes of all cells are much shorter than as many whole rows."""
    suffixes = sum(suffix_length(baseline, cell) for cell in cells)
    return len(cells) > 2 and suffixes <= WORTH * len(cells) * baseline.n_pos


def _chunks(baseline: Baseline, cells: Sequence[Cell], batch_size: int | None, engine: Engine) -> Iterator[list[Cell]]:
    """Put cells together that run at once: of one point, those with the longest suffixes first.

    Packed, whole points of different blocks are put together while there is room; the lower blocks come first.
    """
    most = max(AT_ONCE.get(baseline.final.device.type, MANY) // baseline.batch, 1)
    by_point: dict[str, list[Cell]] = {}
    for cell in cells:
        by_point.setdefault(cell.point.name, []).append(cell)

    def fits(some: Sequence[Cell]) -> bool:
        if batch_size is not None:
            return len(some) <= batch_size
        lengths = (suffix_length(baseline, cell) if engine == "packed" else baseline.n_pos for cell in some)
        return sum(lengths) <= most

    together: list[Cell] = []
    for group in sorted(by_point.values(), key=lambda some: depth_of(baseline.model, some[0].point)):
        ordered = sorted(group, key=lambda one: one.start)
        is_higher = not together or depth_of(baseline.model, together[-1].point) < depth_of(
            baseline.model, group[0].point
        )
        if engine == "packed" and is_higher and fits([*together, *ordered]):
            together += ordered
            continue
        yield from (together,) if together else ()
        *whole, together = _split(ordered, fits)
        yield from whole
        if engine != "packed":
            yield together
            together = []
    yield from (together,) if together else ()


def _split(cells: Sequence[Cell], fits: Callable[[Sequence[Cell]], bool]) -> list[list[Cell]]:
    """Cut cells into stretches that fit, of one cell at least."""
    found: list[list[Cell]] = [[]]
    for cell in cells:
        if found[-1] and not fits([*found[-1], cell]):
            found.append([])
        found[-1].append(cell)
    return found


@attrs.define(eq=False)
class _Sweep:
    """The values so far, and the cells whose logits are still to be computed."""

    baseline: Baseline
    grid: Cells
    request: Request
    n_cells: int = attrs.field(kw_only=True)
    values: dict[str, Tensor] = attrs.field(factory=dict[str, Tensor], init=False)
    baselines: dict[str, Tensor] = attrs.field(factory=dict[str, Tensor], init=False)
    is_scalar: dict[str, bool] = attrs.field(factory=dict[str, bool], init=False)
    done: Bool[Tensor, " cell"] = attrs.field(default=attrs.Factory(lambda: torch.zeros(0, dtype=torch.bool)))
    waiting: list[tuple[list[Cell], Tensor]] = attrs.field(factory=list[tuple[list[Cell], Tensor]], init=False)
    numbers: dict[tuple[int, ...], int] = attrs.field(factory=dict[tuple[int, ...], int], init=False)
    saved: Saved | None = attrs.field(default=None, init=False)
    unsaved: int = attrs.field(default=0, init=False)

    def begin(self, cells: Sequence[Cell]) -> list[Cell]:
        """Measure the baseline, read what was saved, and give the cells that must be run."""
        for name, metric in self.request.metrics.items():
            value, is_scalar = measured(name, metric, self.baseline.logits)
            self.baselines[name], self.is_scalar[name] = value, is_scalar
            self.values[name] = torch.full(
                (self.n_cells, len(value)), torch.nan, dtype=value.dtype, device=value.device
            )
        self.done = torch.zeros(self.n_cells, dtype=torch.bool)
        self.numbers = {cell.index: number for number, cell in enumerate(cells)}
        if self.request.resume is not None:
            self.saved = Saved.open(self.request.resume, self.request.identity, self.baselines)
            self.saved.fill(self.values, self.done)
        idle = [
            number
            for number, cell in enumerate(cells)
            if cell.start > self.baseline.last or self.grid.is_idle(cell, self.baseline.values.get(cell.point.name))
        ]
        for name, value in self.baselines.items():
            self.values[name][idle] = value
        self.done[idle] = True
        return [cell for number, cell in enumerate(cells) if not self.done[number]]

    def take(self, cells: list[Cell], result: Float[Tensor, "cell batch n d"]) -> None:
        """Take the final stream of some cells."""
        self.waiting.append((cells, result))
        rows = sum(one.shape[0] * one.shape[1] * one.shape[2] for _, one in self.waiting)
        n_waiting = sum(len(some) for some, _ in self.waiting)
        if rows * self.baseline.logits.shape[-1] > LOGITS or (self.saved is not None and n_waiting >= SAVES_EVERY):
            self.flush()

    def flush(self) -> None:
        """Compute the logits of what waits for them, and measure."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        model, batch = self.baseline.model, self.baseline.batch
        cells = [cell for some, _ in waiting for cell in some]
        streams = torch.cat([one for _, one in waiting])
        at_once = max(LOGITS // (batch * streams.shape[2] * model.cfg.d_vocab), 1)
        for first in range(0, len(cells), at_once):
            some = streams[first : first + at_once]
            logits: Any = head(model, some.flatten(0, 1))
            self.measure(cells[first : first + at_once], logits.unflatten(0, (len(some), batch)))

    def measure(self, cells: Sequence[Cell], logits: Float[Tensor, "cell batch n d_vocab"]) -> None:
        """Hand each cell's logits to the metrics."""
        for cell, own in zip(cells, logits, strict=True):
            number = self.numbers[cell.index]
            for name, metric in self.request.metrics.items():
                value, _ = measured(name, metric, own)
                self.values[name][number] = value
            self.done[number] = True
        self.unsaved += len(cells)
        if self.saved is not None and self.unsaved >= SAVES_EVERY:
            self.saved.write(self.values, self.done)
            self.unsaved = 0

    def finish(self) -> None:
        """Measure what is left."""
        self.flush()
        if self.saved is not None:
            self.saved.write(self.values, self.done)

    def outcome(self, engine: Engine, n_run: int) -> Outcome:
        """Give what was found."""
        return Outcome(
            values=self.values, baselines=self.baselines, is_scalar=self.is_scalar, engine=engine, n_run=n_run
        )


def measured(name: str, metric: Metric, logits: Float[Tensor, "batch n d_vocab"]) -> tuple[Tensor, bool]:
    """Call a metric on one cell's logits; gives one number for each row, or one, and whether it is a single one.

    Raises:
        ArgumentError: It gives something else.
    """
    value: Any = metric(logits)
    if isinstance(value, int | float):
        value = torch.tensor(float(value), device=logits.device)
    if not isinstance(value, Tensor) or value.is_complex() or (value.shape != logits.shape[:1] and value.numel() != 1):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(
            f"the metric {name!r} gives one number for each of the {len(logits)} rows, or one number; got {got}"
        )
    wide = value.detach().to(torch.promote_types(value.dtype, torch.float32))
    return wide.reshape(-1), value.shape != logits.shape[:1]


def _bar(wanted: bool | None) -> Progress:
    """Make a progress bar on the terminal's error stream; None shows it where somebody looks at a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    is_off = not (console.is_terminal if wanted is None else wanted)
    return Progress(*columns, console=console, transient=True, disable=is_off)
