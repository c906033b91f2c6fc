"""Law 3, later steps: an edit in prefill and decode equals the whole run with it, through the model's own cache."""

import pytest
import torch
from families.compare import TOLERANCE, error, part, run
from golden.tiny import random_tokens
from lens_conformance.edits import only_at
from transformers import DynamicCache


def stepwise(one, tokens, calls):
    """Run the calls one after the other on one cache; return all logits along the positions."""
    past, pieces = DynamicCache(config=one.hf.config), []
    for start, stop, entries in calls:
        with torch.no_grad():
            pieces.append(
                one.model.run_with_hooks(tokens[:, start:stop], fwd_hooks=entries, past_key_values=past, use_cache=True)
            )
    return torch.cat(pieces, dim=1)


def followed(one):
    """List the names whose edit later steps can follow."""
    return [name for name in one.edited_names() if one.subject.decodes(name)]


@pytest.mark.in_full
def test_prefill_and_decode_with_an_edit_equal_the_whole(subject, wide):
    """Law 3: the edit in every call: prefill, single steps and a chunk."""
    tokens, off = random_tokens(2, 7), {}
    for name in followed(wide):
        entry = [(name, subject.edit_at(name, causal=True))]
        expected, _ = wide.golden(tokens, edits=dict(entry))
        bounds = subject.calls(0, 3, 4, 6, 7) if subject.full else subject.calls(0, 3, 4, 7)
        ours = stepwise(wide, tokens, [(start, stop, entry) for start, stop in bounds])
        off |= {} if error(ours, expected) <= TOLERANCE else {name: error(ours, expected)}
    assert not off


@pytest.mark.in_full
def test_an_edit_in_prefill_reaches_bare_decode(subject, wide):
    """Law 3: what prefill's edit did is in the cache that bare decoding reads."""
    tokens, off = random_tokens(2, 6), {}
    for name in followed(wide):
        edit = subject.edit_at(name, causal=True)
        expected, _ = wide.golden(tokens, edits={name: only_at(name, edit, range(4))})
        ours = stepwise(wide, tokens, [(0, 4, [(name, edit)]), (4, 5, []), (5, 6, [])])
        off |= {} if error(ours, expected) <= TOLERANCE else {name: error(ours, expected)}
    assert not off


@pytest.mark.once
@pytest.mark.in_full
def test_an_edit_in_one_decode_step_holds_for_later_steps(subject, wide):
    """Law 3: an edit in the middle of decoding, by call and by position, then bare steps."""
    tokens = random_tokens(2, 6)
    for name in followed(wide):
        if subject.pos_axis(name) is None or subject.per_position(name):
            continue
        edit = subject.edit_at(name, causal=True)
        expected, _ = wide.golden(tokens, edits={name: only_at(name, edit, [3])})
        ours = stepwise(wide, tokens, [(0, 3, []), (3, 4, [(name, edit)]), (4, 5, []), (5, 6, [])])
        assert error(ours, expected) <= TOLERANCE, name
        ours = stepwise(wide, tokens, [(a, b, [(name, edit, [3])]) for a, b in subject.calls(0, 2, 5, 6)])
        assert error(ours, expected) <= TOLERANCE, f"{name} by position"


@pytest.mark.once
@pytest.mark.in_full
@pytest.mark.parametrize("how", ["lens", "hf"])
def test_generation_with_an_edit_equals_golden_greedy(subject, wide, how):
    """Law 3: greedy generation with an edit at any name picks golden's tokens with that edit on the whole text."""
    prompt, moved = random_tokens(2, 4), 0
    plain = greedy(wide, prompt, {})
    for name in followed(wide):
        edit = subject.edit_at(name, causal=True)
        expected = greedy(wide, prompt, {name: edit})
        with torch.no_grad(), wide.model.hooks(fwd_hooks=[(name, edit)]):
            if how == "lens":
                options = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens"}
                ours = wide.model.generate(prompt, max_new_tokens=3, **options)
            else:
                options = {"do_sample": False, "eos_token_id": None}
                ours = wide.hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, **options)
        assert torch.equal(ours, expected), name
        moved += not torch.equal(plain, expected)
    assert moved > len(followed(wide)) / 3, "hardly an edit changes the tokens: the comparison shows nothing"


def greedy(one, prompt, edits):
    """Continue the prompt by golden's most probable tokens."""
    for _ in range(3):
        logits, _ = one.golden(prompt, edits=edits)
        prompt = torch.cat([prompt, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return prompt


@pytest.mark.in_full
def test_values_while_decoding_with_an_edit_equal_golden(subject, wide):
    """Law 3: the values at all names in every step are golden's with the edit: those that enter the model's cache."""
    tokens = random_tokens(2, 6)
    wanted = ("blocks.0.attn.hook_k", "blocks.0.attn.hook_v", "blocks.1.hook_k_input", "blocks.0.attn.hook_rot_k")
    wanted += ("blocks.0.mixer.hook_conv_in", "blocks.0.mixer.hook_ssm_state", "blocks.0.hook_resid_pre")
    for edited in (name for name in wanted if name in wide.names()):
        edit = subject.edit_at(edited)
        _, expected = wide.golden(tokens, edits={edited: edit})
        past = DynamicCache(config=wide.hf.config)
        for start, stop in subject.calls(0, 3, 4, 6):
            _, cache = run(wide, tokens[:, start:stop], [(edited, edit)], past_key_values=past, use_cache=True)
            off = {}
            for name in wide.names():
                want = part(subject, name, expected[name], start, stop)
                if subject.pos_axis(name) is None:  # keys that the model's own cache has dropped may be missing
                    want = want.narrow(1, stop - cache[name].shape[1], cache[name].shape[1])
                off |= {} if error(cache[name], want) <= TOLERANCE else {name: error(cache[name], want)}
            assert not off, f"edit at {edited}, call {start}:{stop}"
