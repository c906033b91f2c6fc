"""The run that a sweep patches, and the plain engine: several cells beside each other along the batch axis.

What cannot change is not computed again: cells of block L start from the residual stream that entered it, and logits
are computed only where the metric looks. The kernels and the shape of each row are those of a run by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_core._context import active_run
from lens_core._hf_cache import new_cache
from lens_core._inputs import Inputs, read_input
from lens_core._pass_log import applied_passes
from lens_core._positions import check_ends
from lens_core.analysis._sweep_grid import Cell, Cells, row_positions
from lens_core.errors import ArgumentError, CacheError
from lens_core.hook_points import HookPoint

if TYPE_CHECKING:
    from lens_core.model import LensModel

BY_POSITION = ".hook_ssm_state"
"""The point whose functions are called once for each position."""

__all__ = ["Baseline", "clean_values", "depth_of", "head", "is_hooked", "picked", "prepare", "run_rows"]


@attrs.frozen(kw_only=True, eq=False)
class Baseline:
    """The corrupted run, as far as patched runs share it.

    Attributes:
        model: The model.
        inputs: What it was given.
        streams: The residual stream that enters each block of the sweep, by block `[batch, pos, d_model]`.
        values: Values at the points that are patched, where they cost nothing to keep.
        logits: Where the metric looks, `[batch, n, d_vocab]`.
        final: What enters the final norm there, `[batch, n, d_model]`.
        at: These positions `[batch, n]`; None for all.
        last: The last position that the metric looks at.
        cache: HF's cache of the run, where an engine asked for it.
    """

    model: "LensModel"
    inputs: Inputs
    streams: Mapping[int, Tensor]
    values: Mapping[str, Tensor]
    logits: Float[Tensor, "batch n d_vocab"]
    final: Float[Tensor, "batch n d_model"]
    at: Int[Tensor, "batch n"] | None
    last: int
    cache: Any = None

    @property
    def n_pos(self) -> int:
        """Positions of the input."""
        given = self.inputs.tokens if self.inputs.tokens is not None else self.inputs.embeddings
        return 0 if given is None else given.shape[1]

    @property
    def batch(self) -> int:
        """Rows of the input."""
        return self.logits.shape[0]


def depth_of(model: "LensModel", point: HookPoint) -> int:
    """Say which block a patched run starts at: -1 for the embeddings, n_layers for what follows the blocks."""
    depth = model.table.depth(point.name)
    return -1 if depth is None else depth


def is_hooked(model: "LensModel") -> bool:
    """Whether hooks of the user's are live, which must see what a run by itself would show them."""
    return bool(model.added_hooks) or active_run(model.bare_model) is not None


def clean_values(
    model: "LensModel", cache: Mapping[str, Tensor], points: Sequence[HookPoint], *, batch: int
) -> dict[str, Tensor]:
    """Take the values of the other run, with a row for each row of the run that is patched.

    Raises:
        CacheError: A point that is not cached, another number of rows, or a cache of something else.
    """
    _check_cache(model, cache)
    found: dict[str, Tensor] = {}
    has_batch = getattr(cache, "has_batch_dim", True)
    for point in points:
        if point.name not in cache:
            raise CacheError(f"the clean cache does not hold {point.name!r}; run it with that name in names_filter")
        value = cache[point.name].detach()
        value = value if has_batch else value[None]
        if value.shape[0] not in (1, batch):
            raise CacheError(
                f"the clean cache has {value.shape[0]} rows at {point.name!r}, and the corrupted input has {batch}"
            )
        found[point.name] = value.expand(batch, *value.shape[1:])
    return found


def _check_cache(model: "LensModel", cache: Mapping[str, Tensor]) -> None:
    """Refuse the cache of a model that this one has nothing in common with, or of other weights of this one.

    Another model of the same type is welcome: patching from a finetune into its base is a question of its own.

    Raises:
        CacheError: See above; says which.
    """
    other = getattr(cache, "model", None)
    if other is None:
        return
    if type(other.bare_model) is not type(model.bare_model):
        raise CacheError(
            f"the clean cache is of a {type(other.bare_model).__name__}, and this model is a "
            f"{type(model.bare_model).__name__}: run the clean prompt on a model of the same type"
        )
    own, theirs = applied_passes(model.bare_model), getattr(cache, "passes", ())
    if own != theirs:
        raise CacheError(
            f"the clean cache is of weights after {', '.join(theirs) or 'no pass'}, and the model's are after "
            f"{', '.join(own) or 'no pass'}: run the clean prompt again"
        )


def prepare(
    model: "LensModel", corrupted: Any, points: Sequence[HookPoint], positions: Any, *, keeps_cache: bool, **kwargs: Any
) -> Baseline:
    """Run the corrupted input once."""
    if model.bare_model.training:
        raise ArgumentError("the model is in training mode, where dropout makes no two runs alike; call model.eval()")
    inputs = read_input(model, corrupted, **kwargs)
    given = inputs.tokens if inputs.tokens is not None else inputs.embeddings
    assert given is not None
    batch, n_pos = given.shape[:2]
    check_ends(positions, inputs.whole_mask)
    at = None if positions is None else row_positions(positions, batch=batch, n_pos=n_pos).expand(batch, -1)
    depths = sorted({depth for point in points if (depth := depth_of(model, point)) >= 0})
    n_layers = model.cfg.n_layers
    stream = {depth: f"blocks.{depth}.hook_resid_pre" for depth in depths if depth < n_layers}
    final = f"blocks.{n_layers - 1}.hook_resid_post"
    stream |= {depth: final for depth in depths if depth == n_layers}
    kept = [point.name for point in points if point.default]
    cache = new_cache(model.bare_model) if keeps_cache else None
    more: dict[str, Any] = {"past_key_values": cache} if keeps_cache else {}
    names = [*stream.values(), *kept, final]
    mask, ids = inputs.whole_mask, inputs.position_ids
    logits, found = model.run_with_cache(given, names_filter=names, attention_mask=mask, position_ids=ids, **more)
    return Baseline(
        model=model,
        inputs=inputs,
        streams={depth: found[name] for depth, name in stream.items()},
        values={name: found[name] for name in kept},
        logits=picked(logits, at).clone(),
        final=picked(found[final], at),
        at=at,
        last=n_pos - 1 if at is None else int(at.max()),
        cache=cache,
    )


def picked(values: Float[Tensor, "*cell batch pos d"], at: Int[Tensor, "batch n"] | None) -> Tensor:
    """Take the positions that the metric looks at, each row its own."""
    if at is None:
        return values
    rows = torch.arange(len(at), device=values.device)[:, None]
    return values[..., rows, at.to(values.device), :]


def head(model: "LensModel", streams: Float[Tensor, "rows n d_model"]) -> Float[Tensor, "rows n d_vocab"]:
    """Give the logits of what enters the final norm."""
    return model(streams, start_at_layer=model.cfg.n_layers)


def run_rows(
    baseline: Baseline, grid: Cells, cells: Sequence[Cell], *, to_logits: bool = False, is_whole: bool = False
) -> Float[Tensor, "cell batch n d"]:
    """Run cells of one point, each as rows of its own, and give the final stream (or the logits) at the metric's.

    `is_whole` runs every block, so that hooks of the user's see what a run by itself would show them.
    """
    model, point, count = baseline.model, cells[0].point, len(cells)
    depth, n_layers = depth_of(model, point), model.cfg.n_layers
    inputs = baseline.inputs

    def repeated(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.repeat_interleave(count, dim=0)

    if depth < 0 or is_whole:  # from the embeddings on
        given = repeated(inputs.tokens if inputs.tokens is not None else inputs.embeddings)
        start = None
    else:
        given, start = repeated(baseline.streams[depth]), depth
    output = model.run_with_hooks(
        given,
        fwd_hooks=[_entry(grid, cells, baseline.n_pos)],
        start_at_layer=start,
        stop_at_layer=None if to_logits else n_layers,
        attention_mask=repeated(inputs.whole_mask),
        position_ids=repeated(inputs.position_ids),
    )
    return picked(output.unflatten(0, (-1, count)).transpose(0, 1), baseline.at)


def _entry(grid: Cells, cells: Sequence[Cell], n_pos: int) -> tuple[Any, ...]:
    """Give the hook entry of some cells.

    A function inside a recurrence is called at each position it asks for; between few of them the scan is fast.
    """
    name, function = cells[0].point.name, patcher(grid, cells)
    asked = grid.asked(cells) if name.endswith(BY_POSITION) else None
    return (name, function) if asked is None or 4 * len(asked) > n_pos else (name, function, asked)


def patcher(grid: Cells, cells: Sequence[Cell]) -> Callable[..., Tensor]:
    """Make the hook function that patches each cell in its own rows, which lie `len(cells)` apart."""
    count = len(cells)

    def patch(values: Tensor, hook: Any) -> Tensor:
        first = int(hook.positions[0])
        for number, cell in enumerate(cells):
            grid.write(cell, values[number::count], first)
        return values

    return patch
