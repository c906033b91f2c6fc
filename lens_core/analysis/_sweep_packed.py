"""The packed engine: only the positions that cells can change, of several cells in one masked sequence.

A cell that patches position p changes nothing before p. So only its positions from p on are run, its suffix; the keys
and values before p are those of the corrupted run. Suffixes stand one behind the other in rows of about equal length,
over the corrupted run's keys and values as a cache that never grows. A mask of its own for each query lets position t
of cell c see the corrupted keys before p_c, and the cell's own positions up to t; position ids say where in the text
each of them stands. HF's blocks take all of this as it is. Cells of higher blocks join the rows where they start, and
the last block's MLP maps only what the metric reads.

It is another kernel than that of a run by itself (a mask given, not implied), so values agree to rounding, not to the
bit. Where HF's attention cannot take it, `can_pack` says so: recurrent states, sliding windows shorter than the text,
kernels without such masks. What cannot be told from outside is tried: `agrees` runs two cells both ways.
"""

import copy
import itertools
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import attrs
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lens_core._functions import function_slot, give_back, take
from lens_core._hf_cache import COPYABLE, new_cache
from lens_core._plan import StopForward
from lens_core._state import takes_position_ids
from lens_core.analysis._sweep_grid import Cell, Cells
from lens_core.analysis._sweep_run import Baseline, depth_of, run_rows
from lens_core.hook_points import HookPoint
from lens_core.seams import ModuleInput

if TYPE_CHECKING:
    from lens_core._plan import Run
    from lens_core.model import LensModel

__all__ = ["agrees", "can_pack", "is_packable", "run_packed", "suffix_length"]

IMPLEMENTATIONS = ("sdpa", "eager")
"""HF's attention kernels that take a mask for each query and key, added to the scores."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far two ways of computing a cell may lie apart, as a share of the stream's size; a tenth in half precision."""

DEPTH_TRIED = 4
"""How many of the last blocks two cells are tried in."""
_tried: WeakKeyDictionary[Any, dict[Any, bool]] = WeakKeyDictionary()


def can_pack(model: "LensModel", n_pos: int) -> bool:
    """Whether the attention of every layer is of the kind that a packed sequence needs."""
    if model.bare_model.config._attn_implementation not in IMPLEMENTATIONS or not takes_position_ids(model):
        return False
    if "attention" not in model.layer_types() or set(model.layer_types()) - {"attention", "mlp"}:
        return False
    for layer in new_cache(model.bare_model).layers:
        window = getattr(layer, "sliding_window", None)
        if type(layer) not in COPYABLE or (window is not None and window <= n_pos):
            return False
    return True


def is_packable(model: "LensModel", point: HookPoint) -> bool:
    """Whether a point's values are one for each position of the call, inside of the blocks."""
    words = point.shape.split()
    is_inside = 0 <= depth_of(model, point) < model.cfg.n_layers
    return is_inside and words[1] == "pos" and not point.part.endswith(("hook_k_rep", "hook_v_rep"))


def suffix_length(baseline: Baseline, cell: Cell) -> int:
    """Count the positions that a cell may change and the metric may see."""
    return max(baseline.last + 1 - cell.start, 0)


@attrs.frozen(kw_only=True, eq=False)
class _Pack:
    """Suffixes of cells of one point, laid out in rows of one width.

    Attributes:
        cells: The cells.
        spots: Where each of them begins: row and column.
        owner: Of each slot, the cell, counted in `cells`; -1 where nothing stands `[row, width]`.
        place: Of each slot, the position in the text.
    """

    cells: Sequence[Cell]
    spots: Sequence[tuple[int, int]]
    owner: Int[Tensor, "row width"]
    place: Int[Tensor, "row width"]


def _packed(cells: Sequence[Cell], stop: int, width: int | None, device: torch.device) -> _Pack:
    """Lay cells out; the width is given, or the one that leaves the fewest slots empty."""
    lengths = [stop - cell.start for cell in cells]
    widths = range(max(lengths), 2 * max(lengths)) if width is None else [max(width, *lengths)]
    spots, rows, width = min((_fitted(lengths, one) for one in widths), key=lambda found: found[1] * found[2])
    owner = torch.full((rows, width), -1)
    place = torch.zeros_like(owner)
    for number, ((row, column), length) in enumerate(zip(spots, lengths, strict=True)):
        owner[row, column : column + length] = number
        place[row, column : column + length] = torch.arange(stop - length, stop)
    return _Pack(cells=cells, spots=spots, owner=owner.to(device), place=place.to(device))


def _fitted(lengths: Sequence[int], width: int) -> tuple[list[tuple[int, int]], int, int]:
    """Put each length, the longest first, into the first row that has room; gives the spots, the rows and the width."""
    spots, filled = [(0, 0)] * len(lengths), list[int]()
    for number in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        row = next((row for row, used in enumerate(filled) if used + lengths[number] <= width), len(filled))
        if row == len(filled):
            filled.append(0)
        spots[number] = (row, filled[row])
        filled[row] += lengths[number]
    return spots, len(filled), width


class _Prefix(DynamicLayer):
    """A layer's keys and values of the corrupted run; what is added is handed back behind them, and not kept."""

    def __init__(self, layer: Any, stop: int, rows: Tensor) -> None:
        cast("Any", super()).__init__()
        self.keys, self.values, self.rows = layer.keys[:, :, :stop], layer.values[:, :, :stop], rows
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Give the corrupted keys and values, and these behind them."""
        rows = self.rows.to(key_states.device)
        own: Any = self
        before: tuple[Tensor, Tensor] = own.keys.index_select(0, rows), own.values.index_select(0, rows)
        return torch.cat([before[0], key_states], dim=-2), torch.cat([before[1], value_states], dim=-2)


def run_packed(baseline: Baseline, grid: Cells, cells: Sequence[Cell]) -> Float[Tensor, "cell batch n d"]:
    """Run cells, those of lower blocks first, and give the final stream where the metric looks.

    Before a cell's first position that is the corrupted run's.
    """
    model, stop = baseline.model, baseline.last + 1
    packs: list[_Pack] = []
    stream: Tensor | None = None
    groups = [list(group) for _, group in itertools.groupby(cells, key=lambda cell: cell.point.name)]
    for number, group in enumerate(groups):
        depth = depth_of(model, group[0].point)
        corrupted = baseline.streams[depth]
        packs.append(_packed(group, stop, packs[0].owner.shape[1] if packs else None, corrupted.device))
        added = corrupted[:, packs[-1].place].flatten(0, 1)
        stream = added if stream is None else torch.cat([stream.to(added.device), added])
        is_last = number + 1 == len(groups)
        until = model.cfg.n_layers if is_last else depth_of(model, groups[number + 1][0].point)
        stream = _run_blocks(baseline, grid, packs, stream, depth, until)
    assert stream is not None
    whole: Any = stream
    parts = whole.split([baseline.batch * len(pack.owner) for pack in packs])
    by_batch = [rows.unflatten(0, (baseline.batch, -1)) for rows in parts]
    return torch.cat([_at_metric(baseline, pack, rows) for pack, rows in zip(packs, by_batch, strict=True)])


def _run_blocks(
    baseline: Baseline, grid: Cells, packs: Sequence[_Pack], stream: Float[Tensor, "row width d"], start: int, stop: int
) -> Float[Tensor, "row width d"]:
    """Run some blocks on all rows; the last pack's cells are patched in the first of them."""
    model, batch, device = baseline.model, baseline.batch, stream.device
    packs = [attrs.evolve(pack, owner=pack.owner.to(device), place=pack.place.to(device)) for pack in packs]
    point = packs[-1].cells[0].point
    rows = torch.cat([torch.arange(batch, device=device).repeat_interleave(len(pack.owner)) for pack in packs])
    place = torch.cat([pack.place.repeat(batch, 1) for pack in packs])
    ids = baseline.inputs.position_ids
    cache = copy.copy(baseline.cache)
    cache.layers = [
        _Prefix(layer, baseline.last + 1, rows) if getattr(layer, "is_initialized", False) else layer
        for layer in cache.layers
    ]
    keep = torch.cat([_kept(baseline, pack).flatten() for pack in packs]).nonzero()[:, 0]
    with (
        model.running(
            model.entries([(point.name, _patcher(grid, packs[-1], batch, baseline.last + 1))], ()),
            start_at=start,
            stop_at=stop,
            residual=stream,
        ) as run,
        _trimmed(model, run, point, keep, is_last=stop == model.cfg.n_layers),
    ):
        try:
            model.hf_model(
                inputs_embeds=stream,
                attention_mask=torch.cat([_mask(baseline, pack, stream.dtype) for pack in packs]),
                position_ids=place if ids is None else ids.to(device)[rows[:, None], place],
                use_cache=False,
                **{model.cache_argument: cache},
            )
        except StopForward as stopped:
            return stopped.residual
        finally:
            run.leave_call()
    raise AssertionError("a run with stop_at_layer comes back by StopForward")


def _patcher(grid: Cells, pack: _Pack, batch: int, stop: int) -> Callable[..., Tensor]:
    """Make the hook function that patches each cell in its own stretch of the last rows."""

    def patch(values: Any, hook: Any) -> Tensor:
        own = values[-batch * len(pack.owner) :].unflatten(0, (batch, -1))
        for cell, (row, column) in zip(pack.cells, pack.spots, strict=True):
            grid.write(cell, own[:, row, column : column + stop - cell.start], cell.start)
        return values

    return patch


def _kept(baseline: Baseline, pack: _Pack) -> Bool[Tensor, "batch row width"]:
    """Mark the slots that the metric reads, for each row of the batch."""
    if baseline.at is None:
        return (pack.owner >= 0)[None].expand(baseline.batch, -1, -1)
    wanted = baseline.at.to(pack.place.device)[:, :, None, None] == pack.place
    return wanted.any(1) & (pack.owner >= 0)


def _mask(baseline: Baseline, pack: _Pack, dtype: torch.dtype) -> Float[Tensor, "row 1 query key"]:
    """Say which corrupted keys, and which of its own row, each slot sees: 0, or a very negative number."""
    owner, place, stop, device = pack.owner, pack.place, baseline.last + 1, pack.owner.device
    starts = torch.tensor([*(cell.start for cell in pack.cells), 0], device=device)[owner]  # of -1, which comes last, 0
    before = torch.arange(stop, device=device) < starts[:, :, None]
    own = (owner[:, :, None] == owner[:, None, :]) & (place[:, None, :] <= place[:, :, None])
    seen = torch.cat([before, own], dim=2)[None].expand(baseline.batch, -1, -1, -1)
    padding = baseline.inputs.whole_mask
    if padding is not None:
        real = padding.bool().to(device)
        there = real[:, None, None, :stop].expand(-1, *owner.shape, -1)
        seen = seen & torch.cat([there, real[:, place][:, :, None, :].expand(-1, -1, owner.shape[1], -1)], dim=3)
    shape = (baseline.batch * len(owner), 1, owner.shape[1], -1)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min).view(shape)


def _at_metric(
    baseline: Baseline, pack: _Pack, stream: Float[Tensor, "batch row width d"]
) -> Float[Tensor, "cell batch n d"]:
    """Take the slots where the metric looks; before a cell's first position the corrupted stream."""
    device = stream.device
    every = torch.arange(baseline.last + 1)[None].expand(baseline.batch, -1)
    at = (every if baseline.at is None else baseline.at).to(device)
    starts = torch.tensor([cell.start for cell in pack.cells], device=device)[:, None, None]
    row, column = torch.tensor(pack.spots, device=device).T[:, :, None, None]
    found = stream[torch.arange(len(at), device=device)[:, None], row, (column + at - starts).clamp(min=0)]
    return torch.where((at < starts)[..., None], baseline.final.to(device), found)


@contextmanager
def _trimmed(
    model: "LensModel", run: "Run", point: HookPoint, keep: Tensor, *, is_last: bool
) -> Generator[None, None, None]:
    """Let the last block's MLP map the slots in `keep` only: nobody reads the others.

    A MLP maps each position by itself. Nothing is trimmed where a point inside of it is patched.
    """
    last = model.cfg.n_layers - 1
    name = f"blocks.{last}.mlp.hook_in"
    seam = model.table[name].seam if is_last and name in model.table else None
    if not isinstance(seam, ModuleInput) or (point.layer == last and "mlp" in point.part):
        yield
        return
    module = run.module(seam.path)

    def few(original: Callable[..., Any], hidden: Any, *args: Any, **kwargs: Any) -> Any:
        flat = hidden.flatten(0, 1)
        kept = keep.to(flat.device)
        output: Any = original(flat[kept][None], *args, **kwargs)
        if not isinstance(output, Tensor) or output.shape[:2] != (1, len(kept)):
            return original(hidden, *args, **kwargs)
        whole: Tensor = output.new_zeros((len(flat), *output.shape[2:])).index_copy_(0, kept, output[0])
        return whole.view(*hidden.shape[:2], *output.shape[2:])

    slot = function_slot(vars(module), "forward", original=module.forward)
    take(slot, run)
    run.handlers[slot.key] = few
    try:
        yield
    finally:
        run.handlers.pop(slot.key, None)
        give_back(slot, run)


def agrees(baseline: Baseline, grid: Cells, cells: Sequence[Cell]) -> bool:
    """Run two cells of a high block both ways, and tell whether they agree; once for each model and length.

    What HF's code does with a mask, a cache and position ids of the user's differs from type to type, so an exception
    is an answer as well.
    """
    model = baseline.model.bare_model
    known = _tried.setdefault(model, {})
    key = (model.config._attn_implementation, model.dtype, baseline.n_pos, baseline.inputs.whole_mask is None)
    if key not in known:
        known[key] = _agree(baseline, grid, _witnesses(baseline, cells))
    return known[key]


def _witnesses(baseline: Baseline, cells: Sequence[Cell]) -> list[Cell]:
    """Choose two cells of one block, the longest suffix and one of middle length, in the last blocks if there are any.

    The kinds of attention that a model mixes come in turn, so that the last few blocks have all of them.
    """
    depths = {cell.point.name: depth_of(baseline.model, cell.point) for cell in cells}
    first = baseline.model.cfg.n_layers - DEPTH_TRIED
    lowest = min(depths, key=lambda name: (depths[name] < first, abs(depths[name] - first)))
    ordered = sorted((cell for cell in cells if cell.point.name == lowest), key=lambda cell: cell.start)
    return [ordered[0], ordered[len(ordered) // 2]]


def _agree(baseline: Baseline, grid: Cells, cells: Sequence[Cell]) -> bool:
    expected = run_rows(baseline, grid, cells)
    try:
        found = run_packed(baseline, grid, cells)
    except Exception:
        return False
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    error = (found - expected).abs().max() / scale
    return bool(error <= TOLERANCE.get(expected.dtype, 0.1))
