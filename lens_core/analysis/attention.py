"""What each attention head does on average over texts: how sharply it looks, how far back, and at what.

Every number is a mean over queries, of all texts. The first token of a text is no query here: it can only look at
itself. Padding counts neither as query nor as key. Entropy and distance are of the weights divided by their sum, which
is 1 but in models with attention sinks; shares are of the weights as they are.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments
from lens_core._extras import need
from lens_core.analysis._batches import Batch, batches, run_through
from lens_core.errors import ArgumentError, EmptyInputError, UnsupportedHookError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["STATISTICS", "AttentionStatistics", "attention_statistics"]

STATISTICS = {
    "entropy": "nats",
    "distance": "tokens",
    "first": "share of attention",
    "current": "share of attention",
    "previous": "share of attention",
    "largest": "share of attention",
}
"""The statistics and their units."""


@attrs.frozen(kw_only=True, eq=False)
class AttentionStatistics:
    """Means over the queries of all texts, for each head.

    Attributes:
        entropy: Of the weights, in nats; 0 where all attention goes to one token.
        distance: How many tokens back it looks on average: the sum of `(query - key) * weight`.
        first: Share of attention to the first token of the text (BOS, where there is one).
        current: Share to the query itself.
        previous: Share to the token before.
        largest: The largest weight of a query.
        even_entropy: What the entropy would be if attention were even: the mean of the logarithm of how many tokens
            there are to look at, in nats.
        even_distance: What the distance would be then, in tokens.
        layers: What the first axis is: the layers that have attention (0-based).
        queries: How many queries the means are over.
        source_ids: Token ids that occur, in order.
        source_counts: How often each occurs as a key, the first tokens included.
        source_shares: Attention that all occurrences of a token id together get, as a share of all attention; None
            where it was not asked for.
    """

    entropy: Float[Tensor, "layer n_heads"] = attrs.field(repr=False)
    distance: Float[Tensor, "layer n_heads"] = attrs.field(repr=False)
    first: Float[Tensor, "layer n_heads"] = attrs.field(repr=False)
    current: Float[Tensor, "layer n_heads"] = attrs.field(repr=False)
    previous: Float[Tensor, "layer n_heads"] = attrs.field(repr=False)
    largest: Float[Tensor, "layer n_heads"] = attrs.field(repr=False)
    even_entropy: float
    even_distance: float
    layers: tuple[int, ...]
    queries: int
    source_ids: Int[Tensor, " token"] = attrs.field(repr=False)
    source_counts: Int[Tensor, " token"] = attrs.field(repr=False)
    source_shares: Float[Tensor, "layer n_heads token"] | None = attrs.field(repr=False, default=None)

    @checks_arguments
    def top_sources(self, layer: int, head: int, k: int = 5) -> list[tuple[int, float, int]]:
        """List what a head looks at most: token id, its share of the attention, and how often the token occurs.

        Raises:
            ArgumentError: No such head, or the sources were not kept.
        """
        if self.source_shares is None:
            raise ArgumentError("the sources were not kept; run attention_statistics with sources=True")
        if layer not in self.layers or not 0 <= head < self.entropy.shape[1]:
            raise ArgumentError(
                f"no statistics of head {head} of layer {layer}; there are layers {list(self.layers)} with heads 0 to "
                f"{self.entropy.shape[1] - 1}"
            )
        shares = self.source_shares[self.layers.index(layer), head]
        best: list[int] = cast("Any", shares.argsort(descending=True, stable=True)[:k]).tolist()
        return [(int(self.source_ids[i]), float(shares[i]), int(self.source_counts[i])) for i in best]

    def to_dataframe(self) -> Any:
        """Give one row for each head, with a column for each statistic.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        rows = [
            {"layer": layer, "head": head, **{name: float(getattr(self, name)[i, head]) for name in STATISTICS}}
            for i, layer in enumerate(self.layers)
            for head in range(self.entropy.shape[1])
        ]
        return need("pandas", "a data frame").DataFrame(rows)

    @checks_arguments
    def picture(self, name: str = "entropy") -> view.Picture:
        """Draw one statistic, layer by head.

        Raises:
            ArgumentError: No such statistic.
        """
        if name not in STATISTICS:
            raise ArgumentError(f"no statistic {name!r}; there are {', '.join(STATISTICS)}")
        even = {"entropy": self.even_entropy, "distance": self.even_distance}.get(name)
        values: Tensor = getattr(self, name)
        return view.grid(
            [f"layer {layer}" for layer in self.layers],
            [str(head) for head in range(values.shape[1])],
            cast("Any", values).tolist(),
            title=name + ("" if even is None else f" (even attention: {even:.2f})"),
            unit=STATISTICS[name],
        )

    def _repr_html_(self) -> str:
        pictures = [self.picture(name) for name in STATISTICS]
        return view.page("Attention statistics", pictures, subtitle=f"{self.queries} queries")._repr_html_()  # pyright: ignore[reportPrivateUsage]


@checks_arguments
def attention_statistics(
    model: "LensModel",
    texts: Any,
    *,
    sources: bool = True,
    batch_size: int = 8,
    prepend_bos: bool | None = None,
) -> AttentionStatistics:
    """Summarise where each head looks, over texts.

    Texts may come from an iterator: a batch at a time is in memory, and of its patterns one layer's. It costs one
    forward for each batch, up to the last layer that has attention; the sources take
    `layers x n_heads x distinct tokens` numbers.

    Args:
        model: A model with attention; in a hybrid, its attention layers are summarised.
        texts: A text, texts, or rows of ids.
        sources: Whether to keep how much attention each token id gets.
        batch_size: Texts at a time.
        prepend_bos: As in `forward`; not with ids.

    Raises:
        UnsupportedHookError: The model has no attention.
        ArgumentError: Neither texts nor ids; a batch size below 1.
        EmptyInputError: No text with two tokens or more.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> found = attention_statistics(model, ["the cat sat on the mat.", "king apple river moon"])
        >>> found.queries, bool(found.previous[0, 2] > 0.9), bool((found.entropy < found.even_entropy).all())
        (11, True, True)
        >>> token, share, count = found.top_sources(0, 2, k=1)[0]
        >>> model.to_string([token]), count
        ('the', 2)
    """
    layers = [layer for layer, kind in enumerate(model.layer_types()) if "attention" in kind]
    if not layers:
        raise UnsupportedHookError(
            "this model has no attention heads, so there are no patterns; cache.effective_attention says what "
            "state-space layers read, and its rows are no distributions"
        )
    sums = _Sums(layers, torch.promote_types(model.cfg.dtype, torch.float32), sources=sources)
    for batch in batches(model, texts, batch_size, prepend_bos=prepend_bos):
        sums.begin(batch)
        hooks = [(f"blocks.{layer}.attn.hook_pattern", sums.read(batch)) for layer in layers]
        run_through(model, batch.tokens, layers[-1], hooks, **batch.call)
        sums.end()
    return sums.statistics()


class _Sums:
    """Sums over queries, by layer."""

    def __init__(self, layers: Sequence[int], dtype: torch.dtype, *, sources: bool) -> None:
        self.layers, self.dtype, self.sources = layers, dtype, sources
        self.queries, self.even_entropy, self.even_distance = 0, 0.0, 0.0
        self.sums: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
        self.ids, self.counts = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        self.received: dict[int, Tensor] = {}  # by layer, [n_heads token]
        self._held = self.ids  # what the columns of `received` are
        self._batch: tuple[Tensor, dict[int, Tensor]] = (self.ids, {})

    def begin(self, batch: Batch) -> None:
        """Count a batch's queries and tokens."""
        for length in batch.lengths:
            self.queries += length - 1
            self.even_entropy += sum(math.log(seen) for seen in range(2, length + 1))
            self.even_distance += sum((seen - 1) / 2 for seen in range(2, length + 1))
        real: Any = batch.tokens[batch.attention_mask.bool()]
        ids, counts = cast("tuple[Tensor, Tensor]", real.unique(return_counts=True))
        self._batch = (ids, {})
        self.ids, self.counts = _merged(self.ids, self.counts, ids.cpu(), counts.cpu())

    def read(self, batch: Batch) -> Callable[..., None]:
        """Give the hook function of a batch."""
        mask = batch.attention_mask.bool()

        def add(pattern: Tensor, hook: Any) -> None:
            wide = pattern.detach().to(torch.promote_types(pattern.dtype, torch.float32))
            real = mask.to(wide.device)
            queries = real[:, None].clone()
            queries[..., 0] = False
            for name, values in _by_query(wide).items():
                total = (values * queries).sum((0, 2)).double().cpu()
                sums = self.sums[hook.layer()]
                sums[name] = sums.get(name, torch.zeros_like(total)) + total
            if self.sources:
                ids, received = self._batch
                by_key = (wide * queries[..., None]).sum(2).transpose(0, 1)[:, real]  # n_heads key, padding left out
                where = torch.searchsorted(ids.to(wide.device), batch.tokens.to(wide.device)[real])
                own = torch.zeros(len(by_key), len(ids), dtype=by_key.dtype, device=wide.device)
                received[hook.layer()] = own.index_add(1, where, by_key).double().cpu()

        return add

    def end(self) -> None:
        """Put the batch's sources to those of the batches before."""
        ids, received = self._batch
        where = torch.searchsorted(self.ids, ids.cpu())
        for layer, own in received.items():
            grown = torch.zeros(len(own), len(self.ids), dtype=torch.float64)
            if layer in self.received:
                before, held = self._held, self.received[layer]
                grown[:, torch.searchsorted(self.ids, before)] = held
            self.received[layer] = grown.index_add(1, where, own)
        self._held = self.ids

    def statistics(self) -> AttentionStatistics:
        """Give the means."""
        if not self.queries:
            raise EmptyInputError("every text has one token only, which can look at nothing else; give longer texts")
        means = {
            name: torch.stack([self.sums[layer][name] for layer in self.layers]).to(self.dtype) / self.queries
            for name in STATISTICS
        }
        shares = torch.stack([self.received[layer] for layer in self.layers]) / self.queries if self.sources else None
        return AttentionStatistics(
            **means,
            even_entropy=self.even_entropy / self.queries,
            even_distance=self.even_distance / self.queries,
            layers=tuple(self.layers),
            queries=self.queries,
            source_ids=self.ids,
            source_counts=self.counts,
            source_shares=None if shares is None else shares.to(self.dtype),
        )


def _merged(ids: Tensor, counts: Tensor, new: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """Add counts by id; the ids in order."""
    both: Any = torch.cat([ids, new])
    every, where = cast("tuple[Tensor, Tensor]", both.unique(return_inverse=True))
    return every, torch.zeros_like(every).index_add(0, where, torch.cat([counts, more]))


def _by_query(pattern: Float[Tensor, "batch n_heads query key"]) -> dict[str, Float[Tensor, "batch n_heads query"]]:
    """Give each statistic of each query."""
    size = pattern.shape[-1]
    total = pattern.sum(-1)
    share = pattern / torch.where(total > 0, total, torch.ones_like(total))[..., None]
    positions = torch.arange(size, device=pattern.device, dtype=pattern.dtype)
    back = positions[:, None] - positions
    return {
        "entropy": -torch.xlogy(share, share).sum(-1),
        "distance": (share * back).sum(-1),
        "first": pattern[..., 0],
        "current": pattern.diagonal(dim1=-2, dim2=-1),
        "previous": torch.nn.functional.pad(pattern.diagonal(-1, dim1=-2, dim2=-1), (1, 0)),
        "largest": pattern.amax(-1),
    }
