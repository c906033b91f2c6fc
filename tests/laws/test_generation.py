"""Generation is HF's, with hooks live at every step; text, tokens and streams come out as asked."""

import pytest
import torch
from golden.tiny import fresh, pad, random_tokens, tiny_gpt2, tiny_tokenizer
from lens_conformance.fingerprint import differences, fingerprint

import lens_core as lens
from lens_core import errors


@pytest.fixture
def talker():
    """Give a tiny model with a tokenizer, and its untouched twin."""
    hf = tiny_gpt2()
    return lens.load(hf, tokenizer=tiny_tokenizer()), fresh(hf)


def of_hf(reference, tokens, n, mask=None, **options):
    """Let HF's own generate continue the tokens."""
    mask = torch.ones_like(tokens) if mask is None else mask
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 28, **options}
    return reference.generate(tokens, attention_mask=mask, max_new_tokens=n, **options)


def test_greedy_equals_hf(talker):
    """Greedy tokens are HF's, for tokens and for text."""
    model, reference = talker
    tokens = random_tokens(2, 4)
    options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False}
    expected = of_hf(reference, tokens, 6)
    assert torch.equal(model.generate(tokens, **options), expected)
    assert torch.equal(model.generate(tokens, return_type="tokens", **options), expected)
    row = of_hf(reference, torch.tensor([[28, 3, 1]]), 6)
    got = model.generate("w3 w1", prepend_bos=True, return_type="tokens", **options)
    assert torch.equal(got, row)


def test_text_in_is_text_out(talker):
    """return_type "input" gives what came in: a string for a string, a list for a list."""
    model, reference = talker
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "prepend_bos": False}
    text = model.generate("w3 w1", **options)
    ids = of_hf(reference, torch.tensor([[3, 1]]), 4)[0]
    assert text.split() == [model.tokenizer.convert_ids_to_tokens(int(i)) for i in ids if int(i) != 28]
    many = model.generate(["w3 w1", "w7 w7"], **options)
    assert isinstance(many, list)
    assert many[0] == text


def test_uneven_prompts_are_padded_and_equal_each_alone(talker):
    """A batch of texts of unequal lengths continues each as it does alone."""
    model, reference = talker
    options = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "prepend_bos": False}
    out = model.generate(["w3 w1 w4 w1", "w9"], return_type="tokens", **options)
    for row, ids in zip(out, ([3, 1, 4, 1], [9]), strict=True):
        alone = of_hf(reference, torch.tensor([ids]), 5)[0]
        assert torch.equal(row[-len(alone) :], alone)


def test_sampling_draws_what_hf_draws(talker):
    """With a seed, sampled tokens are HF's with the same options."""
    model, reference = talker
    tokens = random_tokens(2, 4)
    for options in ({"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}):
        torch.manual_seed(5)
        full = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, **options}
        expected = of_hf(reference, tokens, 6, do_sample=True, **full)
        torch.manual_seed(5)
        ours = model.generate(tokens, max_new_tokens=6, do_sample=True, stop_at_eos=False, **options)
        assert torch.equal(ours, expected), options


def test_streaming_gives_the_same_tokens(talker):
    """The pieces of generate_stream, put together, are the tokens of generate."""
    model, reference = talker
    tokens = random_tokens(1, 4)
    expected = of_hf(reference, tokens, 6)
    pieces = list(
        model.generate_stream(tokens, max_new_tokens=6, do_sample=False, stop_at_eos=False, return_type="tokens")
    )
    assert len(pieces) > 1
    joined = torch.cat([piece.reshape(1, -1) for piece in pieces], 1)
    assert torch.equal(joined[:, -6:], expected[:, -6:])


def test_a_stream_left_early_leaves_the_model(talker):
    """A stream that the user stops reading leaves nothing behind, with hooks too."""
    model, reference = talker
    tokens, fired = random_tokens(1, 4), []
    model.hf_model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2, do_sample=False)
    before = fingerprint(model.hf_model)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda x, hook: fired.append(hook.step))]):
        stream = model.generate_stream(tokens, max_new_tokens=8, do_sample=False, stop_at_eos=False)
        next(iter(stream))
        stream.close()
    assert fired
    assert fired == list(range(len(fired)))
    assert differences(before, fingerprint(model.hf_model)) == []
    assert torch.equal(model(tokens), reference(tokens).logits)


def test_generation_stops_at_eos(talker):
    """stop_at_eos ends a row at the end token: the tokenizer's, or the ids given."""
    model, reference = talker
    tokens = random_tokens(1, 4)
    plain = of_hf(reference, tokens, 8)[0]
    end = int(plain[6])
    first = plain[4:].tolist().index(end)
    out = model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=end)
    assert torch.equal(out[0], plain[: 4 + first + 1])


def test_generation_without_a_key_value_cache_is_the_same(talker):
    """use_past_kv_cache=False recomputes the whole each step, with the same tokens."""
    model, reference = talker
    tokens, widths = random_tokens(2, 4), []
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: widths.append(x.shape[1]))]):
        out = model.generate(tokens, max_new_tokens=3, do_sample=False, stop_at_eos=False, use_past_kv_cache=False)
    assert widths == [4, 5, 6]
    assert torch.equal(out, of_hf(reference, tokens, 3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"return_type": "words"},
        {"temperature": "hot"},
        {"max_new_tokens": 100},
    ],
    ids=str,
)
def test_wrong_arguments_are_errors(talker, wrong):
    """Lengths, kinds and a total beyond the context are refused, and the model works on."""
    model, reference = talker
    tokens = random_tokens(1, 4)
    with pytest.raises(errors.LensError):
        model.generate(tokens, **{"max_new_tokens": 2, **wrong})
    assert torch.equal(model(tokens), reference(tokens).logits)


def test_left_padded_tokens_with_a_mask(talker):
    """A padded batch of ids with its mask continues as HF continues it."""
    model, reference = talker
    tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (3, 5)], "left")
    ours = model.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False, stop_at_eos=False)
    assert torch.equal(ours, of_hf(reference, tokens, 4, mask=mask))
