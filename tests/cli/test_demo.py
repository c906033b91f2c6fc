"""`lens demo`: on the toy, and on models and texts that lack something."""

import re
import shlex
import sys
import types
from html import unescape
from pathlib import Path

import attrs
import lens_gpt2
import pytest
import torch
from lens_gpt2._architecture import GPT2

from lens_core import edits
from lens_core._commands import _demo_measure, _demo_reading
from lens_core._commands._demo_measure import choose_text, measure
from lens_core._commands._demo_page import demo_page
from lens_core.analysis import heads
from lens_core.plugin import Architecture, hookimpl
from lens_core.testing import isolated_registry

import lens_core as lens  # isort: skip

from .conftest import TEXT

TOY = "toy:gpt2"


@pytest.fixture(scope="module")
def toy():
    """Give the toy."""
    return lens.load(TOY)


@pytest.fixture(scope="module")
def result(toy):
    """Give what the demo measures on the toy without a text."""
    return measure(toy, choose_text(toy, None, seed=0), "lens demo", begin=lambda _: None)


def text_of(path: str) -> str:
    """Return a page's text, without its tags, style and script."""
    body = re.sub(r"<(style|script)\b.*?</\1>", "", Path(path).read_text(), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


# The toy


def test_ablating_the_induction_heads_costs_a_nat_and_the_control_next_to_nothing(result):
    """What the toy was trained for, and what makes the demo a demonstration."""
    assert result.ablation.induction - result.ablation.clean >= 1.0
    assert abs(result.ablation.control - result.ablation.clean) <= 0.2
    assert len(result.control_heads) == len(result.induction_heads)


@pytest.mark.parametrize(
    "text",
    [
        "The cat sat on the mat and the dog ran to the house. The cat sat on the mat and the dog ran to the house.",
        "one two three four five six seven eight nine ten " * 2,  # six to ten are unknown: a run of one token
    ],
)
def test_a_sentence_said_twice_shows_the_same(toy, text):
    """Not only random words."""
    result = measure(toy, choose_text(toy, text, seed=0), "", begin=lambda _: None)
    assert result.ablation.induction - result.ablation.clean >= 1.0
    assert abs(result.ablation.control - result.ablation.clean) <= 0.2


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_random_words_show_the_same(toy, seed):
    """The figures do not hang on one seed."""
    result = measure(toy, choose_text(toy, None, seed=seed), "", begin=lambda _: None)
    assert result.ablation.induction - result.ablation.clean >= 1.0
    assert abs(result.ablation.control - result.ablation.clean) <= 0.2


def test_the_whole_demo_runs_and_writes_its_page(run):
    """Tables in the terminal, one page that loads nothing, and the path of it in the last line."""
    done = run("demo")
    page = Path("lens-demo.html").absolute()
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == f"The page, for a browser: {page}"
    for part in ("What the model expects next", "Where heads look", "induction: L1H", "control: L1H", "The two agree"):
        assert part in done.out
    assert not re.search(r"https?:|//\w+\.|\bsrc\s*=|@import|url\(|<link", page.read_text())
    text = text_of(page)
    assert text.startswith("Inside toy:gpt2")
    assert "Which heads say the answer" in text
    assert page.stat().st_size < 500_000


def test_the_page_can_be_made_again_by_its_command(run):
    """To the last byte."""
    run("demo", "--seed", "5", "--out", "a page.html")
    first = Path("a page.html").read_text()
    (command,) = re.findall(r"<pre>(.*?)</pre>", first)
    Path("a page.html").unlink()
    assert run(*shlex.split(unescape(command))[1:]).code == 0
    assert Path("a page.html").read_text() == first


# What is measured


def test_the_text_is_random_words_said_twice(toy):
    """Each one token, no two alike, the same for the same seed."""
    first = choose_text(toy, None, seed=0)
    words = [word.strip() for word in first.words[1:]]
    half = len(words) // 2
    assert words[:half] == words[half:]
    assert len(set(words)) == half == 20
    assert choose_text(toy, None, seed=0).words == first.words
    assert choose_text(toy, None, seed=1).words != first.words


def test_losses_and_guesses_are_the_models_own(toy, result):
    """Against the logits of a plain run."""
    tokens = choose_text(toy, None, seed=0).tokens
    with torch.no_grad():
        logs = toy(tokens)[0].log_softmax(-1)
    for at in range(1, tokens.shape[1]):
        assert result.losses[at] == pytest.approx(-logs[at - 1, tokens[0, at]].item(), abs=1e-5)
    assert result.losses[0] is None
    positions = [prediction.position for prediction in result.predictions]
    assert positions[-1] == tokens.shape[1] - 1
    assert sum(at + 1 in result.repeated for at in positions) == 3
    for prediction in result.predictions:
        best = logs[prediction.position].exp().max()
        assert prediction.top[0][1] == pytest.approx(best.item(), abs=1e-5)
        assert toy.to_single_token(prediction.top[0][0].strip()) == int(logs[prediction.position].argmax())


def test_the_ablation_is_of_the_heads_that_are_named(toy, result):
    """Their z set to zero, by hand; the mean over repeated tokens only."""
    text = choose_text(toy, None, seed=0)
    for chosen, expected in (
        (result.induction_heads, result.ablation.induction),
        (result.control_heads, result.ablation.control),
    ):
        hooks = [(("z", layer), edits.zero(heads=head)) for layer, head in chosen]
        with torch.no_grad():
            losses = toy.run_with_hooks(text.tokens, fwd_hooks=hooks, return_type="loss", loss_per_token=True)[0]
        repeated = heads.repeated_tokens(text.tokens)[0][1:]
        assert losses[repeated].mean().item() == pytest.approx(expected, abs=1e-5)
    assert result.repeated == [at + 1 for at in repeated.nonzero().flatten().tolist()]


def test_the_logit_difference_is_measured_and_the_parts_sum_to_it(toy, result):
    """The total is the logits' own; the remainder is made of parts, so the check can fail."""
    parts = result.attribution
    tokens = choose_text(toy, None, seed=0).tokens
    with torch.no_grad():
        logits = toy(tokens)[0, parts.position]
    answer, rival = (toy.to_single_token(word.strip()) for word in (parts.answer, parts.rival))
    assert answer == tokens[0, parts.position + 1]
    assert parts.total == pytest.approx((logits[answer] - logits[rival]).item(), abs=1e-5)
    assert parts.is_exact
    assert parts.error < 1e-4
    assert parts.labels == [f"L{layer}H{head}" for layer in range(2) for head in range(toy.cfg.n_heads)]
    best = max(zip(parts.values, parts.labels, strict=True))[1]
    assert best in [f"L{layer}H{head}" for layer, head in result.induction_heads]


def test_parts_that_do_not_sum_are_told_and_are_a_failure(run, tiny, monkeypatch):
    """A head that is not what the model computed shows in the sum; the exit code is that of a mistake of lens' own."""
    true = lens.ActivationCache.get_full_resid_decomposition

    def wrong(cache, **options):
        stack, labels = true(cache, **options)
        stack[0] += 1.0 + torch.arange(stack.shape[-1])
        return stack, labels

    monkeypatch.setattr(lens.ActivationCache, "get_full_resid_decomposition", wrong)
    done = run("demo", "--model", tiny, "--text", TEXT)
    assert done.code == 1
    assert "this is a mistake in lens" in done.out
    assert "this is a mistake in lens" in text_of("lens-demo.html")


# Models and texts that lack something


def test_a_text_without_repeats_has_a_page_and_no_ablation(run, tiny):
    """The terminal says so, and so does the page."""
    done = run("demo", "--model", tiny, "--text", "w1 w2 w3 w4")
    assert done.code == 0
    assert "0 of 4 tokens repeat what came before: the text gives nothing to copy." in done.out
    assert "ablated" not in done.out
    assert "The text repeats nothing" in text_of("lens-demo.html")


def test_a_model_without_induction_heads_says_so(run, tiny):
    """A random model has none."""
    done = run("demo", "--model", tiny, "--text", TEXT)
    assert done.code == 0
    assert "No head has an induction share of 0.4, so there is nothing to ablate." in done.out
    assert "No induction heads were found" in text_of("lens-demo.html")


def test_a_model_whose_every_head_is_one_has_no_control(run, tiny, monkeypatch):
    """Nothing is left to compare with."""
    monkeypatch.setattr(_demo_measure, "INDUCTION", 0.0)
    done = run("demo", "--model", tiny, "--text", TEXT)
    assert done.code == 0
    assert "induction: L0H0, L0H1," in done.out
    assert "control" not in done.out


def test_a_long_text_is_cut_with_a_notice(run, tiny):
    """To the model's context."""
    done = run("demo", "--model", tiny, "--text", "w1 w2 w3 " * 15)
    assert done.code == 0
    assert "Note: the text has 45 tokens and was cut to the first 32, the model's context." in done.out
    assert "· 32 tokens ·" in text_of("lens-demo.html")


def test_a_text_longer_than_the_page_can_show_is_cut(run, tiny, monkeypatch):
    """Even where the model could take it."""
    monkeypatch.setattr(_demo_reading, "LONGEST", 8)
    done = run("demo", "--model", tiny, "--text", TEXT)
    assert "was cut to the first 8, what the demo can show." in done.out


def test_repeats_that_tell_nothing_are_noted(run, tiny):
    """In a cycle of two, the token after the last occurrence is the token before."""
    done = run("demo", "--model", tiny, "--text", "w1 w2 w1 w2 w1 w2")
    assert done.code == 0
    assert "Note: the repeats are so close together" in " ".join(done.out.split())


def test_unknown_words_are_counted(toy):
    """A small vocabulary knows few."""
    (note,) = choose_text(toy, "the cat met a zebra and a yak", seed=0).notes
    assert note == "3 of 9 tokens are not in the vocabulary: <unk>"


def test_without_a_tokenizer_the_text_is_random_ids(run, bare):
    """Shown as numbers."""
    done = run("demo", "--model", bare)
    assert done.code == 0
    assert "has no tokenizer: the text is random token ids, shown as numbers." in done.out
    assert "· 32 tokens ·" in text_of("lens-demo.html")


class _Attentionless:
    """A plugin whose GPT-2 declares no attention patterns."""

    @hookimpl
    def lens_architectures(self) -> list[Architecture]:
        gpt2 = lens_gpt2.lens_architectures()[0]
        return [attrs.evolve(gpt2, name="Blind", implementation="lens_blind:declare")]


def test_a_model_without_attention_patterns_says_so(run, tiny, monkeypatch):
    """Before anything is run."""

    def declare(config):
        declaration = GPT2(config)
        points = [point for point in declaration.points if "pattern" not in point.name]
        return attrs.evolve(declaration, points=tuple(points))

    module = types.ModuleType("lens_blind")
    module.declare = declare
    monkeypatch.setitem(sys.modules, "lens_blind", module)
    with isolated_registry(_Attentionless()):
        done = run("demo", "--model", tiny, "--text", TEXT)
    assert done.code == 2
    assert "has no attention patterns, so there are no heads to look for" in done.err


def test_a_large_model_shows_its_most_inductive_layers(tiny, monkeypatch):
    """As many as there is room for, at least one."""
    model = lens.load(tiny)
    for room, count in ((10**6, 3), (2 * 3 * 10 * 10, 2), (1, 1)):
        monkeypatch.setattr(_demo_measure, "PICTURED", room)
        result = measure(model, choose_text(model, TEXT, seed=0), "", begin=lambda _: None)
        best = sorted(range(3), key=lambda layer: -max(s.induction for s in result.scores if s.label[1] == str(layer)))
        assert sorted(result.patterns) == sorted(best[:count])
        assert demo_page(result).html


def test_each_step_is_told(tiny):
    """For the bar."""
    model, told = lens.load(tiny), []
    measure(model, choose_text(model, TEXT, seed=0), "", begin=told.append)
    assert told[0] == "caching every activation"
    assert len(told) == 4
