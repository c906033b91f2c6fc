"""A step of sampling by hand against `generate`, and by counting draws."""

import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2, tiny_tokenizer

import lens_core as lens
from lens_core.errors import ArgumentError, EmptyInputError, TokenizerError
from lens_core.sampling import sample_logits
from lens_core.tokens import tokenize_and_concatenate

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def shares(**options):
    """Give how often each token is drawn in 4000."""
    rows = LOGITS.expand(4000, -1)
    tokens = options.pop("tokens", None)
    tokens = None if tokens is None else tokens.expand(4000, -1)
    drawn = sample_logits(rows, tokens=tokens, generator=torch.Generator().manual_seed(0), **options)
    return drawn.bincount(minlength=4) / 4000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, LOGITS[0].softmax(0)),
        ({"temperature": 2.0}, (LOGITS[0] / 2).softmax(0)),
        ({"top_k": 2}, torch.tensor([2.0, 1.0, -torch.inf, -torch.inf]).softmax(0)),
        ({"top_p": 0.7}, torch.tensor([2.0, 1.0, -torch.inf, -torch.inf]).softmax(0)),
        ({"top_k": 3, "top_p": 0.5}, torch.tensor([1.0, 0, 0, 0])),
        ({"freq_penalty": 1.0, "tokens": torch.tensor([[0, 0, 1]])}, torch.tensor([0.0, 0, 0, -1]).softmax(0)),
        (
            {"freq_penalty": 1.0, "temperature": 2.0, "tokens": torch.tensor([[0, 0, 1]])},
            torch.tensor([0.0, 0, 0, -0.5]).softmax(0),
        ),
        ({"repetition_penalty": 2.0, "tokens": torch.tensor([[0, 3]])}, torch.tensor([1.0, 1, 0, -2]).softmax(0)),
    ],
)
def test_tokens_are_drawn_by_their_probabilities(options, expected):
    """Within five standard deviations of 4000 draws."""
    assert (shares(**options) - expected).abs().max() < 5 * 0.5 / 4000**0.5


def test_a_step_by_hand_is_a_step_of_generate():
    """The same options, the same draw."""
    model, prompt = lens.load(tiny_gpt2()), random_tokens()
    options = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "freq_penalty": 0.7, "repetition_penalty": 1.3}
    torch.manual_seed(3)
    expected = model.generate(prompt, max_new_tokens=1, **options)[:, -1]
    torch.manual_seed(3)
    logits = model(prompt)[:, -1]
    before = logits.clone()
    assert sample_logits(logits, tokens=prompt, **options).tolist() == expected.tolist()
    assert torch.equal(logits, before)


def test_greedy_takes_the_likeliest():
    """Of each row, half-precision logits too."""
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert sample_logits(logits, temperature=0).tolist() == logits.argmax(-1).tolist()
    assert sample_logits(logits.bfloat16(), temperature=0.0).shape == (5,)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 1.5}, {"freq_penalty": 1.0}, {"repetition_penalty": 2.0}],
)
def test_numbers_out_of_range_are_refused(options):
    """And penalties that have nothing to count."""
    with pytest.raises(ArgumentError):
        sample_logits(LOGITS, **options)
    with pytest.raises(ArgumentError, match="one position"):
        sample_logits(LOGITS[0])


def test_rows_are_cut_from_all_texts_one_after_the_other():
    """EOS between texts, BOS before rows, the rest left out; data sets and iterators alike."""
    tokenizer, texts = tiny_tokenizer(), ["w1 w2 w3", "w4", "w5 w6 w7 w8"]
    stream = [1, 2, 3, 28, 4, 28, 5, 6, 7, 8]
    plain = tokenize_and_concatenate(texts, tokenizer, max_length=4, add_bos_token=False)
    assert plain.tolist() == [stream[:4], stream[4:8]]
    with_bos = tokenize_and_concatenate(({"body": text} for text in texts), tokenizer, max_length=4, column_name="body")
    assert with_bos.tolist() == [[28, *stream[:3]], [28, *stream[3:6]], [28, *stream[6:9]]]
    with pytest.raises(EmptyInputError, match="10 tokens, and a row takes 11"):
        tokenize_and_concatenate(texts, tokenizer, max_length=11, add_bos_token=False)
    with pytest.raises(TokenizerError, match="no EOS token"):
        tokenize_and_concatenate(texts, tiny_tokenizer(bos=False, pad=False))
    with pytest.raises(ArgumentError, match="no place"):
        tokenize_and_concatenate(texts, tokenizer, max_length=1)
    with pytest.raises(TokenizerError):
        tokenize_and_concatenate(texts, None)
