"""Runs of a model in which any set of edges of its graph is cut, all in one forward.

At a reader's own copy of the stream a function adds, for each cut edge, what the writer contributes in another run less
what it wrote in this one: `input = stream + sum over writers of cut * (source - current)`. The stream holds what all
writers wrote in this very run, also those that read something else than in the plain run, so what is left of a cut
writer is its source alone. Nothing but the copies is edited: the stream goes on as it is.

A run holds, for each branch that a cut edge comes from, one residual stream for each writer: `writers * rows * pos *
d_model` numbers, and the source as many again for one copy of the rows. Runs of several circuits share the source.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import attrs
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core.analysis._runs import Metric, Prompt
from lens_core.analysis.graph import Graph, Node, contributions
from lens_core.cache import ActivationCache
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["Ablation", "EdgeRuns", "edge_runs"]

Ablation: TypeAlias = Literal["resample", "mean", "mean_by_position", "zero"]
"""What stands for a writer at a cut edge: what it wrote in the corrupted run at the same row and position; the mean of
that over rows and real positions, or over rows at each position; or nothing."""


@attrs.frozen(kw_only=True, eq=False)
class _Branch:
    """Writers whose contributions are computed together, and the bias that they share where it depends on the run."""

    first: int
    """Index of the first writer in the graph."""
    writers: tuple[Node, ...]
    bias: tuple[Node, ...] = ()
    """At most one: a bias behind a post-norm, whose scale is the run's."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Writers, then the bias."""
        return (*self.writers, *self.bias)

    @property
    def span(self) -> slice:
        """The writers' places in the graph."""
        return slice(self.first, self.first + len(self.writers))

    def is_before(self, layer: int) -> bool:
        """Whether it writes before a block is entered."""
        own = self.writers[0].layer
        return own is None or own < layer


def _branches(graph: Graph) -> Iterator[_Branch]:
    place = 0
    for _, group in groupby(graph.writers, key=lambda node: node.writes or node.hook):
        writers = tuple(group)
        scale = f"blocks.{writers[0].layer}.ln1_post.hook_scale"
        bias = tuple(one for one in graph.constants if one.writes == writers[0].writes and scale in graph.writer_names)
        yield _Branch(first=place, writers=writers, bias=bias)
        place += len(writers)


@attrs.frozen(kw_only=True, eq=False)
class EdgeRuns:
    """A model, an input, and what stands for the writers where edges are cut."""

    graph: Graph
    prompt: Prompt
    branches: tuple[_Branch, ...]
    sources: Mapping[int, Float[Tensor, "node batch pos d_model"]]
    """By branch; batch and position may be 1."""
    clean: ActivationCache | None = None
    """The plain run: what writers wrote and what entered each block; None where every run starts at the embeddings."""
    logits: Float[Tensor, "batch pos d_vocab"] | None = None
    """Of the plain run."""
    _kept: dict[int, Tensor] = attrs.field(factory=dict[int, Tensor], init=False)

    def run(
        self, keep: Bool[Tensor, "copies writer reader"] | Float[Tensor, "copies writer reader"]
    ) -> Float[Tensor, "rows pos d_vocab"]:
        """Run one copy of the rows for each mask: 1 keeps an edge, 0 cuts it, between is between.

        Blocks below the first reader with a cut edge are not run where the plain run is at hand. A mask that has a
        gradient is taken to cut every edge.
        """
        cut = self._cut(keep)
        live = self.graph.mask.to(cut.device) if cut.requires_grad else cut.ne(0).any(0)
        start = self._start(live)
        run = _Run(self, cut, live, start)
        copies = len(keep)
        if not start:
            return self.prompt.run(run.hooks(), copies=copies)
        assert self.clean is not None
        stream = self.clean[f"blocks.{start}.hook_resid_pre"]
        return self.prompt.run(run.hooks(), copies=copies, start=start, residual=stream.repeat(copies, 1, 1))

    def plain(self, metric: Metric) -> Float[Tensor, " batch"]:
        """Measure the plain run."""
        assert self.logits is not None
        return self.prompt.measured(metric, self.logits)[0]

    def difference(
        self, index: int, current: Float[Tensor, "node copies batch pos d_model"]
    ) -> Float[Tensor, "node copies batch pos d_model"]:
        """Give what stands for a branch's writers less what they wrote; a bias is never set to zero."""
        source = self.sources.get(index)
        if source is not None:
            return source.to(current.device).unsqueeze(1) - current
        writers = len(self.branches[index].writers)
        return torch.cat([-current[:writers], torch.zeros_like(current[writers:])])

    def clean_difference(self, index: int) -> Float[Tensor, "node copies batch pos d_model"]:
        """Give the same for the plain run, of which there is one copy."""
        if index not in self._kept:
            assert self.clean is not None
            with torch.no_grad():
                current = contributions(self.clean, self.branches[index].nodes).unsqueeze(1)
                self._kept[index] = self.difference(index, current)
        return self._kept[index]

    def _cut(self, keep: Tensor) -> Tensor:
        device = self.prompt.model.cfg.device
        wide = keep.to(device, keep.dtype if keep.is_floating_point() else torch.float32)
        return (1 - wide) * self.graph.mask.to(device)

    def _start(self, live: Tensor) -> int:
        """Find the first block that has a reader with a cut edge; 0 where runs start at the embeddings."""
        last = self.prompt.model.cfg.n_layers - 1
        if self.clean is None:
            return 0
        layers = [node.layer for node, is_cut in zip(self.graph.readers, live.any(0), strict=True) if is_cut]
        return min([last, *(last if layer is None else layer for layer in layers)])


class _Run:
    """One forward: what writers wrote so far, and what stands for them less that."""

    def __init__(self, runs: EdgeRuns, cut: Tensor, live: Tensor, start: int) -> None:
        self.runs, self.cut, self.live, self.start = runs, cut, live, start
        self.values: dict[str, Tensor] = {}
        self.differences: dict[int, Tensor] = {}

    def hooks(self) -> list[Any]:
        """Give the functions that keep what is written, and those that edit what is read."""
        graph, table = self.runs.graph, self.runs.prompt.model.table
        if not self.live.any():
            return []
        kept = [name for name in graph.writer_names if (table[name].layer or 0) >= self.start]
        hooks: list[Any] = [(name, self._keep) for name in kept]
        for name, readers in groupby(range(len(graph.readers)), key=lambda index: graph.readers[index].hook):
            chosen = list(readers)
            if self.live[:, chosen].any():
                hooks.append((name, partial(self._read, chosen)))
        return hooks

    def _keep(self, value: Tensor, hook: Any) -> None:
        self.values[hook.name] = value

    def _read(self, readers: list[int], value: Tensor, hook: Any) -> Tensor:
        """Change what some readers at one hook point read, `[rows, pos, d_model]` or with an axis of heads."""
        total: Tensor | None = None
        for index, branch in enumerate(self.runs.branches):
            cut, live = self.cut[:, branch.span, readers], self.live[branch.span, readers].any(1)
            if not live.any():
                continue
            difference = self._difference(index, branch)
            if branch.bias:  # goes with its heads, in proportion
                cut = torch.cat([cut, cut.mean(1, keepdim=True)], 1)
                live = torch.cat([live, live.new_ones(1)])
            part = torch.einsum("cnh,ncbpd->cbphd", cut[:, live].to(difference.dtype), difference[live])
            total = part if total is None else total + part
        assert total is not None
        total = total.flatten(0, 1)  # rows pos readers d_model
        total = total if value.ndim == 4 else total.squeeze(2)
        return (value + total.to(value.device)).to(value.dtype)

    def _difference(self, index: int, branch: _Branch) -> Float[Tensor, "node copies batch pos d_model"]:
        """Give what stands for a branch's writers less what they wrote; one copy where all are alike."""
        found = self.differences.get(index)
        if found is None:
            runs = self.runs
            if self.start and branch.is_before(self.start):
                return runs.clean_difference(index)
            cache = ActivationCache(self.values, table=runs.prompt.model.table, model=runs.prompt.model)
            current = contributions(cache, branch.nodes)
            current = current.view(len(current), len(self.cut), runs.prompt.shape[0], *current.shape[2:])
            found = self.differences[index] = runs.difference(index, current)
        return found


@checks_arguments
def edge_runs(
    model: "LensModel",
    graph: Graph,
    input: Any,
    corrupted: Any,
    *,
    ablation: Ablation,
    options: Mapping[str, Any],
    reuse: bool = True,
) -> EdgeRuns:
    """Read the inputs and run what is needed: the corrupted input once, and with `reuse` the input itself once.

    Raises:
        ArgumentError: An unknown ablation, or a corrupted input that is missing or of another shape.
    """
    if ablation not in get_args(Ablation):
        raise ArgumentError(f"ablation is one of {', '.join(map(repr, get_args(Ablation)))}; got {ablation!r}")
    prompt = Prompt.read(model, input, options)
    branches = tuple(_branches(graph))
    with torch.no_grad():
        sources = _sources(prompt, graph, branches, corrupted, ablation, options)
        logits = clean = None
        if reuse:
            layers = range(1, model.cfg.n_layers)
            names = (*graph.writer_names, *(f"blocks.{layer}.hook_resid_pre" for layer in layers))
            logits, clean = prompt.cached(names)
    return EdgeRuns(graph=graph, prompt=prompt, branches=branches, sources=sources, clean=clean, logits=logits)


def _sources(
    prompt: Prompt,
    graph: Graph,
    branches: Sequence[_Branch],
    corrupted: Any,
    ablation: Ablation,
    options: Mapping[str, Any],
) -> dict[int, Tensor]:
    """Give what stands for the writers of each branch."""
    if ablation == "zero":
        return {}
    if corrupted is None:
        raise ArgumentError(f"ablation {ablation!r} takes values from a corrupted input, and none is given")
    other = Prompt.read(prompt.model, corrupted, options)
    if ablation == "resample" and other.shape != prompt.shape:
        raise ArgumentError(
            f"resampling takes the same row and position of the corrupted input, {list(other.shape)}, for the input's, "
            f"{list(prompt.shape)}; give inputs of one shape, or ablation='mean'"
        )
    if ablation == "mean_by_position" and other.shape[1] != prompt.shape[1]:
        raise ArgumentError(f"the corrupted input has {other.shape[1]} positions, and the input {prompt.shape[1]}")
    _, cache = other.cached(graph.writer_names)
    found: dict[int, Tensor] = {}
    for index, branch in enumerate(branches):
        value = contributions(cache, branch.nodes)  # node batch pos d_model
        found[index] = value if ablation == "resample" else _mean(value, other.real, ablation)
    return found


def _mean(value: Tensor, real: Tensor, ablation: Ablation) -> Tensor:
    """Average `[node, batch, pos, d_model]` over real rows, and positions too unless by position."""
    axes = (1,) if ablation == "mean_by_position" else (1, 2)
    weight = real.to(value.device, value.dtype)[None, :, :, None]
    return (value * weight).sum(axes, keepdim=True) / weight.sum(axes, keepdim=True).clamp(min=1)
