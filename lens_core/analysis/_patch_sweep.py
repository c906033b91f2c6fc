"""The general sweep: what is asked for becomes a grid of cells, and what comes back a result for each metric."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import attrs
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core._inputs import read_input
from lens_core._positions import check_ends
from lens_core._state import facts
from lens_core.analysis._sweep import Metric, Outcome, Request, run_sweep
from lens_core.analysis._sweep_file import digest
from lens_core.analysis._sweep_grid import LOCAL, Axis, Grid, read_axes, read_points
from lens_core.analysis._sweep_result import PatchingResult
from lens_core.analysis._sweep_run import clean_values
from lens_core.errors import ArgumentError
from lens_core.hook_points import HookPoint

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["Corrupted", "metrics_of", "patch_sweep", "read_corrupted", "results_of"]


@checks_arguments
def patch_sweep(
    model: "LensModel",
    corrupted: Any,
    clean_cache: Mapping[str, Tensor],
    metric: Metric | Mapping[str, Metric],
    name: Any = "resid_pre",
    *,
    axes: Sequence[str] | None = None,
    layers: Any = None,
    patch_positions: Any = None,
    heads: Any = None,
    neurons: Any = None,
    sources: Any = None,
    positions: Any = None,
    exact: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
    resume: Any = None,
    **kwargs: Any,
) -> Any:
    """Patch a piece of the clean run into the corrupted one, for every combination of some axes, and measure each time.

    Args:
        model: The model, in evaluation mode.
        corrupted: The input that is run and patched, as in `forward`.
        clean_cache: Activations of the other input, under the names that are patched; with as many positions, and as
            many rows or one for all.
        metric: Called for each cell with that cell's logits `[batch, n, d_vocab]`; gives one number for each row
            `[batch]`, or one for all of them. Or several, by name.
        name: What is patched: a short form such as `"resid_pre"`, `"z"`, `"pattern"`, `"ssm_state"` for all layers, or
            any hook point by its name.
        axes: The axes of the result: `"layer"`, `"position"`, `"head"`, `"neuron"`, `"destination"` and `"source"` (of
            attention), `"channel"`, `"group"`, or an axis of the point's shape by its own word. An axis left out is
            patched whole. None is layer and position, for patterns and scores layer and head.
        layers: Which layers; None for all that have the point.
        patch_positions: Which positions are patched: an int, a slice or some ints for all rows alike; a tensor
            `[batch]` or `[batch, n]`, or a list for each row, where each row has its own. With an axis `"position"`
            (or `"destination"`) one by one, else all in each cell.
        heads: Which heads, likewise.
        neurons: Which neurons of the MLP, likewise.
        sources: Which positions that are attended to, likewise.
        positions: Where logits are computed; the metric sees only those. In the same forms as `patch_positions`; `-1`
            gives the metric `[batch, 1, d_vocab]`. None computes all, which the engine then cannot save.
        exact: Whether every cell has the kernels of a run by itself; see below.
        batch_size: How many cells run at once; None chooses.
        progress: Whether a bar is shown; None shows it on a terminal.
        resume: A path where what is done is written from time to time, and read again if the sweep was interrupted; the
            file stays. A file of another sweep is refused. The metric itself is told by its name and its value at the
            unpatched run only.
        **kwargs: How the input is read, as in `forward`: `prepend_bos`, `padding_side`, `attention_mask`,
            `position_ids`.

    Returns:
        A `PatchingResult`; for several metrics a dictionary of them by name.

    Cells start at the patched block, from the residual stream that entered it in the corrupted run. Several run at
    once, and logits are computed where the metric looks. Cells whose patch puts in what is there anyway, or that lie
    after the last position that the metric looks at, are not run. Where attention allows it, only positions from the
    patched one on are run (`engine="packed"`), which is another way to the same numbers: within 1e-5 of their scale in
    float32. `exact=True` runs whole rows by HF's own kernels: the same bits as one forward for each cell where the
    shapes are the same too (`batch_size=1`, `positions=None`), and in practice mostly else. Models with recurrent
    states, and attention that looks back less far than the text, always run whole rows. While hooks of
    the user's are live, every cell is a whole run by itself, which they see.

    Raises:
        UnknownHookError: No such hook point.
        ArgumentError: No such axis, layer, position or head; positions counted from the end of a row that ends in
            padding; a metric that gives something else; a model in training mode.
        CacheError: The clean cache does not hold what is patched, is of another shape, of a model of another type, or
            of weights that went through other passes.
        AnalysisFileError: The file at `resume` is of another sweep, or is damaged.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> _, clean = model.run_with_cache("king apple river moon book king apple river")
        >>> corrupted = "king apple door moon book king apple river"
        >>> moon = model.to_single_token("moon")
        >>> result = patch_sweep(model, corrupted, clean, lambda logits: logits[:, -1, moon], positions=-1)
        >>> result.axes, result.values.shape[0]
        (('layer', 'position'), 2)
    """
    inputs = read_corrupted(model, corrupted, kwargs)
    batch, n_pos = inputs.shape
    check_ends(patch_positions, inputs.options["attention_mask"], "patch_positions")
    points = read_points(model.table, name, layers)
    clean = clean_values(model, clean_cache, points, batch=batch)
    local = next((word for word in LOCAL if word in points[0].shape.split()), "pos")
    head = next((word for word in ("n_heads", "n_kv_heads", "ssm_heads") if word in points[0].shape.split()), "head")
    chosen = {local: patch_positions, head: heads, "neuron": neurons, "source": sources}
    found, fixed = read_axes(points, axes, chosen, clean, n_pos=n_pos)
    patched = {point.layer: _earliest(model, point) for point in points}
    grid = Grid(
        axes=found,
        points=patched,
        clean={patched[point.layer].name: clean[point.name] for point in points},
        fixed=fixed,
    )
    request = Request(
        metrics=metrics_of(metric),
        positions=positions,
        exact=exact,
        batch_size=batch_size,
        progress=progress,
        resume=resume,
        options=inputs.options,
    )
    if resume is not None:
        request = attrs.evolve(request, identity=_identity(model, points, grid, inputs.given, request))
    outcome = run_sweep(model, inputs.given, grid, request)
    results = results_of(
        outcome,
        shape=grid.shape,
        axes=tuple(axis.name for axis in found),
        indices=tuple(axis.numbers for axis in found),
        labels=tuple(_labels(model, axis, inputs.tokens) for axis in found),
        name=points[0].part,
    )
    return results if isinstance(metric, Mapping) else results["metric"]


@checks_arguments
def metrics_of(metric: Metric | Mapping[str, Metric]) -> dict[str, Metric]:
    """Give the metrics by name; one alone is called `metric`.

    Raises:
        ArgumentError: Nothing that can be called.
    """
    metrics = dict(cast("Mapping[str, Metric]", metric)) if isinstance(metric, Mapping) else {"metric": metric}
    wrong = next((name for name, one in metrics.items() if not callable(one)), None)
    if wrong is not None or not metrics:
        raise ArgumentError(f"a metric is a function of the logits, or several by name; got {metric!r}")
    return metrics


def results_of(outcome: Outcome, *, shape: Sequence[int], **described: Any) -> dict[str, PatchingResult]:
    """Give a result for each metric."""
    return {
        name: PatchingResult(
            values=value.reshape(*shape, value.shape[-1]),
            baseline=outcome.baselines[name],
            metric=name,
            engine=outcome.engine,
            n_run=outcome.n_run,
            **described,
        )
        for name, value in outcome.values.items()
    }


@attrs.frozen(kw_only=True, eq=False)
class Corrupted:
    """The input that is run and patched: token ids, or embeddings, and how they are read."""

    given: Tensor
    options: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and positions."""
        return self.given.shape[0], self.given.shape[1]

    @property
    def tokens(self) -> Tensor | None:
        """The token ids; None of embeddings."""
        return None if self.given.is_floating_point() else self.given


def read_corrupted(model: "LensModel", corrupted: Any, kwargs: Mapping[str, Any]) -> Corrupted:
    """Bring the input to ids or embeddings.

    Raises:
        ArgumentError: Arguments that do not say how an input is read.
    """
    unknown = sorted(kwargs.keys() - {"prepend_bos", "padding_side", "attention_mask", "position_ids"})
    if unknown:
        raise ArgumentError(
            f"a sweep takes no {', '.join(unknown)}; how the input is read may be said by prepend_bos, padding_side, "
            "attention_mask and position_ids"
        )
    inputs = read_input(model, corrupted, **kwargs)
    given = inputs.tokens if inputs.tokens is not None else inputs.embeddings
    assert given is not None
    return Corrupted(given=given, options={"attention_mask": inputs.whole_mask, "position_ids": inputs.position_ids})


def _earliest(model: "LensModel", point: HookPoint) -> HookPoint:
    """Find the point from which a patched run need start: what leaves a block is what enters the next."""
    if point.part == "hook_resid_post" and point.layer is not None and point.layer + 1 < model.cfg.n_layers:
        return model.table[f"blocks.{point.layer + 1}.hook_resid_pre"]
    return point


def _labels(model: "LensModel", axis: Axis, tokens: Tensor | None) -> tuple[str, ...]:
    """Say what a picture calls an axis' entries: positions by their token, where all rows have the same there."""
    to_text: Callable[[Tensor], Any] | None = None if model.tokenizer is None else model.to_str_tokens
    by_row = any(isinstance(choice, Tensor) for choice in axis.choices)
    if axis.word not in (*LOCAL, "key") or by_row or tokens is None or to_text is None:
        return tuple(map(str, axis.numbers))
    words: list[str] = to_text(tokens[0])
    equal: Any = (tokens == tokens[:1]).all(0)
    same: list[bool] = equal.tolist()
    return tuple(words[at] if same[at] else str(at) for at in axis.numbers)


def _identity(
    model: "LensModel", points: Sequence[HookPoint], grid: Grid, given: Tensor, request: Request
) -> dict[str, Any]:
    """Say what makes a sweep this one and no other."""
    return {
        "model": facts(model),
        "hook points": [point.name for point in points],
        "axes": [[axis.name, [_plain(choice) for choice in axis.choices]] for axis in grid.axes],
        "choices": {word: _plain(choice) for word, choice in grid.fixed.items()},
        "metrics": sorted(request.metrics),
        "positions": repr(_plain(request.positions)),
        "exact": request.exact,
        "input": digest(given, *(one for one in request.options.values() if one is not None)),
        "clean values": digest(*grid.clean.values()),
    }


def _plain(choice: Any) -> Any:
    listed: Any = choice
    return listed.tolist() if isinstance(choice, Tensor) else listed
