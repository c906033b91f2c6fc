"""The packed engine: the positions that cells can change, of several cells in one masked sequence.

A cell that patches position p changes nothing before p. So only its positions from p on are run, its suffix; the keys
and values before p are those of the corrupted run. The suffixes of several cells stand one behind the other in one
sequence, over the corrupted run's keys and values as a cache that never grows. A mask of its own for each query lets
position t of cell c see the corrupted keys before p_c, and the cell's own positions up to t; position ids say where in
the text each of them stands. HF's blocks take all of this as it is.

It is another kernel than that of a run by itself (a mask given, not implied), so values agree to rounding, not to the
bit. Where HF's attention cannot take it, `can_pack` says so: recurrent states, sliding windows shorter than the text,
kernels without such masks. What cannot be told from outside is tried: `agrees` runs two cells both ways.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lens_core._functions import function_slot, give_back, take
from lens_core._hf_cache import COPYABLE, cached_length
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


def can_pack(model: "LensModel", cache: Any, n_pos: int) -> bool:
    """Whether the attention of every layer is of the kind that a packed sequence needs; `cache` is of a whole run."""
    if model.bare_model.config._attn_implementation not in IMPLEMENTATIONS or not takes_position_ids(model):
        return False
    if "attention" not in model.layer_types() or set(model.layer_types()) - {"attention", "mlp"}:
        return False
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None)
        if type(layer) not in COPYABLE or (window is not None and window <= n_pos):
            return False
    return cached_length(cache) == n_pos


def is_packable(model: "LensModel", point: HookPoint) -> bool:
    """Whether a point's values are one for each position of the call, inside of the blocks."""
    words = point.shape.split()
    is_inside = 0 <= depth_of(model, point) < model.cfg.n_layers
    return is_inside and words[1] == "pos" and not point.part.endswith(("hook_k_rep", "hook_v_rep"))


def suffix_length(baseline: Baseline, cell: Cell) -> int:
    """Count the positions that a cell may change and the metric may see."""
    return max(baseline.last + 1 - cell.start, 0)


class _Prefix(DynamicLayer):
    """A layer's keys and values of the corrupted run; what is added is handed back behind them, and not kept."""

    def __init__(self, layer: Any, length: int) -> None:
        super().__init__()
        self.keys, self.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Give the corrupted keys and values, and these behind them."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def _prefix(cache: Any, length: int) -> Any:
    """Give a cache that goes on from the first positions of a run, as often as one likes."""
    new = copy.copy(cache)
    new.layers = [
        _Prefix(layer, length) if getattr(layer, "is_initialized", False) else layer for layer in cache.layers
    ]
    return new


def run_packed(baseline: Baseline, grid: Cells, cells: Sequence[Cell]) -> Float[Tensor, "cell batch n d"]:
    """Run cells of one point as one sequence, and give the final stream where the metric looks.

    Before a cell's first position that is the corrupted run's.
    """
    model, point = baseline.model, cells[0].point
    depth, n_layers, stop = depth_of(model, point), model.cfg.n_layers, baseline.last + 1
    device = baseline.streams[depth].device
    starts = torch.tensor([cell.start for cell in cells], device=device)
    lengths = stop - starts
    owner = torch.repeat_interleave(torch.arange(len(cells), device=device), lengths)
    ends = lengths.cumsum(0)
    begins = ends - lengths
    place = torch.arange(len(owner), device=device) - begins[owner] + starts[owner]  # of each slot, in the text
    hidden = baseline.streams[depth][:, place]
    wanted = baseline.at if baseline.at is not None else torch.arange(stop)[None].expand(baseline.batch, -1)
    slots = begins[:, None, None] + (wanted.to(device)[None] - starts[:, None, None])  # cell batch n
    cache = _prefix(baseline.cache, stop)
    ids = baseline.inputs.position_ids
    ids = place[None].expand(baseline.batch, -1) if ids is None else ids[:, place]
    keep = slots[wanted.to(device)[None] >= starts[:, None, None]].unique()
    with (
        model.running(
            model.entries([(point.name, _packed_patcher(grid, cells, begins.tolist(), lengths.tolist()))], ()),
            start_at=depth,
            stop_at=n_layers,
            residual=hidden,
        ) as run,
        _trimmed(model, run, point, keep),
    ):
        try:
            model.hf_model(
                inputs_embeds=hidden,
                attention_mask=_mask(baseline, owner, place, starts, stop, hidden.dtype),
                position_ids=ids,
                use_cache=False,
                **{model.cache_argument: cache},
            )
        except StopForward as stopped:
            output = stopped.residual
        finally:
            run.leave_call()
    rows = torch.arange(baseline.batch, device=device)[:, None]
    is_before = wanted.to(device)[None] < starts[:, None, None]
    return torch.where(is_before[..., None], baseline.final, output[rows, slots.clamp(min=0)])


def _packed_patcher(
    grid: Cells, cells: Sequence[Cell], begins: Sequence[int], lengths: Sequence[int]
) -> Callable[..., Tensor]:
    """Make the hook function that patches each cell in its own stretch of the sequence."""

    def patch(values: Tensor, hook: Any) -> Tensor:
        for cell, begin, length in zip(cells, begins, lengths, strict=True):
            grid.write(cell, values[:, begin : begin + length], cell.start)
        return values

    return patch


def _mask(
    baseline: Baseline, owner: Tensor, place: Tensor, starts: Tensor, stop: int, dtype: torch.dtype
) -> Float[Tensor, "batch 1 query key"]:
    """Say which corrupted keys, and which of the sequence itself, each query sees: 0, or a very negative number."""
    before = torch.arange(stop, device=place.device)[None, :] < starts[owner][:, None]  # query key
    own = (owner[:, None] == owner[None, :]) & (place[None, :] <= place[:, None])
    seen = torch.cat([before, own], dim=1)[None]
    padding = baseline.inputs.whole_mask
    if padding is not None:
        real = padding.bool().to(place.device)
        seen = seen & torch.cat([real[:, :stop], real[:, place]], dim=1)[:, None, :]
    seen = seen[:, None].expand(baseline.batch, -1, -1, -1)
    return torch.zeros(seen.shape, dtype=dtype, device=place.device).masked_fill_(~seen, torch.finfo(dtype).min)


@contextmanager
def _trimmed(model: "LensModel", run: "Run", point: HookPoint, keep: Tensor) -> Iterator[None]:
    """Let the last block's MLP compute the slots in `keep` only: nobody reads the others.

    A MLP maps each position by itself. Nothing is trimmed where a point inside of it is patched.
    """
    last = model.cfg.n_layers - 1
    name = f"blocks.{last}.mlp.hook_in"
    seam = model.table[name].seam if name in model.table else None
    if not isinstance(seam, ModuleInput) or (point.layer == last and "mlp" in point.part):
        yield
        return
    module = run.module(seam.path)

    def few(original: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = original(hidden[:, keep], *args, **kwargs)
        if not isinstance(output, Tensor) or output.shape[:2] != (len(hidden), len(keep)):
            return original(hidden, *args, **kwargs)
        return output.new_zeros((*hidden.shape[:2], *output.shape[2:])).index_copy_(1, keep, output)

    slot = function_slot(vars(module), "forward", original=module.forward)
    take(slot, run)
    run.handlers[slot.key] = few
    try:
        yield
    finally:
        run.handlers.pop(slot.key, None)
        give_back(slot, run)


def agrees(baseline: Baseline, grid: Cells, cells: Sequence[Cell]) -> bool:
    """Run some cells both ways, and tell whether they agree.

    What HF's code does with a mask, a cache and position ids of the user's differs from type to type, so an exception
    is an answer as well.
    """
    expected = run_rows(baseline, grid, cells)
    try:
        found = run_packed(baseline, grid, cells)
    except Exception:
        return False
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    error = (found - expected).abs().max() / scale
    return bool(error <= TOLERANCE.get(expected.dtype, 0.1))
