"""Law 11: padding side and amount, batch mates, and the split into prefill and decode do not matter, edits included."""

import itertools

import pytest
import torch
from golden.tiny import pad, random_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lens_conformance.edits import edit_at, pos_axis
from lens_conformance.golden.gpt2 import names_at
from transformers import DynamicCache

QUIET = settings(deadline=None, max_examples=5, derandomize=True, suppress_health_check=list(HealthCheck))
NAMES = names_at(1)
EDITS = [None, "blocks.0.attn.hook_k", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"]
EDITS += ["blocks.0.hook_v_input", "blocks.1.hook_resid_mid", "blocks.1.attn.hook_result", "blocks.0.ln1.hook_scale"]


def run(one, tokens, edited, **options):
    """Run with an edit and return logits and every value."""
    entries = [(edited, edit_at(edited, causal=True))] if edited else []
    with torch.no_grad(), one.model.hooks(fwd_hooks=entries):
        return one.model.run_with_cache(tokens, names_filter=NAMES, **options)


def real_part(name, value, row, real):
    """Take one row's real positions, and real keys where there is a key axis."""
    value = value[row : row + 1].index_select(pos_axis(name), real)
    return value.index_select(3, real) if pos_axis(name) == 2 else value


def assert_same(name, ours, theirs, what):
    """Compare in units of the scale; the same cells must be masked."""
    if not ours.is_floating_point():
        assert torch.equal(ours, theirs), f"{name}, {what}"
        return
    hidden = theirs == -torch.inf
    assert torch.equal(ours == -torch.inf, hidden), f"{name}, {what}"
    ours, theirs = ours.masked_fill(hidden, 0), theirs.masked_fill(hidden, 0)
    error = float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
    assert error <= 1e-10, f"{name}, {what}: off by {error:.2e}"


@pytest.mark.parametrize("edited", EDITS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_do_not_matter(subject, attn, side, edited):
    """Law 11: each row alone, unpadded, has the values that it has among padded others."""
    one = subject(dtype=torch.float64, attn=attn)

    @QUIET
    @given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(0, 3), st.integers(0, 99))
    def prove(lengths, amount, seed):
        rows = [random_tokens(1, n, seed=seed + n)[0] for n in lengths]
        tokens, mask = pad(rows, side, amount=amount)
        logits, cache = run(one, tokens, edited, attention_mask=mask)
        for row, ids in enumerate(rows):
            alone, values = run(one, ids[None], edited)
            real = mask[row].nonzero()[:, 0]
            what = f"lengths {lengths}, {amount} more, row {row}, edit {edited}"
            assert_same("logits", logits[row : row + 1, real], alone, what)
            for name in NAMES:
                assert_same(name, real_part(name, cache[name], row, real), values[name], what)

    prove()


@pytest.mark.parametrize("edited", EDITS, ids=str)
def test_batch_order_does_not_matter(subject, attn, edited):
    """Law 11: permuting the rows permutes the values."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens(5, 4)
    order = torch.tensor([3, 0, 4, 2, 1])
    logits, cache = run(one, tokens, edited)
    permuted, values = run(one, tokens[order], edited)
    assert_same("logits", permuted, logits[order], "permuted")
    for name in NAMES:
        assert_same(name, values[name], cache[name][order], f"permuted, edit {edited}")


def test_a_head_is_deaf_to_the_shared_norm_only_where_its_own_input_was_edited(subject):
    """Beside an edit of the norm, one head's input at one position: the other row and the other positions hear it."""
    one, tokens = subject(dtype=torch.float64), random_tokens(2, 5, seed=1)
    norm, copies, q = "blocks.0.ln1.hook_normalized", "blocks.0.hook_q_input", "blocks.0.attn.hook_q"

    def first_row(x, hook):
        x[0, 2, 1] *= -0.5

    with torch.no_grad(), one.model.hooks(fwd_hooks=[(norm, edit_at(norm, causal=True))]):
        _, heard = one.model.run_with_cache(tokens, names_filter=q)
        with one.model.hooks(fwd_hooks=[(copies, first_row)]):
            _, both = one.model.run_with_cache(tokens, names_filter=q)
    differs = (both[q] != heard[q]).any(-1).nonzero().tolist()
    assert differs == [[0, 2, 1]]


@pytest.mark.parametrize("edited", EDITS, ids=str)
def test_the_split_does_not_matter(subject, attn, edited):
    """Law 11: any split into prefill, chunks and single steps has the whole run's values."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens(2, 6)
    logits, whole = run(one, tokens, edited)

    @QUIET
    @given(st.sets(st.integers(1, 5)))
    def prove(cuts):
        past, bounds = DynamicCache(config=one.hf.config), [0, *sorted(cuts), 6]
        for start, stop in itertools.pairwise(bounds):
            part, cache = run(one, tokens[:, start:stop], edited, past_key_values=past, use_cache=True)
            what = f"split {bounds}, call {start}:{stop}, edit {edited}"
            assert_same("logits", part, logits[:, start:stop], what)
            for name in NAMES:
                expected = whole[name].narrow(pos_axis(name), start, stop - start)
                expected = expected[..., :stop] if pos_axis(name) == 2 else expected
                assert_same(name, cache[name], expected, what)

    prove()


@pytest.mark.parametrize("edited", EDITS, ids=str)
@pytest.mark.parametrize("side", ["left"])
def test_a_padded_prompt_may_be_split_too(subject, attn, side, edited):
    """Law 11: left padding and decoding together, with the mask that grows by a column a step."""
    one = subject(dtype=torch.float64, attn=attn)
    rows = [random_tokens(1, n, seed=n)[0] for n in (5, 7)]
    tokens, mask = pad(rows, side, amount=1)
    logits, whole = run(one, tokens, edited, attention_mask=mask)
    past = DynamicCache(config=one.hf.config)
    for start, stop in ((0, 5), (5, 6), (6, 8)):
        part, cache = run(
            one, tokens[:, start:stop], edited, attention_mask=mask[:, :stop], past_key_values=past, use_cache=True
        )
        for row in range(2):
            real = mask[row, start:stop].nonzero()[:, 0]
            assert_same("logits", part[row, real], logits[row, start:stop][real], f"call {start}:{stop}")
            for name in NAMES:
                axis = pos_axis(name) - 1
                expected = whole[name][row].narrow(axis, start, stop - start).index_select(axis, real)
                expected = expected[..., :stop] if pos_axis(name) == 2 else expected
                assert_same(name, cache[name][row].index_select(axis, real), expected, f"call {start}:{stop}")


def test_two_runs_do_not_know_each_other(subject, attn):
    """Law 11: run(A) then run(B) equals run(B) alone, bit for bit, after edits, gradients and errors."""
    one, a, b = subject(attn=attn), random_tokens(2, 5, seed=1), random_tokens(3, 4, seed=2)
    expected, first = one.model.run_with_cache(b, names_filter=one.names())
    for name in NAMES:
        one.model.run_with_hooks(a, fwd_hooks=[(name, edit_at(name))]).sum().backward()
    one.hf.zero_grad(set_to_none=True)
    again, second = one.model.run_with_cache(b, names_filter=one.names())
    assert torch.equal(again, expected)
    for name in one.names():
        assert torch.equal(first[name], second[name]), name
