"""How much of what a model does its circuits do, by size: faithfulness and completeness."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, cast

import attrs
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments
from lens_core._extras import need
from lens_core.analysis._circuit import Circuit, edge_order
from lens_core.analysis._circuit_runs import measured_masks
from lens_core.analysis._edge_runs import Ablation, edge_runs
from lens_core.analysis.graph import Graph, graph
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["CircuitCurve", "completeness", "faithfulness"]


@attrs.frozen(kw_only=True, eq=False)
class CircuitCurve:
    """A metric of circuits of several sizes, or of what is left of the model without them.

    Attributes:
        sizes: Edges of each circuit, from few to many.
        total: Edges of the graph.
        values: The metric of each circuit; for completeness, of the model with the circuit's edges cut.
        full: The metric of the model.
        ablated: The metric with every edge cut.
        kind: `"faithfulness"` or `"completeness"`.
        circuits: The circuits.
    """

    sizes: tuple[int, ...]
    total: int
    values: Float[Tensor, "size batch"] = attrs.field(repr=False)
    full: Float[Tensor, " batch"] = attrs.field(repr=False)
    ablated: Float[Tensor, " batch"] = attrs.field(repr=False)
    kind: Literal["faithfulness", "completeness"]
    circuits: tuple[Circuit, ...] = attrs.field(repr=False)

    @property
    def normalized(self) -> Float[Tensor, " size"]:
        """Of what the model does beyond full ablation, the share that is done: 1 as the model, 0 as full ablation.

        A ratio of means over the rows; it may lie outside of 0 and 1.
        """
        return (self.values.mean(1) - self.ablated.mean()) / (self.full.mean() - self.ablated.mean())

    @property
    def per_example(self) -> Float[Tensor, "size batch"]:
        """The same for each row; not finite where ablation does not move that row's metric."""
        return (self.values - self.ablated) / (self.full - self.ablated)

    def _line(self) -> list[tuple[float, float]]:
        """Give share of edges and share done, with both ends, which are known: no edges, and all."""
        shares: Any = self.normalized
        none, every = (0.0, 1.0) if self.kind == "faithfulness" else (1.0, 0.0)
        points = {0: none, self.total: every} | dict(zip(self.sizes, shares.tolist(), strict=True))
        return [(size / self.total, points[size]) for size in sorted(points)]

    @property
    def area(self) -> float:
        """The area under the curve over the share of edges, 0 to 1, by trapezoids.

        For faithfulness the more the better (CPR of Mueller et al. 2025); for completeness the less.
        """
        line = self._line()
        return sum((b - a) * (f + g) / 2 for (a, f), (b, g) in pairwise(line))

    @property
    def distance(self) -> float:
        """The area between the curve and the model's own line, 1 for faithfulness, 0 for completeness.

        The less the better (CMR of Mueller et al. 2025).
        """
        level = 1.0 if self.kind == "faithfulness" else 0.0
        line = [(at, abs(value - level)) for at, value in self._line()]
        return sum((b - a) * (f + g) / 2 for (a, f), (b, g) in pairwise(line))

    def smallest(self, share: float) -> Circuit | None:
        """Give the smallest circuit from which on all of the curve's circuits do at least this share, or None."""
        shares: Any = self.normalized
        chosen: Circuit | None = None
        for circuit, value in zip(reversed(self.circuits), reversed(shares.tolist()), strict=True):
            if not value >= share:
                break
            chosen = circuit
        return chosen

    def to_dataframe(self) -> Any:
        """Give a pandas frame: one line for each size and row of the batch.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas = need("pandas", "a data frame")
        each = self.per_example
        lines = [
            (size, size / self.total, row, float(self.values[index, row]), float(each[index, row]))
            for index, size in enumerate(self.sizes)
            for row in range(len(self.full))
        ]
        return pandas.DataFrame(lines, columns=["edges", "share", "row", "value", self.kind])

    def _repr_html_(self) -> str:
        shares: Any = self.normalized
        labels = [f"{size} edges" for size in self.sizes]
        title = f"{self.kind.capitalize()} by size; area {self.area:.3f}"
        return view.bars(labels, shares.tolist(), title=title)._repr_html_()  # pyright: ignore[reportPrivateUsage]


@checks_arguments
def faithfulness(
    model: "LensModel",
    input: Any,
    corrupted: Any,
    metric: Callable[[Tensor], Tensor],
    circuits: Tensor | Sequence[Circuit] | Circuit,
    *,
    sizes: Sequence[int] | None = None,
    method: Literal["greedy", "top"] = "greedy",
    graph: Graph | None = None,
    ablation: Ablation = "resample",
    batch_size: int = 64,
    **options: Any,
) -> CircuitCurve:
    """Measure how much of what the model does each circuit does by itself.

    `(m(circuit) - m(ablated)) / (m(model) - m(ablated))`, where everything outside of the circuit is ablated.

    Args:
        model: The model.
        input: What is run.
        corrupted: The input that ablated contributions are taken from; None for `"zero"`.
        metric: From the logits `[batch, pos, d_vocab]` to one number for each row `[batch]`.
        circuits: Circuits of one graph, or a score for each edge `[writer, reader]`, from which circuits of several
            sizes are chosen.
        sizes: How many edges these have; None for 20 sizes from 1 to all, evenly on a logarithmic scale.
        method: How they are chosen: see `circuit_of_scores`.
        graph: The graph that scores are of; None for that of the model.
        ablation: As in `run_circuit`.
        batch_size: Rows of one forward.
        **options: About reading the inputs, as in `run_circuit`.

    Raises:
        ArgumentError: Scores or circuits of another graph, sizes that it has not, a metric that does not give one
            number for each row; and as `run_circuit`.

    Costs two forwards, and `circuits * batch / batch_size`.

    Source: Marks et al. 2024, "Sparse Feature Circuits" (arXiv 2403.19647), section 3; Hanna et al. 2024 (arXiv
    2403.17806); areas as Mueller et al. 2025, "MIB" (arXiv 2504.13151).

    Example:
        >>> import lens_core as lens
        >>> from lens_core.analysis.circuits import edge_effects
        >>> model = lens.load("toy:gpt2")
        >>> text, other = "red dog saw a red", "red dog saw a dog"
        >>> def dog(logits):
        ...     return logits[:, -1, model.to_single_token("dog")]
        >>> scores = edge_effects(model, text, other, dog).scores
        >>> curve = faithfulness(model, text, other, dog, scores, sizes=[0, 10, 137])
        >>> [round(share, 3) for share in curve.normalized[[0, -1]].tolist()]
        [0.0, 1.0]
    """
    return _curve(
        "faithfulness",
        model,
        (input, corrupted),
        metric,
        _chosen(model, circuits, sizes, method, graph),
        ablation=ablation,
        batch_size=batch_size,
        options=options,
    )


@checks_arguments
def completeness(
    model: "LensModel",
    input: Any,
    corrupted: Any,
    metric: Callable[[Tensor], Tensor],
    circuits: Tensor | Sequence[Circuit] | Circuit,
    *,
    sizes: Sequence[int] | None = None,
    method: Literal["greedy", "top"] = "greedy",
    graph: Graph | None = None,
    ablation: Ablation = "resample",
    batch_size: int = 64,
    **options: Any,
) -> CircuitCurve:
    """Measure how much of what the model does is left without each circuit: 0 where the circuit is all that does it.

    `(m(model without the circuit) - m(ablated)) / (m(model) - m(ablated))`, where the circuit's edges are ablated and
    all others kept. Arguments, cost and errors are those of `faithfulness`.

    Args:
        model: The model.
        input: What is run.
        corrupted: The input that ablated contributions are taken from.
        metric: From the logits to one number for each row.
        circuits: Circuits, or a score for each edge.
        sizes: How many edges circuits chosen by scores have.
        method: How they are chosen.
        graph: The graph that scores are of.
        ablation: As in `run_circuit`.
        batch_size: Rows of one forward.
        **options: About reading the inputs.

    Raises:
        ArgumentError: As `faithfulness`.

    Source: Marks et al. 2024 (arXiv 2403.19647), section 3; Wang et al. 2022 (arXiv 2211.00593), section 4.

    Example:
        >>> import lens_core as lens
        >>> from lens_core.analysis.circuits import edge_effects
        >>> model = lens.load("toy:gpt2")
        >>> text, other = "red dog saw a red", "red dog saw a dog"
        >>> def dog(logits):
        ...     return logits[:, -1, model.to_single_token("dog")]
        >>> scores = edge_effects(model, text, other, dog).scores
        >>> curve = completeness(model, text, other, dog, scores, sizes=[0, 137])
        >>> [round(share, 3) for share in curve.normalized[[0, -1]].tolist()]  # without nothing; without all edges
        [1.0, 0.0]
    """
    return _curve(
        "completeness",
        model,
        (input, corrupted),
        metric,
        _chosen(model, circuits, sizes, method, graph),
        ablation=ablation,
        batch_size=batch_size,
        options=options,
    )


def _curve(
    kind: Literal["faithfulness", "completeness"],
    model: "LensModel",
    inputs: tuple[Any, Any],
    metric: Callable[[Tensor], Tensor],
    circuits: tuple[Circuit, ...],
    *,
    ablation: Ablation,
    batch_size: int,
    options: dict[str, Any],
) -> CircuitCurve:
    found = circuits[0].graph
    runs = edge_runs(model, found, *inputs, ablation=ablation, options=options)
    values = measured_masks(runs, _masks(kind, circuits), metric, batch_size)
    return CircuitCurve(
        sizes=tuple(len(circuit) for circuit in circuits),
        total=len(found),
        values=values[1:],
        full=runs.plain(metric),
        ablated=values[0],
        kind=kind,
        circuits=circuits,
    )


def _masks(kind: str, circuits: Sequence[Circuit]) -> Iterator[Bool[Tensor, "writer reader"]]:
    yield torch.zeros_like(circuits[0].kept)
    for circuit in circuits:
        yield (circuit if kind == "faithfulness" else circuit.complement()).kept


def _chosen(
    model: "LensModel", given: Any, sizes: Sequence[int] | None, method: Literal["greedy", "top"], graph: Graph | None
) -> tuple[Circuit, ...]:
    """Give the circuits, from small to large."""
    if isinstance(given, Tensor):
        return tuple(_by_size(_graph(model, graph), given, sizes, method))
    many = cast("Sequence[Any]", given) if isinstance(given, Sequence) else ()
    listed: list[Any] = [given] if isinstance(given, Circuit) else list(many)
    if not listed or not all(isinstance(one, Circuit) for one in listed):
        raise ArgumentError(
            f"circuits are some Circuit, or scores [writer, reader]; got {type(cast('object', given)).__name__}"
        )
    circuits = cast("list[Circuit]", listed)
    if sizes is not None:
        raise ArgumentError("sizes are for scores; circuits have their own")
    if any(circuit.graph != circuits[0].graph for circuit in circuits):
        raise ArgumentError("the circuits are of several graphs; compare those of one")
    return tuple(sorted(circuits, key=len))


def _graph(model: "LensModel", given: Graph | None) -> Graph:
    return graph(model) if given is None else given


def _by_size(found: Graph, scores: Tensor, sizes: Any, method: Literal["greedy", "top"]) -> Iterator[Circuit]:
    total = len(found)
    if sizes is None:
        steps: Any = torch.logspace(0, 1, 20, base=total).round()
        sizes = [int(step) for step in steps.tolist()]
    listed: list[Any] = sorted(set(sizes))
    wrong = [size for size in listed if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= total]
    if wrong or not listed:
        raise ArgumentError(f"sizes are numbers of edges, 0 to {total}; got {wrong[0] if wrong else sizes!r}")
    order = edge_order(found, scores, method)
    for size in listed:
        kept = torch.zeros_like(found.mask)
        for writer, reader in order[:size]:
            kept[writer, reader] = True
        yield Circuit(graph=found, kept=kept, scores=scores)
