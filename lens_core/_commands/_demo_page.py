"""The page that `lens demo` writes: plain values in, one HTML page out. Imports neither torch nor transformers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from lens_core import view

_ROWS = 8  # heads in the table of scores
_BARS = 16  # heads with a bar of their own


@attrs.frozen(kw_only=True)
class Prediction:
    """What the model expects after one position.

    Attributes:
        position: 0-based; the token after which the model predicts.
        top: The likeliest next tokens with their probabilities, best first.
    """

    position: int
    top: Sequence[tuple[str, float]]


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
    def error(self) -> float:
        """How far the sum of the parts is from the total."""
        return abs(sum(self.values) + self.remainder - self.total)

    @property
    def is_exact(self) -> bool:
        """Whether the parts sum to the total, but for rounding."""
        return self.error <= self.tolerance


@attrs.frozen(kw_only=True)
class DemoResult:
    """Everything that the page shows.

    Attributes:
        model: What was loaded, such as `toy:gpt2`.
        description: One line on its size.
        activations: One line on what was cached.
        tokens: The text.
        repeated: Positions whose token an earlier stretch of the text foretells.
        losses: Nats per token; None for the first, which nothing predicts.
        predictions: At chosen positions.
        scores: For every head.
        patterns: By layer, `[heads][query][key]`; of a large model, some layers.
        threshold: Induction score from which a head counts as an induction head.
        induction_heads: `(layer, head)` of those found.
        control_heads: `(layer, head)` of those ablated to compare.
        ablation: None where no token is repeated or no induction head was found.
        attribution: None where there was no place to attribute.
        command: How to make this page again.
        versions: One line: library, plugin, torch, transformers.
    """

    model: str
    description: str
    activations: str
    tokens: Sequence[str]
    repeated: Sequence[int]
    losses: Sequence[float | None]
    predictions: Sequence[Prediction]
    scores: Sequence[HeadScores]
    patterns: Mapping[int, Any]
    threshold: float
    induction_heads: Sequence[tuple[int, int]]
    control_heads: Sequence[tuple[int, int]]
    ablation: Ablation | None
    attribution: Attribution | None
    command: str
    versions: str


def demo_page(result: DemoResult) -> view.Page:
    """Tell the demo's story on one page, top to bottom.

    Raises:
        ArgumentError: the parts of the result do not fit each other.
    """
    sections = [
        *_summary(result),
        *_text(result),
        *_predictions(result),
        *_patterns(result),
        *_ablation(result),
        *_attribution(result),
        view.heading("Make this page again"),
        view.code(result.command),
        f"Made with {result.versions}. The page is one file: it loads nothing and sends nothing.",
    ]
    subtitle = f"{result.description} · {len(result.tokens)} tokens · {result.activations} cached"
    return view.page(f"Inside {result.model}", sections, subtitle=subtitle)


def head_label(layer: int, head: int) -> str:
    """Return the name of a head on the page."""
    return f"L{layer}H{head}"


def _summary(result: DemoResult) -> list[view.Picture | str]:
    """Say what was found, where something was."""
    run = result.ablation
    if run is None:
        return []
    heads = _listed([head_label(*head) for head in result.induction_heads])
    is_one = len(result.induction_heads) == 1
    story = (
        f"{heads} {'copies' if is_one else 'copy'} what the text said before: without {'it' if is_one else 'them'}, "
        f"the loss on repeated tokens goes from {run.clean:.2f} to {run.induction:.2f} nats"
    )
    if run.control is not None:
        control = _listed([head_label(*head) for head in result.control_heads])
        story += f"; without {control}, chosen to compare, it is {run.control:.2f}"
    return [f"{story}."]


def _text(result: DemoResult) -> list[view.Picture | str]:
    story = (
        "The model reads the text from left to right and, before each token, gives a probability to every token that "
        "could come next. A token's loss is minus the logarithm of the probability it got: the deeper the colour, the "
        "greater the surprise."
    )
    picture = view.tokens(result.tokens, result.losses, unit="nats of loss", full=_deepest(result))
    if result.repeated:
        again = _mean([result.losses[i] for i in result.repeated])
        other = _mean([loss for i, loss in enumerate(result.losses) if i not in set(result.repeated)])
        story += (
            f" Here {len(result.repeated)} of {len(result.tokens)} tokens repeat an earlier stretch of the text. Their "
            f"mean loss is {again:.2f} nats, that of the others {other:.2f}"
            f"{': the model copies what it has seen.' if again < other / 2 else '.'}"
        )
    return [
        view.heading("The text, coloured by the model's surprise"),
        story,
        picture,
    ]


def _predictions(result: DemoResult) -> list[view.Picture | str]:
    if not result.predictions:
        return []
    most = max(len(prediction.top) for prediction in result.predictions)
    rows: list[list[object]] = []
    for prediction in result.predictions:
        after = prediction.position + 1
        actual = result.tokens[after] if after < len(result.tokens) else None
        cells = [
            f"{view.visible(token)}  {probability:.1%}{' ✓' if token == actual else ''}"
            for token, probability in prediction.top
        ]
        context = "".join(view.visible(token) for token in result.tokens[max(0, after - 4) : after])
        next_token = "(the text ends)" if actual is None else view.visible(actual)
        rows.append(
            [
                prediction.position,
                f"{'…' if after > 4 else ''}{context}",
                next_token,
                *cells,
                *[None] * (most - len(cells)),
            ]
        )
    columns = ["position", "the text so far", "what follows", *[f"guess {i + 1}" for i in range(most)]]
    return [
        view.heading("What the model expects next"),
        "The likeliest next tokens, with their probabilities. ✓ marks the token that does follow.",
        view.table(rows, columns),
    ]


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
    story += f"Outlined: {_listed(outlined)}." if found else "No head of this model does so on this text."
    layers = len({score.label.partition("H")[0] for score in result.scores})
    if len(result.patterns) < layers:
        shown = _listed([f"L{layer}" for layer in sorted(result.patterns)])
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
    induction = _listed([head_label(*head) for head in result.induction_heads])
    control = _listed([head_label(*head) for head in result.control_heads])
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
            " The control, ablated in the same way, shows what ablating any head does: it is as many other heads, of "
            "the same layers where there are any, with the lowest induction scores."
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
    verdict = (
        f"the two agree to {parts.error:.0e}."
        if parts.is_exact
        else f"the two differ by {parts.error:.1e}, more than rounding explains: this is a mistake in lens."
    )
    return [
        view.heading("Which heads say the answer"),
        f"After position {parts.position}, {chosen}, the text goes on with “{answer}”; the comparison is with "
        f"“{rival}”, the strongest other guess. The logits are a sum over everything written to the residual stream, "
        "so their difference splits exactly into parts.",
        view.bars(list(shown), list(shown.values()), unit="logits", highlight=[name for name in found if name in kept]),
        f"Heads {_signed(heads)}, embeddings, MLPs and biases {_signed(parts.remainder)}: together "
        f"{_signed(heads + parts.remainder)} logits. The model's own logits differ by {_signed(parts.total)}; "
        f"{verdict}",
    ]


def _deepest(result: DemoResult) -> float | None:
    """Return the largest loss on the page, in nats, so that its texts share one scale of colour."""
    losses: list[float | None] = [*result.losses, *(result.ablation.losses if result.ablation else ())]
    return max((loss for loss in losses if loss and math.isfinite(loss)), default=None)


def _mean(values: Sequence[float | None]) -> float:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else 0.0


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")
