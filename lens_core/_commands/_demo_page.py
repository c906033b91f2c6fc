"""The page that `lens demo` writes of attention heads: plain values in, one HTML page out. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from lens_core import view
from lens_core._commands._demo_parts import Reading, deepest, listed, page, signed, verdict

_ROWS = 8  # heads in the table of scores
_BARS = 16  # heads with a bar of their own


@attrs.frozen(kw_only=True)
class HeadScores:
    """How much of a head's attention goes where, each the mean over the positions that have such a place, 0 to 1.

    Attributes:
        label: The head, such as `L1H4`.
        induction: To tokens that came after earlier occurrences of the same token.
        previous: To the token before.
        duplicate: To earlier occurrences of the same token.
    """

    label: str
    induction: float
    previous: float
    duplicate: float


@attrs.frozen(kw_only=True)
class Ablation:
    """Mean loss on the repeated tokens, in nats.

    Attributes:
        clean: Nothing touched.
        induction: The induction heads ablated.
        control: As many other heads ablated, in the same way; None where there are none.
        method: What was done to a head's output, such as `set to zero`.
        losses: Nats per token with the induction heads ablated; None where there is none.
    """

    clean: float
    induction: float
    control: float | None
    method: str
    losses: Sequence[float | None]


@attrs.frozen(kw_only=True)
class Attribution:
    """The parts of one logit difference, in logits.

    Attributes:
        position: 0-based; where the logits were read.
        answer: The token the model should predict there.
        rival: The token it is compared with.
        labels: The heads.
        values: What each head adds.
        remainder: What all that is not a head adds: embeddings, MLPs, biases.
        total: The difference of the model's own logits, measured and not summed.
        tolerance: How far rounding may put the sum from the total.
    """

    position: int
    answer: str
    rival: str
    labels: Sequence[str]
    values: Sequence[float]
    remainder: float
    total: float
    tolerance: float

    @property
    def sum(self) -> float:
        """All parts together."""
        return sum(self.values) + self.remainder

    @property
    def error(self) -> float:
        """How far the sum of the parts is from the total."""
        return abs(self.sum - self.total)

    @property
    def is_exact(self) -> bool:
        """Whether the parts sum to the total, but for rounding."""
        return self.error <= self.tolerance


@attrs.frozen(kw_only=True)
class DemoResult(Reading):
    """Everything that the page of a model with attention shows.

    Attributes:
        scores: For every head.
        patterns: By layer, `[heads][query][key]`; of a large model, some layers.
        threshold: Induction score from which a head counts as an induction head.
        induction_heads: `(layer, head)` of those found.
        control_heads: `(layer, head)` of those ablated to compare.
        ablation: None where no token is repeated or no induction head was found.
        attribution: None where there was no place to attribute.
    """

    scores: Sequence[HeadScores]
    patterns: Mapping[int, Any]
    threshold: float
    induction_heads: Sequence[tuple[int, int]]
    control_heads: Sequence[tuple[int, int]]
    ablation: Ablation | None
    attribution: Attribution | None


def demo_page(result: DemoResult) -> view.Page:
    """Tell the story of attention heads on one page, top to bottom.

    Raises:
        ArgumentError: the parts of the result do not fit each other.
    """
    story = [*_patterns(result), *_ablation(result), *_attribution(result)]
    return page(result, _summary(result), story, full=_deepest(result))


def head_label(layer: int, head: int) -> str:
    """Return the name of a head on the page."""
    return f"L{layer}H{head}"


def _summary(result: DemoResult) -> list[view.Picture | str]:
    """Say what was found, where something was."""
    run = result.ablation
    if run is None:
        return []
    heads = listed([head_label(*head) for head in result.induction_heads])
    is_one = len(result.induction_heads) == 1
    story = (
        f"{heads} {'copies' if is_one else 'copy'} what the text said before: without {'it' if is_one else 'them'}, "
        f"the loss on repeated tokens goes from {run.clean:.2f} to {run.induction:.2f} nats"
    )
    if run.control is not None:
        control = listed([head_label(*head) for head in result.control_heads])
        story += f"; without {control}, chosen to compare, it is {run.control:.2f}"
    return [f"{story}."]


def _patterns(result: DemoResult) -> list[view.Picture | str]:
    found = [head_label(*head) for head in result.induction_heads]
    patterns = {
        head_label(layer, head): pattern
        for layer, heads in sorted(result.patterns.items())
        for head, pattern in enumerate(heads)
    }
    story = (
        "Each square is one attention head (L1H4 is head 4 of layer 1, counted from 0): row by row, how a token "
        "spreads its attention over the tokens before it. An induction head looks for an earlier occurrence of the "
        "current token and attends to the token that came after it; on repeated text this draws a stripe parallel to "
        "the diagonal. "
    )
    outlined = [label for label in found if label in patterns]
    story += f"Outlined: {listed(outlined)}." if found else "No head of this model does so on this text."
    layers = len({score.label.partition("H")[0] for score in result.scores})
    if len(result.patterns) < layers:
        shown = listed([f"L{layer}" for layer in sorted(result.patterns)])
        story += f" Shown: {shown} of {layers} layers, those with the most inductive heads."
    parts: list[view.Picture | str] = [
        view.heading("Where each head looks"),
        story,
        view.attention(result.tokens, patterns, highlight=outlined),
    ]
    ranked = sorted(result.scores, key=lambda score: -score.induction)[:_ROWS]
    if ranked:
        which = "" if len(ranked) == len(result.scores) else f", the first {len(ranked)} of {len(result.scores)}"
        rows = [[score.label, score.induction, score.previous, score.duplicate] for score in ranked]
        parts += [
            view.table(
                rows,
                ["head", "induction", "previous token", "duplicate token"],
                title=f"Heads by induction score{which}",
            ),
            "A score is the mean share of a head's attention, 0 to 1, on one kind of place: the tokens that came after "
            "earlier occurrences of the current one (induction), the token just before it (previous token), those "
            "earlier occurrences themselves (duplicate token). Positions at which two of these are one place are "
            f"left out. From an induction score of {result.threshold} a head counts as an induction head.",
        ]
    return parts


def _ablation(result: DemoResult) -> list[view.Picture | str]:
    title = view.heading("What happens without them")
    if not result.repeated:
        return [title, "The text repeats nothing, so there is no copying to break: the ablation was left out."]
    if result.ablation is None:
        return [title, "No induction heads were found, so there was nothing to ablate."]
    run = result.ablation
    induction = listed([head_label(*head) for head in result.induction_heads])
    control = listed([head_label(*head) for head in result.control_heads])
    rows: list[list[object]] = [
        ["nothing", run.clean, None],
        [f"induction: {induction}", run.induction, run.induction - run.clean],
    ]
    story = (
        "If these heads do the copying, the model cannot copy without them. The output of each ablated head was "
        f"{run.method}; the loss is the mean over the {len(result.repeated)} repeated tokens."
    )
    if run.control is not None:
        rows.append([f"control: {control}", run.control, run.control - run.clean])
        story += (
            " The control, ablated in the same way, shows what ablating any head does: it is other heads, as many "
            "as there are, of the same layers where there are any, with the lowest induction scores; heads that attend "
            "to the previous token, which induction is made of, are not among them."
        )
    return [
        title,
        story,
        view.table(rows, ["ablated", "loss (nats)", "change (nats)"]),
        "The text again with the induction heads ablated, in the colours of the first picture:",
        view.tokens(result.tokens, run.losses, unit="nats of loss", full=_deepest(result)),
    ]


def _attribution(result: DemoResult) -> list[view.Picture | str]:
    parts = result.attribution
    if parts is None:
        return []
    answer, rival = view.visible(parts.answer), view.visible(parts.rival)
    heads = sum(parts.values)
    bars = dict(zip(parts.labels, parts.values, strict=True))
    kept = sorted(bars, key=lambda label: -abs(bars[label]))[:_BARS]
    found = [head_label(*head) for head in result.induction_heads]
    others = [(f"{len(bars) - len(kept)} other heads", heads - sum(bars[label] for label in kept))]
    shown = {
        **{label: value for label, value in bars.items() if label in kept},
        **dict(others if len(kept) < len(bars) else ()),
        "all else": parts.remainder,
    }
    chosen = "where the ablation costs most" if result.ablation else "where the loss is lowest"
    return [
        view.heading("Which heads say the answer"),
        f"After position {parts.position}, {chosen}, the text goes on with “{answer}”; the comparison is with "
        f"“{rival}”, the strongest other guess. The logits are a sum over everything written to the residual stream, "
        "so their difference splits exactly into parts.",
        view.bars(list(shown), list(shown.values()), unit="logits", highlight=[name for name in found if name in kept]),
        f"Heads {signed(heads)}, embeddings, MLPs and biases {signed(parts.remainder)}: together "
        f"{signed(heads + parts.remainder)} logits. The model's own logits differ by {signed(parts.total)}; "
        f"{verdict(parts.error, is_exact=parts.is_exact)}",
    ]


def _deepest(result: DemoResult) -> float | None:
    return deepest(result.losses, result.ablation.losses if result.ablation else ())
