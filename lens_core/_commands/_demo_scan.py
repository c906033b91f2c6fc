# ruff: noqa: TID253 - imported when the demo runs, not when its options are declared
"""What `lens demo` measures on a model with state-space mixers: a model and a text in, plain values out."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from lens_core._commands._demo_reading import (
    ROUNDINGS,
    Text,
    contrast,
    losses_with,
    reading,
    telling_position,
    word,
)
from lens_core._commands._demo_scan_page import KnockedOut, MapScore, ScanResult, TokenParts
from lens_core.analysis import heads as _heads
from lens_core.analysis.ssm_attention import effective_attention
from lens_core.analysis.ssm_knockout import knockout
from lens_core.analysis.ssm_scan import mixer_layers
from lens_core.analysis.ssm_tokens import token_attribution

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache
    from lens_core.model import LensModel

__all__ = ["measure_scan"]

OFFSETS = 4  # places counted from the earlier occurrence: itself, and the next three, as far as a convolution carries
RECENT = 3  # tokens just before, which every scan reads and which tell nothing about copying
LAYERS = 4  # whose maps are drawn
UNITS = 4  # channels or heads of each such layer that have a map of their own
_BLOCK = 256  # channels or heads whose maps are in memory at once


def measure_scan(model: "LensModel", text: Text, command: str, *, begin: Callable[[str], None]) -> ScanResult:
    """Find where the effective attention copies from, knock these sources out, and attribute a logit to tokens."""
    tokens = text.tokens
    begin("caching every activation")
    (logits, clean), cache = model.run_with_cache(tokens, return_type="both", loss_per_token=True)
    losses = [None, *map(float, clean[0])]
    shared = reading(model, text, cache, logits, losses, command)
    begin("computing the effective attention")
    places = [_after(tokens, offset) for offset in range(OFFSETS)]
    layers = mixer_layers(cache.table)
    whole = {layer: effective_attention(cache, layer, reduce="mean_abs").values for layer in layers}
    shares = {layer: _shares(values[:, None], places)[0] for layer, values in whole.items()}
    layer, offset = max(((one, at) for one in layers for at in range(OFFSETS)), key=lambda at: shares[at[0]][at[1]])
    drawn = sorted(sorted(layers, key=lambda one: -shares[one][offset])[:LAYERS])
    maps, units, error = _maps(cache, drawn, places, offset)
    begin("knocking its sources out")
    knocked = _knocked_out(model, tokens, losses, shared["repeated"], places, offset)
    begin("attributing the logits")
    position = telling_position(losses, None if knocked is None else knocked.losses, shared["repeated"])
    even = torch.ones_like(whole[layer]).tril()
    return ScanResult(
        **shared,
        description=_description(model, cache),
        per="head" if _has_heads(cache, layer) else "channel",
        scores=[MapScore(label=f"L{one}", shares=shares[one]) for one in drawn] + units,
        even=_shares(even[:, None], places)[0],
        maps=maps,
        copying=f"L{layer}",
        offset=offset,
        error=error,
        knocked_out=knocked,
        attribution=_attribution(model, cache, logits[0], tokens[0], position),
    )


def _after(tokens: Int[Tensor, "1 pos"], offset: int) -> Bool[Tensor, "1 query key"]:
    """Mark what stands so many tokens after earlier occurrences of each token, but for queries where that is recent."""
    same = _heads.duplicate_places(tokens)
    places = F.pad(same, (offset, 0))[..., : same.shape[-1]].tril(-1)
    return _heads.unmixed(places, _recent(tokens))


def _recent(tokens: Int[Tensor, "1 pos"]) -> Bool[Tensor, "1 query key"]:
    return torch.ones_like(_heads.duplicate_places(tokens)).tril(-1).triu(-RECENT)


def _shares(
    attention: Float[Tensor, "1 map query key"], places: Sequence[Bool[Tensor, "1 query key"]]
) -> list[list[float]]:
    """Give, for each map, what share of its rows' absolute values lies at each kind of place."""
    sizes = attention.abs()
    rows = sizes / sizes.sum(-1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)
    shares = torch.stack([_heads.attention_share(rows, place) for place in places], dim=1)
    return [[float(share) for share in row] for row in shares]


def _maps(
    cache: "ActivationCache", layers: Sequence[int], places: Sequence[Tensor], offset: int
) -> tuple[dict[str, Any], list[MapScore], float]:
    """Give each layer's mean map and the maps of the units that look most at one place; and how exact they are."""
    maps: dict[str, Any] = {}
    scores: list[MapScore] = []
    errors: list[float] = []
    for layer in layers:
        mean = effective_attention(cache, layer, reduce="mean")
        maps[f"L{layer} mean"] = mean.values[0].cpu()
        errors.append(mean.error or 0.0)
        best: list[tuple[float, MapScore, Tensor]] = []
        for first in range(0, _units(cache, layer), _BLOCK):
            block = effective_attention(cache, layer, heads=slice(first, first + _BLOCK)).values
            for at, shares in enumerate(_shares(block, places)):
                label = f"L{layer}{'H' if mean.per == 'head' else 'C'}{first + at}"
                best.append((shares[offset], MapScore(label=label, shares=shares), block[0, at].cpu().clone()))
            best = sorted(best, key=lambda unit: -unit[0])[:UNITS]
        maps |= {score.label: values for _, score, values in best}
        scores += [score for _, score, _ in best]
    return maps, sorted(scores, key=lambda score: -score.shares[offset]), max(errors)


def _knocked_out(
    model: "LensModel",
    tokens: Int[Tensor, "1 pos"],
    losses: Sequence[float | None],
    repeated: Sequence[int],
    places: Sequence[Bool[Tensor, "1 query key"]],
    offset: int,
) -> KnockedOut | None:
    """Cut each position before a repeated token from the places it copies from; and from as many others to compare."""
    copied: dict[int, list[int]] = {}
    others: dict[int, list[int]] = {}
    generator = torch.Generator().manual_seed(0)
    taken = torch.stack([*places, _recent(tokens)]).any(0)[0].cpu()
    for target in (at - 1 for at in repeated):
        sources = [source for source, is_place in enumerate(places[offset][0, target]) if is_place]
        free = [source for source in range(1, target) if not taken[target, source]]
        drawn = map(int, torch.randperm(len(free), generator=generator)[: len(sources)])
        if sources:
            copied[target], others[target] = sources, [free[at] for at in drawn]
    if not copied:
        return None
    without = losses_with(model, tokens, _cuts(model, copied))
    compared = losses_with(model, tokens, _cuts(model, others))

    def mean(values: Sequence[float | None]) -> float:
        return sum(values[target + 1] or 0.0 for target in copied) / len(copied)

    return KnockedOut(
        clean=mean(losses), copied=mean(without), control=mean(compared), losses=without, pairs=copied, others=others
    )


def _cuts(model: "LensModel", pairs: Mapping[int, Sequence[int]]) -> list[tuple[Any, ...]]:
    return [
        entry
        for target, sources in pairs.items()
        if sources  # a short text may have no others to compare with
        for entry in knockout(model, "attention", sources, targets=target)
    ]


def _attribution(
    model: "LensModel",
    cache: "ActivationCache",
    logits: Float[Tensor, "pos d_vocab"],
    tokens: Int[Tensor, " pos"],
    position: int,
) -> TokenParts:
    """Split the logit of the token that follows, less that of its strongest rival, by layer and source token."""
    answer, rival, total = contrast(logits, tokens, position)
    found = token_attribution(cache, answer, rival, target=position)
    values = found.values[:, 0]
    rest = [*map(float, found.constant[:, 0]), float(found.other[0]), float(found.bias.reshape(-1)[0])]
    return TokenParts(
        position=position,
        answer=word(model, answer),
        rival=word(model, rival),
        labels=[f"L{layer}" for layer in found.layers],
        values=[[float(value) for value in row] for row in values],
        remainder=sum(rest),  # never total less the tokens
        total=total,
        tolerance=ROUNDINGS * torch.finfo(logits.dtype).eps * (float(values.abs().sum()) + sum(map(abs, rest))),
    )


def _has_heads(cache: "ActivationCache", layer: int) -> bool:
    return "d_inner" not in cache.table[f"blocks.{layer}.mixer.hook_delta"].shape.split()


def _units(cache: "ActivationCache", layer: int) -> int:
    return cache["delta", layer].shape[-1]


def _description(model: "LensModel", cache: "ActivationCache") -> str:
    cfg, layer = model.cfg, mixer_layers(cache.table)[0]
    units = f"{_units(cache, layer)} {'heads' if _has_heads(cache, layer) else 'channels'}"
    states = cache["B", layer].shape[-1]
    return f"{model.architecture.name}, {cfg.n_layers} layers of {units} with {states} states, width {cfg.d_model}"
