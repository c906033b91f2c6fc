# ruff: noqa: TID253 - imported when the demo runs, not when its options are declared
"""What `lens demo` measures, step by step: a model and a text in, plain values out.

Which story a model has is told by its hook points: attention patterns are read here, scans in `_demo_scan`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_core import edits
from lens_core._commands._demo_page import Ablation, Attribution, DemoResult, HeadScores, head_label
from lens_core._commands._demo_reading import (
    ROUNDINGS,
    Text,
    choose_text,
    contrast,
    has_patterns,
    has_scan,
    losses_with,
    places,
    reading,
    telling_position,
    word,
)
from lens_core._commands._demo_scan import measure_scan
from lens_core._commands._demo_scan_page import ScanResult
from lens_core.analysis import heads as _heads
from lens_core.errors import UnsupportedHookError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache
    from lens_core.model import LensModel

__all__ = ["choose_text", "measure"]

INDUCTION = 0.4  # share of attention from which a head counts as an induction head
PICTURED = 2_000_000  # cells of attention patterns on the page, about 5 MB
_HEAD_LABEL = re.compile(r"L\d+H\d+")
_Head = tuple[int, int]


@torch.no_grad()
def measure(model: "LensModel", text: Text, command: str, *, begin: Callable[[str], None]) -> DemoResult | ScanResult:
    """Run the whole demo on one text; `begin` is told what comes next.

    Raises:
        UnsupportedHookError: The model has neither attention patterns nor state-space mixers.
    """
    if has_patterns(model):
        return _measure_heads(model, text, command, begin=begin)
    if has_scan(model):
        return measure_scan(model, text, command, begin=begin)
    raise UnsupportedHookError(
        f"{model.cfg.model_name} has no attention patterns, so there are no heads to look for, and no state-space "
        "mixers; `lens hooks` lists what it has"
    )


def _measure_heads(model: "LensModel", text: Text, command: str, *, begin: Callable[[str], None]) -> DemoResult:
    """Find the induction heads, ablate them, and attribute a logit to heads."""
    tokens = text.tokens
    begin("caching every activation")
    (logits, clean), cache = model.run_with_cache(tokens, return_type="both", loss_per_token=True)
    losses = [None, *map(float, clean[0])]
    shared = reading(model, text, cache, logits, losses, command)
    begin("looking for induction heads")
    scores = _scores(cache, tokens)
    induction = {head: score["induction"] for head, score in scores.items()}
    found = _heads.heads_above(induction, INDUCTION) if shared["repeated"] else []
    steady = {head: score["previous"] < INDUCTION for head, score in scores.items()}  # not what induction is made of
    control = _heads.control_heads(found, {head: share for head, share in induction.items() if steady[head]})
    begin("ablating them")
    ablation = _ablation(model, tokens, losses, shared["repeated"], found, control) if found else None
    begin("attributing the logits")
    position = telling_position(losses, None if ablation is None else ablation.losses, shared["repeated"])
    return DemoResult(
        **shared,
        description=_description(model),
        scores=[HeadScores(label=head_label(*head), **score) for head, score in scores.items()],
        patterns=_patterns(cache, induction),
        threshold=INDUCTION,
        induction_heads=sorted(found),
        control_heads=control,
        ablation=ablation,
        attribution=_attribution(model, cache, logits[0], tokens[0], position),
    )


def _scores(cache: "ActivationCache", tokens: Int[Tensor, "1 pos"]) -> dict[_Head, dict[str, float]]:
    kinds = {kind: _heads.head_scores(cache, place) for kind, place in places(tokens).items()}
    return {head: {kind: found[head] for kind, found in kinds.items()} for head in kinds["induction"]}


def _ablation(
    model: "LensModel",
    tokens: Int[Tensor, "1 pos"],
    losses: Sequence[float | None],
    repeated: Sequence[int],
    found: Sequence[_Head],
    control: Sequence[_Head],
) -> Ablation:
    ablated = _losses_without(model, tokens, found)
    compared = _losses_without(model, tokens, control) if control else None

    def mean(values: Sequence[float | None]) -> float:
        return sum(values[at] or 0.0 for at in repeated) / len(repeated)

    return Ablation(
        clean=mean(losses),
        induction=mean(ablated),
        control=None if compared is None else mean(compared),
        method="set to zero",
        losses=ablated,
    )


def _losses_without(model: "LensModel", tokens: Int[Tensor, "1 pos"], heads: Sequence[_Head]) -> list[float | None]:
    """Give the loss of every token with the output of these heads set to zero."""
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        by_layer[layer].append(head)
    hooks = [(("z", layer), edits.zero(heads=chosen)) for layer, chosen in by_layer.items()]
    return losses_with(model, tokens, hooks)


def _patterns(cache: "ActivationCache", induction: Mapping[_Head, float]) -> dict[int, Any]:
    """Give the patterns of as many layers as a page can show, those with the most inductive heads first."""
    best: dict[int, float] = defaultdict(float)
    for (layer, _), score in induction.items():
        best[layer] = max(best[layer], score)
    shown: dict[int, Any] = {}
    cells = 0
    for layer in sorted(best, key=lambda layer: -best[layer]):
        pattern = cache["pattern", layer][0]
        cells += pattern.numel()
        if shown and cells > PICTURED:
            break
        shown[layer] = pattern.float().cpu()
    return shown


def _attribution(
    model: "LensModel",
    cache: "ActivationCache",
    logits: Float[Tensor, "pos d_vocab"],
    tokens: Int[Tensor, " pos"],
    position: int,
) -> Attribution:
    """Split the logit of the token that follows, less that of its strongest rival, into what each head adds."""
    answer, rival, total = contrast(logits, tokens, position)
    stack, labels = cache.get_full_resid_decomposition(expand_neurons=False, pos_slice=position, return_labels=True)
    shares, bias = cache.logit_attrs(stack, answer, rival, pos_slice=position, return_bias=True)
    parts = dict(zip(labels, map(float, shares[:, 0]), strict=True)) | {"final bias": float(bias)}
    heads = {label: value for label, value in parts.items() if _HEAD_LABEL.fullmatch(label)}
    return Attribution(
        position=position,
        answer=word(model, answer),
        rival=word(model, rival),
        labels=list(heads),
        values=list(heads.values()),
        remainder=sum(value for label, value in parts.items() if label not in heads),  # never total less the heads
        total=total,
        tolerance=ROUNDINGS * torch.finfo(logits.dtype).eps * sum(map(abs, parts.values())),
    )


def _description(model: "LensModel") -> str:
    cfg = model.cfg
    return f"{model.architecture.name}, {cfg.n_layers} layers of {cfg.n_heads} heads, width {cfg.d_model}"
