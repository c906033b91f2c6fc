"""Evaluations and prompts, by one forward for each text and loops over its tokens."""

import math

import pytest
import torch
from analysis.four_families import FAMILIES, tiny
from golden.tiny import random_tokens

import lens_core as lens
from lens_core.analysis import evals, prompts
from lens_core.errors import ArgumentError, ContextLengthError, EmptyInputError, TokenizerError

TEMPLATES = ["w1 [A] w2 [B] w3 [THING] w4 [B] w5 [A]", "w6 [B] [A] w7 [B] w8 w9 [THING] w5 [A]"]
DRAWN = {"templates": TEMPLATES, "names": ["w20", "w21", "w22"], "nouns": {"THING": ["w11", "w12 w13"]}}


def test_accuracy_counts_real_next_tokens():
    """By a loop, padding left out."""
    logits, tokens = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)), random_tokens(3, 6, vocab=4)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    found = evals.lm_accuracy(logits, tokens, per_token=True, attention_mask=mask)
    right = real = 0
    for row in range(3):
        for pos in range(5):
            is_real = bool(mask[row, pos] and mask[row, pos + 1])
            is_right = is_real and logits[row, pos].argmax() == tokens[row, pos + 1]
            assert found[row, pos] == is_right
            right, real = right + is_right, real + is_real
    assert evals.lm_accuracy(logits, tokens, attention_mask=mask).item() == pytest.approx(right / real)
    assert evals.lm_accuracy(logits, tokens).item() == (logits[:, :-1].argmax(-1) == tokens[:, 1:]).float().mean()
    with pytest.raises(ArgumentError, match="two positions"):
        evals.lm_accuracy(logits[:, :1], tokens[:, :1])


@pytest.mark.parametrize("family", FAMILIES)
def test_induction_loss_is_the_loss_of_the_second_time(family):
    """Over the tokens that the first time foretells; without special tokens among the random ones."""
    model, seen = tiny(family), []
    with model.hooks([("hook_tokens", lambda tokens, hook: seen.append(tokens.clone()))]):
        loss = evals.induction_loss(model, batch_size=3, subseq_len=6, prepend_bos=True, seed=5)
    (tokens,) = seen
    assert tokens.shape == (3, 13)
    assert (tokens[:, 0] == 28).all()
    assert (tokens[:, 1:] < 28).all()
    assert torch.equal(tokens[:, 1:7], tokens[:, 7:])
    logits = model(tokens).double().log_softmax(-1)
    expected = [-logits[row, pos - 1, tokens[row, pos]].item() for row in range(3) for pos in range(8, 13)]
    assert loss.item() == pytest.approx(sum(expected) / 15, abs=1e-5)


def test_induction_loss_tells_toys_that_can_from_those_that_cannot():
    """A toy that was trained to is far below guessing; without its induction head it is not."""
    model = lens.load("toy:gpt2")
    assert evals.induction_loss(model, subseq_len=24) < 1.0
    with model.hooks([(("z", 1), lens.edits.zero(heads=0))]):
        assert evals.induction_loss(model, subseq_len=24) > 3.0
    assert math.log(247) > 5.5


@pytest.mark.parametrize("family", ["gpt2", "mamba2"])
def test_indirect_objects_are_measured_at_the_end_of_each_prompt(family):
    """One prompt at a time; the object stands twice before the answer is asked for, the subject three times."""
    model = tiny(family)
    dataset = evals.IOIDataset(model.tokenizer, num_samples=7, **DRAWN)
    differences = []
    for index, text in enumerate(dataset.texts):
        item, words = dataset[index], text.split()
        names = [word for word in words if word in DRAWN["names"]]
        io, s = model.to_string(item["IO"]), model.to_string(item["S"])
        assert (names.count(io), names.count(s)) == (1, 2)
        assert model.to_tokens(text)[0].tolist() == item["prompt"].tolist()
        logits = model(text)[0, -1]
        differences.append((logits[item["IO"]] - logits[item["S"]]).item())
    found = evals.ioi_eval(model, dataset, batch_size=3)
    assert found["Logit Difference"] == pytest.approx(sum(differences) / 7, abs=1e-5)
    assert found["Accuracy"] == pytest.approx(sum(one > 0 for one in differences) / 7)
    assert len(dataset) == 7


def test_symmetric_prompts_come_in_pairs():
    """With the names exchanged; a seed gives one set of prompts."""
    tokenizer = tiny("gpt2").tokenizer
    dataset = evals.IOIDataset(tokenizer, num_samples=6, symmetric=True, **DRAWN)
    for first, second in zip(range(0, 6, 2), range(1, 6, 2), strict=True):
        assert dataset[first]["IO"] == dataset[second]["S"]
        assert dataset[first]["S"] == dataset[second]["IO"]
    again = evals.IOIDataset(tokenizer, num_samples=6, symmetric=True, **DRAWN)
    other = evals.IOIDataset(tokenizer, num_samples=6, symmetric=True, seed=1, **DRAWN)
    assert dataset.texts == again.texts != other.texts


def test_names_of_several_tokens_are_left_out():
    """And two must be left."""
    tokenizer = tiny("gpt2").tokenizer
    dataset = evals.IOIDataset(tokenizer, num_samples=1, **{**DRAWN, "names": ["w20", "w2 w3", "w21"]})
    assert dataset.names == ["w20", "w21"]
    with pytest.raises(TokenizerError, match="fewer than two names"):
        evals.IOIDataset(tokenizer, **{**DRAWN, "names": ["w20", "w2 w3"]})
    for templates, message in [(["[A] and [B]"], "ends in"), (["[A] [B] [WHO] [A]"], "bracket")]:
        with pytest.raises(ArgumentError, match=message):
            evals.IOIDataset(tokenizer, **{**DRAWN, "templates": templates})


def test_what_cannot_be_evaluated_is_refused():
    """By name, with the value."""
    model = tiny("gpt2")
    with pytest.raises(ArgumentError, match="from 2; got 1"):
        evals.induction_loss(model, subseq_len=1)
    with pytest.raises(ArgumentError, match="rows; got 0"):
        evals.induction_loss(model, batch_size=0, subseq_len=4)
    with pytest.raises(ContextLengthError):
        evals.induction_loss(model)
    with pytest.raises(ArgumentError, match="own tokenizer"):
        evals.induction_loss(model, tokenizer=object(), subseq_len=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answers_tokens_are_ranked_one_after_the_other(family, capsys):
    """Each after the true ones before it, by sorting all logits; printed as TransformerLens does."""
    model = tiny(family)
    found = prompts.test_prompt("w1 w2 w3", "w4 w5", model, top_k=3)
    tokens = model.to_tokens("w1 w2 w3 w4 w5")
    logits = model(tokens)[0]
    for index, token in enumerate(tokens[0, 3:].tolist()):
        own = logits[2 + index]
        ranked = sorted(range(29), key=lambda one: -own[one].item())
        assert found.ranks[index] == ranked.index(token)
        assert found.top_ids[index].tolist() == ranked[:3]
        assert found.logits[index].item() == pytest.approx(own[token].item(), abs=1e-6)
        assert found.probabilities[index].item() == pytest.approx(own.softmax(-1)[token].item(), abs=1e-6)
    printed = capsys.readouterr().out
    assert f"Ranks of the answer tokens: {list(zip(found.answer, found.ranks, strict=True))}" in printed
    assert printed.count("Top 2th token.") == 2
    assert "probability" in found._repr_html_()


def test_a_prompt_may_be_silent_and_a_vocabulary_padded(capsys):
    """Ids beyond the tokenizer's have no text."""
    model = tiny("gpt2")
    prompts.test_prompt("w1", "w2", model, print_details=False)
    assert not capsys.readouterr().out
    assert prompts._word(model, 40) == "<40>"
    assert prompts.test_prompt("w1", "w2", model, print_details=False, prepend_bos=True).prompt[0] == "<s>"
    with pytest.raises(ArgumentError, match="from 1 to 29; got 30"):
        prompts.test_prompt("w1", "w2", model, top_k=30)
    with pytest.raises(EmptyInputError):
        prompts.test_prompt("w1", "", model)
