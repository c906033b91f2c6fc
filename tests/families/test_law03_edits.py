"""Law 3: an edit replaces the value for everything downstream that the equations say, and for nothing else."""

import pytest
import torch
from families.compare import TOLERANCE, check, error, run
from golden.tiny import pad, random_tokens
from lens_conformance.edits import in_place, only_at, only_head


def ends_of(one):
    """Name what lies in the first and the last block."""
    last = one.config.num_hidden_layers - 1
    return [name for name in one.names() if name.startswith(("blocks.0.", f"blocks.{last}."))]


def every(one, step, names=None):
    """Take all names of a subject that is tried in full, else each `step`-th, from where the subject's name says."""
    names = one.edited_names() if names is None else names
    return names if one.subject.full else names[sum(map(ord, one.subject.name)) % step :: step]


@pytest.mark.in_full
def test_an_edit_has_golden_effect_everywhere(subject, wide):
    """Law 3: logits and the value at every other name are golden's with the same edit, for every name of a layer.

    For types not tried in full every other name, not the same for all types; their logits are compared for each below.
    """
    tokens = random_tokens(2, 5)
    for name in every(wide, 2):
        edit = subject.edit_at(name)
        check(wide, tokens, [(name, edit)], {name: edit})


@pytest.mark.once
@pytest.mark.in_full
def test_an_edit_in_the_first_and_the_last_block_has_golden_effect(subject, wide):
    """Law 3: the same at the ends of the stack: all names in full, else every ninth."""
    tokens = random_tokens(2, 5)
    for name in every(wide, 9, ends_of(wide)):
        edit = subject.edit_at(name)
        check(wide, tokens, [(name, edit)], {name: edit})


@pytest.mark.in_full
def test_an_edit_alone_has_golden_effect(subject, wide):
    """Law 3: with nothing else asked for, the logits are golden's: returned, in place, with a graph or not."""
    tokens = random_tokens(2, 5)
    for name in wide.edited_names():
        edit = subject.edit_at(name)
        expected, _ = wide.golden(tokens, edits={name: edit})
        for mode, entry in ((torch.enable_grad, edit), (torch.inference_mode, in_place(edit))):
            with mode():
                ours = wide.model.run_with_hooks(tokens, fwd_hooks=[(name, entry)])
            assert error(ours, expected) <= TOLERANCE, f"{name} under {mode.__name__}: {error(ours, expected):.1e}"


@pytest.mark.once
@pytest.mark.in_full
def test_an_edit_in_place_has_golden_effect_with_a_graph(subject, wide):
    """Law 3: writing into the argument in grad mode, and calling the HF model itself inside the context."""
    tokens = random_tokens(2, 5)
    for name in wide.edited_names():
        edit = subject.edit_at(name)
        expected, _ = wide.golden(tokens, edits={name: edit})
        ours = wide.model.run_with_hooks(tokens, fwd_hooks=[(name, in_place(edit))])
        assert error(ours, expected) <= TOLERANCE, name
        with torch.no_grad(), wide.model.hooks(fwd_hooks=[(name, edit)]):
            assert error(wide.hf(tokens).logits, expected) <= TOLERANCE, f"{name} through the HF model"


@pytest.mark.in_full
def test_an_edit_is_right_to_float32_precision(subject, narrow):
    """Law 3: in float32, HF unmodified, the error of an edited run is a rounding error."""
    tokens, off = random_tokens(2, 5), {}
    for name in narrow.edited_names():
        edit = subject.edit_at(name)
        expected, _ = narrow.golden(tokens, edits={name: edit})
        with torch.no_grad():
            ours = narrow.model.run_with_hooks(tokens, fwd_hooks=[(name, edit)])
        off |= {name: error(ours.double(), expected)} if not error(ours.double(), expected) <= 2e-5 else {}
    assert not off


@pytest.mark.once
@pytest.mark.in_full
def test_an_edit_of_one_head_reaches_that_head(subject, wide):
    """Law 3: an edit of one head's (or channel's) part equals golden's: each head in full, else the second."""
    tokens = random_tokens(2, 5)
    _, values = wide.golden(tokens)
    for name in wide.edited_names():
        axis = subject.head_axis(name)
        if axis is None:
            continue
        heads = values[name].shape[axis]
        for head in range(heads) if subject.full and heads < 8 else (min(1, heads - 1),):
            edit = only_head(subject.edit_at(name), head, axis)
            check(wide, tokens, [(name, edit)], {name: edit})


@pytest.mark.once
@pytest.mark.in_full
def test_an_entry_may_name_positions(subject, wide):
    """Law 3: an entry with positions is shown those only, and edits those only."""
    tokens = random_tokens(2, 6)
    for name in wide.edited_names():
        axis = subject.pos_axis(name)
        if axis is None or subject.per_position(name):
            continue
        edit, shown = subject.edit_at(name), []

        def note(x, hook, edit=edit, shown=shown, axis=axis):
            shown.append((x.shape[axis], hook.positions.tolist()))
            return edit(x, hook=hook)

        edits = {name: only_at(name, edit, [1, 4])}
        if subject.full:
            check(wide, tokens, [(name, note, [1, 4])], edits)
        else:
            expected, _ = wide.golden(tokens, edits=edits)
            with torch.no_grad():
                ours = wide.model.run_with_hooks(tokens, fwd_hooks=[(name, note, [1, 4])])
            assert error(ours, expected) <= TOLERANCE, f"{name}: {error(ours, expected):.1e}"
        assert shown == [(2, [1, 4])], name


@pytest.mark.once
@pytest.mark.in_full
@pytest.mark.parametrize("side", ["left", "right"])
def test_edits_under_padding_equal_golden(subject, wide, side):
    """Law 3: under a mask the logits at real positions are golden's with the same edit."""
    if side not in subject.paddings or (side == "right" and not subject.full):
        return
    tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (3, 6)], side)
    real, off = mask.bool(), {}
    for name in wide.edited_names():
        edit = subject.edit_at(name, causal=True)
        expected, _ = wide.golden(tokens, attention_mask=mask, edits={name: edit})
        with torch.no_grad():
            ours = wide.model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[(name, edit)])
        off |= {} if error(ours[real], expected[real]) <= TOLERANCE else {name: error(ours[real], expected[real])}
    assert not off


@pytest.mark.once
@pytest.mark.subjects(lambda subject: subject.name in ("olmo2", "qwen3", "llama"))
def test_an_edited_key_is_normed_beside_the_keys_that_functions_made(subject, wide):
    """Law 3: where all heads are normed together, a query head's own key sees an edit of the other heads' keys."""
    tokens = random_tokens(2, 5)
    own, keys = "blocks.1.hook_k_input_rep", "blocks.1.attn.hook_k"
    edits = {own: only_head(subject.edit_at(own), 0), keys: subject.edit_at(keys)}
    check(wide, tokens, list(edits.items()), edits)


@pytest.mark.in_full
def test_several_edits_compose(subject, wide):
    """Law 3: mild edits at many names at once, as golden composes them."""
    tokens = random_tokens(2, 5)
    chosen = [n for n in wide.names() if subject.gradient(n) and not n.endswith(("_rep", "resid_pre", "resid_post"))]
    edits = {name: lambda x, hook: x * 0.97 + 0.003 for name in chosen[::2]}
    check(wide, tokens, list(edits.items()), edits)
    edits = {name: lambda x, hook: x * 0.97 + 0.003 for name in chosen[1::2]}
    check(wide, tokens, list(edits.items()), edits)


@pytest.mark.once
@pytest.mark.in_full
def test_writing_into_the_argument_reaches_nothing_upstream(subject, wide):
    """Law 3: an in-place edit does not reach values upstream or beside that share storage in HF."""
    tokens = random_tokens(2, 5)
    for name in wide.edited_names()[:: 1 if subject.full else 4]:
        edit = subject.edit_at(name)
        _, expected = wide.golden(tokens, edits={name: edit})
        _, cache = run(wide, tokens, [(name, in_place(edit))])
        off = {n: error(cache[n], expected[n]) for n in wide.names()}
        assert not {n: value for n, value in off.items() if not value <= TOLERANCE}, f"writing into {name}"
