"""The page that `lens demo` writes of state-space mixers: plain values in, one HTML page out. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from lens_core import view
from lens_core._commands._demo_parts import Reading, deepest, page, signed, verdict

__all__ = ["KnockedOut", "MapScore", "ScanResult", "TokenParts", "place_label", "scan_page"]

NO_SOFTMAX = "It is not a softmax: rows do not sum to 1, and entries may be negative."
_PLACES = ("the same token", "the token after it", "two after it", "three after it")


@attrs.frozen(kw_only=True)
class MapScore:
    """Where one map of effective attention looks.

    Attributes:
        label: The map: a layer (the mean of absolute values over its channels or heads), a channel or a head.
        shares: By place (see `place_label`), the share of the absolute values in a row that lies there, 0 to 1: the
            mean over the rows that have such a place.
    """

    label: str
    shares: Sequence[float]


@attrs.frozen(kw_only=True)
class KnockedOut:
    """Mean loss in nats on the repeated tokens, with sources hidden from the positions that foretell them.

    Attributes:
        clean: Nothing touched.
        copied: Without the places that are copied from.
        control: Without as many other earlier tokens.
        losses: Nats per token without the places that are copied from; None where there is none.
        pairs: By target position, the sources that were hidden from it.
        others: The same for the control.
    """

    clean: float
    copied: float
    control: float
    losses: Sequence[float | None]
    pairs: Mapping[int, Sequence[int]]
    others: Mapping[int, Sequence[int]]


@attrs.frozen(kw_only=True)
class TokenParts:
    """The parts of one logit difference, in logits.

    Attributes:
        position: 0-based; where the logits were read.
        answer: The token the model should predict there.
        rival: The token it is compared with.
        labels: The layers with a mixer.
        values: `[layer][source]`: what each token adds through each layer's mixer.
        remainder: What no source token adds: biases, and the embedding of the token itself.
        total: The difference of the model's own logits, measured and not summed.
        tolerance: How far rounding may put the sum from the total.
    """

    position: int
    answer: str
    rival: str
    labels: Sequence[str]
    values: Sequence[Sequence[float]]
    remainder: float
    total: float
    tolerance: float

    @property
    def sum(self) -> float:
        """All parts together."""
        return sum(map(sum, self.values)) + self.remainder

    @property
    def error(self) -> float:
        """How far the sum of the parts is from the total."""
        return abs(self.sum - self.total)

    @property
    def is_exact(self) -> bool:
        """Whether the parts sum to the total, but for rounding."""
        return self.error <= self.tolerance


@attrs.frozen(kw_only=True)
class ScanResult(Reading):
    """Everything that the page of a model with state-space mixers shows.

    Attributes:
        per: What has a map of its own: a `channel` or a `head`.
        scores: Of some layers, and of the channels or heads in them that look most at the place copied from.
        even: The shares of a row that looks at all tokens alike.
        maps: By label, `[target][source]`, signed.
        copying: The layer with the largest share.
        offset: The place with the largest share there: how many tokens after the earlier occurrence.
        error: How far the maps are from giving the scan's output back, as a share of the largest output.
        knocked_out: None where no token is repeated.
        attribution: Of one logit difference to source tokens.
    """

    per: str
    scores: Sequence[MapScore]
    even: Sequence[float]
    maps: Mapping[str, Any]
    copying: str
    offset: int
    error: float
    knocked_out: KnockedOut | None
    attribution: TokenParts


def place_label(offset: int) -> str:
    """Name a place by how many tokens it comes after the earlier occurrence."""
    return _PLACES[offset]


def scan_page(result: ScanResult) -> view.Page:
    """Tell the story of state-space mixers on one page, top to bottom.

    Raises:
        ArgumentError: the parts of the result do not fit each other.
    """
    story = [*_maps(result), *_knocked_out(result), *_attribution(result)]
    return page(result, _summary(result), story, full=_deepest(result))


def _summary(result: ScanResult) -> list[view.Picture | str]:
    run = result.knocked_out
    if run is None:
        return []
    return [
        f"To foretell a repeated token, the model reads {_where(result)} in the state: with what was written there "
        f"hidden, the loss on repeated tokens goes from {run.clean:.2f} to {run.copied:.2f} nats; with as many other "
        f"tokens hidden, it is {run.control:.2f}."
    ]


def _where(result: ScanResult) -> str:
    place = place_label(result.offset)
    return f"{place.removesuffix(' it')} its earlier occurrence" if result.offset else "its earlier occurrence"


def _maps(result: ScanResult) -> list[view.Picture | str]:
    first = f"{result.copying} mean"
    columns = ["map", *map(place_label, range(len(result.even)))]
    rows: list[list[object]] = [[score.label, *score.shares] for score in result.scores]
    return [
        view.heading("Where the scan reads from"),
        "A state-space layer keeps no tokens, only a state that fades and is written to. Yet its output is a sum over "
        "the tokens so far: y_t = Σ α[t, s] x_s. The effective attention α says how much of what token s wrote is "
        f"left when token t reads, and how well the reading fits it. {NO_SOFTMAX} Here it gives the scan's output back "
        f"to {result.error:.0e} of its largest value.",
        "Each square is one map: row by row, what a token reads of the tokens before it. Each layer has a scale of its "
        f"own. “mean” is the mean over all {result.per}s of a layer; the others are those {result.per}s of it that "
        f"read most from {place_label(result.offset)} (counted from an earlier occurrence of the current token).",
        *(
            view.attention(
                result.tokens,
                maps,
                title=f"Effective attention of layer {layer}: rows do not sum to 1, entries may be negative",
                highlight=[first] if first in maps else [],
            )
            for layer, maps in _by_layer(result.maps).items()
        ),
        view.table([*rows, ["all tokens alike", *result.even]], columns, title="Where the maps look"),
        "A share is the part of a row's absolute values that lies at one kind of place, the mean over the rows that "
        "have it: at an earlier occurrence of the current token, or so many tokens after it. A convolution stands "
        "before the scan, so what is written at one position also tells of the few before it. Rows in which such a "
        f"place is one of the last few tokens are left out. L0 is layer 0, all of its {result.per}s together.",
    ]


def _by_layer(maps: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Group maps by the layer that their labels begin with (`L0 mean`, `L0C12`): layers differ in size."""
    layers: dict[int, dict[str, Any]] = {}
    for label, values in maps.items():
        digits = label.removeprefix("L").split(" ")[0].replace("C", "H").split("H")[0]
        layers.setdefault(int(digits), {})[label] = values
    return dict(sorted(layers.items()))


def _knocked_out(result: ScanResult) -> list[view.Picture | str]:
    title = view.heading("What happens when these tokens are hidden")
    run = result.knocked_out
    if run is None:
        return [title, "The text repeats nothing at a distance, so there is no copying to break."]
    rows: list[list[object]] = [
        ["nothing", run.clean, None],
        [f"copied from: {place_label(result.offset)}", run.copied, run.copied - run.clean],
        ["control: others", run.control, run.control - run.clean],
    ]
    return [
        title,
        f"At each of the {len(run.pairs)} positions before a repeated token, what {place_label(result.offset)} had "
        "written was taken from what every scan reads there: y_t - Σ α[t, s] x_s over these s. The state, its decay "
        "and all other positions stay as they are. The control hides as many other earlier tokens, drawn at random.",
        view.table(rows, ["hidden", "loss (nats)", "change (nats)"]),
        "The text again with these tokens hidden, in the colours of the first picture:",
        view.tokens(result.tokens, run.losses, unit="nats of loss", full=_deepest(result)),
    ]


def _attribution(result: ScanResult) -> list[view.Picture | str]:
    parts = result.attribution
    answer, rival = view.visible(parts.answer), view.visible(parts.rival)
    through = sum(map(sum, parts.values))
    shown = [row[: parts.position + 1] for row in parts.values]
    chosen = "where hiding them costs most" if result.knocked_out else "where the loss is lowest"
    return [
        view.heading("Which tokens say the answer"),
        f"After position {parts.position}, {chosen}, the text has “{answer}”; the comparison is with “{rival}”, "
        "the strongest other guess. Given the gates, decays and scales of this run, each mixer is linear in what its "
        "convolution reads, so the difference of the logits splits exactly into what every token adds through every "
        "layer.",
        view.grid(parts.labels, result.tokens[: parts.position + 1], shown, unit="logits"),
        f"Tokens through mixers {signed(through)}, biases and the token's own embedding {signed(parts.remainder)}: "
        f"together {signed(parts.sum)} logits. The model's own logits differ by {signed(parts.total)}; "
        f"{verdict(parts.error, is_exact=parts.is_exact)}",
    ]


def _deepest(result: ScanResult) -> float | None:
    return deepest(result.losses, result.knocked_out.losses if result.knocked_out else ())
