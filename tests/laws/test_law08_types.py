"""Law 8: dtype and device are the model's own; floating returns are cast; a wrong shape, device or type is an error."""

import numpy as np
import pytest
import torch
from golden.tiny import random_tokens
from lens_conformance.edits import edit_at
from lens_conformance.fingerprint import differences, fingerprint
from lens_conformance.golden.gpt2 import names, names_at

from lens_core import errors

FLOATS = [name for name in names(3) if name != "hook_tokens"]
LAYER = names_at(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_values_have_the_models_dtype_and_device(subject, attn, dtype):
    """Law 8: every floating value is of the model's dtype, and so is what a function is handed."""
    one, tokens, handed = subject(dtype=dtype, attn=attn), random_tokens(), {}

    def note(x, hook):
        handed[hook.name] = x.dtype, x.device

    with torch.no_grad(), one.model.hooks(fwd_hooks=[(name, note) for name in one.names()]):
        _, cache = one.model.run_with_cache(tokens, names_filter=one.names())
    assert cache["hook_tokens"].dtype == torch.long
    for name in FLOATS:
        assert (cache[name].dtype, cache[name].device) == handed[name], name
        assert cache[name].dtype == dtype, name
        assert cache[name].device == torch.device("cpu"), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_returned_floating_dtype_is_cast(subject, attn, dtype):
    """Law 8: what a function returns in another floating dtype is cast to the place's."""
    one, tokens = subject(dtype=dtype, attn=attn), random_tokens()
    for name in LAYER[1:]:
        edit = edit_at(name)
        for other in (torch.float64, torch.float16):
            with torch.no_grad():
                expected = one.model.run_with_hooks(
                    tokens, fwd_hooks=[(name, lambda x, hook, e=edit, o=other: e(x).to(o).to(x.dtype))]
                )
                entries = [(name, lambda x, hook, e=edit, o=other: e(x).to(o))]
                with one.model.hooks(fwd_hooks=entries):
                    ours, cache = one.model.run_with_cache(tokens, names_filter=[name])
            assert torch.equal(ours, expected), f"{name} returned as {other}"
            assert cache[name].dtype == dtype, name


WRONG = {
    "more-positions": lambda x: torch.cat([x, x[:, :1]], 1),
    "one-position": lambda x: x[:, :1],
    "one-row": lambda x: x[:1],
    "scalar": lambda x: x.flatten()[0],
    "no-batch": lambda x: x[0],
    "more-axes": lambda x: x[None],
    "last-axis-of-one": lambda x: x[..., :1] if x.shape[-1] > 1 else x.expand(*x.shape[:-1], 2),
    "another-device": lambda x: torch.empty_like(x, device="meta"),
    "a-string": lambda x: "nothing",
    "a-number": lambda x: 0.0,
    "a-tuple": lambda x: (x,),
    "an-array": lambda x: np.zeros(tuple(x.shape), dtype=np.float32),
    "true": lambda x: True,
    "complex": lambda x: x.to(torch.complex64),
    "booleans": lambda x: x > 0,
}


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_a_wrong_return_is_an_error_and_leaves_the_model(subject, attn, kind):
    """Law 8: each wrong thing, at every name, is an error that names the hook point; the model stays usable."""
    one, tokens = subject(attn=attn), random_tokens()
    expected = one.reference(tokens).logits.detach()
    one.hf(tokens)
    before = fingerprint(one.hf)
    for name in LAYER:
        if kind == "last-axis-of-one" and name == "hook_tokens":
            continue  # it has no last axis beside the positions: "one-position" is that case
        for mode in (torch.no_grad, torch.enable_grad):
            with mode(), pytest.raises(errors.HookValueError, match=name):
                one.model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: WRONG[kind](x))])
    assert differences(before, fingerprint(one.hf)) == []
    with torch.no_grad():
        assert torch.equal(one.model(tokens), expected)


def test_a_wrong_return_at_named_positions_is_an_error(subject):
    """Law 8: an entry with positions must return as many positions as it was shown."""
    one, tokens = subject(), random_tokens(2, 6)
    for name in LAYER:
        axis = 2 if name.endswith(("scores", "pattern")) else 1
        with pytest.raises(errors.HookValueError, match=name):
            one.model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook, a=axis: x.narrow(a, 0, 1), [1, 3])])


def test_a_wrong_gradient_is_an_error(subject):
    """Law 8: a backward function that returns a wrong shape or type is an error that names the hook point."""
    one, tokens = subject(), random_tokens()
    for wrong in (lambda g: g[:, :1], lambda g: "nothing", lambda g: g[0]):
        logits = one.model.run_with_hooks(
            tokens, bwd_hooks=[("blocks.1.hook_resid_mid", lambda g, hook, w=wrong: w(g))]
        )
        with pytest.raises(errors.HookValueError, match=r"blocks\.1\.hook_resid_mid"):
            logits.sum().backward()
    one.hf.zero_grad(set_to_none=True)
    one.model(tokens).sum().backward()
    one.reference(tokens).logits.sum().backward()
    for ours, theirs in zip(one.hf.parameters(), one.reference.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_cache_may_be_cast_and_moved(subject):
    """Law 8: `dtype=` of run_with_cache casts the cached copies; the model and its logits stay."""
    one, tokens = subject(), random_tokens()
    expected = one.reference(tokens).logits
    logits, cache = one.model.run_with_cache(tokens, dtype=torch.float16, device="cpu")
    assert torch.equal(logits, expected)
    assert {cache[name].dtype for name in cache if name != "hook_tokens"} == {torch.float16}
    assert cache["hook_tokens"].dtype == torch.long
    assert next(one.hf.parameters()).dtype == torch.float32


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_edits_err_no_more_than_hf(subject, attn, dtype):
    """Law 8: in half precision an edited run errs no more than 4 times as much as plain HF against golden."""
    one, tokens = subject(dtype=dtype, attn=attn), random_tokens()
    bare, _ = one.golden(tokens)
    with torch.no_grad():
        theirs = float((one.reference(tokens).logits.double() - bare).abs().max())
    for name in FLOATS:
        edit = (lambda x, hook: x * 0.75 + 0.0) if "scores" in name else (lambda x, hook: x * 0.75)
        expected, _ = one.golden(tokens, edits={name: edit})
        with torch.no_grad():
            ours = one.model.run_with_hooks(tokens, fwd_hooks=[(name, edit)]).double()
        error = float((ours - expected).abs().max())
        assert error <= 4 * theirs, f"{name}: off by {error:.1e}, HF by {theirs:.1e}"
