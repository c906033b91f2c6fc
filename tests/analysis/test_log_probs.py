"""Log-probabilities in pieces of positions and vocabulary: those of HF's logits, and bounded memory."""

import gc

import pytest
import torch
from golden.live import live_bytes
from golden.tiny import fresh, pad, random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

import lens_core as lens
from lens_core.analysis.log_probs import log_probs
from lens_core.errors import ArgumentError, InputError, UnsupportedHookError

MODELS = {
    "gpt2": lambda: tiny_gpt2(dtype=torch.float64),
    "soft-cap": lambda: tiny_llama("gemma2", attn="eager").double(),
    "divided": lambda: tiny_llama("granite").double(),
    "scaled": lambda: tiny_llama("cohere").double(),
    "biased": lambda: tiny_llama("phi").double(),
    "tied": lambda: tiny_llama("llama-tied").double(),
}
OTHERS = {"mamba": "toy:mamba", "mamba2": "toy:mamba2"}


def expected(hf, tokens, mask=None):
    """Take log-softmax of HF's logits."""
    with torch.no_grad():
        logits = hf(tokens, attention_mask=mask).logits
    return torch.log_softmax(logits.double(), -1)[:, :-1]


@pytest.mark.parametrize("name", MODELS)
def test_they_are_those_of_hf_logits(name):
    """In float64 to 1e-12: the tokens' own, the best ones, ranks, entropy, and the mean."""
    hf = MODELS[name]()
    model, tokens = lens.load(fresh(hf) if name == "gpt2" else hf), random_tokens(3, 8)
    found = log_probs(model, tokens, top=3, rows=5, chunk=7)
    every = expected(hf, tokens)
    own = every.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.log_probs, own, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.entropy, -(every.exp() * every).sum(-1), rtol=0, atol=1e-12)
    best = every.topk(3)
    assert torch.equal(found.top_tokens, best.indices)
    torch.testing.assert_close(found.top_log_probs, best.values, rtol=0, atol=1e-12)
    assert torch.equal(found.ranks, (every > own[..., None]).sum(-1))
    torch.testing.assert_close(found.loss, -own.mean(), rtol=0, atol=1e-12)
    assert torch.equal(found.tokens, tokens[:, 1:])


@pytest.mark.parametrize("name", OTHERS)
def test_state_space_models(name):
    """In float32, as their checkpoints are."""
    model = lens.load(OTHERS[name])
    tokens = random_tokens(2, 8)
    own = expected(model.hf_model, tokens).gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(log_probs(model, tokens).log_probs.double(), own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    """Rows of unequal length give what each gives alone, and the loss is that of forward."""
    model = lens.load(tiny_gpt2(dtype=torch.float64))
    rows = [random_tokens(1, 9)[0], random_tokens(1, 6, seed=1)[0]]
    tokens, mask = pad(rows, side)
    found = log_probs(model, tokens, attention_mask=mask)
    for index, row in enumerate(rows):
        alone = log_probs(model, row[None])
        torch.testing.assert_close(found.log_probs[index][found.is_real[index]], alone.log_probs[0])
    assert (found.log_probs[~found.is_real] == 0).all()
    assert found.is_real.sum() == 8 + 5
    torch.testing.assert_close(found.loss, model(tokens, return_type="loss", attention_mask=mask))


def test_hooks_count():
    """Edits on the way reach it; a hook at the logits is refused, whoever put it there."""
    model, tokens = lens.load(tiny_gpt2(dtype=torch.float64)), random_tokens(2, 8)
    for place in ("blocks.1.hook_mlp_out", "ln_final.hook_normalized", "unembed.hook_in"):
        with model.hooks(fwd_hooks=[(place, lambda value, hook: value * 1.5)]):
            torch.testing.assert_close(log_probs(model, tokens).loss, model(tokens, return_type="loss"))
    message = "a hook at 'hook_logits' has the logits of all tokens|a hook at 'unembed.hook_out' has the logits"
    with model.hooks(fwd_hooks=[("hook_logits", lambda value, hook: value * 1.5)]):
        with pytest.raises(UnsupportedHookError, match=message):
            log_probs(model, tokens)
        model(tokens)
    model.add_hook("unembed.hook_out", lambda value, hook: None)
    with pytest.raises(UnsupportedHookError, match=message):
        log_probs(model, tokens)


def test_memory_does_not_grow_with_positions_times_vocabulary():
    """A few times `rows * chunk` numbers, where the logits alone would be 60 MB."""
    config = GPT2Config(vocab_size=30_000, n_positions=512, n_embd=16, n_layer=1, n_head=2)
    model, tokens = lens.load(GPT2LMHeadModel(config).eval()), random_tokens(1, 512)
    logits, piece = 512 * 30_000 * 4, 64 * 1000 * 4
    gc.collect()
    with torch.no_grad():
        trunk = live_bytes(lambda: model.run_with_cache(tokens, stop_at_layer=1, return_type=None)[0], model)
        peak = live_bytes(lambda: log_probs(model, tokens, rows=64, chunk=1000), model)
        whole = live_bytes(lambda: model(tokens, return_type="loss"), model)
    one_row = 30_000 * 4  # HF's last position, and the zeros that stand for no bias
    assert peak < trunk + 8 * piece + 3 * one_row
    assert peak < logits / 10
    assert whole > 1.9 * logits  # log-softmax makes them twice


def test_mistakes_are_named():
    """What has no next token, and sizes that are none."""
    model = lens.load(tiny_gpt2())
    with pytest.raises(InputError, match="there is one token, and none comes after it"):
        log_probs(model, random_tokens(2, 1))
    with pytest.raises(InputError, match="embeddings have no next tokens"):
        log_probs(model, torch.zeros(1, 3, 21))
    with pytest.raises(ArgumentError, match="rows is a whole number, at least 1; got 0"):
        log_probs(model, random_tokens(), rows=0)
