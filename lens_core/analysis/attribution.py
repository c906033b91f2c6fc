"""Attribution patching: to first order, what every activation or every edge of a model did for a metric, at once.

Activation patching asks what happens to a metric when one value of a *clean* run takes the place of the *corrupted*
run's, one forward for each value. Its linear estimate needs one forward of each input and one backward for all of them:

    (value of the clean run - value of the corrupted run) . gradient of the metric with respect to the value

summed over the vector that is patched as one. Positive means that the clean value raises the metric. With the gradient
of the corrupted run it estimates what putting the clean value there gains, with that of the clean run what taking it
away costs. For an edge the difference is what a writer adds to the residual stream, and the gradient is the one at what
a reader reads (`lens_core.analysis.graph`): EAP. The sum over a writer's edges is the attribution of the writer.

The estimate is wrong where the metric is far from linear along the way, at saturated softmaxes first of all. Integrated
gradients average the gradient along a way: between the inputs' embeddings (`"ig-inputs"`, EAP-IG), or between the
values of one hook point after the other, everything else as it was (`"ig-activations"`), for which the sum over the
hook point is exactly the effect of patching it whole, but for the steps' error.

Sources: Nanda 2023, "Attribution patching"; Syed, Rager and Conmy 2023 (EAP, arXiv 2310.10348); Hanna, Pezzelle and
Belinkov 2024 (EAP-IG, arXiv 2403.17806), whose steps are right ends of intervals where these are middles; Sundararajan,
Taly and Yan 2017 (arXiv 1703.01365); Marks et al. 2024 (arXiv 2403.19647) for the way between activations.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import attrs
import torch
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core.analysis import graph as graphs
from lens_core.analysis._attribution_runs import At, Baseline, Method, Metric, Pair, difference, midpoints, put
from lens_core.analysis.attribution_results import Agreement, EdgeAttribution, NodeAttribution, agreement
from lens_core.analysis.nodes import contributions
from lens_core.errors import ArgumentError
from lens_core.hook_points import HookPoint, NameFilter
from lens_core.shapes import AXES

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache
    from lens_core.model import LensModel

__all__ = ["Agreement", "EdgeAttribution", "NodeAttribution", "agreement", "attribute_edges", "attribute_nodes"]

KEPT = ("pos", "query", "key", "n_heads", "n_kv_heads", "ssm_heads", "d_mlp", "d_inner", "n_experts", "k")
"""Axes that stay unless others are asked for: what is patched as one is a vector of the other axes."""


@checks_arguments
def attribute_nodes(
    model: "LensModel",
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    names: NameFilter = None,
    axes: Sequence[str] | None = None,
    method: Method = "gradient",
    at: At | None = None,
    steps: int = 5,
    baseline: Baseline = "corrupted",
    **kwargs: Any,
) -> NodeAttribution:
    """Attribute a metric to the values at some hook points.

    Costs one forward of each input and one backward; with `"ig-inputs"` two forwards and `steps` forwards and
    backwards; with `"ig-activations"` so many for every hook point.

    Args:
        model: The model. Hooks of enclosing blocks are live in every run: `linearized` entries, for one.
        clean: What is attributed, as in `forward`.
        corrupted: The input to compare with, of as many rows and tokens; None where the baseline needs none. With the
            baseline `"mean"`, any text or batch that the mean is to be taken over.
        metric: From the logits `[batch, pos, d_vocab]` to one number for each row `[batch]`, differentiable. One number
            for all rows works too; values of a row are then its share.
        names: Any hook points, as in `run_with_cache`; None for what writes to the residual stream, heads by
            `attn.hook_z`, a mixer with heads by `mixer.hook_gated`.
        axes: Axes to keep besides the batch, in the words of `lens_core.shapes`; None for positions, heads, neurons and
            channels (and queries and keys). Over the others the products are summed.
        method: `"gradient"`, or integrated gradients, see the module.
        at: Which run's gradient, or, for `"ig-activations"`, which run the values are put into: `"corrupted"`, or
            `"clean"`, which is all there is under other baselines. Not with `"ig-inputs"`.
        steps: Gradients along the way, for integrated gradients.
        baseline: What takes the clean value's place: the corrupted run's, `"zero"`, or the `"mean"` over rows and
            positions (of scores and patterns: over rows) of the corrupted run, or the clean one where that is None.
            Padding counts in a mean.
        **kwargs: As in `forward`, for both inputs.

    Raises:
        ArgumentError: Options that do not go together; runs of different shapes; a metric without a gradient or of
            another shape; hook points that hold whole numbers.
        UnknownHookError: No such hook point.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> clean, corrupted = model.to_tokens("king apple river king"), model.to_tokens("moon apple river king")
        >>> apple = model.to_single_token(" apple")
        >>> found = attribute_nodes(model, clean, corrupted, lambda logits: logits[:, -1, apple], names="z")
        >>> found.stacked("attn.hook_z").shape  # layer batch pos n_heads
        torch.Size([2, 1, 5, 4])
    """
    pair = Pair(model=model, clean=clean, corrupted=corrupted, metric=metric, options=kwargs)
    way = _Way.read(pair, method, at, steps, baseline)
    if names is None:
        chosen = graphs.graph(model).writer_names
        names = [name for name in chosen if not name.endswith("hook_scale")]
    points = [model.table[name] for name in model.table.select(names).names]
    _check_points(points, axes)
    nodes = _Nodes(way, points, axes)
    nodes.run()
    return NodeAttribution(
        values=nodes.values,
        axes={point.name: tuple(_kept(point, axes)) for point in points},
        layers={point.name: point.layer for point in points},
        clean=way.measured["clean"],
        corrupted=way.measured.get("corrupted"),
    )


@checks_arguments
def attribute_edges(
    model: "LensModel",
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    graph: graphs.Graph | None = None,
    method: Method = "gradient",
    at: At | None = None,
    steps: int = 5,
    baseline: Baseline = "corrupted",
    **kwargs: Any,
) -> EdgeAttribution:
    """Attribute a metric to every edge of the model's graph (EAP, EAP-IG).

    Costs one forward of each input and one backward; with `"ig-inputs"` two forwards and `steps` forwards and
    backwards; with `"ig-activations"` so many for every branch of every block. Holds one residual stream for each
    writer; gradients are used up where they come.

    Args:
        model: As in `attribute_nodes`.
        clean: As there.
        corrupted: As there.
        metric: As there.
        graph: `lens_core.analysis.graph.graph` of the model; None for that with heads.
        method: As there; `"ig-activations"` puts in place what one branch adds to the stream.
        at: As there.
        steps: As there.
        baseline: As there, of what a writer adds.
        **kwargs: As there.

    Raises:
        ArgumentError: As there; a graph of another model.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> clean, corrupted = model.to_tokens("king apple river king"), model.to_tokens("moon apple river king")
        >>> apple = model.to_single_token(" apple")
        >>> found = attribute_edges(model, clean, corrupted, lambda logits: logits[:, -1, apple])
        >>> [label for label, value in found.top_edges(1)][0] in [edge.label for edge in found.graph.edges]
        True
    """
    pair = Pair(model=model, clean=clean, corrupted=corrupted, metric=metric, options=kwargs)
    way = _Way.read(pair, method, at, steps, baseline)
    found = graphs.graph(model) if graph is None else graph
    unknown = [name for name in (*found.writer_names, *found.reader_names) if name not in model.table]
    if unknown:
        raise ArgumentError(f"this graph is of another model: there is no {unknown[0]!r} in {model!r}")
    edges = _Edges(way, found)
    edges.run()
    return EdgeAttribution(
        values=edges.values, graph=found, clean=way.measured["clean"], corrupted=way.measured.get("corrupted")
    )


@attrs.frozen(kw_only=True, eq=False)
class _Way:
    """The two ends that values are compared at, and where gradients are taken between them."""

    pair: Pair
    method: Method
    at: At
    steps: int
    baseline: Baseline
    measured: dict[str, Tensor] = attrs.field(factory=dict[str, Tensor])

    @classmethod
    def read(cls, pair: Pair, method: Any, at: Any, steps: Any, baseline: Any) -> "_Way":
        """Read the options, and refuse those that do not go together."""
        for name, given, allowed in (
            ("method", method, get_args(Method)),
            ("at", at, (None, *get_args(At))),
            ("baseline", baseline, get_args(Baseline)),
        ):
            if given not in allowed:
                raise ArgumentError(f"{name} is one of {', '.join(map(repr, allowed))}; got {given!r}")
        midpoints(steps)
        if baseline == "corrupted" and pair.corrupted is None:
            raise ArgumentError("there is no corrupted input: give one, or baseline='zero' or 'mean'")
        if baseline == "zero" and pair.corrupted is not None:
            raise ArgumentError("baseline='zero' compares with no other run: give None as the corrupted input")
        if baseline != "corrupted" and at == "corrupted":
            raise ArgumentError(f"baseline={baseline!r} is no run that has a gradient: leave out at='corrupted'")
        if method == "ig-inputs" and at is not None:
            raise ArgumentError(f"'ig-inputs' takes gradients between both runs: leave out at={at!r}")
        at = at or ("corrupted" if baseline == "corrupted" else "clean")
        return cls(pair=pair, method=method, at=at, steps=steps, baseline=baseline)

    @property
    def other(self) -> At:
        """The run whose gradient is not taken."""
        return "corrupted" if self.at == "clean" else "clean"

    def values(self, which: At, names: Sequence[str]) -> "ActivationCache":
        """Give the values of a run, and note its metric; what a mean is taken over may be no text of the metric's."""
        if which == "corrupted" and self.baseline != "corrupted":
            return self.pair.values(which, names)[0]
        cache, self.measured[which] = self.pair.measured_values(which, names)
        return cache

    def ends(self, names: Sequence[str]) -> "tuple[ActivationCache, ActivationCache | None]":
        """Give the clean run's values, and the other's where there is one."""
        return self.values("clean", names), None if self.pair.corrupted is None else self.values("corrupted", names)

    def gradients(self, which: At, names: Sequence[str] = (), **options: Any) -> "ActivationCache":
        """Run forward and backward, and note the metric where the run is a plain one."""
        cache, measured = self.pair.gradients(which, names, **options)
        if not options.get("fwd_hooks"):
            self.measured[which] = measured
        return cache

    def base(self, clean: Tensor, corrupted: Tensor | None, axes: Sequence[int]) -> Tensor | float:
        """Give what takes the clean value's place; `axes` are those that a mean is taken over."""
        if self.baseline == "zero":
            return 0.0
        reference = clean if corrupted is None else corrupted
        if self.baseline == "corrupted":
            return reference
        wide = reference.to(torch.promote_types(reference.dtype, torch.float32))
        return wide.mean(list(axes), keepdim=True).expand(clean.shape)

    def between(
        self, names: Sequence[str], clean: Mapping[str, Tensor], corrupted: Mapping[str, Tensor] | None, share: float
    ) -> tuple[list[Any], list[Tensor]]:
        """Give hooks that put values between both ends in place, and what gradients may end at."""
        entries, leaves, table = list[Any](), list[Tensor](), self.pair.model.table
        for name in names:
            point = table[name]
            base = self.base(clean[name], None if corrupted is None else corrupted[name], _mean_axes(point))
            delta = difference(clean[name], base, name)
            entries.append((name, put(base, delta, share, leaves, point.position_axis)))
        return entries, leaves


class _Nodes:
    """The values of hook points, while gradients come in."""

    def __init__(self, way: _Way, points: Sequence[HookPoint], axes: Sequence[str] | None) -> None:
        self.way, self.points, self.axes = way, points, axes
        self.names = [point.name for point in points]
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(self) -> None:
        """Run what the method asks for."""
        way, names = self.way, self.names
        if way.method == "gradient":
            other = None if way.pair.corrupted is None else way.values(way.other, names)
            own = way.gradients(way.at, names)
            clean, corrupted = (own, other) if way.at == "clean" else (other, own)
            for point in self.points:
                self.add(point, clean, corrupted, own.grad[point.name], 1.0)
            return
        embeddings = way.pair.model.declaration.embeddings
        clean, corrupted = way.ends([*names, *embeddings])
        for replaced in [embeddings] if way.method == "ig-inputs" else [[name] for name in names]:
            kept = names if way.method == "ig-inputs" else replaced
            for share in midpoints(way.steps):
                entries, leaves = way.between(replaced, clean, corrupted, share)
                run: At = "clean" if way.method == "ig-inputs" else way.at
                own = way.gradients(run, kept, fwd_hooks=entries, leaves=leaves)
                for point in (point for point in self.points if point.name in kept):
                    self.add(point, clean, corrupted, own.grad[point.name], 1 / way.steps)

    def add(self, point: HookPoint, clean: Any, corrupted: Any, gradient: Tensor, weight: float) -> None:
        """Take the products of differences and gradients, summed over what is patched as one."""
        name, kept = point.name, _kept(point, self.axes)
        value = clean[name]
        base = self.way.base(value, None if corrupted is None else corrupted[name], _mean_axes(point))
        product = difference(value, base, name) * gradient.to(value.device) * weight
        gone = [at for at, axis in enumerate(point.shape.split()) if at and axis not in kept]
        found = product.sum(gone) if gone else product
        self.values[name] = self.values[name] + found if name in self.values else found


class _Edges:
    """The products of writers' differences and readers' gradients, while gradients come in."""

    def __init__(self, way: _Way, graph: graphs.Graph) -> None:
        self.way, self.graph = way, graph
        self.columns: dict[str, list[int]] = {}
        for column, reader in enumerate(graph.readers):
            self.columns.setdefault(reader.hook, []).append(column)
        self.rows = slice(0, len(graph.writers))
        self.weight = 1.0
        self.delta = self.values = torch.empty(0)

    def run(self) -> None:
        """Run what the method asks for."""
        way, names = self.way, self.graph.writer_names
        if way.method == "gradient":
            other = None if way.pair.corrupted is None else way.values(way.other, names)

            def compare(own: "ActivationCache") -> None:
                self.compare(*((own, other) if way.at == "clean" else (other, own)))

            way.gradients(way.at, names, bwd_hooks=self.hooks(), before_backward=compare)
            return
        groups = self._groups()
        replaced = way.pair.model.declaration.embeddings if way.method == "ig-inputs" else list(groups)
        clean, corrupted = way.ends([*names, *replaced])
        self.compare(clean, corrupted)
        self.weight = 1 / way.steps
        for share in midpoints(way.steps):
            if way.method == "ig-inputs":
                entries, leaves = way.between(replaced, clean, corrupted, share)
                way.gradients("clean", fwd_hooks=entries, leaves=leaves, bwd_hooks=self.hooks())
                continue
            for name, self.rows in groups.items():
                entries, leaves = way.between([name], clean, corrupted, share)
                way.gradients(way.at, fwd_hooks=entries, leaves=leaves, bwd_hooks=self.hooks())

    def _groups(self) -> dict[str, slice]:
        """Give the writers of each branch by what the branch adds, as a slice of the writers."""
        found: dict[str, slice] = {}
        for row, node in enumerate(self.graph.writers):
            name = node.writes or node.hook
            found[name] = slice(found[name].start if name in found else row, row + 1)
        return found

    @torch.no_grad()
    def compare(self, clean: Any, corrupted: Any) -> None:
        """Take the differences of what writers added in both runs."""
        values = contributions(clean, self.graph.writers)
        other = None if corrupted is None else contributions(corrupted, self.graph.writers)
        self.delta = difference(values, self.way.base(values, other, (1, 2)), "the residual stream")
        shape = (self.delta.shape[1], len(self.graph.writers), len(self.graph.readers))
        self.values = torch.zeros(shape, dtype=self.delta.dtype, device=self.delta.device)

    def hooks(self) -> list[Any]:
        """Give backward hooks for the readers that come after these writers."""
        return [(name, self.take) for name in self.columns]

    def take(self, gradient: Tensor, hook: Any) -> None:
        """Multiply the gradient at what some readers read with what the writers before them changed."""
        columns = self.columns[hook.name]
        reader, reach = self.graph.readers[columns[0]], self.graph.reach[columns[0]]
        rows = slice(self.rows.start, min(self.rows.stop, reach))
        if rows.start >= rows.stop:
            return
        gradient = gradient.to(self.delta.device, self.delta.dtype)
        if reader.part is None:
            gradient = gradient[:, :, None]
        elif reader.head is None:
            gradient = gradient.sum(2, keepdim=True)
        found = torch.einsum("wbpd,bphd->bwh", self.delta[rows], gradient)
        self.values[:, rows, columns[0] : columns[-1] + 1] += found * self.weight


def _kept(point: HookPoint, axes: Sequence[str] | None) -> list[str]:
    return [axis for axis in point.shape.split()[1:] if axis in (KEPT if axes is None else axes)]


def _mean_axes(point: HookPoint) -> tuple[int, ...]:
    """Give the axes of rows and positions; of scores and patterns the rows, since a mean over queries looks ahead."""
    axes = point.shape.split()
    return (0,) if "key" in axes or point.position_axis is None else (0, point.position_axis)


def _check_points(points: Sequence[HookPoint], axes: Sequence[str] | None) -> None:
    whole = [point.name for point in points if point.name.endswith(("hook_tokens", "hook_expert_indices"))]
    if whole:
        raise ArgumentError(f"{whole[0]!r} holds whole numbers, which have no gradient; leave it out")
    foreign = [point.name for point in points if point.shape.split()[:1] != ["batch"]]
    if foreign:
        raise ArgumentError(f"nothing says what the axes of {foreign[0]!r} are; attribute at a hook point of the table")
    if isinstance(axes, str) or any(axis not in AXES for axis in axes or ()):
        raise ArgumentError(f"axes are some of {', '.join(AXES)}; got {axes!r}")
