"""What attribution found, by example: of places of any hook points, or of edges of the graph."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments, is_whole
from lens_core._extras import need
from lens_core.analysis.graph import Edge, Graph
from lens_core.errors import ArgumentError
from lens_core.view import Picture

__all__ = ["Agreement", "EdgeAttribution", "NodeAttribution", "agreement"]

_SIGNS = {"n_heads": "H", "ssm_heads": "H", "n_kv_heads": "KV", "d_mlp": "N", "d_inner": "C"}


@attrs.frozen(kw_only=True)
class Agreement:
    """How well attribution says what exact patching finds.

    Attributes:
        pearson: Correlation of the two.
        spearman: Correlation of their ranks, ties sharing theirs.
        slope: What exact effects are per unit of attribution (least squares through zero); below 1 where attribution
            exaggerates.
        sign: The share of cells at which both have the same sign.
        count: The cells compared.
    """

    pearson: float
    spearman: float
    slope: float
    sign: float
    count: int


@checks_arguments
def agreement(attributed: Float[Tensor, "..."], exact: Float[Tensor, "..."]) -> Agreement:
    """Compare attribution with exact effects, cell by cell.

    Needs scipy (`lens-core[analysis]`).

    Args:
        attributed: Values of any shape.
        exact: What patching each cell did, of the same shape; cells that are not finite in either are left out.

    Raises:
        ArgumentError: Other shapes, or fewer than two cells.
        MissingPackageError: scipy is not installed.

    Example:
        >>> found = agreement(torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.5, 1.0, -0.5]))
        >>> round(found.pearson, 6), round(found.spearman, 6), found.slope, found.sign
        (1.0, 1.0, 0.5, 1.0)
    """
    if attributed.shape != exact.shape:
        raise ArgumentError(f"attribution {list(attributed.shape)} and exact {list(exact.shape)} are not of one shape")
    stats = need("scipy.stats", "a correlation of ranks")
    kept = attributed.isfinite() & exact.isfinite()
    x, y = (values.detach().cpu()[kept.cpu()].double() for values in (attributed, exact))
    if len(x) < 2:
        raise ArgumentError(f"a correlation takes two cells at least; there are {len(x)}")
    return Agreement(
        pearson=float(torch.corrcoef(torch.stack([x, y]))[0, 1]),
        spearman=float(stats.spearmanr(x.numpy(), y.numpy()).statistic),
        slope=float((x @ y) / (x @ x)),
        sign=float((x.sign() == y.sign()).double().mean()),
        count=len(x),
    )


@attrs.frozen(kw_only=True, eq=False, repr=False)
class NodeAttribution:
    """What places at some hook points did for a metric, to first order.

    A value is in the metric's units: how much higher the metric is, by this estimate, for the clean value there in the
    corrupted one's (or the baseline's) place.

    Attributes:
        values: By canonical hook name, `[batch, ...]`; the other axes are those of `axes`.
        axes: By hook name, the axes after the batch, in the words of `lens_core.shapes`.
        layers: By hook name, the 0-based block; None outside of the blocks.
        clean: The metric of the clean run, `[batch]`, or one number for all rows.
        corrupted: The same of the corrupted run; None where none was given.
    """

    values: Mapping[str, Float[Tensor, "batch ..."]] = attrs.field(repr=False)
    axes: Mapping[str, tuple[str, ...]] = attrs.field(repr=False)
    layers: Mapping[str, int | None] = attrs.field(repr=False)
    clean: Float[Tensor, "..."] = attrs.field(repr=False)
    corrupted: Float[Tensor, "..."] | None = attrs.field(default=None, repr=False)

    @property
    def scores(self) -> Mapping[str, Float[Tensor, "..."]]:
        """Give the means over the batch, by hook name; of a metric of all rows, the sums of the rows' shares."""
        return {name: _over_rows(values, self.clean) for name, values in self.values.items()}

    @checks_arguments
    def summed(self, *axes: str) -> "NodeAttribution":
        """Sum over some axes, wherever a hook point has them: `summed("pos")` gives one value for each head.

        Raises:
            ArgumentError: No hook point has such an axis.
        """
        known = {axis for own in self.axes.values() for axis in own}
        unknown = [axis for axis in axes if axis not in known]
        if unknown:
            raise ArgumentError(f"no hook point here has an axis {unknown[0]!r}; there are {', '.join(sorted(known))}")
        values, left = dict[str, Tensor](), dict[str, tuple[str, ...]]()
        for name, value in self.values.items():
            gone = [1 + at for at, axis in enumerate(self.axes[name]) if axis in axes]
            values[name] = value.sum(gone) if gone else value
            left[name] = tuple(axis for axis in self.axes[name] if axis not in axes)
        return attrs.evolve(self, values=values, axes=left)

    @checks_arguments
    def stacked(self, part: str) -> Float[Tensor, "layer batch ..."]:
        """Stack the values of one kind of hook point over its layers, such as `"attn.hook_z"`, on the first's device.

        Raises:
            ArgumentError: No hook point here is of that kind.
        """
        names = [name for name in self.values if name.endswith(f".{part}") and self.layers[name] is not None]
        if not names:
            kinds = sorted({_part(name) for name in self.values})
            raise ArgumentError(f"no {part!r} here; there are {', '.join(kinds)}")
        return torch.stack([self.values[name].to(self.values[names[0]].device) for name in names])

    @checks_arguments
    def top_nodes(self, k: int = 10, *, signed: bool = False) -> list[tuple[str, float]]:
        """Give the k places with the largest mean value, of either sign unless `signed`, as label and value.

        Example:
            >>> import torch, lens_core as lens
            >>> from lens_core.analysis.attribution import attribute_nodes
            >>> model = lens.load("toy:gpt2")
            >>> clean, corrupted = model.to_tokens("king apple river"), model.to_tokens("king moon river")
            >>> found = attribute_nodes(model, clean, corrupted, lambda logits: logits[:, -1, 3], names="z")
            >>> len(found.summed("pos").top_nodes(3))
            3
        """
        labels = [label for _, label, _ in self._cells()]
        return _top(labels, torch.cat([value.flatten() for value in self.scores.values()]), k, signed=signed)

    def to_dataframe(self) -> Any:
        """Give one row for each place: label, hook, layer, its index along each axis, mean value, standard error.

        Needs pandas. The standard error is that of the mean over the batch; NaN for one example.
        """
        pandas = need("pandas", "a data frame")
        rows = [{"label": label, "hook": name, "layer": self.layers[name], **at} for name, label, at in self._cells()]
        return pandas.DataFrame(rows).assign(**_statistics([v.flatten(1) for v in self.values.values()], self.clean))

    @checks_arguments
    def heatmap(self, part: str, *, title: str | None = None) -> Picture:
        """Draw the means of one kind of hook point: layers downwards; heads, positions or neurons to the right.

        Raises:
            ArgumentError: No such kind, or more than one axis besides the layers: sum over the others first.
        """
        stack = torch.stack([_over_rows(values, self.clean) for values in self.stacked(part)])
        names = [name for name in self.values if name.endswith(f".{part}")]
        axes = self.axes[names[0]]
        if len(axes) != 1:
            raise ArgumentError(f"a heat map has layers and one axis more; {part!r} has {axes}. Use summed(...) first")
        columns = [f"{_SIGNS.get(axes[0], '')}{index}" for index in range(stack.shape[1])]
        rows = [f"layer {self.layers[name]}" for name in names]
        return view.grid(rows, columns, stack.cpu(), title=title or f"Attribution at {part}", unit=axes[0])

    def agreement(self, exact: Mapping[str, Tensor]) -> Agreement:
        """Compare with exact effects by hook name, `[batch, ...]` as `values`; needs scipy.

        Raises:
            ArgumentError: Effects of other hook points or shapes.
        """
        if set(exact) != set(self.values):
            raise ArgumentError(f"exact effects are of {sorted(exact)}, and attribution of {sorted(self.values)}")
        pairs = [(value.flatten(), exact[name].flatten()) for name, value in self.values.items()]
        return agreement(*(torch.cat(side) for side in zip(*pairs, strict=True)))

    def __repr__(self) -> str:
        """Show the largest."""
        return f"NodeAttribution({_shown(self.top_nodes(3))}, of {sum(v[0].numel() for v in self.values.values())})"

    def _repr_html_(self) -> str:
        return _bars(self.top_nodes(20), "Attribution: the 20 largest")

    def _cells(self) -> Iterator[tuple[str, str, dict[str, int]]]:
        """Name every place: hook name, label, and index along each axis."""
        for name, value in self.values.items():
            for index in product(*map(range, value.shape[1:])):
                at = dict(zip(self.axes[name], index, strict=True))
                yield name, _label(name, self.layers[name], at), at


@attrs.frozen(kw_only=True, eq=False, repr=False)
class EdgeAttribution:
    """What each edge of a model's graph did for a metric, to first order.

    A value is in the metric's units: how much higher the metric is, by this estimate, where the reader alone hears the
    writer's clean contribution in the corrupted one's (or the baseline's) place.

    Attributes:
        values: By example, 0 where there is no edge.
        graph: Its writers and readers are the two last axes.
        clean: The metric of the clean run, `[batch]`, or one number for all rows.
        corrupted: The same of the corrupted run; None where none was given.
    """

    values: Float[Tensor, "batch writer reader"] = attrs.field(repr=False)
    graph: Graph
    clean: Float[Tensor, "..."] = attrs.field(repr=False)
    corrupted: Float[Tensor, "..."] | None = attrs.field(default=None, repr=False)

    @property
    def scores(self) -> Float[Tensor, "writer reader"]:
        """Give the means over the batch; of a metric that gives one number for all rows, the sums of their shares."""
        return _over_rows(self.values, self.clean)

    @property
    def node_values(self) -> Float[Tensor, "batch writer"]:
        """Sum over each writer's edges: what the writer did along all of them."""
        return self.values.sum(2)

    @checks_arguments
    def score(self, edge: Edge | str) -> float:
        """Give the mean value of one edge, by its label such as `L0H3 -> L1H2.k`."""
        found = edge if isinstance(edge, Edge) else self.graph.edge(edge)
        return float(self.scores[self.graph.writers.index(found.source), self.graph.readers.index(found.target)])

    @checks_arguments
    def top_edges(self, k: int = 10, *, signed: bool = False) -> list[tuple[str, float]]:
        """Give the k edges with the largest mean value, of either sign unless `signed`, as label and value."""
        return _top([edge.label for edge in self.graph.edges], _over_rows(self._flat(), self.clean), k, signed=signed)

    @checks_arguments
    def top_nodes(self, k: int = 10, *, signed: bool = False) -> list[tuple[str, float]]:
        """Give the k writers with the largest mean of `node_values`, likewise."""
        values = _over_rows(self.node_values, self.clean)
        return _top([node.label for node in self.graph.writers], values, k, signed=signed)

    def to_dataframe(self) -> Any:
        """Give one row for each edge: label, source, target, mean value and its standard error; needs pandas."""
        pandas = need("pandas", "a data frame")
        rows = [{"edge": e.label, "source": e.source.label, "target": e.target.label} for e in self.graph.edges]
        return pandas.DataFrame(rows).assign(**_statistics([self._flat()], self.clean))

    @checks_arguments
    def heatmap(self, *, title: str | None = None) -> Picture:
        """Draw writers downwards and readers to the right; no colour where there is no edge.

        In a large model this is a large page: attribute with `graph(model, heads=False)` for an overview.
        """
        cells = self.scores.cpu().masked_fill(~self.graph.mask, torch.nan)
        rows, columns = ([node.label for node in nodes] for nodes in (self.graph.writers, self.graph.readers))
        return view.grid(rows, columns, cells, title=title or "Attribution of edges")

    def agreement(self, exact: Float[Tensor, "batch writer reader"]) -> Agreement:
        """Compare with exact effects of the edges, laid out as `values`; needs scipy.

        Raises:
            ArgumentError: Effects of another shape.
        """
        mask = self.graph.mask.to(self.values.device)
        return agreement(self.values.masked_fill(~mask, torch.nan), exact)

    def _flat(self) -> Float[Tensor, "batch edge"]:
        mask = self.graph.mask.to(self.values.device)
        return self.values.mT[:, mask.T]

    def __repr__(self) -> str:
        """Show the largest."""
        return f"EdgeAttribution({_shown(self.top_edges(3))}, of {len(self.graph.edges)} edges)"

    def _repr_html_(self) -> str:
        return _bars(self.top_edges(20), "Attribution: the 20 largest edges")


def _shown(top: Sequence[tuple[str, float]]) -> str:
    """Write labels and values in a line."""
    return ", ".join(f"{label} {value:+.3g}" for label, value in top)


def _over_rows(values: Float[Tensor, "batch ..."], measured: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Take the mean; where the metric is one number for all rows, each row's values are its share: take their sum."""
    return values.sum(0) if measured.ndim == 0 else values.mean(0)


def _bars(top: Sequence[tuple[str, float]], title: str) -> str:
    picture = view.bars([label for label, _ in top], [value for _, value in top], title=title)
    return picture._repr_html_()  # pyright: ignore[reportPrivateUsage]


def _part(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def _label(name: str, layer: int | None, at: Mapping[str, int]) -> str:
    """Write a place as `L1H2.z@5`: block, head or neuron, hook point, position."""
    block = "" if layer is None else f"L{layer}"
    own = "".join(f"{sign}{at[axis]}" for axis, sign in _SIGNS.items() if axis in at)
    position = "".join(f"@{at[axis]}" for axis in ("pos", "query", "key") if axis in at)
    named = (*_SIGNS, "pos", "query", "key")
    rest = "".join(f"[{axis} {index}]" for axis, index in at.items() if axis not in named)
    short = name.rsplit(".", 1)[-1].removeprefix("hook_")
    return f"{block}{own}.{short}{position}{rest}" if block else f"{short}{own}{position}{rest}"


def _top(labels: Sequence[str], values: Tensor, k: int, *, signed: bool) -> list[tuple[str, float]]:
    """Give the largest values with their labels."""
    if not is_whole(k):
        raise ArgumentError(f"k is how many to give, 1 or more; got {k!r}")
    order = (values if signed else values.abs()).topk(min(k, len(values))).indices
    return [(labels[int(index)], float(values[index])) for index in order]


def _statistics(flat: Sequence[Tensor], measured: Tensor) -> dict[str, Any]:
    """Give mean and standard error over examples for every cell; of a metric of all rows the sum, without an error."""
    values = torch.cat([value.detach().cpu() for value in flat], 1).double()
    count = len(values)
    is_one_each = count > 1 and measured.ndim > 0
    errors = values.std(0) / count**0.5 if is_one_each else torch.full(values.shape[1:], torch.nan)
    return {"value": _over_rows(values, measured).numpy(), "stderr": errors.numpy()}
