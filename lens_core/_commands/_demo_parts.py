"""What the pages of `lens demo` share: the text, the model's guesses, the frame. Imports no torch."""

import math
from collections.abc import Sequence

import attrs

from lens_core import view

__all__ = ["Prediction", "Reading", "deepest", "listed", "page", "signed", "verdict"]


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
class Reading:
    """What every page shows of a model that read a text.

    Attributes:
        model: What was loaded, such as `toy:gpt2`.
        description: One line on its size.
        activations: One line on what was cached.
        tokens: The text.
        repeated: Positions whose token an earlier stretch of the text foretells.
        losses: Nats per token; None for the first, which nothing predicts.
        predictions: At chosen positions.
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
    command: str
    versions: str


def page(
    reading: Reading,
    summary: Sequence[view.Picture | str],
    story: Sequence[view.Picture | str],
    *,
    full: float | None,
) -> view.Page:
    """Put a story between what all pages begin and end with.

    Args:
        reading: The model and the text.
        summary: Stands first.
        story: Comes after the text and the model's guesses.
        full: The loss with the deepest colour.

    Raises:
        ArgumentError: The parts do not fit each other.
    """
    sections = [
        *summary,
        *_text(reading, full),
        *_predictions(reading),
        *story,
        view.heading("Make this page again"),
        view.code(reading.command),
        f"Made with {reading.versions}. The page is one file: it loads nothing and sends nothing.",
    ]
    subtitle = f"{reading.description} · {len(reading.tokens)} tokens · {reading.activations} cached"
    return view.page(f"Inside {reading.model}", sections, subtitle=subtitle)


def _text(reading: Reading, full: float | None) -> list[view.Picture | str]:
    story = (
        "The model reads the text from left to right and, before each token, gives a probability to every token that "
        "could come next. A token's loss is minus the logarithm of the probability it got: the deeper the colour, the "
        "greater the surprise."
    )
    picture = view.tokens(reading.tokens, reading.losses, unit="nats of loss", full=full)
    if reading.repeated:
        again = _mean([reading.losses[i] for i in reading.repeated])
        other = _mean([loss for i, loss in enumerate(reading.losses) if i not in set(reading.repeated)])
        story += (
            f" Here {len(reading.repeated)} of {len(reading.tokens)} tokens repeat an earlier stretch of the text. "
            f"Their mean loss is {again:.2f} nats, that of the others {other:.2f}"
            f"{': the model copies what it has seen.' if again < other / 2 else '.'}"
        )
    return [
        view.heading("The text, coloured by the model's surprise"),
        story,
        picture,
    ]


def _predictions(reading: Reading) -> list[view.Picture | str]:
    if not reading.predictions:
        return []
    most = max(len(prediction.top) for prediction in reading.predictions)
    rows: list[list[object]] = []
    for prediction in reading.predictions:
        after = prediction.position + 1
        actual = reading.tokens[after] if after < len(reading.tokens) else None
        cells = [
            f"{view.visible(token)}  {probability:.1%}{' ✓' if token == actual else ''}"
            for token, probability in prediction.top
        ]
        context = "".join(view.visible(token) for token in reading.tokens[max(0, after - 4) : after])
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


def deepest(*texts: Sequence[float | None]) -> float | None:
    """Return the largest loss in nats, so that several pictures share one scale of colour."""
    return max((loss for losses in texts for loss in losses if loss and math.isfinite(loss)), default=None)


def listed(names: Sequence[str]) -> str:
    """Join names as a sentence does."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def signed(value: float) -> str:
    """Write a number with its sign."""
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def verdict(error: float, *, is_exact: bool) -> str:
    """Say how a sum of parts compares with what was measured."""
    if is_exact:
        return f"the two agree to {error:.0e}."
    return f"the two differ by {error:.1e}, more than rounding explains: this is a mistake in lens."


def _mean(values: Sequence[float | None]) -> float:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else 0.0
