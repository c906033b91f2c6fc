"""Law 5: with nothing asked for, and again after every run, the HF model and transformers are as they were."""

import threading

import pytest
import torch
from families.subject import pair, shared_pair
from golden.tiny import random_tokens
from lens_conformance.fingerprint import differences, fingerprint

import lens_core as lens
from lens_core import errors


def boom(x, hook):
    """Raise."""
    raise RuntimeError("boom")


def warm(hf):
    """Let HF set what it sets lazily at its first forward and generation."""
    tokens = random_tokens(1, 3)
    with torch.no_grad():
        hf(tokens)
        hf.generate(tokens, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(tokens))
    return fingerprint(hf)


def unchanged(before, hf):
    """Assert that nothing was left behind since."""
    assert differences(before, fingerprint(hf)) == []


@pytest.mark.once
def test_loading_leaves_the_model(subject, attn):
    """Law 5: lens.load of a model in memory changes nothing about it, and serves that very model."""
    hf = subject.build(attn=attn)
    before = warm(hf)
    model = lens.load(hf)
    unchanged(before, hf)
    assert model.hf_model is hf


@pytest.mark.sampled
def test_runs_leave_the_model(subject, attn):
    """Law 5: reading, editing, gradients, generation and contexts leave nothing behind."""
    one, tokens = pair(subject, attn=attn), random_tokens()
    before = warm(one.hf)
    with torch.no_grad():
        one.model(tokens)
        one.model.run_with_cache(tokens, names_filter=one.names())
    unchanged(before, one.hf)
    for index, name in enumerate(one.edited_names()):
        with torch.no_grad():
            one.model.run_with_hooks(tokens, fwd_hooks=[(name, subject.edit_at(name))])
        if subject.full or index % 8 == 0:
            unchanged(before, one.hf)
    unchanged(before, one.hf)
    grads = [(name, lambda g, hook: None) for name in one.names() if subject.gradient(name)]
    one.model.run_with_hooks(tokens, bwd_hooks=grads).sum().backward()
    one.hf.zero_grad(set_to_none=True)
    unchanged(before, one.hf)
    with one.model.hooks(fwd_hooks=[(name, lambda x, hook: x.clone()) for name in one.names()]):
        one.model.generate(tokens, max_new_tokens=3, do_sample=False)
    unchanged(before, one.hf)


@pytest.mark.once
@pytest.mark.sampled
def test_an_exception_in_a_function_leaves_the_model(subject, attn):
    """Law 5: a function that raises, at any name, in run_with_hooks, through the HF model and in generation."""
    one, tokens = pair(subject, attn=attn), random_tokens()
    before = warm(one.hf)
    for index, name in enumerate(one.edited_names()):
        with pytest.raises(errors.HookFunctionError, match=name) as caught:
            one.model.run_with_hooks(tokens, fwd_hooks=[(name, boom)])
        assert isinstance(caught.value.__cause__, RuntimeError)
        if subject.full or index % 8 == 0:
            with pytest.raises(errors.HookFunctionError), one.model.hooks(fwd_hooks=[(name, boom)]):
                one.hf(tokens)
            unchanged(before, one.hf)
    with pytest.raises(errors.HookFunctionError), one.model.hooks(fwd_hooks=[(one.edited_names()[-1], boom)]):
        one.model.generate(tokens, max_new_tokens=3)
    unchanged(before, one.hf)
    with torch.no_grad():
        assert torch.equal(one.model(tokens), one.reference(tokens).logits)


@pytest.mark.sampled
def test_the_hf_model_is_hooked_inside_the_context_only(subject, narrow):
    """Law 5: the HF model called by itself is hooked inside `with model.hooks`, and not after."""
    tokens, calls = random_tokens(), []
    name = next(n for n in narrow.names() if n.startswith("blocks.1.") and n.endswith(("hook_z", "hook_gated")))
    with torch.no_grad():
        plain = narrow.reference(tokens).logits
        with narrow.model.hooks(fwd_hooks=[(name, lambda x, hook: calls.append(1) or x * 0)]):
            inside = narrow.hf(tokens).logits
        after = narrow.hf(tokens).logits
    assert calls == [1]
    assert (inside - plain).abs().max() > 1e-3
    assert torch.equal(after, plain)


@pytest.mark.sampled
def test_two_threads_at_once_do_not_meet(subject, attn):
    """Law 5: two models of one type run at once, one edited and one plain, and a third thread runs HF bare."""
    one, tokens = shared_pair(subject.name, torch.float32, attn), random_tokens(2, 5)
    other = pair(subject, attn=attn, seed=1)
    names = one.edited_names()
    edited = next(n for n in names if n.endswith(("hook_rot_k", "hook_attn_scores", "hook_conv")))
    edit, before, wrong = subject.edit_at(edited), (warm(one.hf), warm(other.hf)), []
    with torch.no_grad():
        moved = one.model.run_with_hooks(tokens, fwd_hooks=[(edited, edit)])
        plain, bare = other.reference(tokens).logits, one.reference(tokens).logits
    assert (moved - bare).abs().max() > 1e-3
    start = threading.Barrier(3)

    def job(call, expected):
        start.wait()
        for _ in range(6):
            with torch.no_grad():
                if not torch.equal(call(), expected):
                    wrong.append(call)

    jobs = [(lambda: one.model.run_with_hooks(tokens, fwd_hooks=[(edited, edit)]), moved)]
    jobs += [(lambda: other.model.run_with_cache(tokens, names_filter=names)[0], plain)]
    jobs += [(lambda: one.hf(tokens).logits, bare)]
    threads = [threading.Thread(target=job, args=args) for args in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    unchanged(before[0], one.hf)
    unchanged(before[1], other.hf)
