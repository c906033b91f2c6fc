"""Law 8: dtype and device are the model's own and declared; floating returns are cast; a wrong return is an error."""

import pytest
import torch
from families.subject import shared_pair
from golden.tiny import random_tokens

from lens_core import errors


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_have_the_declared_dtype(subject, attn, dtype):
    """Law 8: every value, cached and handed, is of the dtype that the table declares; edits keep it."""
    one = shared_pair(subject.name, getattr(torch, dtype), attn)
    table, handed = {point.name: point for point in one.model.hook_points()}, {}

    def note(x, hook):
        handed[hook.name] = x.dtype, x.device

    with torch.no_grad(), one.model.hooks(fwd_hooks=[(name, note) for name in one.names()]):
        _, cache = one.model.run_with_cache(random_tokens(), names_filter=one.names())
    for name in one.names():
        declared = table[name].dtype
        expected = getattr(torch, dtype) if declared == "model" else getattr(torch, declared)
        assert cache[name].dtype == expected, f"{name}: {cache[name].dtype}, declared {declared}"
        assert handed[name] == (expected, torch.device("cpu")), name


@pytest.mark.sampled
def test_a_returned_floating_dtype_is_cast(subject, attn):
    """Law 8: in bfloat16, what a function returns in float64 is cast to the place's dtype."""
    one, tokens = shared_pair(subject.name, torch.bfloat16, attn), random_tokens()
    for name in (name for name in one.edited_names() if subject.gradient(name)):
        edit = subject.edit_at(name)
        with torch.no_grad():
            expected = one.model.run_with_hooks(
                tokens, fwd_hooks=[(name, lambda x, hook, e=edit: e(x).double().to(x.dtype))]
            )
            ours = one.model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook, e=edit: e(x).double())])
        assert torch.equal(ours, expected), name


WRONG = {
    "one-row": lambda x: x[:1],
    "no-batch": lambda x: x[0],
    "more-axes": lambda x: x[None],
    "another-device": lambda x: torch.empty_like(x, device="meta"),
    "a-string": lambda x: "nothing",
    "complex": lambda x: x.to(torch.complex64),
}


@pytest.mark.once
@pytest.mark.sampled
def test_a_wrong_return_is_an_error(subject, narrow):
    """Law 8: each wrong thing, at every name, is an error that names the hook point; the model stays usable."""
    tokens = random_tokens()
    kinds = sorted(WRONG)
    for index, name in enumerate(narrow.edited_names()):
        for kind in kinds if subject.full else (kinds[index % len(kinds)],):
            with torch.no_grad(), pytest.raises(errors.HookValueError, match=name):
                narrow.model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook, k=kind: WRONG[k](x))])
    with torch.no_grad():
        assert torch.equal(narrow.model(tokens), narrow.reference(tokens).logits)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_edits_err_no_more_than_hf(subject, attn, dtype):
    """Law 8: in half precision an edited run errs no more than 4 times as much as plain HF against golden."""
    if dtype == "float16" and not subject.full:
        return
    one, tokens = shared_pair(subject.name, getattr(torch, dtype), attn), random_tokens()
    bare, _ = one.golden(tokens)
    with torch.no_grad():
        theirs = float((one.reference(tokens).logits.double() - bare).abs().max())
    wrong = {}
    for name in (name for name in one.edited_names() if subject.gradient(name)):
        edit = {name: lambda x, hook: x * 0.75}
        expected, _ = one.golden(tokens, edits=edit)
        with torch.no_grad():
            ours = one.model.run_with_hooks(tokens, fwd_hooks=list(edit.items())).double()
        off = float((ours - expected).abs().max())
        wrong |= {} if off <= 4 * theirs else {name: off}
    assert not wrong, f"HF is off by {theirs:.1e}"


@pytest.mark.once
@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_edited_scale_is_edited_where_it_was(subject, attn, dtype):
    """Laws 3 and 8: a norm's scale is shown in the model's dtype; positions that nobody changed keep all its digits."""
    one, tokens = shared_pair(subject.name, getattr(torch, dtype), attn), random_tokens(2, 6)
    for name in (name for name in one.edited_names() if name.endswith("hook_scale")):
        if subject.pos_axis(name) != 1 or one.model.table[name].shape.split()[1] != "pos":
            continue
        with torch.no_grad():
            plain = one.model(tokens)
            edited = one.model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x * 2, [4])])
        assert torch.equal(edited[:, :4], plain[:, :4]), name
        assert not torch.equal(edited[:, 4:], plain[:, 4:]), name
