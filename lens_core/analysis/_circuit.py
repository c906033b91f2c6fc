"""A circuit: some of the edges of a model's graph."""

import heapq
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, cast

import attrs
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments
from lens_core._extras import need
from lens_core.analysis._circuit_file import read_circuit, write_circuit
from lens_core.analysis.graph import Edge, Graph, Node
from lens_core.errors import ArgumentError

__all__ = ["Circuit", "check_scores", "circuit_of_scores", "edge_order", "fed_writers"]


@attrs.frozen(kw_only=True, eq=False, slots=False)
class Circuit:
    """Some of the edges of a graph; all others are cut.

    Attributes:
        graph: All writers, readers and edges.
        kept: Which edges are in the circuit.
        scores: A number for each edge that the circuit was chosen by, NaN where there is none; None where there are
            none at all.

    Example:
        >>> import lens_core as lens
        >>> from lens_core.analysis.graph import graph
        >>> found = graph(lens.load("toy:gpt2"))
        >>> circuit = Circuit.of(found, ["embed -> L0H1.v", "L0H1 -> L1H2.k", "L1H2 -> logits"])
        >>> circuit
        Circuit(3 of 137 edges, 4 of 13 components)
        >>> "L0H1 -> L1H2.k" in circuit
        True
    """

    graph: Graph
    kept: Bool[Tensor, "writer reader"]
    scores: Float[Tensor, "writer reader"] | None = None

    @classmethod
    def of(cls, graph: Graph, edges: Iterable[str | Edge], scores: Tensor | None = None) -> "Circuit":
        """Make the circuit of some edges, given by label (`"L0H1 -> L1H2.k"`) or as records.

        Raises:
            ArgumentError: No such edge.
        """
        kept = torch.zeros_like(graph.mask)
        for given in edges:
            edge = graph.edge(given) if isinstance(given, str) else given
            kept[graph.writers.index(edge.source), graph.readers.index(edge.target)] = True
        return cls(graph=graph, kept=kept, scores=scores)

    @classmethod
    def full(cls, graph: Graph) -> "Circuit":
        """Make the circuit of all edges: the model itself."""
        return cls(graph=graph, kept=graph.mask)

    def __len__(self) -> int:
        """Count the edges."""
        return int(self.kept.sum())

    def __repr__(self) -> str:
        """Say how much of the graph it is."""
        total = len(self.graph.components)
        return f"Circuit({len(self)} of {len(self.graph)} edges, {len(self.components)} of {total} components)"

    def __contains__(self, edge: object) -> bool:
        """Whether an edge, or a component, is in the circuit, by label or as a record."""
        label = edge.label if isinstance(edge, Edge | Node) else edge
        return label in self._labels or label in self.components

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """The edges, reader by reader in the order of computation."""
        indices: Any = self.kept.T.nonzero()
        pairs: list[list[int]] = indices.tolist()
        return tuple(Edge(self.graph.writers[writer], self.graph.readers[reader]) for reader, writer in pairs)

    @cached_property
    def _labels(self) -> frozenset[str]:
        return frozenset(edge.label for edge in self.edges)

    @cached_property
    def components(self) -> tuple[str, ...]:
        """What the edges join (`embed`, `L3H5`, `L3.mlp`, `logits`), in the order of computation."""
        found = {node.component for edge in self.edges for node in (edge.source, edge.target)}
        return tuple(name for name in self.graph.components if name in found)

    def score(self, edge: Edge | str) -> float:
        """Give the number of one edge; NaN where there is none.

        Raises:
            ArgumentError: No such edge in the graph.
        """
        found = self.graph.edge(edge) if isinstance(edge, str) else edge
        if self.scores is None:
            return float("nan")
        return float(self.scores[self.graph.writers.index(found.source), self.graph.readers.index(found.target)])

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """List the `k` edges of largest score by size, with their scores."""
        scored = [(edge.label, self.score(edge)) for edge in self.edges]
        return sorted(scored, key=lambda one: -abs(one[1]) if one[1] == one[1] else 0.0)[:k]

    def complement(self) -> "Circuit":
        """Give the circuit of all other edges."""
        return attrs.evolve(self, kept=self.graph.mask & ~self.kept)

    def without(self, component: str) -> "Circuit":
        """Give the circuit less all edges from and to a component, such as `L3H5`.

        Raises:
            ArgumentError: The graph has no such component.
        """
        if component not in self.graph.components:
            raise ArgumentError(f"this graph has no component {component!r}; it has {', '.join(self.graph.components)}")
        kept = self.kept.clone()
        kept[[node.component == component for node in self.graph.writers]] = False
        kept[:, [node.component == component for node in self.graph.readers]] = False
        return attrs.evolve(self, kept=kept)

    def connected(self) -> "Circuit":
        """Give the circuit less the edges that lie on no path from an embedding to the logits.

        What no embedding reaches computes from the corrupted run alone, so with ablation `"resample"` the circuit does
        the same without it. With other ablations it may not: a head that reads means need not write the mean.
        """
        fed = fed_writers(self.graph)
        writers, readers = self.graph.writers, self.graph.readers
        reached = torch.tensor([node.kind == "embed" for node in writers])
        useful = torch.tensor([node.kind == "logits" for node in readers])
        for writer in range(len(writers)):
            own = [reader for reader, writes in enumerate(fed) if writer in writes]
            reached[writer] |= bool((self.kept[:, own] & reached[:, None]).any())
        for writer in reversed(range(len(writers))):
            if bool((self.kept[writer] & useful).any()):
                useful[[reader for reader, writes in enumerate(fed) if writer in writes]] = True
        return attrs.evolve(self, kept=self.kept & reached[:, None] & useful)

    def to_dataframe(self) -> Any:
        """Give a pandas frame: one line for each edge, with its source, target, part and score.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas = need("pandas", "a data frame")
        lines = [(edge.source.label, edge.target.component, edge.target.part, self.score(edge)) for edge in self.edges]
        return pandas.DataFrame(lines, columns=["source", "target", "part", "score"])

    def _repr_html_(self) -> str:
        rows = [(edge.source.label, edge.target.label, self.score(edge)) for edge in self.edges[:200]]
        more = "" if len(self) <= 200 else ", the first 200"
        return view.table(rows, ["from", "to", "score"], title=f"{self!r}{more}")._repr_html_()  # pyright: ignore[reportPrivateUsage]

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the circuit, and its graph, to a JSON file, which appears complete or not at all."""
        write_circuit(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Circuit":
        """Read a file that `save` wrote. Scores of edges outside the circuit are not in it.

        Raises:
            AnalysisFileError: Not such a file.
        """
        parts = read_circuit(path)
        return cls.of(parts.graph, parts.labels, parts.scores)


def fed_writers(graph: Graph) -> tuple[tuple[int, ...], ...]:
    """Give for each reader the writers that are computed from what it reads; shared keys feed all their heads."""
    readers_at = {node.hook: 0 for node in graph.readers}
    for node in graph.readers:
        readers_at[node.hook] += 1

    def feeds(reader: Node) -> Iterator[int]:
        own = [
            index
            for index, node in enumerate(graph.writers)
            if node.layer == reader.layer and node.kind == reader.kind and reader.layer is not None
        ]
        group = max(1, len(own) // readers_at[reader.hook])
        for index in own:
            head = graph.writers[index].head
            if reader.head is None or head is None or head // group == reader.head:
                yield index

    return tuple(tuple(feeds(reader)) for reader in graph.readers)


def check_scores(graph: Graph, scores: Any) -> Float[Tensor, "writer reader"]:
    """See that scores are a number for each writer and reader; NaN counts as zero.

    Raises:
        ArgumentError: They are not.
    """
    shape = (len(graph.writers), len(graph.readers))
    if not isinstance(scores, Tensor) or tuple(scores.shape) != shape:
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ArgumentError(f"scores are a tensor [writer, reader] of this graph, {list(shape)}; got {got}")
    return scores.detach().cpu().float().nan_to_num() * graph.mask


def edge_order(
    graph: Graph, scores: Float[Tensor, "writer reader"], method: Literal["greedy", "top"] = "greedy"
) -> list[tuple[int, int]]:
    """Order all edges, as (writer, reader): the first n are the circuit of n edges. See `circuit_of_scores`."""
    absolute: Any = check_scores(graph, scores).abs()
    size: list[list[float]] = absolute.tolist()
    edges = [(writer, reader) for reader, reach in enumerate(graph.reach) for writer in range(reach)]
    if method == "top":
        return sorted(edges, key=lambda edge: -size[edge[0]][edge[1]])
    fed = fed_writers(graph)
    waiting: list[tuple[float, int, int]] = []
    open_readers: set[int] = set()

    def open_reader(reader: int) -> None:
        if reader not in open_readers:
            open_readers.add(reader)
            for writer in range(graph.reach[reader]):
                heapq.heappush(waiting, (-size[writer][reader], writer, reader))

    open_reader(len(graph.readers) - 1)  # the logits
    order: list[tuple[int, int]] = []
    while waiting:
        _, writer, reader = heapq.heappop(waiting)
        order.append((writer, reader))
        for index, writes in enumerate(fed):
            if writer in writes:
                open_reader(index)
    return order + sorted(set(edges) - set(order), key=lambda edge: -size[edge[0]][edge[1]])


@checks_arguments
def circuit_of_scores(
    graph: Graph,
    scores: Float[Tensor, "writer reader"],
    n_edges: int,
    *,
    method: Literal["greedy", "top"] = "greedy",
) -> Circuit:
    """Choose the circuit of so many edges by a score for each edge, such as edge attribution gives.

    Args:
        graph: All edges.
        scores: What an edge does to a metric; the size counts, not the sign.
        n_edges: How many to keep.
        method: `"greedy"` grows the circuit from the logits back, each time by the edge of largest score whose target
            is in the circuit already, so that every edge leads on to the logits. `"top"` takes the largest, connected
            or not; `Circuit.connected` drops those that are not.

    Raises:
        ArgumentError: Scores of another graph; fewer than 0 or more than all edges; an unknown method.

    Source: Hanna, Pezzelle and Belinkov 2024, "Have Faith in Faithfulness" (arXiv 2403.17806), section 3.

    Example:
        >>> import torch, lens_core as lens
        >>> from lens_core.analysis.graph import graph
        >>> found = graph(lens.load("toy:gpt2"))
        >>> circuit_of_scores(found, torch.rand(found.mask.shape), n_edges=20).connected()  # doctest: +ELLIPSIS
        Circuit(...)
    """
    if method not in ("greedy", "top"):
        raise ArgumentError(f"method is 'greedy' or 'top'; got {method!r}")
    if isinstance(n_edges, bool) or not isinstance(n_edges, int) or not 0 <= n_edges <= len(graph):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"a circuit of this graph has 0 to {len(graph)} edges; got {n_edges!r}")
    kept = torch.zeros_like(graph.mask)
    for writer, reader in cast("Sequence[tuple[int, int]]", edge_order(graph, scores, method)[:n_edges]):
        kept[writer, reader] = True
    return Circuit(graph=graph, kept=kept, scores=scores)
