"""Law 11: padding side and amount, batch mates, and the split into prefill and decode do not matter, edits included."""

import pytest
import torch
from families.compare import TOLERANCE, error, part, real_part, run
from golden.tiny import pad, random_tokens
from transformers import DynamicCache

ENDINGS = ("0.attn.hook_k", "1.attn.hook_pattern", "0.hook_v_input", "1.hook_resid_mid", "0.ln1.hook_scale")
ENDINGS += ("1.attn.hook_attn_scores", "0.attn.hook_rot_k", "1.mlp.hook_router_logits", "0.ln1_post.hook_scale")
ENDINGS += ("0.mixer.hook_conv", "0.mixer.hook_ssm_state", "1.mixer.hook_delta", "0.hook_resid_pre")


def edits_of(one):
    """Give no edit, and an edit at each of some names that reach other positions; fewer of them in a sample."""
    names = [name for name in one.names() if name.endswith(ENDINGS)]
    chosen = names if one.subject.full else names[::3]
    return [[], *([(name, one.subject.edit_at(name, causal=True))] for name in chosen)]


def assert_same(one, ours, theirs, what):
    """Compare every value in units of its scale."""
    off = {name: error(ours[name], theirs[name]) for name in ours}
    assert not {name: value for name, value in off.items() if not value <= TOLERANCE}, what


@pytest.mark.once
@pytest.mark.sampled
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_do_not_matter(subject, wide, side):
    """Law 11: each row alone, unpadded, has the values that it has among padded others."""
    if side not in subject.paddings:
        return
    rows = [random_tokens(1, n, seed=n)[0] for n in ((1, 4, 6) if subject.full else (2, 6))]
    tokens, mask = pad(rows, side, amount=2)
    for entries in edits_of(wide):
        logits, cache = run(wide, tokens, entries, attention_mask=mask)
        for row, ids in enumerate(rows):
            alone, values = run(wide, ids[None], entries)
            real = mask[row].nonzero()[:, 0]
            assert error(logits[row : row + 1, real], alone) <= TOLERANCE, f"row {row}, edit {entries}"
            ours = {name: real_part(subject, name, cache[name], row, real) for name in wide.names()}
            assert_same(wide, ours, values, f"row {row}, edit {[name for name, _ in entries]}")


@pytest.mark.once
@pytest.mark.sampled
def test_the_split_does_not_matter(subject, wide):
    """Law 11: any split into prefill, chunks and single steps has the whole run's values, with padding too."""
    rows = [random_tokens(1, n, seed=n)[0] for n in ((4, 6) if "left" in subject.paddings else (6, 6))]
    tokens, mask = pad(rows, "left")
    for entries in edits_of(wide):
        logits, whole = run(wide, tokens, entries, attention_mask=mask)
        past = DynamicCache(config=wide.hf.config)
        for start, stop in subject.calls(0, 3, 4, 6):
            given = {"attention_mask": mask[:, :stop], "past_key_values": past, "use_cache": True}
            piece, cache = run(wide, tokens[:, start:stop], entries, **given)
            for row in range(2):
                real = mask[row, start:stop].nonzero()[:, 0]
                assert error(piece[row, real], logits[row, start:stop][real]) <= TOLERANCE, (start, entries)
                ours, theirs = {}, {}
                for name in (name for name in wide.names() if subject.pos_axis(name) is not None):
                    axis = subject.pos_axis(name)
                    ours[name] = cache[name][row : row + 1].index_select(axis, real)
                    expected = part(subject, name, whole[name], start, stop)
                    theirs[name] = expected[row : row + 1].index_select(axis, real)
                assert_same(wide, ours, theirs, f"call {start}:{stop}, edit {[name for name, _ in entries]}")


@pytest.mark.once
def test_two_runs_do_not_know_each_other(subject, narrow):
    """Law 11: run(A) then run(B) equals run(B) alone, bit for bit, after edits and gradients."""
    a, b = random_tokens(2, 5, seed=1), random_tokens(3, 4, seed=2)
    names = narrow.names()
    expected, first = run(narrow, b)
    for name in narrow.edited_names()[::4]:
        narrow.model.run_with_hooks(a, fwd_hooks=[(name, subject.edit_at(name))]).sum().backward()
    narrow.hf.zero_grad(set_to_none=True)
    again, second = run(narrow, b)
    assert torch.equal(again, expected)
    for name in names:
        assert torch.equal(first[name], second[name]), name
