"""Scores of every head for every kind, beside controls.

A head's score for a kind is the share of its attention that goes where such a head looks, over the queries that have
such a place (`heads.attention_share`), 0 to 1. Two numbers say what of it needs no explanation:

- the **control**, the same head's score for the same places in texts that do not have them: on repeated random tokens,
  the second half is drawn anew; on texts of one's own, each text's tokens are shuffled. A head that looks a fixed
  number of tokens back scores as much there, and an induction head does not;
- **chance**, the score of even attention to all tokens so far.

State-space layers have no attention pattern. With `effective=True` they are scored by the share of the *absolute*
effective attention, `|alpha[t, s]| / sum over s of |alpha[t, s]|`: how much of what the scan reads of the past comes
from there. It leaves out signs, and what the convolution before the scan carries over a few tokens.

Source: Olsson et al. 2022 (arXiv 2209.11895) for the scores on repeated random tokens; effective
attention: Ali, Zimerman and Wolf 2024 (arXiv 2403.01590).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments, is_whole
from lens_core._extras import need
from lens_core.analysis._batches import Batch, batches, run_through, token_rows
from lens_core.analysis._random_text import random_rows, repeated_rows
from lens_core.analysis.heads import duplicate_places, induction_places, previous_places
from lens_core.errors import ArgumentError, UnsupportedHookError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["KINDS", "HeadScores", "score_heads"]

Places = Callable[[Tensor], Tensor]
KINDS: Mapping[str, Places] = {
    "previous": previous_places,
    "duplicate": duplicate_places,
    "induction": induction_places,
}
"""Kind to where such a head looks, from ids `[batch, pos]` to a mask `[batch, query, key]`."""

_CHUNK_BYTES = 64 * 2**20


@attrs.frozen(kw_only=True, eq=False)
class HeadScores:
    """How much each head does what a head of a kind does.

    Attributes:
        scores: Share of attention, 0 to 1; 0 where no query has such a place.
        control: The same in texts that do not have the places, for each draw of such texts.
        chance: The score of even attention to all tokens so far.
        queries: How many queries had such a place.
        kinds: What the first axis is.
        layers: What the second axis is: the layers that have heads (0-based).
        effective: Whether the scores are of effective attention (then a head may be a Mamba-1 channel).
    """

    scores: Float[Tensor, "kind layer head"] = attrs.field(repr=False)
    control: Float[Tensor, "draw kind layer head"] = attrs.field(repr=False)
    chance: Float[Tensor, " kind"]
    queries: Int[Tensor, " kind"]
    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    effective: bool

    @property
    def excess(self) -> Float[Tensor, "kind layer head"]:
        """Give the score less the mean of the controls: what the text, not the position, explains."""
        return self.scores - self.control.mean(0)

    @checks_arguments
    def of(self, kind: str, *, excess: bool = False) -> dict[tuple[int, int], float]:
        """Give one kind's scores by `(layer, head)`, as `heads.heads_above` and `heads.control_heads` take them.

        Args:
            kind: One of `kinds`.
            excess: Whether the control is subtracted.

        Raises:
            ArgumentError: No such kind.
        """
        if kind not in self.kinds:
            raise ArgumentError(f"no scores of kind {kind!r}; there are {', '.join(self.kinds)}")
        values = cast("Any", (self.excess if excess else self.scores)[self.kinds.index(kind)]).tolist()
        return {
            (layer, head): score
            for layer, row in zip(self.layers, values, strict=True)
            for head, score in enumerate(row)
        }

    @checks_arguments
    def top(self, kind: str, k: int = 5, *, excess: bool = False) -> list[tuple[tuple[int, int], float]]:
        """List the k best heads of a kind with their scores, best first."""
        return sorted(self.of(kind, excess=excess).items(), key=lambda item: -item[1])[:k]

    def to_dataframe(self) -> Any:
        """Give one row for each kind, layer and head: `score`, `control` (mean of the draws), `excess`, `chance`.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        rows = [
            {
                "kind": kind,
                "layer": layer,
                "head": head,
                "score": float(self.scores[i, j, head]),
                "control": float(self.control[:, i, j, head].mean()),
                "excess": float(self.excess[i, j, head]),
                "chance": float(self.chance[i]),
            }
            for i, kind in enumerate(self.kinds)
            for j, layer in enumerate(self.layers)
            for head in range(self.scores.shape[2])
        ]
        return need("pandas", "a data frame").DataFrame(rows)

    @checks_arguments
    def picture(self, kind: str, *, excess: bool = False) -> view.Picture:
        """Draw one kind's scores, layer by head.

        Raises:
            ArgumentError: No such kind.
        """
        scores = list(self.of(kind, excess=excess).values())
        n_heads = self.scores.shape[2]
        told = f"control {float(self.control[:, self.kinds.index(kind)].mean()):.2f} on average"
        chance = float(self.chance[self.kinds.index(kind)])
        return view.grid(
            [f"layer {layer}" for layer in self.layers],
            [str(head) for head in range(n_heads)],
            [scores[start : start + n_heads] for start in range(0, len(scores), n_heads)],
            title=f"{kind}{' less control' if excess else ''} (chance {chance:.2f}, {told})",
            unit="share of attention",
        )

    def _repr_html_(self) -> str:
        return view.page("Heads by kind", [self.picture(kind) for kind in self.kinds])._repr_html_()  # pyright: ignore[reportPrivateUsage]


@checks_arguments
def score_heads(
    model: "LensModel",
    texts: Any = None,
    *,
    kinds: Mapping[str, Places] | None = None,
    effective: bool = False,
    n_texts: int = 8,
    length: int = 24,
    n_controls: int = 2,
    batch_size: int = 8,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> HeadScores:
    """Score every head for every kind, with controls.

    It costs one forward for each batch of texts, and `n_controls` more. Patterns are read one layer at a time, and none
    is kept.

    Args:
        model: A model with attention; with `effective`, one with state-space layers.
        texts: Texts or rows of ids, possibly from an iterator; None for random tokens that come twice.
        kinds: Where heads of a kind look, by name; functions from ids `[batch, pos]` to a mask `[batch, query, key]`.
            None for previous, duplicate and induction heads.
        effective: Score the state-space layers by their effective attention (absolute shares), not attention layers.
        n_texts: Random rows.
        length: Random tokens in each, before they come again.
        n_controls: Runs without the places.
        batch_size: Rows at a time.
        prepend_bos: Whether rows begin with BOS; None for what the tokenizer does. Not with ids.
        seed: Of the random tokens and of the controls.

    Raises:
        UnsupportedHookError: The model has no attention, or with `effective` no state-space layers.
        ArgumentError: Numbers that are not positive; kinds that do not give masks.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> found = score_heads(model)
        >>> (head, score), *_ = found.top("induction")
        >>> head, score > 0.5, score > 10 * found.control.amax(0)[2].max()
        ((1, 0), True, tensor(True))
    """
    layers = _layers(model, effective=effective)
    kinds = dict(KINDS if kinds is None else kinds)
    if not kinds:
        raise ArgumentError("kinds is empty; give at least one, or None")
    if not is_whole(n_controls):
        raise ArgumentError(f"n_controls is a positive number; got {n_controls!r}")
    generator = torch.Generator().manual_seed(seed)
    if texts is None:
        rows: Iterable[Tensor] = repeated_rows(model, n_texts, length, generator, prepend_bos)
    else:
        rows = token_rows(model, texts, prepend_bos=prepend_bos)
    tallies = [_Tally() for _ in range(1 + n_controls)]
    chance, queries = torch.zeros(len(kinds), dtype=torch.float64), torch.zeros(len(kinds), dtype=torch.long)
    for batch in batches(model, iter(rows), batch_size):
        places = _places(batch, kinds)
        queries += places.any(-1).sum((1, 2)).cpu()
        so_far = torch.arange(1, places.shape[-1] + 1, device=places.device)
        chance += (places.sum(-1) / so_far).sum((1, 2)).double().cpu()
        for index, tally in enumerate(tallies):
            run = batch if index == 0 else _without_places(model, batch, generator, length if texts is None else None)
            _read(model, run, layers, tally.taker(places), effective=effective)
    scores = [tally.total(layers) / queries.clamp(min=1)[:, None, None] for tally in tallies]
    dtype = torch.promote_types(model.cfg.dtype, torch.float32)
    return HeadScores(
        scores=scores[0].to(dtype),
        control=torch.stack(scores[1:]).to(dtype),
        chance=(chance / queries.clamp(min=1)).to(dtype),
        queries=queries,
        kinds=tuple(kinds),
        layers=tuple(layers),
        effective=effective,
    )


class _Tally:
    """Attention to the places, summed over queries: by layer and head, `[kind]`."""

    def __init__(self) -> None:
        self.sums: dict[tuple[int, int], Tensor] = {}  # by layer and first head of a chunk

    def taker(self, places: Bool[Tensor, "kind batch query key"]) -> Callable[[int, int, Tensor], None]:
        """Give the function that adds what some heads of a layer give to the places."""

        def take(layer: int, first: int, pattern: Tensor) -> None:
            share = torch.einsum("bhqk,nbqk->nh", pattern, places.to(pattern)).double().cpu()
            self.sums[layer, first] = self.sums.get((layer, first), torch.zeros_like(share)) + share

        return take

    def total(self, layers: Sequence[int]) -> Float[Tensor, "kind layer head"]:
        rows = [torch.cat([self.sums[key] for key in sorted(self.sums) if key[0] == layer], dim=1) for layer in layers]
        return torch.stack(rows, dim=1)


def _layers(model: "LensModel", *, effective: bool) -> list[int]:
    types = model.layer_types()
    attending = [layer for layer, kind in enumerate(types) if "attention" in kind]
    mixing = [layer for layer, kind in enumerate(types) if "mamba" in kind]
    if effective and not mixing:
        raise UnsupportedHookError("effective=True is for state-space layers, and this model has none; leave it out")
    if not effective and not attending:
        raise UnsupportedHookError(
            "this model has no attention heads; effective=True scores its state-space layers by the share of the "
            "absolute effective attention"
        )
    return mixing if effective else attending


def _places(batch: Batch, kinds: Mapping[str, Places]) -> Bool[Tensor, "kind batch query key"]:
    real = batch.attention_mask.bool()
    found: list[Tensor] = []
    for name, where in kinds.items():
        mask: Any = where(batch.tokens)
        expected = (*batch.tokens.shape, batch.tokens.shape[1])
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != expected:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ArgumentError(f"kind {name!r} gives {got}, not a mask [batch, query, key] = {list(expected)}")
        found.append(mask.to(real.device) & real[:, :, None])
    return torch.stack(found)


def _without_places(model: "LensModel", batch: Batch, generator: torch.Generator, length: int | None) -> Batch:
    """Give a batch of the same shape in which the text does not come again: its end drawn anew, or all shuffled."""
    tokens = batch.tokens.clone()
    if length is not None:
        tokens[:, -length:] = random_rows(model, len(tokens), length, generator).to(tokens)
    else:
        for row, size in zip(tokens, batch.lengths, strict=True):
            order = 1 + torch.randperm(size - 1, generator=generator)
            row[1:size] = row[order.to(row.device)]
    return attrs.evolve(batch, tokens=tokens)


def _read(
    model: "LensModel",
    batch: Batch,
    layers: Sequence[int],
    take: Callable[[int, int, Tensor], None],
    *,
    effective: bool,
) -> None:
    """Run a batch, and hand layer, first head and `[batch, head, query, key]` of some heads to `take`."""
    if not effective:

        def read(pattern: Tensor, hook: Any) -> None:
            wide = torch.promote_types(pattern.dtype, torch.float32)
            take(hook.layer(), 0, pattern.detach().to(wide))

        names = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
        run_through(model, batch.tokens, max(layers), [(name, read) for name in names], **batch.call)
        return
    names = [f"blocks.{layer}.mixer.hook_{name}" for layer in layers for name in ("delta", "B", "C")]
    with torch.no_grad(), model.caching(names) as cache:
        run_through(model, batch.tokens, max(layers), [], **batch.call)
        step = max(1, _CHUNK_BYTES // (8 * batch.tokens.numel() * batch.tokens.shape[1]))
        for layer in layers:
            for first in range(0, cache["delta", layer].shape[2], step):
                take(layer, first, _shares(cache.effective_attention(layer, heads=slice(first, first + step)).values))


def _shares(effective: Tensor) -> Tensor:
    """Give absolute values that sum to 1 over the sources; zeros where nothing is read."""
    size = effective.to(torch.promote_types(effective.dtype, torch.float32)).abs()
    total = size.sum(-1, keepdim=True)
    return size / torch.where(total > 0, total, torch.ones_like(total))
