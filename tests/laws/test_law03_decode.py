"""Law 3, later steps: an edit in prefill and decode equals the whole run with it, through the model's own cache."""

import pytest
import torch
from golden.tiny import random_tokens
from lens_conformance.edits import at_steps, edit_at, only_at
from lens_conformance.golden.gpt2 import BLOCK, TOP, names_at
from transformers import DynamicCache

PLACES = [*TOP, *(f"blocks.L.{name}" for name in BLOCK)]


def at_layers(place, layers=(0, 1, 2)):
    """Give the names of a place in some layers, or the place itself where there are none."""
    return [place.replace(".L.", f".{layer}.") for layer in layers] if ".L." in place else [place]


def stepwise(one, tokens, calls, **run):
    """Run the calls one after the other on one key-value cache; return all logits along the positions."""
    past, pieces = DynamicCache(config=one.hf.config), []
    for start, stop, entries in calls:
        with torch.no_grad():
            pieces.append(
                one.model.run_with_hooks(
                    tokens[:, start:stop], fwd_hooks=entries, past_key_values=past, use_cache=True, **run
                )
            )
    return torch.cat(pieces, dim=1)


def assert_equal(ours, expected, what):
    """Compare in units of the scale."""
    error = float((ours - expected).abs().max())
    assert error <= 1e-10 * max(1.0, float(expected.abs().max())), f"{what}: off by {error:.2e}"


@pytest.mark.parametrize("place", PLACES)
def test_prefill_and_decode_with_an_edit_equal_the_whole(subject, attn, place):
    """Law 3: the edit in every call, prefill, single steps and a chunk."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens(2, 7)
    for name in at_layers(place):
        entry = [(name, edit_at(name, causal=True))]
        expected, _ = one.golden(tokens, edits=dict(entry))
        calls = [(start, stop, entry) for start, stop in ((0, 3), (3, 4), (4, 6), (6, 7))]
        assert_equal(stepwise(one, tokens, calls), expected, name)


@pytest.mark.parametrize("place", PLACES)
def test_an_edit_in_prefill_reaches_bare_decode(subject, attn, place):
    """Law 3: what prefill's edit did is in the cache that bare decoding reads."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens(2, 6)
    for name in at_layers(place, [1]):
        edit = edit_at(name, causal=True)
        expected, _ = one.golden(tokens, edits={name: only_at(name, edit, range(4))})
        calls = [(0, 4, [(name, edit)]), (4, 5, []), (5, 6, [])]
        assert_equal(stepwise(one, tokens, calls), expected, name)


@pytest.mark.parametrize("place", PLACES)
def test_an_edit_in_one_decode_step_holds_for_later_steps(subject, attn, place):
    """Law 3: an edit in the middle of decoding, by position, then bare steps."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens(2, 6)
    for name in at_layers(place, [1]):
        edit = edit_at(name, causal=True)
        expected, _ = one.golden(tokens, edits={name: only_at(name, edit, [3])})
        calls = [(0, 3, []), (3, 4, [(name, edit)]), (4, 5, []), (5, 6, [])]
        assert_equal(stepwise(one, tokens, calls), expected, name)
        entry = [(name, edit, [3])]
        calls = [(start, stop, entry) for start, stop in ((0, 2), (2, 5), (5, 6))]
        assert_equal(stepwise(one, tokens, calls), expected, f"{name} by position")


@pytest.mark.parametrize("how", ["lens", "hf"])
def test_generation_with_an_edit_equals_golden_greedy(subject, attn, how):
    """Law 3: greedy generation with an edit at any name picks golden's tokens with that edit on the whole text."""
    one, prompt = subject(dtype=torch.float64, attn=attn), random_tokens(2, 4)
    moved = 0
    for name in names_at(1):
        edit = edit_at(name, causal=True)
        expected, plain = prompt, prompt
        for _ in range(4):
            logits, _ = one.golden(expected, edits={name: edit})
            expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], 1)
            plain = torch.cat([plain, one.golden(plain)[0][:, -1].argmax(-1, keepdim=True)], 1)
        with one.model.hooks(fwd_hooks=[(name, edit)]):
            if how == "lens":
                ours = one.model.generate(
                    prompt, max_new_tokens=4, do_sample=False, stop_at_eos=False, return_type="tokens"
                )
            else:
                mask = torch.ones_like(prompt)
                ours = one.hf.generate(
                    prompt, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None
                )
        assert torch.equal(ours, expected), name
        moved += not torch.equal(plain, expected)
    assert moved > len(names_at(1)) / 2, "hardly an edit changes the tokens: the comparison shows nothing"


def test_values_while_decoding_with_an_edit_equal_golden(subject, attn):
    """Law 3: the values at all names in every step are golden's with the edit."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens(2, 6)
    for edited in ("blocks.0.attn.hook_k", "blocks.0.attn.hook_v", "blocks.1.hook_k_input", "blocks.0.hook_resid_mid"):
        _, expected = one.golden(tokens, edits={edited: edit_at(edited)})
        past = DynamicCache(config=one.hf.config)
        for start, stop in ((0, 3), (3, 4), (4, 6)):
            with torch.no_grad(), one.model.hooks(fwd_hooks=[(edited, edit_at(edited))]):
                _, cache = one.model.run_with_cache(
                    tokens[:, start:stop], names_filter=one.names(), past_key_values=past, use_cache=True
                )
            for name in one.names():
                want = at_steps(name, expected[name], slice(start, stop))
                hidden = want == -torch.inf
                assert torch.equal(cache[name] == -torch.inf, hidden), name
                ours = cache[name].masked_fill(hidden, 0)
                assert_equal(ours, want.masked_fill(hidden, 0), f"{name}, edit at {edited}, call {start}:{stop}")


def test_a_static_cache_takes_edits(subject, attn):
    """Law 3: edits of keys and values enter a static cache too."""
    from transformers import StaticCache

    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens(2, 6)
    for name in (
        "blocks.1.attn.hook_k",
        "blocks.1.attn.hook_v",
        "blocks.1.attn.hook_pattern",
        "blocks.1.hook_resid_mid",
    ):
        edit, pieces = edit_at(name, causal=True), []
        expected, _ = one.golden(tokens, edits={name: edit})
        past = StaticCache(config=one.hf.config, max_cache_len=11)
        for start, stop in ((0, 4), (4, 5), (5, 6)):
            with torch.no_grad():
                pieces.append(
                    one.model.run_with_hooks(
                        tokens[:, start:stop], fwd_hooks=[(name, edit)], past_key_values=past, use_cache=True
                    )
                )
        assert_equal(torch.cat(pieces, 1), expected, name)
