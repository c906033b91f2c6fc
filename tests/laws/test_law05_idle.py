"""Law 5: with nothing asked for, and again after every run, the HF model is as it was loaded."""

import contextlib
import warnings

import pytest
import torch
from golden.tiny import fresh, random_tokens, tiny_gpt2
from lens_conformance.edits import bend, edit_at
from lens_conformance.fingerprint import differences, fingerprint
from lens_conformance.golden.gpt2 import golden, names_at

import lens_core as lens
from lens_core import errors


def boom(x, hook):
    """Raise."""
    raise RuntimeError("boom")


def unchanged(before, hf):
    """Assert that nothing was left behind since."""
    assert differences(before, fingerprint(hf)) == []


def test_loading_leaves_the_model(attn):
    """Law 5: lens.load of a model in memory changes nothing about it, and serves that very model."""
    hf = tiny_gpt2(attn=attn)
    hf(random_tokens())
    before = fingerprint(hf)
    model = lens.load(hf)
    unchanged(before, hf)
    assert model.hf_model is hf


def test_runs_leave_the_model(subject, attn):
    """Law 5: reading, editing, gradients, generation and contexts leave nothing behind."""
    one, tokens = subject(attn=attn), random_tokens()
    one.hf(tokens)
    one.hf.generate(tokens, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(tokens))
    before = fingerprint(one.hf)
    with torch.no_grad():
        one.model(tokens)
        one.model.run_with_cache(tokens, names_filter=one.names())
    unchanged(before, one.hf)
    for name in names_at(1):
        with torch.no_grad():
            one.model.run_with_hooks(tokens, fwd_hooks=[(name, edit_at(name))])
        unchanged(before, one.hf)
    grads = [(name, lambda g, hook: None) for name in one.names() if name != "hook_tokens"]
    logits = one.model.run_with_hooks(tokens, bwd_hooks=grads)
    unchanged(before, one.hf)
    logits.sum().backward()
    one.hf.zero_grad(set_to_none=True)
    unchanged(before, one.hf)
    with one.model.hooks(fwd_hooks=[(name, edit_at(name)) for name in one.names() if "scale" not in name]):
        one.model.generate(tokens, max_new_tokens=3, do_sample=False)
    unchanged(before, one.hf)
    for layer in range(4):
        one.model(tokens, stop_at_layer=layer)
        one.model(torch.randn(2, 5, 21), start_at_layer=layer)
    one.hf.zero_grad(set_to_none=True)
    unchanged(before, one.hf)


def test_an_exception_in_a_function_leaves_the_model(subject, attn):
    """Law 5: a function that raises, at any name, in run_with_hooks, in a context and in generation."""
    one, tokens = subject(attn=attn), random_tokens()
    expected = one.reference(tokens).logits.detach()
    one.hf(tokens)
    one.hf.generate(tokens, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(tokens))
    before = fingerprint(one.hf)
    for name in names_at(1):
        with pytest.raises(errors.HookFunctionError, match=name) as caught:
            one.model.run_with_hooks(tokens, fwd_hooks=[(name, boom)])
        assert isinstance(caught.value.__cause__, RuntimeError)
        with pytest.raises(errors.HookFunctionError), one.model.hooks(fwd_hooks=[(name, boom)]):
            one.model.hf_model(tokens)
        unchanged(before, one.hf)
    with pytest.raises(errors.HookFunctionError), one.model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", boom)]):
        one.model.generate(tokens, max_new_tokens=3)
    with contextlib.suppress(KeyboardInterrupt), one.model.hooks(fwd_hooks=[("blocks.1.attn.hook_q", bend)]):
        one.model(tokens)
        raise KeyboardInterrupt
    unchanged(before, one.hf)
    assert torch.equal(one.model(tokens), expected)


def test_an_exception_in_the_model_leaves_the_model(subject):
    """Law 5: HF itself raising in the middle of a run (a user's own hook, a broken input)."""
    one, tokens = subject(), random_tokens()
    one.hf(tokens)

    def fail(module, args):
        raise ValueError("theirs")

    handle = one.hf.transformer.h[1].mlp.register_forward_pre_hook(fail)
    before = fingerprint(one.hf)
    with pytest.raises(ValueError, match="theirs"):
        one.model.run_with_cache(tokens, names_filter=one.names())
    unchanged(before, one.hf)
    handle.remove()
    assert torch.equal(one.model.run_with_cache(tokens)[0], one.reference(tokens).logits)


def test_users_own_hooks_stay_and_fire(subject):
    """Law 5: torch hooks that the user registered stay where they are and fire as without us."""
    one, tokens, seen = subject(), random_tokens(), []
    for module in one.hf.modules():
        module.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    one.hf(tokens)
    expected, before = list(seen), fingerprint(one.hf)
    seen.clear()
    one.model.run_with_hooks(
        tokens, fwd_hooks=[(name, edit_at(name)) for name in ("blocks.1.hook_resid_mid", "hook_embed")]
    )
    assert seen == expected
    unchanged(before, one.hf)


def test_hf_calls_inside_the_context_are_hooked(subject, attn):
    """Law 5: inside `with model.hooks`, the HF model, its generation and its inner model are hooked; not after."""
    one, tokens = subject(attn=attn), random_tokens()
    calls = []
    with torch.no_grad():
        plain = one.reference(tokens).logits
        with one.model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda x, hook: calls.append(1) or x * 0)]):
            inside = one.model.hf_model(tokens).logits
            deeper = one.hf.transformer(tokens).last_hidden_state
            one.hf.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False, eos_token_id=None
            )
        after = one.model.hf_model(tokens).logits
    assert len(calls) == 5
    assert (inside - plain).abs().max() > 1e-3
    assert torch.allclose(one.reference.lm_head(deeper), inside, atol=1e-5)
    assert torch.equal(after, plain)


def test_the_hf_module_methods_are_the_hf_modules(subject):
    """Law 5: to, eval, train, parameters, state_dict are the HF module's."""
    one = subject()
    assert [id(p) for p in one.model.parameters()] == [id(p) for p in one.hf.parameters()]
    assert sorted(one.model.state_dict()) == sorted(one.hf.state_dict())
    one.model.train()
    assert one.hf.training
    one.model.eval()
    assert not one.hf.training
    one.model.to(torch.float64)
    assert one.hf.lm_head.weight.dtype == torch.float64


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize(
    "name",
    [
        "blocks.1.attn.hook_z",
        "blocks.1.hook_resid_mid",
        "blocks.1.hook_resid_pre",
        "blocks.1.attn.hook_pattern",
        "hook_embed",
        "ln_final.hook_out",
    ],
)
def test_gradient_checkpointing_is_right_or_refused(subject, reentrant, name):
    """Law 5: with checkpointing, a backward after the run has golden's gradients, or the run refuses."""
    one, tokens = subject(dtype=torch.float64), random_tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its newer name is not in every version that is supported
        one.hf.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    one.hf.enable_input_require_grads()
    got = {}
    entries = {"fwd_hooks": [(name, bend)], "bwd_hooks": [(name, lambda g, hook: got.update(g=g.clone()))]}
    before = fingerprint(one.hf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            logits = one.model.run_with_hooks(tokens, **entries)
            logits.pow(2).sum().backward()
        except errors.LensError:
            unchanged(before, one.hf)
            return
    expected, values = golden(one.reference.state_dict(), one.reference.config, tokens, edits={name: bend})
    expected.pow(2).sum().backward()
    assert torch.allclose(got["g"], values[name].grad, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore::lens_core.errors.CompileWarning")
@pytest.mark.parametrize("when", ["in-place", "wrapped"])
def test_a_compiled_model_works_or_refuses(subject, when):
    """Law 5: a compiled model is hooked or the run refuses; never silently unhooked."""
    one, tokens = subject(), random_tokens()
    torch._dynamo.reset()
    if when == "in-place":
        one.hf.compile(backend="eager")
        model = one.model
        one.hf(tokens)
    else:
        try:
            model = lens.load(torch.compile(one.hf, backend="eager"))
        except errors.LensError:
            return
    for name in ("blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern", "blocks.1.hook_resid_mid"):
        expected, _ = one.golden(tokens, edits={name: edit_at(name)})
        for run in (lambda: model(tokens), lambda: model.hf_model(tokens).logits):
            fired = []

            def edit(x, hook, fired=fired, name=name):
                fired.append(1)
                return edit_at(name)(x)

            with torch.no_grad(), contextlib.suppress(errors.LensError):
                with model.hooks(fwd_hooks=[(name, edit)]):
                    logits = run()
                assert fired == [1], f"{name}: a compiled model was silently unhooked"
                assert torch.allclose(logits.double(), expected, rtol=1e-4, atol=1e-3), name
    with torch.no_grad():
        assert torch.allclose(one.hf(tokens).logits, fresh(one.reference)(tokens).logits, atol=1e-5)
