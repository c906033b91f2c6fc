"""Activation patching: put a piece of one run into another, for every layer, position or head, and measure each time.

Two prompts differ in what the model is to do. An activation of the clean run, put into the corrupted one, restores as
much of the clean behaviour as that activation carries, given the rest of the corrupted run. `patch_sweep` does it for
every combination of the axes asked for. The functions `get_act_patch_...`, `generic_activation_patch` and the setters
are TransformerLens', by its names and argument orders.

Cells are not run one by one. What a patch cannot change is taken from the corrupted run: the blocks below it, the
positions before it, and the logits that the metric does not look at; see `patch_sweep`.

Source: Vig et al. 2020 (arXiv 2004.12265); Meng et al. 2022 (arXiv 2202.05262), "causal tracing"; Wang et al. 2022
(arXiv 2211.00593). To read results: Heimersheim and Nanda 2024 (2404.15255), Zhang and Nanda 2023 (2309.16042).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core.analysis._patch_setters import (
    SETTER_AXES,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
    make_df_from_ranges,
)
from lens_core.analysis._patch_sweep import metrics_of, patch_sweep, read_corrupted, results_of
from lens_core.analysis._sweep import Request, run_sweep
from lens_core.analysis._sweep_grid import SetterGrid, read_points
from lens_core.analysis._sweep_result import PatchingResult
from lens_core.analysis._sweep_run import clean_values
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = [
    "PatchingResult",
    "generic_activation_patch",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_pre",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "make_df_from_ranges",
    "patch_sweep",
]

Reduce = Literal["mean", "none"]
_THEIRS = ("layer", "pos", "head", "head_index", "dest_pos", "src_pos")
_OURS = ("layer", "position", "head", "head", "destination", "source")
AXIS_NAMES: Mapping[str, str] = dict(zip(_THEIRS, _OURS, strict=True))
"""TransformerLens' names of index columns, and the axes of a sweep."""


@checks_arguments
def generic_activation_patch(
    model: "LensModel",
    corrupted_tokens: Any,
    clean_cache: Mapping[str, Tensor],
    patching_metric: Callable[[Tensor], Tensor],
    patch_setter: Callable[[Tensor, Sequence[int], Tensor], Any],
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
    *,
    reduce: Reduce = "mean",
    **options: Any,
) -> Any:
    """Patch by a setter, for every index, and measure each time; TransformerLens' most general function.

    The setters of this module over `index_axis_names` go by `patch_sweep`, with its speed. One of your own is called
    in runs that start at its layer, several cells at once; what it changes is its own affair, so whole rows are run.

    Args:
        model: The model.
        corrupted_tokens: What is run and patched, `[batch, pos]` or text.
        clean_cache: Activations of the clean run.
        patching_metric: From logits to a number, or to one for each row.
        patch_setter: `setter(corrupted_activation, index, clean_activation)` writes into its first argument
            `[batch, ...]`, or returns another tensor. `index` is a list of ints, the layer first.
        activation_name: A short form, such as `"resid_pre"` or `"z"`.
        index_axis_names: What the indices count: `"layer"` first, then `"pos"`, `"head_index"` (or `"head"`),
            `"dest_pos"`, `"src_pos"`; every combination is patched.
        index_df: Instead, a DataFrame with a line for each index; the result has one axis then.
        return_index_df: Give `(result, index_df)`.
        reduce: `"mean"` gives a tensor, the mean over rows if the metric gives one number for each; `"none"` the whole
            `PatchingResult`.
        **options: As for `patch_sweep`: `positions`, `exact`, `batch_size`, `progress`, ...

    Raises:
        ArgumentError: Neither or both of `index_axis_names` and `index_df`, or an unknown axis.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> _, clean = model.run_with_cache("king apple river moon book king apple river")
        >>> corrupted = model.to_tokens("king apple door moon book king apple river")
        >>> moon = model.to_single_token("moon")
        >>> def swap(corrupted_activation, index, clean_activation):
        ...     layer, pos = index
        ...     corrupted_activation[:, pos] = clean_activation[:, pos]
        ...     return corrupted_activation
        >>> table = generic_activation_patch(
        ...     model, corrupted, clean, lambda logits: logits[0, -1, moon], swap, "resid_pre", ["layer", "pos"]
        ... )
        >>> table.shape == (model.cfg.n_layers, corrupted.shape[1])
        True
    """
    if (index_axis_names is None) == (index_df is None):
        raise ArgumentError("give index_axis_names, for every combination, or index_df, for the lines of it")
    if index_axis_names is not None:
        unknown = [name for name in index_axis_names if name not in AXIS_NAMES]
        if unknown or list(index_axis_names[:1]) != ["layer"]:
            raise ArgumentError(
                f"index_axis_names are 'layer' and then some of {', '.join(list(AXIS_NAMES)[1:])}; got "
                f"{list(index_axis_names)!r}"
            )
    axes = SETTER_AXES.get(patch_setter)
    if index_axis_names is not None and axes is not None and len(axes) == len(index_axis_names):
        found = patch_sweep(
            model, corrupted_tokens, clean_cache, patching_metric, activation_name, axes=axes, **options
        )
    else:
        call = (model, corrupted_tokens, clean_cache, patching_metric, patch_setter, activation_name)
        found = _by_setter(*call, index_axis_names, index_df, **options)
    if return_index_df and index_axis_names is not None:
        index_df = make_df_from_ranges(found.values.shape[:-1], index_axis_names)
    result = _reduced(found, reduce)
    return (result, index_df) if return_index_df else result


def _by_setter(
    model: "LensModel",
    corrupted: Any,
    clean_cache: Mapping[str, Tensor],
    metric: Callable[[Tensor], Tensor],
    setter: Callable[[Tensor, Sequence[int], Tensor], Any],
    name: str,
    axis_names: Sequence[str] | None,
    index_df: Any,
    *,
    positions: Any = None,
    exact: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> PatchingResult:
    """Run a sweep whose cells are lines of indices, written by a function of the user's."""
    inputs = read_corrupted(model, corrupted, kwargs)
    points = read_points(model.table, name, None)
    if points[0].layer is None:
        raise ArgumentError(f"{name!r} is outside of the blocks, and an index begins with the layer; use patch_sweep")
    clean = clean_values(model, clean_cache, points, batch=inputs.shape[0])
    if axis_names is None:
        rows = [[int(number) for number in row] for row in index_df.to_numpy().tolist()]
        shape, names, indices = [len(rows)], ["index"], [tuple(range(len(rows)))]
    else:
        words, there = points[0].shape.split(), next(iter(clean.values())).shape
        sizes = dict(zip(words, there, strict=True))
        heads = next((sizes[word] for word in ("n_heads", "n_kv_heads", "ssm_heads") if word in sizes), 0)
        ranges = {"layer": [point.layer or 0 for point in points], "head": range(heads)}
        indices = [tuple(ranges.get(AXIS_NAMES[axis], range(inputs.shape[1]))) for axis in axis_names]
        names, shape = [AXIS_NAMES[axis] for axis in axis_names], [len(index) for index in indices]
        rows = [list(row) for row in itertools.product(*indices)]
    by_layer = {point.layer or 0: point for point in points}
    missing = sorted({row[0] for row in rows} - by_layer.keys())
    if missing:
        raise ArgumentError(f"indices name layers {missing}, and {name!r} is in layers {sorted(by_layer)}")
    grid = SetterGrid(rows=rows, points=by_layer, clean=clean, setter=setter)
    request = Request(
        metrics=metrics_of(metric),
        positions=positions,
        exact=exact,
        batch_size=batch_size,
        progress=progress,
        options=inputs.options,
    )
    outcome = run_sweep(model, inputs.given, grid, request)
    labels = tuple(tuple(map(str, index)) for index in indices)
    described = {"axes": tuple(names), "indices": tuple(indices), "labels": labels, "name": points[0].part}
    return results_of(outcome, shape=shape, **described)["metric"]


@checks_arguments
def _reduced(found: PatchingResult, reduce: Reduce) -> Tensor | PatchingResult:
    if reduce not in ("mean", "none"):
        raise ArgumentError(f"reduce is 'mean' or 'none'; got {reduce!r}")
    return found if reduce == "none" else found.mean


# ---------------------------------------------------------------------- TransformerLens' sweeps


def _sweep_of(
    function: str, name: str, setter: Callable[..., Any], index_axis_names: Sequence[str], what: str
) -> Callable[..., Any]:
    """Make one of TransformerLens' functions: a setter at an activation over index axes."""

    def sweep(
        model: "LensModel",
        corrupted_tokens: Any,
        clean_cache: Mapping[str, Tensor],
        patching_metric: Callable[[Tensor], Tensor],
        index_df: Any = None,
        return_index_df: bool = False,
        **options: Any,
    ) -> Any:
        names = None if index_df is not None else index_axis_names
        call = (model, corrupted_tokens, clean_cache, patching_metric, setter, name)
        return generic_activation_patch(*call, names, index_df, return_index_df, **options)

    sweep.__doc__ = _document(function, f"Patch {what}", index_axis_names, _INDEX_ARGS)
    sweep.__name__ = sweep.__qualname__ = function
    return checks_arguments(sweep)


_INDEX_ARGS = """index_df: A DataFrame of indices, in place of every combination; then `[index]`.
    return_index_df: Give `(result, index_df)`.
    **options: As for `generic_activation_patch`: `reduce`, `positions`, `exact`, `batch_size`, ..."""
_EXAMPLE_SIZES = {"3": 3, "5": 5, "layer": 2, "pos": 5, "head": 4, "dest_pos": 5, "src_pos": 5}


def _document(function: str, what: str, axes: Sequence[str], more: str) -> str:
    """Write the docstring that TransformerLens' functions share."""
    sizes = [_EXAMPLE_SIZES[axis] for axis in axes]
    return f"""{what}; gives `[{", ".join(axes)}]`.

Args:
    model: The model.
    corrupted_tokens: What is run and patched, `[batch, pos]` or text.
    clean_cache: Activations of the clean run.
    patching_metric: From logits to a number, or to one for each row (then the mean over rows is given).
    {more}

Example:
    >>> import lens_core as lens
    >>> model = lens.load("toy:gpt2")
    >>> _, clean = model.run_with_cache("king apple river king")
    >>> corrupted = model.to_tokens("moon apple river king")
    >>> {function}(model, corrupted, clean, lambda logits: logits[0, -1, 3]).shape
    torch.Size({sizes})
"""


def _block_sweep(function: str, name: str, what: str) -> Callable[..., Any]:
    return _sweep_of(function, name, layer_pos_patch_setter, ["layer", "pos"], f"{what} at one position")


def _by_pos(part: str, name: str, what: str) -> Callable[..., Any]:
    function = f"get_act_patch_attn_head_{part}_by_pos"
    axes = ["layer", "pos", "head"]
    return _sweep_of(function, name, layer_pos_head_vector_patch_setter, axes, f"one head's {what} at one position")


def _all_pos(part: str, name: str, what: str) -> Callable[..., Any]:
    function, axes = f"get_act_patch_attn_head_{part}_all_pos", ["layer", "head"]
    setter = layer_head_pattern_patch_setter if name == "pattern" else layer_head_vector_patch_setter
    return _sweep_of(function, name, setter, axes, f"one head's {what} at all positions")


get_act_patch_resid_pre = _block_sweep("get_act_patch_resid_pre", "resid_pre", "the stream that enters a block")
get_act_patch_resid_mid = _block_sweep("get_act_patch_resid_mid", "resid_mid", "the stream between attention and MLP")
get_act_patch_attn_out = _block_sweep("get_act_patch_attn_out", "attn_out", "what attention adds to the stream")
get_act_patch_mlp_out = _block_sweep("get_act_patch_mlp_out", "mlp_out", "what the MLP adds to the stream")

get_act_patch_attn_head_out_by_pos = _by_pos("out", "z", "output z")
get_act_patch_attn_head_q_by_pos = _by_pos("q", "q", "query")
get_act_patch_attn_head_k_by_pos = _by_pos("k", "k", "key (of `n_key_value_heads`)")
get_act_patch_attn_head_v_by_pos = _by_pos("v", "v", "value (of `n_key_value_heads`)")

get_act_patch_attn_head_out_all_pos = _all_pos("out", "z", "outputs z")
get_act_patch_attn_head_q_all_pos = _all_pos("q", "q", "queries")
get_act_patch_attn_head_k_all_pos = _all_pos("k", "k", "keys (of `n_key_value_heads`)")
get_act_patch_attn_head_v_all_pos = _all_pos("v", "v", "values (of `n_key_value_heads`)")
get_act_patch_attn_head_pattern_all_pos = _all_pos("pattern", "pattern", "attention")

get_act_patch_attn_head_pattern_by_pos = _sweep_of(
    "get_act_patch_attn_head_pattern_by_pos",
    "pattern",
    layer_head_pos_pattern_patch_setter,
    ["layer", "head", "dest_pos"],
    "one head's attention from one position",
)
get_act_patch_attn_head_pattern_dest_src_pos = _sweep_of(
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "pattern",
    layer_head_dest_src_pos_pattern_patch_setter,
    ["layer", "head", "dest_pos", "src_pos"],
    "one weight of one head's attention",
)


# ---------------------------------------------------------------------- TransformerLens' bundles


_BUNDLE_ARGS = """**options: As for `generic_activation_patch`; with `reduce="none"` a dictionary of results by part."""
_NO_HEAD = (
    ". Where there are fewer key-value heads than heads, their entries come first and the rest are NaN, no such head "
    "to patch, where TransformerLens has zeros, which a metric may have as well"
)


def _bundle(
    function: str, parts: Mapping[str, Callable[..., Any]], what: str, axes: Sequence[str]
) -> Callable[..., Any]:
    """Make one of TransformerLens' functions that do several sweeps and stack them."""

    def sweeps(
        model: "LensModel",
        corrupted_tokens: Any,
        clean_cache: Mapping[str, Tensor],
        metric: Callable[[Tensor], Tensor],
        **options: Any,
    ) -> Any:
        found = {part: sweep(model, corrupted_tokens, clean_cache, metric, **options) for part, sweep in parts.items()}
        return _stacked(found, axes)

    sweeps.__doc__ = _document(function, f"Patch {what}", [str(len(parts)), *axes], _BUNDLE_ARGS).replace(
        "patching_metric:", "metric:"
    )
    sweeps.__name__ = sweeps.__qualname__ = function
    return sweeps


get_act_patch_attn_head_all_pos_every = _bundle(
    "get_act_patch_attn_head_all_pos_every",
    {
        "out": get_act_patch_attn_head_out_all_pos,
        "q": get_act_patch_attn_head_q_all_pos,
        "k": get_act_patch_attn_head_k_all_pos,
        "v": get_act_patch_attn_head_v_all_pos,
        "pattern": get_act_patch_attn_head_pattern_all_pos,
    },
    "each head's output, query, key, value and attention at all positions" + _NO_HEAD,
    ["layer", "head"],
)
get_act_patch_attn_head_by_pos_every = _bundle(
    "get_act_patch_attn_head_by_pos_every",
    {
        "out": get_act_patch_attn_head_out_by_pos,
        "q": get_act_patch_attn_head_q_by_pos,
        "k": get_act_patch_attn_head_k_by_pos,
        "v": get_act_patch_attn_head_v_by_pos,
        "pattern": get_act_patch_attn_head_pattern_by_pos,
    },
    "each head's output, query, key, value and attention by position, of the attention the one that attends" + _NO_HEAD,
    ["layer", "pos", "head"],
)
get_act_patch_block_every = _bundle(
    "get_act_patch_block_every",
    {"resid_pre": get_act_patch_resid_pre, "attn_out": get_act_patch_attn_out, "mlp_out": get_act_patch_mlp_out},
    "the residual stream, attention's output and the MLP's by position",
    ["layer", "pos"],
)


def _stacked(parts: Mapping[str, Any], axes: Sequence[str]) -> Any:
    """Stack tensors, those with fewer heads filled up by NaN; leave results as they are.

    TransformerLens' sweep of the pattern by position has its axes in the order layer, head, position.
    """
    if not all(isinstance(part, Tensor) for part in parts.values()):
        return dict(parts)
    found = dict(parts)
    if list(axes) == ["layer", "pos", "head"]:
        found["pattern"] = found["pattern"].transpose(1, 2)
    heads = max(part.shape[-1] for part in found.values())
    return torch.stack(
        [torch.nn.functional.pad(part, (0, heads - part.shape[-1]), value=torch.nan) for part in found.values()]
    )
