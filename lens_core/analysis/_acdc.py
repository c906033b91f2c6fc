"""Automatic circuit discovery: edges are cut one after the other, from the logits back, as long as the output stays."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lens_core._arguments import checks_arguments
from lens_core.analysis._circuit import Circuit, fed_writers
from lens_core.analysis._circuit_runs import copies_in
from lens_core.analysis._edge_runs import Ablation, EdgeRuns, edge_runs
from lens_core.analysis._runs import Prompt, position_mask
from lens_core.analysis.graph import Graph, graph
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["acdc"]


@checks_arguments
def acdc(
    model: "LensModel",
    input: Any,
    corrupted: Any,
    threshold: float,
    *,
    metric: Callable[[Tensor], Tensor] | None = None,
    positions: Any = None,
    graph: Graph | None = None,
    ablation: Ablation = "resample",
    batch_size: int = 64,
    **options: Any,
) -> Circuit:
    """Find a circuit by cutting edges one after the other, from the logits back (ACDC).

    Readers are visited from the last to the first, the writers of each likewise. An edge is cut for good if that
    moves the output's distance from the model's by less than the threshold, given all that was cut before. Readers of a
    head, MLP or mixer that nothing in the circuit reads any more lose their edges unasked: they cannot matter.

    Args:
        model: The model.
        input: What is run.
        corrupted: The input that ablated contributions are taken from; None for `"zero"`.
        threshold: The least growth of the distance that keeps an edge: in nats, or in the metric's unit. Smaller ones
            give larger circuits.
        metric: From the logits `[batch, pos, d_vocab]` to one number for each row: the distance is then the mean size
            of its difference from the model's. None for the Kullback-Leibler divergence of the next token's
            distribution from the model's, in nats, at `positions`.
        positions: Where that divergence is taken, as mean: as hook entries name positions, or a mask `[batch, pos]`.
            None for the last real position of each row.
        graph: The writers and readers; None for those of the model.
        ablation: As in `run_circuit`.
        batch_size: Rows of one forward. Cuts are tried several at once, each after those before it, on the guess that
            they hold: the result is that of one after the other.
        **options: About reading the inputs, as in `run_circuit`.

    Returns:
        The circuit; `scores` are how much each tried cut moved the distance, NaN for edges that were not tried.

    Raises:
        ArgumentError: A threshold that is no number; positions beside a metric; and as `run_circuit`.

    Costs two forwards, and one row for each edge at most, twice that at worst, each from the reader's block on.

    Source: Conmy et al. 2023, "Towards Automated Circuit Discovery for Mechanistic Interpretability" (arXiv
    2304.14997), algorithm 1.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> text, other = "king apple river moon king apple", "king book river moon king apple"
        >>> circuit = acdc(model, text, other, threshold=0.1)
        >>> "L0H2 -> L1H0.k" in circuit  # from the previous-token head to the induction head's keys
        True
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or math.isnan(threshold):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"threshold is a number, in nats or in the metric's unit; got {threshold!r}")
    if metric is not None and positions is not None:
        raise ArgumentError("positions are where the divergence is taken; a metric chooses its own from the logits")
    found = _graph(model, graph)
    runs = edge_runs(model, found, input, corrupted, ablation=ablation, options=options)
    distance = _Distance.of(runs, metric, positions)
    search = _Search(runs, distance, float(threshold), copies_in(runs, batch_size))
    for reader in reversed(range(len(found.readers))):
        search.visit(reader)
    return Circuit(graph=found, kept=search.kept, scores=search.scores)


def _graph(model: "LensModel", given: Graph | None) -> Graph:
    return graph(model) if given is None else given


class _Search:
    """The state of the search: what is still there, and how far off the output is."""

    def __init__(self, runs: EdgeRuns, distance: "_Distance", threshold: float, most: int) -> None:
        self.runs, self.distance, self.threshold, self.most = runs, distance, threshold, most
        self.kept = runs.graph.mask
        self.scores = torch.full(self.kept.shape, torch.nan)
        self.current = 0.0
        self.fed = fed_writers(runs.graph)

    def visit(self, reader: int) -> None:
        """Try to cut each edge into one reader."""
        graph = self.runs.graph
        is_read = graph.readers[reader].kind == "logits" or bool(self.kept[list(self.fed[reader])].any())
        if not is_read:
            self.kept[:, reader] = False
            return
        waiting = list(reversed(range(graph.reach[reader])))
        size = 1
        while waiting:
            done = self._try(reader, waiting[:size])
            size = min(2 * size, self.most) if done == len(waiting[:size]) else 1
            waiting = waiting[done:]

    def _try(self, reader: int, writers: list[int]) -> int:
        """Cut some edges, each after those before it, until one is to stay; gives how many are settled."""
        masks = self.kept.repeat(len(writers), 1, 1)
        for row, writer in enumerate(writers):
            masks[row:, writer, reader] = False
        for row, (writer, now) in enumerate(zip(writers, self.distance(masks), strict=True)):
            growth = now - self.current
            self.scores[writer, reader] = growth
            if not growth < self.threshold:
                return row + 1
            self.kept[writer, reader] = False
            self.current = now
        return len(writers)


@attrs.frozen(kw_only=True, eq=False)
class _Distance:
    """How far a circuit's output is from the model's."""

    runs: EdgeRuns
    metric: Callable[[Tensor], Tensor] | None
    target: Float[Tensor, " batch"] | Float[Tensor, "batch pos d_vocab"]
    """The metric, or the log-probabilities, of the model."""
    where: Bool[Tensor, "batch pos"]

    @classmethod
    def of(cls, runs: EdgeRuns, metric: Callable[[Tensor], Tensor] | None, positions: Any) -> "_Distance":
        where = _last_real(runs.prompt) if positions is None else position_mask(positions, runs.prompt)
        assert where is not None
        assert runs.logits is not None
        target = _log_probabilities(runs.logits) if metric is None else runs.plain(metric)
        return cls(runs=runs, metric=metric, target=target.detach(), where=where)

    @torch.no_grad()
    def __call__(self, masks: Bool[Tensor, "copies writer reader"]) -> list[float]:
        """Give the distance of each circuit, as mean over the rows."""
        logits, copies = self.runs.run(masks), len(masks)
        metric = self._divergence if self.metric is None else self.metric
        values = self.runs.prompt.measured(metric, logits, copies)
        if self.metric is not None:
            values = (values - self.target).abs()
        means: Any = values.mean(1)
        return means.tolist()

    def _divergence(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        each = F.kl_div(_log_probabilities(logits), self.target, log_target=True, reduction="none").sum(-1)
        weight = self.where.to(each.device, each.dtype)
        return (each * weight).sum(1) / weight.sum(1).clamp(min=1)


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _last_real(prompt: Prompt) -> Bool[Tensor, "batch pos"]:
    """Mark the last real position of each row."""
    real = prompt.real
    return real & (real.flip(1).cumsum(1).flip(1) == 1)
