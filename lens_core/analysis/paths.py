"""Path patching: what some writers do to some readers, and by nothing else.

One run is made anew with one change: the receivers read what they would read if the senders had written, directly into
what these read, what they wrote in another run. Everything between is as it was: no other head, MLP or mixer hears the
senders. What follows the receivers computes on.

What a reader reads is a sum of what all before it wrote, so with everything between frozen the change is the senders'
difference itself, added to the receivers' inputs: no forward is needed to find it, and it is exact, norms included,
since these come after the sum. A sweep over senders is then a batch of rows that differ in what is added. With
`live_mlps` the MLPs between are computed anew, and so carry the change too; that takes one more forward, which ends at
the receivers.

Behind a post-norm (Gemma 2) a writer's contribution is taken at the scale of the run that it comes from.

Source: Wang et al. 2022, "Interpretability in the Wild" (arXiv 2211.00593), appendix B, who keep the MLPs live;
Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path Patching" (arXiv 2304.05969).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from lens_core._arguments import checks_arguments, is_whole
from lens_core.analysis._node_names import find_readers, find_writers
from lens_core.analysis._path_result import PathPatching
from lens_core.analysis._path_runs import Cell, PathRuns, path_runs
from lens_core.analysis._runs import position_mask
from lens_core.analysis.graph import Graph, graph
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache
    from lens_core.model import LensModel

__all__ = [
    "PathPatching",
    "get_act_patch_direct_path",
    "get_act_patch_direct_path_all_sources",
    "path_patch",
    "path_sweep",
]


@checks_arguments
def path_patch(
    model: "LensModel",
    input: Any,
    source: Any,
    senders: Any,
    receivers: Any,
    metric: Callable[[Tensor], Tensor],
    *,
    positions: Any = None,
    live_mlps: bool = False,
    graph: Graph | None = None,
    **options: Any,
) -> PathPatching:
    """Patch the direct paths from some senders to some receivers, all at once, and measure.

    Args:
        model: The model.
        input: What is run and patched, as in `forward`.
        source: The other run that senders' values come from: its input, or its `ActivationCache`. Rows and positions
            are those of the input.
        senders: Writers of the graph, one or several: labels (`"L3H5"`, `"L3.mlp"`, `"embed"`), heads `(3, 5)`, or hook
            points such as `("attn_out", 3)`.
        receivers: Readers of the graph, one or several: labels (`"L4H1.q"`, `"L4.mlp"`, `"logits"`), heads by what
            they read `(4, 1, "q")` or altogether `(4, 1)`, or hook points such as `("q_input", 4)`. Under grouped-query
            attention keys and values are read by `"L4KV0.k"`, which several heads share. Each is set to what it would
            read, and so does not hear those before it; the logits hear them all.
        metric: From the logits `[batch, pos, d_vocab]` to one number for each row `[batch]`.
        positions: Where the senders are patched: an int, several, a slice, or a mask `[batch, pos]` for each row's
            own; None for all.
        live_mlps: Whether MLPs between senders and receivers are computed anew, so that paths through them count.
        graph: The writers and readers, as `graph.graph` gives; None for that of the model. One with
            `per_query_head=True` lets each query head read its keys and values by itself.
        **options: About reading the inputs, as in `forward`: `prepend_bos`, `padding_side`, `attention_mask`,
            `position_ids`.

    Returns:
        One row, one column.

    Raises:
        ArgumentError: No such sender or receiver; no sender comes before any receiver; inputs that do not fit; a
            metric that does not give one number for each row.
        CacheError: A source that does not hold what the senders wrote: `graph.writer_names`.

    Costs two forwards (one where the source is a cache), and one from the first receiver on; with `live_mlps` one more
    up to the last receiver. Senders and their graph's other writers are held once: `writers * batch * pos * d_model`.

    Source: Wang et al. 2022, appendix B.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> text, other = "red dog saw a red", "red dog saw a dog"
        >>> dog = model.to_single_token("dog")
        >>> patched = path_patch(model, text, other, (0, 1), "logits", lambda logits: logits[:, -1, dog])
        >>> patched.effect.shape
        torch.Size([1, 1, 1])
    """
    found = _graph(model, graph)
    writers = find_writers(found, model.table, senders)
    readers = find_readers(found, model.table, receivers)
    if min(writers) >= max(found.reach[index] for index in readers):
        first, last = found.writers[min(writers)].label, found.readers[max(readers)].label
        raise ArgumentError(f"there is no path: {first} writes after {last}, the last of the receivers, has read")
    cell = Cell(senders=writers, receivers=readers)
    runs = path_runs(model, found, input, source, [cell], positions=positions, live_mlps=live_mlps, options=options)
    return PathPatching(
        values=_measured(runs, [cell], metric, batch_size=1)[:, None],
        baseline=runs.prompt.measured(metric, runs.logits)[0],
        senders=("+".join(found.writers[index].label for index in writers),),
        receivers=tuple(found.readers[index].label for index in readers),
    )


@checks_arguments
def path_sweep(
    model: "LensModel",
    input: Any,
    source: Any,
    receivers: Any,
    metric: Callable[[Tensor], Tensor],
    *,
    senders: Any = None,
    positions: Any = None,
    by_position: bool = False,
    live_mlps: bool = False,
    graph: Graph | None = None,
    batch_size: int = 64,
    **options: Any,
) -> PathPatching:
    """Patch the direct paths from every sender by itself to some receivers, and measure each time.

    Arguments are those of `path_patch`, and:

    Args:
        model: The model.
        input: What is run and patched.
        source: The other run: its input, or its `ActivationCache`.
        receivers: One or several; all of them are patched each time.
        metric: From the logits `[batch, pos, d_vocab]` to one number for each row `[batch]`.
        senders: What is swept over; None for all that come before any receiver.
        positions: Positions where senders are patched; None for all.
        by_position: Whether each position is patched by itself. Then `positions` is not a mask.
        live_mlps: Whether MLPs between are computed anew.
        graph: The writers and readers; None for those of the model.
        batch_size: Rows of one forward, the input's rows times as many patches as fit.
        **options: About reading the inputs.

    Returns:
        One row for each sender, in the order of computation; one column for each position, or one.

    Raises:
        ArgumentError: As `path_patch`; or a mask of positions by position.
        CacheError: As `path_patch`.

    Costs two forwards and `senders * batch / batch_size` from the first receiver on; where the logits are the only
    receiver, these are a final norm and an unembedding each. With `live_mlps` as many more up to the last receiver.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> text, other = "red dog saw a red", "red dog saw a dog"
        >>> dog = model.to_single_token("dog")
        >>> sweep = path_sweep(model, text, other, "logits", lambda logits: logits[:, -1, dog])
        >>> len(sweep.senders), sweep.senders[:3]
        (12, ('embed', 'pos_embed', 'L0H0'))
    """
    found = _graph(model, graph)
    readers = find_readers(found, model.table, receivers)
    reach = max(found.reach[index] for index in readers)
    writers = tuple(range(reach)) if senders is None else find_writers(found, model.table, senders)
    if isinstance(positions, Tensor) and positions.ndim > 1 and by_position:
        raise ArgumentError("by_position patches each position by itself; give positions that all rows share, or none")
    cells = [Cell(senders=(index,), receivers=readers) for index in writers]
    runs = path_runs(model, found, input, source, cells, positions=positions, live_mlps=live_mlps, options=options)
    columns = _columns(runs, positions) if by_position else None
    if columns is not None:
        cells = [attrs.evolve(cell, position=position) for cell in cells for position in columns]
    values = _measured(runs, cells, metric, batch_size=batch_size)
    return PathPatching(
        values=values.reshape(len(writers), -1, values.shape[-1]),
        baseline=runs.prompt.measured(metric, runs.logits)[0],
        senders=tuple(found.writers[index].label for index in writers),
        positions=columns,
        receivers=tuple(found.readers[index].label for index in readers),
    )


def _graph(model: "LensModel", given: Graph | None) -> Graph:
    return graph(model) if given is None else given


def _columns(runs: PathRuns, positions: Any) -> tuple[int, ...]:
    mask = position_mask(positions, runs.prompt)
    total = runs.prompt.shape[1]
    return tuple(at for at in range(total) if mask is None or bool(mask[0, at]))


@torch.no_grad()
def _measured(
    runs: PathRuns, cells: Sequence[Cell], metric: Callable[[Tensor], Tensor], *, batch_size: int
) -> Float[Tensor, "cell batch"]:
    """Run the cells, as many at once as `batch_size` rows hold, and measure each."""
    if not is_whole(batch_size):
        raise ArgumentError(f"batch_size is the number of rows in one forward, 1 or more; got {batch_size!r}")
    size = max(1, batch_size // runs.prompt.shape[0])
    found: list[Tensor] = []
    for first in range(0, len(cells), size):
        chunk = cells[first : first + size]
        found.append(runs.prompt.measured(metric, runs.run(chunk), len(chunk)))
    return torch.cat(found)


# ---------------------------------------------------------------------- TransformerLens' names


@checks_arguments
def get_act_patch_direct_path(
    model: "LensModel",
    corrupted_tokens: Any,
    clean_cache: "ActivationCache",
    corrupted_cache: "ActivationCache | None",
    patching_metric: Callable[[Tensor], Tensor],
    src_layer: int,
    src_head: int,
    component: str = "q",
    *,
    batch_size: int = 64,
) -> Float[Tensor, "layer head"]:
    """Patch the direct path from one head to each later head's queries, keys or values: TransformerLens' function.

    It is exact: the receiver's norm is computed anew, where TransformerLens keeps its scale. Heads without a path from
    the sender hold the metric of the untouched run.

    Args:
        model: The model.
        corrupted_tokens: What is run and patched.
        clean_cache: The run that the sender's output comes from.
        corrupted_cache: Not needed, and not looked at: the run is made once in any case. It keeps the place that
            TransformerLens gives it.
        patching_metric: From the logits of one run `[batch, pos, d_vocab]` to one number, or one for each row.
        src_layer: The sender's layer.
        src_head: The sender.
        component: `"q"`, `"k"` or `"v"`; keys and values have `n_key_value_heads` receivers.
        batch_size: Rows of one forward.

    Raises:
        ArgumentError: No such head or component.
        CacheError: The clean cache does not hold what the sender wrote.

    Costs one forward, and one row for each receiver.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> tokens = model.to_tokens("moon apple river king")
        >>> caches = [model.run_with_cache(text)[1] for text in ("king apple river king", tokens)]
        >>> metric = lambda logits: logits[0, -1, 3]
        >>> get_act_patch_direct_path(model, tokens, *caches, metric, 0, 2, "k").shape  # layer n_heads
        torch.Size([2, 4])
    """
    values = _direct_paths(
        model, corrupted_tokens, clean_cache, patching_metric, [(src_layer, src_head)], component, batch_size
    )
    return values[0]


@checks_arguments
def get_act_patch_direct_path_all_sources(
    model: "LensModel",
    corrupted_tokens: Any,
    clean_cache: "ActivationCache",
    corrupted_cache: "ActivationCache | None",
    patching_metric: Callable[[Tensor], Tensor],
    component: str = "q",
    *,
    batch_size: int = 64,
) -> Float[Tensor, "layer head layer head"]:
    """Give `get_act_patch_direct_path` for every sender: `[src_layer, src_head, layer, head]`.

    Raises:
        ArgumentError: No such component, or layers that differ in their heads.
        CacheError: The clean cache does not hold what the senders wrote.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> tokens = model.to_tokens("moon apple river king")
        >>> caches = [model.run_with_cache(text)[1] for text in ("king apple river king", tokens)]
        >>> metric = lambda logits: logits[0, -1, 3]
        >>> get_act_patch_direct_path_all_sources(model, tokens, *caches, metric, component="k").shape
        torch.Size([2, 4, 2, 4])
    """
    heads = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads or 0)]
    values = _direct_paths(model, corrupted_tokens, clean_cache, patching_metric, heads, component, batch_size)
    return values.reshape(model.cfg.n_layers, -1, *values.shape[1:])


def _direct_paths(
    model: "LensModel",
    tokens: Any,
    cache: "ActivationCache",
    metric: Callable[[Tensor], Tensor],
    heads: Sequence[tuple[int, int]],
    component: str,
    batch_size: int,
) -> Float[Tensor, "sender layer head"]:
    if component not in ("q", "k", "v"):
        raise ArgumentError(f"component is 'q', 'k' or 'v'; got {component!r}")
    found = graph(model)
    readers = [index for index, node in enumerate(found.readers) if node.part == component]
    per_layer = [sum(found.readers[index].layer == layer for index in readers) for layer in range(model.cfg.n_layers)]
    if len(set(per_layer)) > 1 or not readers:
        raise ArgumentError(f"layers have {per_layer} heads that read {component}; take path_sweep for such a model")
    senders = find_writers(found, model.table, heads)
    cells = [
        Cell(senders=(sender,), receivers=(reader,))
        for sender in senders
        for reader in readers
        if sender < found.reach[reader]
    ]

    def each(logits: Tensor) -> Tensor:
        value = metric(logits)
        return value.expand(logits.shape[0]) if value.ndim == 0 else value

    runs = path_runs(model, found, tokens, cache, cells, positions=None, live_mlps=False, options={})
    baseline = runs.prompt.measured(each, runs.logits)[0].mean()
    values = baseline.repeat(len(senders), len(found.readers))
    if cells:
        measured = _measured(runs, cells, each, batch_size=batch_size).mean(1)
        for cell, value in zip(cells, measured, strict=True):
            values[senders.index(cell.senders[0]), cell.receivers[0]] = value
    return values[:, readers].reshape(len(senders), model.cfg.n_layers, -1)
