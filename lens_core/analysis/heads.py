"""Attention heads by where they look.

A *place* is a kind of position that a query may look at, such as the token before it: a mask `[batch, query, key]`. A
head's score for it is the share of its attention that goes there, 0 to 1: the mean, over the queries of all rows that
have such a place, of the pattern summed over those keys. Every place lies before its query, so no head scores for
looking at the current token. Rows are taken as they are: padding counts as tokens.

Source: induction, previous-token and duplicate-token heads as in Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits", and Olsson et al. 2022, "In-context Learning and Induction Heads".
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from lens_core._arguments import checks_arguments
from lens_core.cache import ActivationCache
from lens_core.errors import ArgumentError, CacheError

__all__ = [
    "attention_share",
    "control_heads",
    "duplicate_places",
    "head_scores",
    "heads_above",
    "induction_places",
    "previous_places",
    "repeated_tokens",
    "unmixed",
]


@checks_arguments
def previous_places(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos pos"]:
    """Mark the token just before each.

    Example:
        >>> previous_places(torch.tensor([[7, 8, 9]])).int()
        tensor([[[0, 0, 0],
                 [1, 0, 0],
                 [0, 1, 0]]], dtype=torch.int32)
    """
    batch, length = _checked(tokens).shape
    before = torch.ones(length - 1, dtype=torch.bool, device=tokens.device).diag(-1)
    return before.expand(batch, length, length)


@checks_arguments
def duplicate_places(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos pos"]:
    """Mark earlier occurrences of each token.

    Example:
        >>> duplicate_places(torch.tensor([[7, 8, 7]])).int()
        tensor([[[0, 0, 0],
                 [0, 0, 0],
                 [1, 0, 0]]], dtype=torch.int32)
    """
    tokens = _checked(tokens)
    return (tokens[:, :, None] == tokens[:, None, :]).tril(-1)


@checks_arguments
def induction_places(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos pos"]:
    """Mark the tokens that came after earlier occurrences of each token, where an induction head looks.

    Example:
        >>> induction_places(torch.tensor([[7, 8, 7]])).int()
        tensor([[[0, 0, 0],
                 [0, 0, 0],
                 [0, 1, 0]]], dtype=torch.int32)
    """
    return F.pad(duplicate_places(tokens), (1, 0))[..., :-1].tril(-1)


def _checked(tokens: object) -> Tensor:
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        got = f"shape {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ArgumentError(f"tokens are ids [batch, pos], as model.to_tokens gives; got {got}")
    return tokens


@checks_arguments
def unmixed(
    places: Bool[Tensor, "batch query key"], *others: Bool[Tensor, "batch query key"]
) -> Bool[Tensor, "batch query key"]:
    """Drop the queries at which a place of this kind is also one of another kind.

    In `a a` the token before the second is also its earlier occurrence; in `a b a b` the token before the last came
    after an earlier occurrence of it. What is left tells the kinds of heads apart.

    Raises:
        ArgumentError: The places are not of one text.

    Example:
        >>> tokens = torch.tensor([[7, 8, 7, 8, 9, 7]])
        >>> places = unmixed(induction_places(tokens), previous_places(tokens), duplicate_places(tokens))
        >>> places.nonzero().tolist()
        [[0, 5, 1], [0, 5, 3]]
    """
    mixed = torch.zeros_like(places)
    for other in others:
        if other.shape != places.shape:
            raise ArgumentError(f"places {tuple(places.shape)} and {tuple(other.shape)} are not of one text")
        mixed |= other
    return places & ~(places & mixed).any(-1, keepdim=True)


@checks_arguments
def repeated_tokens(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Mark the tokens that the text foretells: the token before and this one stood side by side before.

    Example:
        >>> repeated_tokens(torch.tensor([[7, 8, 9, 7, 8, 8]])).int()
        tensor([[0, 0, 0, 0, 1, 0]], dtype=torch.int32)
    """
    same = duplicate_places(tokens)
    pairs = same[:, 1:, 1:] & same[:, :-1, :-1]
    return F.pad(pairs.any(-1), (1, 0))


@checks_arguments
def attention_share(
    pattern: Float[Tensor, "batch n_heads query key"], places: Bool[Tensor, "batch query key"]
) -> Float[Tensor, " n_heads"]:
    """Score each head: its mean attention to the places, over the queries that have any.

    Args:
        pattern: Attention after the softmax.
        places: What counts, as `induction_places` and its kin give.

    Returns:
        0 to 1 for each head, in float32 or wider; 0 where no query has such a place.

    Raises:
        ArgumentError: The two are not of the same rows, queries and keys.

    Example:
        >>> tokens = torch.tensor([[7, 8, 7]])
        >>> looks_back = torch.tensor([[[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.25, 0.75, 0.0]]]])
        >>> attention_share(looks_back, induction_places(tokens)), attention_share(looks_back, previous_places(tokens))
        (tensor([0.7500]), tensor([0.8750]))
    """
    wide = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    places = places.to(pattern.device)
    if places.shape != (pattern.shape[0], *pattern.shape[2:]):
        raise ArgumentError(
            f"the pattern {tuple(pattern.shape)} and the places {tuple(places.shape)} are not of one text; "
            "give the tokens of the run, and a cache of all its positions"
        )
    share = (wide * places[:, None]).sum(-1)  # batch n_heads query
    return share.sum((0, 2)) / places.any(-1).sum().clamp(min=1)


@checks_arguments
def head_scores(cache: ActivationCache, places: Bool[Tensor, "batch query key"]) -> dict[tuple[int, int], float]:
    """Score every head whose pattern is cached, by `(layer, head)`.

    Args:
        cache: Holds `hook_pattern` of some layers, for all positions.
        places: What counts; of the tokens that were run.

    Raises:
        CacheError: No pattern is cached.
        ArgumentError: The places are of other tokens.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> tokens = model.to_tokens("the red dog saw the red dog")
        >>> _, cache = model.run_with_cache(tokens, names_filter="pattern")
        >>> scores = head_scores(cache, induction_places(tokens))
        >>> len(scores) == model.cfg.n_layers * model.cfg.n_heads
        True
    """
    scores: dict[tuple[int, int], float] = {}
    if not isinstance(places, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"places are a mask [batch, query, key], as induction_places gives; got {places!r}")
    for name in cache:
        layer = cache.table[name].layer
        if layer is None or not name.endswith(".hook_pattern"):
            continue
        pattern = cache[name] if cache.has_batch_dim else cache[name][None]
        shares = attention_share(pattern, places)
        scores |= {(layer, head): float(share) for head, share in zip(_heads(cache, pattern), shares, strict=True)}
    if not scores and not any(name.endswith(".hook_pattern") for name in cache.table):
        raise CacheError("this model has no attention heads; for state-space mixers see cache.effective_attention")
    if not scores:
        raise CacheError("no attention pattern is cached; run with names_filter='pattern', or None for all defaults")
    return scores


def _heads(cache: ActivationCache, pattern: Tensor) -> Sequence[int]:
    """List the heads that a pattern has: all, or those that the run chose."""
    return range(pattern.shape[1]) if cache.heads is None else cache.heads


def heads_above(scores: Mapping[tuple[int, int], float], threshold: float) -> list[tuple[int, int]]:
    """List the heads of at least this score, best first.

    Example:
        >>> heads_above({(0, 0): 0.1, (1, 0): 0.6, (1, 1): 0.9}, 0.5)
        [(1, 1), (1, 0)]
    """
    return sorted((head for head in scores if scores[head] >= threshold), key=lambda head: -scores[head])


def control_heads(heads: Sequence[tuple[int, int]], scores: Mapping[tuple[int, int], float]) -> list[tuple[int, int]]:
    """Choose other heads to ablate for comparison: for each head the lowest in score of its layer.

    A layer that has none left takes one from the nearest layer that has. Fewer are chosen than `heads` only where most
    heads of the model are among them.

    Args:
        heads: What is ablated, `(layer, head)`.
        scores: Of every head that may be chosen.

    Example:
        >>> control_heads([(1, 1)], {(0, 0): 0.0, (1, 0): 0.6, (1, 1): 0.9, (1, 2): 0.2})
        [(1, 2)]
    """
    free = [head for head in scores if head not in heads]
    chosen: list[tuple[int, int]] = []
    for layer, _ in heads[: len(free)]:
        best = min(free, key=lambda head, layer=layer: (abs(head[0] - layer), scores[head]))
        free.remove(best)
        chosen.append(best)
    return sorted(chosen)
