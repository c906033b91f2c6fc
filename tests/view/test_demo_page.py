"""The page of the demo, from made-up results."""

import html
import re

import attrs
import pytest

from lens_core._commands._demo_page import Ablation, Attribution, DemoResult, HeadScores, demo_page, head_label
from lens_core._commands._demo_parts import Prediction
from lens_core.errors import ArgumentError

WORDS = [" river", " stone", " <lamp>", " green"]
TOKENS = ["<|bos|>", *WORDS, *WORDS]
SIZE = len(TOKENS)


def pattern(kind: str) -> list[list[float]]:
    """Return a head that attends to the token before, or to the one after the last same token."""
    back = {"previous": 1, "induction": len(WORDS) - 1}[kind]
    return [[float(k == max(q - back, 0)) for k in range(SIZE)] for q in range(SIZE)]


RESULT = DemoResult(
    model="toy:<gpt2>",
    description="GPT-2, 2 layers of 2 heads, width 64",
    activations="61 activations, 0.2 MiB",
    tokens=TOKENS,
    repeated=[6, 7, 8],
    losses=[None, 3.0, 3.5, 3.25, 3.0, 2.0, 0.05, 0.1, 0.03],
    predictions=[
        Prediction(position=2, top=[(" green", 0.4), (" <lamp>", 0.3)]),
        Prediction(position=8, top=[(" river", 0.93)]),
    ],
    scores=[
        HeadScores(label="L0H0", induction=0.01, previous=0.97, duplicate=0.02),
        HeadScores(label="L1H1", induction=0.93, previous=0.04, duplicate=0.03),
    ],
    patterns={1: [pattern("previous"), pattern("induction")], 0: [pattern("previous"), pattern("previous")]},
    threshold=0.4,
    induction_heads=[(1, 1)],
    control_heads=[(1, 0)],
    ablation=Ablation(
        clean=0.06,
        induction=2.81,
        control=0.09,
        method="set to zero",
        losses=[None, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 4.0, 2.0],
    ),
    attribution=Attribution(
        position=7,
        answer=" green",
        rival=" river",
        labels=["L0H0", "L1H1"],
        values=[-0.5, 6.0],
        remainder=0.25,
        total=5.750002,
        tolerance=1e-5,
    ),
    command="lens demo --text 'river <stone>'",
    versions="lens-core 0.1.0",
)


def text_of(result: DemoResult) -> str:
    """Return the page's text, without its tags, style and script."""
    body = re.sub(r"<(style|script)\b.*?</\1>", "", demo_page(result).html, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_the_page_tells_the_story_in_order():
    """Model, text, predictions, patterns, ablation, attribution, how to repeat it."""
    text = text_of(RESULT)
    story = [
        "Inside toy:<gpt2>",
        "GPT-2, 2 layers of 2 heads, width 64 · 9 tokens · 61 activations, 0.2 MiB cached",
        "L1H1 copies what the text said before: without it, the loss on repeated tokens goes from 0.06 to 2.81 nats; "
        "without L1H0, chosen to compare, it is 0.09.",
        "3 of 9 tokens repeat an earlier stretch of the text. Their mean loss is 0.06 nats, that of the others 2.95",
        "What the model expects next",
        "Outlined: L1H1.",
        "L1H1 0.930 0.040 0.030 L0H0 0.010 0.970 0.020",
        "From an induction score of 0.4 a head counts as an induction head.",
        "nothing 0.060 induction: L1H1 2.810 2.750 control: L1H0 0.090 0.030",
        "4.000 nats of loss",
        "After position 7, where the ablation costs most, the text goes on with “·green”; the comparison is with "
        "“·river”",
        "L0H0 −0.500 L1H1 +6.000 all else +0.250",
        "Heads +5.500, embeddings, MLPs and biases +0.250: together +5.750 logits.",
        "The model's own logits differ by +5.750; the two agree to 2e-06.",
        "lens demo --text 'river <stone>'",
        "Made with lens-core 0.1.0.",
    ]
    at = 0
    for part in story:
        assert part in text[at:]
        at = text.index(part, at) + len(part)


def test_the_right_guess_is_marked():
    """A guess that does follow has a tick, and the end of the text says so."""
    text = text_of(RESULT)
    assert "2 <|bos|>·river·stone ·<lamp> ·green 40.0% ·<lamp> 30.0% ✓" in text
    assert "8 …·river·stone·<lamp>·green (the text ends) ·river 93.0%" in text


def test_both_texts_have_one_scale():
    """The colours of the text before and after the ablation compare."""
    assert text_of(RESULT).count("0 4.000 nats of loss") == 2


def test_induction_heads_are_outlined_and_layers_in_order():
    """The heads stand layer by layer whatever the order of the mapping; the first one found is shown large."""
    source = demo_page(RESULT).html
    labels = re.findall(r"<canvas></canvas><span>(\w+)</span>", source)
    assert labels == ["L0H0", "L0H1", "L1H0", "L1H1"]
    assert source.count("lens-head marked") == 1
    assert '"first":3' in source


def test_a_text_without_repeats_says_that_nothing_was_ablated():
    """No table is made up."""
    text = text_of(attrs.evolve(RESULT, repeated=[], ablation=None))
    assert "The text repeats nothing" in text
    assert "change (nats)" not in text
    assert "Their mean loss" not in text


def test_a_model_without_induction_heads_says_so():
    """The patterns and the ablation both tell."""
    text = text_of(attrs.evolve(RESULT, induction_heads=[], ablation=None, attribution=None))
    assert "No head of this model does so on this text." in text
    assert "No induction heads were found" in text
    assert "Which heads say the answer" not in text


def test_a_model_without_a_head_to_compare_has_no_control():
    """The induction heads are ablated all the same."""
    ablation = attrs.evolve(RESULT.ablation, control=None)
    text = text_of(attrs.evolve(RESULT, control_heads=[], ablation=ablation))
    assert "induction: L1H1 2.810 2.750" in text
    assert "control" not in text
    assert "to compare" not in text


def test_a_sum_that_is_off_is_called_a_mistake():
    """The page does not say that the parts agree with the logits when they do not."""
    text = text_of(attrs.evolve(RESULT, attribution=attrs.evolve(RESULT.attribution, total=5.76)))
    assert "the two differ by 1.0e-02, more than rounding explains: this is a mistake in lens." in text
    assert "agree" not in text


def test_only_the_first_parts_of_many_have_a_bar():
    """The rest is one bar, so that the bars still sum to the total."""
    values = [0.01 * i for i in range(40)]
    parts = attrs.evolve(RESULT.attribution, labels=[f"L0H{i}" for i in range(40)], values=values)
    text = text_of(attrs.evolve(RESULT, attribution=parts))
    assert "L0H24 0.240 L0H25 0.250" in text
    assert "L0H39 0.390 24 other heads 2.760 all else 0.250" in text
    assert "Heads +7.800," in text


def test_some_layers_of_a_large_model_are_said_to_be_some():
    """Patterns of layers that a page has no room for are not passed over in silence."""
    text = text_of(attrs.evolve(RESULT, patterns={1: RESULT.patterns[1]}))
    assert "Shown: L1 of 2 layers, those with the most inductive heads." in text
    assert "Shown:" not in text_of(RESULT)


def test_a_page_may_lack_predictions_scores_and_some_layers():
    """What is not there is left out, without an empty table."""
    text = text_of(attrs.evolve(RESULT, predictions=[], scores=[], patterns={0: [pattern("previous")]}))
    assert "What the model expects next" not in text
    assert "Heads by induction score" not in text


def test_only_the_first_heads_of_many_are_listed():
    """A large model's table stays short and says how many there are."""
    scores = [HeadScores(label=f"L0H{i}", induction=i / 144, previous=0.0, duplicate=0.0) for i in range(144)]
    text = text_of(attrs.evolve(RESULT, scores=scores))
    assert "the first 8 of 144" in text
    assert "L0H143 0.993" in text
    assert "L0H135 " not in text


def test_an_infinite_loss_does_not_spoil_the_colours():
    """A token that was given no probability at all has no colour, and the others keep theirs."""
    losses = [*RESULT.losses[:-1], float("inf")]
    assert "4.000 nats of loss" in text_of(attrs.evolve(RESULT, losses=losses))


def test_results_that_do_not_fit_are_refused():
    """A loss too few is an error, not a shifted picture."""
    with pytest.raises(ArgumentError, match="8 values where 9"):
        demo_page(attrs.evolve(RESULT, losses=RESULT.losses[:-1]))


def test_heads_are_named_as_the_field_does():
    """Layer, then head, counted from 0."""
    assert head_label(0, 11) == "L0H11"
