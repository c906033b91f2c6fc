"""Running circuits: one, every edge cut by itself, every component cut by itself."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments, is_whole
from lens_core._extras import need
from lens_core.analysis._circuit import Circuit
from lens_core.analysis._edge_runs import Ablation, EdgeRuns, edge_runs
from lens_core.analysis.graph import Edge, Graph, graph
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = [
    "ComponentEffects",
    "EdgeEffects",
    "component_effects",
    "copies_in",
    "edge_effects",
    "measured_masks",
    "read_mask",
    "run_circuit",
]


@checks_arguments
def run_circuit(
    model: "LensModel",
    input: Any,
    corrupted: Any,
    circuit: Circuit | Tensor | Iterable[str],
    *,
    graph: Graph | None = None,
    ablation: Ablation = "resample",
    **options: Any,
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run a circuit: every edge that is not in it is cut, all in one forward.

    A reader at the end of cut edges reads, in place of what those writers write in this run, what they wrote in the run
    of the corrupted input. The circuit of all edges is the plain run, bit for bit; that of none, resampled, is the
    corrupted run.

    Args:
        model: The model.
        input: What is run, as in `forward`.
        corrupted: The input that ablated contributions are taken from, of the same shape for `"resample"`; None for
            `"zero"`.
        circuit: A circuit; labels of edges to keep; or a mask `[writer, reader]`: bools, or numbers between 0 (cut) and
            1 (kept), which mix the two contributions. Gradients reach such a mask, so it can be learned.
        graph: The graph that a mask or labels are of; None for `graph(model)`.
        ablation: `"resample"`: what the writer wrote at the same row and position of the corrupted run. `"mean"`: the
            mean of that over rows and real positions; `"mean_by_position"`: over rows, at each position. `"zero"`:
            nothing (biases stay).
        **options: About reading the inputs, as in `forward`, for both: `prepend_bos`, `padding_side`,
            `attention_mask`, `position_ids`.

    Returns:
        The logits; on autograd's graph where the mask is, or as `forward` gives them.

    Raises:
        ArgumentError: A mask of another graph, no such edge, an unknown ablation, or inputs that do not fit.

    Costs a forward of the corrupted input and one of the input, and `writers * batch * pos * d_model` numbers twice:
    what each writer wrote in either run.

    Source: Conmy et al. 2023 (arXiv 2304.14997) for the semantics; Bhaskar et al. 2024, "Finding Transformer Circuits
    with Edge Pruning" (arXiv 2406.16778) for masks between 0 and 1.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> edges = ["embed -> L1H2.v", "L1H2 -> logits"]
        >>> logits = run_circuit(model, "red dog saw a red", "red dog saw a dog", edges)
        >>> logits.shape == model("red dog saw a red").shape
        True
    """
    found, mask = read_mask(model, circuit, graph)
    runs = edge_runs(model, found, input, corrupted, ablation=ablation, options=options, reuse=False)
    return runs.run(mask[None])


@checks_arguments
def read_mask(
    model: "LensModel", circuit: Any, given: Graph | None
) -> tuple[Graph, Bool[Tensor, "writer reader"] | Float[Tensor, "writer reader"]]:
    """Bring what stands for a circuit to its graph and a mask.

    Raises:
        ArgumentError: Not such a thing.
    """
    if isinstance(circuit, Circuit):
        return circuit.graph, circuit.kept
    found = graph(model) if given is None else given
    if not isinstance(circuit, Tensor):
        if isinstance(circuit, str) or not isinstance(circuit, Iterable):
            raise ArgumentError(f"a circuit is a Circuit, a mask [writer, reader] or labels of edges; got {circuit!r}")
        return found, Circuit.of(found, cast("Iterable[str]", circuit)).kept
    if circuit.shape != found.mask.shape:
        raise ArgumentError(
            f"the mask is of shape {list(circuit.shape)}, and this graph has {len(found.writers)} writers and "
            f"{len(found.readers)} readers; give the graph that the mask is of as graph="
        )
    if circuit.dtype != torch.bool and not circuit.is_floating_point():
        raise ArgumentError(f"a mask holds bools, or floating numbers from 0 to 1; got {circuit.dtype}")
    return found, circuit


def copies_in(runs: EdgeRuns, batch_size: Any) -> int:
    """Say how many copies of the rows one forward has.

    Raises:
        ArgumentError: `batch_size` is no number of rows.
    """
    if not is_whole(batch_size):
        raise ArgumentError(f"batch_size is the number of rows in one forward, 1 or more; got {batch_size!r}")
    return max(1, batch_size // runs.prompt.shape[0])


@torch.no_grad()
def measured_masks(
    runs: EdgeRuns, masks: Iterator[Bool[Tensor, "writer reader"]], metric: Callable[[Tensor], Tensor], batch_size: int
) -> Float[Tensor, "mask batch"]:
    """Run a circuit for each mask, several in one forward, and measure each."""
    size = copies_in(runs, batch_size)
    found: list[Tensor] = []
    chunk: list[Tensor] = []

    def run() -> None:
        found.append(runs.prompt.measured(metric, runs.run(torch.stack(chunk)), len(chunk)))
        chunk.clear()

    for mask in masks:
        chunk.append(mask)
        if len(chunk) == size:
            run()
    if chunk:
        run()
    return torch.cat(found) if found else torch.zeros(0, runs.prompt.shape[0])


# ---------------------------------------------------------------------- one edge, one component at a time


@attrs.frozen(kw_only=True, eq=False)
class EdgeEffects:
    """What each edge does for a metric, by cutting it.

    Attributes:
        graph: The writers and readers.
        values: The metric of the model with that one edge cut; NaN where there is no edge.
        baseline: The metric of the model.
    """

    graph: Graph
    values: Float[Tensor, "batch writer reader"] = attrs.field(repr=False)
    baseline: Float[Tensor, " batch"] = attrs.field(repr=False)

    @property
    def effect(self) -> Float[Tensor, "batch writer reader"]:
        """How much higher the metric is with the edge than without, in its unit; as `EdgeAttribution.values`."""
        return self.baseline[:, None, None] - self.values

    @property
    def scores(self) -> Float[Tensor, "writer reader"]:
        """The mean effect over the rows."""
        return self.effect.mean(0)

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """List the `k` edges of largest mean effect by size."""
        scores = self.scores
        order: Any = scores.abs().nan_to_num(-1.0).flatten().argsort(descending=True)
        pairs = [divmod(int(index), scores.shape[1]) for index in order[: min(k, len(self.graph))]]
        return [
            (Edge(self.graph.writers[writer], self.graph.readers[reader]).label, float(scores[writer, reader]))
            for writer, reader in pairs
            if not scores[writer, reader].isnan()
        ]

    def to_dataframe(self) -> Any:
        """Give a pandas frame: one line for each edge and row of the batch.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas = need("pandas", "a data frame")
        effect = self.effect
        lines = [
            (edge.source.label, edge.target.label, row, float(effect[row, writer, reader]))
            for reader, reach in enumerate(self.graph.reach)
            for writer in range(reach)
            for edge in [Edge(self.graph.writers[writer], self.graph.readers[reader])]
            for row in range(len(self.baseline))
        ]
        return pandas.DataFrame(lines, columns=["source", "target", "row", "effect"])


@checks_arguments
def edge_effects(
    model: "LensModel",
    input: Any,
    corrupted: Any,
    metric: Callable[[Tensor], Tensor],
    *,
    graph: Graph | None = None,
    ablation: Ablation = "resample",
    batch_size: int = 64,
    **options: Any,
) -> EdgeEffects:
    """Cut every edge by itself and measure: what edge attribution approximates.

    Args:
        model: The model.
        input: What is run.
        corrupted: The input that ablated contributions are taken from; None for `"zero"`.
        metric: From the logits `[batch, pos, d_vocab]` to one number for each row `[batch]`.
        graph: The writers and readers; None for those of the model.
        ablation: As in `run_circuit`.
        batch_size: Rows of one forward, the input's rows times as many edges as fit.
        **options: About reading the inputs, as in `run_circuit`.

    Raises:
        ArgumentError: As `run_circuit`, or a metric that does not give one number for each row.

    Costs two forwards, and `edges * batch / batch_size`, each from the reader's block on.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> dog = model.to_single_token("dog")
        >>> effects = edge_effects(model, "red dog saw a red", "red dog saw a dog", lambda logits: logits[:, -1, dog])
        >>> len(effects.top(3))
        3
    """
    found = _graph(model, graph)
    runs = edge_runs(model, found, input, corrupted, ablation=ablation, options=options)
    edges = [(writer, reader) for reader, reach in enumerate(found.reach) for writer in range(reach)]
    measured = measured_masks(runs, _each_without(found, edges), metric, batch_size)
    values = measured.new_full((measured.shape[1], *found.mask.shape), torch.nan)
    for (writer, reader), value in zip(edges, measured, strict=True):
        values[:, writer, reader] = value
    return EdgeEffects(graph=found, values=values, baseline=runs.plain(metric))


def _graph(model: "LensModel", given: Graph | None) -> Graph:
    return graph(model) if given is None else given


def _each_without(found: Graph, edges: Sequence[tuple[int, int]]) -> Iterator[Bool[Tensor, "writer reader"]]:
    for writer, reader in edges:
        mask = found.mask
        mask[writer, reader] = False
        yield mask


@attrs.frozen(kw_only=True, eq=False)
class ComponentEffects:
    """What cutting each component out of a circuit did to a metric.

    Attributes:
        components: A label for each row of `values`.
        values: The metric of the circuit without the component.
        baseline: The metric of the circuit.
        full: The metric of the model.
    """

    components: tuple[str, ...]
    values: Float[Tensor, "component batch"] = attrs.field(repr=False)
    baseline: Float[Tensor, " batch"] = attrs.field(repr=False)
    full: Float[Tensor, " batch"] = attrs.field(repr=False)

    @property
    def effect(self) -> Float[Tensor, "component batch"]:
        """How much each component's loss moved the metric, in its unit."""
        return self.values - self.baseline

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """List the `k` components whose loss moves the metric most, with the mean effect."""
        mean = self.effect.mean(1)
        order: Any = mean.abs().argsort(descending=True)
        return [(self.components[int(index)], float(mean[index])) for index in order[:k]]

    def _repr_html_(self) -> str:
        mean: Any = self.effect.mean(1)
        picture = view.bars(self.components, mean.tolist(), title="The circuit without each component")
        return picture._repr_html_()  # pyright: ignore[reportPrivateUsage]


@checks_arguments
def component_effects(
    model: "LensModel",
    input: Any,
    corrupted: Any,
    circuit: Circuit,
    metric: Callable[[Tensor], Tensor],
    *,
    ablation: Ablation = "resample",
    batch_size: int = 64,
    **options: Any,
) -> ComponentEffects:
    """Cut each component out of a circuit and measure: whether the circuit is minimal.

    A component whose loss does not move the metric has no part in what the circuit does; all others are needed. Of the
    criterion of Wang et al. this is the case without further knock-outs (K empty): components that stand in for each
    other may each look needless.

    Args:
        model: The model.
        input: What is run.
        corrupted: The input that ablated contributions are taken from; None for `"zero"`.
        circuit: The circuit.
        metric: From the logits `[batch, pos, d_vocab]` to one number for each row `[batch]`.
        ablation: As in `run_circuit`.
        batch_size: Rows of one forward.
        **options: About reading the inputs, as in `run_circuit`.

    Raises:
        ArgumentError: As `run_circuit`, or a metric that does not give one number for each row.

    Costs two forwards, and `components * batch / batch_size`.

    Source: Wang et al. 2022 (arXiv 2211.00593), section 4.

    Example:
        >>> import lens_core as lens
        >>> from lens_core.analysis.graph import graph
        >>> model = lens.load("toy:gpt2")
        >>> circuit = Circuit.of(graph(model), ["embed -> L1H2.v", "L1H2 -> logits"])
        >>> text, other = "red dog saw a red", "red dog saw a dog"
        >>> component_effects(model, text, other, circuit, lambda logits: logits[:, -1, 0]).components
        ('embed', 'L1H2')
    """
    runs = edge_runs(model, circuit.graph, input, corrupted, ablation=ablation, options=options)
    names = tuple(name for name in circuit.components if name != "logits")
    masks = (one.kept for one in (circuit, *(circuit.without(name) for name in names)))
    values = measured_masks(runs, masks, metric, batch_size)
    return ComponentEffects(components=names, values=values[1:], baseline=values[0], full=runs.plain(metric))
