"""What a comparison of two models found, and how it is shown."""

from collections.abc import Callable
from typing import Any

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments
from lens_core._extras import need
from lens_core.analysis._listed import listed
from lens_core.errors import ArgumentError

__all__ = ["Comparison", "Context", "WeightChange"]

_TABLES = ("points", "positions", "tokens", "contexts", "weights")


@attrs.frozen(kw_only=True)
class WeightChange:
    """How far one parameter of the second model is from the first's."""

    name: str
    """HF's."""
    layer: int | None
    """0-based block, or None outside of the blocks."""
    size: float
    """The Frobenius norm of the first model's."""
    change: float
    """The Frobenius norm of the difference."""

    @property
    def relative(self) -> float:
        """The change over the size; infinite where the first model's is all zeros."""
        return self.change / self.size if self.size else (float("inf") if self.change else 0.0)


@attrs.frozen(kw_only=True)
class Context:
    """A place where the two models say different things about the next token."""

    kl: float
    """KL(a ‖ b) there, in nats."""
    text: int
    """Which text, 0-based."""
    pos: int
    """The position in it, 0-based."""
    before: str
    """The tokens up to there, the last few of them."""
    top_a: str
    """The first model's most likely next token."""
    top_b: str
    """The second model's."""


@attrs.frozen(kw_only=True, eq=False)
class Comparison:
    """Where two models differ, over all real positions of some texts.

    Attributes:
        names: The hook points that were compared, in order.
        layers: Their blocks; None outside of the blocks.
        parts: Their names below the block.
        relative: ‖b - a‖ / ‖a‖ of each, over all positions together.
        cosine: The mean over positions of the cosine of a's and b's vector.
        relative_by_pos: As `relative`, for each position of a text.
        cosine_by_pos: As `cosine`, likewise.
        kl: KL(a ‖ b) of the next token, in nats, the mean over positions.
        kl_by_pos: The same for each position of a text.
        agreement: The share of positions where both find the same token the most likely.
        losses: The next-token cross-entropy of each model, in nats.
        probs: The mean probability that each model gives to each token.
        contexts: Where the next token's distributions differ most, the most first.
        weights: The parameters that both have; empty if they were not compared.
    """

    names: tuple[str, ...] = attrs.field(repr=False)
    layers: tuple[int | None, ...] = attrs.field(repr=False)
    parts: tuple[str, ...] = attrs.field(repr=False)
    relative: Float[Tensor, " point"] = attrs.field(repr=False)
    cosine: Float[Tensor, " point"] = attrs.field(repr=False)
    relative_by_pos: Float[Tensor, "point pos"] = attrs.field(repr=False)
    cosine_by_pos: Float[Tensor, "point pos"] = attrs.field(repr=False)
    kl: float
    kl_by_pos: Float[Tensor, " pos"] = attrs.field(repr=False)
    agreement: float
    losses: tuple[float, float]
    probs: Float[Tensor, "two d_vocab"] = attrs.field(repr=False)
    contexts: tuple[Context, ...] = attrs.field(repr=False)
    weights: tuple[WeightChange, ...] = attrs.field(repr=False)
    decode: Callable[[int], str] = attrs.field(repr=False, default=str)
    """From a token id to what is shown."""

    @property
    def prob_change(self) -> Float[Tensor, " d_vocab"]:
        """How much more probable each token is to the second model, in the mean."""
        return self.probs[1] - self.probs[0]

    @checks_arguments
    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """Give the hook points with the largest relative difference."""
        order = listed(self.relative.argsort(descending=True, stable=True)[:k])
        return [(self.names[at], float(self.relative[at])) for at in order]

    @checks_arguments
    def top_tokens(self, k: int = 10) -> list[tuple[str, float]]:
        """Give the tokens whose mean probability changed most, and by how much."""
        order = listed(self.prob_change.abs().argsort(descending=True, stable=True)[:k])
        return [(self.decode(token), float(self.prob_change[token])) for token in order]

    @checks_arguments
    def top_weights(self, k: int = 10) -> list[WeightChange]:
        """Give the parameters with the largest relative change."""
        return sorted(self.weights, key=lambda one: -one.relative)[:k]

    @checks_arguments
    def to_dataframe(self, table: str = "points") -> Any:
        """Give one table as a pandas data frame.

        Args:
            table: `"points"` (a row for each hook point), `"positions"` (for each hook point and position), `"tokens"`
                (for each token of the vocabulary), `"contexts"` or `"weights"`.

        Raises:
            ArgumentError: No such table.
            MissingPackageError: pandas is not installed.
        """
        if table not in _TABLES:
            raise ArgumentError(f"table is one of {', '.join(map(repr, _TABLES))}; got {table!r}")
        pandas = need("pandas", "a data frame")
        if table == "points":
            columns = {"name": self.names, "layer": pandas.array(self.layers, dtype="Int64"), "part": self.parts}
            return pandas.DataFrame(columns | {"relative": listed(self.relative), "cosine": listed(self.cosine)})
        if table == "positions":
            n_pos = self.relative_by_pos.shape[1]
            rows: list[dict[str, Any]] = [
                {"name": name, "pos": at, "relative": relative, "cosine": cosine}
                for name, relatives, cosines in zip(
                    self.names, listed(self.relative_by_pos), listed(self.cosine_by_pos), strict=True
                )
                for at, relative, cosine in zip(range(n_pos), relatives, cosines, strict=True)
            ]
            return pandas.DataFrame(rows)
        if table == "tokens":
            ids = range(self.probs.shape[1])
            own, other = listed(self.probs)
            found: dict[str, Any] = {
                "id": ids,
                "token": [self.decode(token) for token in ids],
                "prob_a": own,
                "prob_b": other,
            }
            return pandas.DataFrame(found | {"change": listed(self.prob_change)})
        if table == "contexts":
            return pandas.DataFrame([attrs.asdict(one) for one in self.contexts])
        return pandas.DataFrame([{**attrs.asdict(one), "relative": one.relative} for one in self.weights])

    @checks_arguments
    def grid(self, *, title: str | None = None) -> view.Picture:
        """Draw the relative difference of every hook point: a row for each block, a column for each part."""
        parts = list(dict.fromkeys(self.parts))
        rows = list(dict.fromkeys(self.layers))
        values: list[list[float | None]] = [[None] * len(parts) for _ in rows]
        for layer, part, value in zip(self.layers, self.parts, listed(self.relative), strict=True):
            values[rows.index(layer)][parts.index(part)] = value
        names = ["outside" if layer is None else f"layer {layer}" for layer in rows]
        return view.grid(names, parts, values, title=title or "Relative difference", unit="of the first model's norm")

    def page(self) -> view.Page:
        """Put everything on a page."""
        summary = [
            ["KL of the next token (nats)", self.kl],
            ["loss of a (nats)", self.losses[0]],
            ["loss of b (nats)", self.losses[1]],
            ["same most likely token (share)", self.agreement],
        ]
        shown: list[view.Picture | str] = [view.table(summary, ["over all positions", "value"]), self.grid()]
        tokens = self.top_tokens(15)
        shown.append(
            view.bars(
                [view.visible(token) for token, _ in tokens],
                [change for _, change in tokens],
                title="Tokens whose probability changed most",
                unit="mean probability",
            )
        )
        if self.contexts:
            rows = [[view.visible(one.before), one.top_a, one.top_b, one.kl] for one in self.contexts[:15]]
            shown.append(view.table(rows, ["up to", "a says", "b says", "KL (nats)"], title="Where they differ most"))
        if self.weights:
            most = self.top_weights(15)
            values = [one.relative if torch.isfinite(torch.tensor(one.relative)) else None for one in most]
            shown.append(view.bars([one.name for one in most], values, title="Weights", unit="relative change"))
        return view.page("Two models compared", shown)

    def _repr_html_(self) -> str:
        return self.page()._repr_html_()  # pyright: ignore[reportPrivateUsage]
