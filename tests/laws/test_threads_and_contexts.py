"""Laws 3 to 5 when runs overlap: threads on one model, nested runs, copies of a context, re-entrant functions."""

import contextvars
import sys
import threading

import pytest
import torch
from golden.tiny import random_tokens
from lens_conformance.edits import edit_at
from lens_conformance.fingerprint import differences, fingerprint

from lens_core import errors

EDITED = ["blocks.1.attn.hook_pattern", "blocks.0.attn.hook_k", "blocks.1.hook_resid_mid", "blocks.1.hook_q_input"]


def in_threads(jobs, rounds=15):
    """Run each job over and over in a thread of its own, switching often; return what was raised."""
    failures, start = [], threading.Barrier(len(jobs))

    def work(job):
        start.wait()
        for _ in range(rounds):
            try:
                job()
            except BaseException as error:
                failures.append(f"{job.__name__}: {type(error).__name__}: {error}")
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return failures


def test_threads_on_one_model_do_not_meet(subject, attn):
    """Law 3 to 5: bare, reading all, generating and differently editing threads each get their own results."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    with torch.no_grad():
        plain = one.reference(tokens).logits
        greedy = one.reference.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False, eos_token_id=None
        )
    _, values = one.golden(tokens)
    one.hf.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=1, do_sample=False)
    before = fingerprint(one.hf)

    def bare():
        with torch.no_grad():
            assert torch.equal(one.hf(tokens).logits, plain)

    def read():
        with torch.no_grad():
            logits, cache = one.model.run_with_cache(tokens, names_filter=one.names())
        assert torch.equal(logits, plain)
        for name in ("blocks.1.attn.hook_pattern", "blocks.2.hook_resid_mid", "blocks.1.attn.hook_q"):
            assert torch.allclose(cache[name], values[name], atol=1e-10), name

    def generate():
        ours = one.model.generate(tokens, max_new_tokens=3, do_sample=False, stop_at_eos=False, return_type="tokens")
        assert torch.equal(ours, greedy)

    def editor(name):
        expected, _ = one.golden(tokens, edits={name: edit_at(name)})

        def edit():
            with torch.no_grad():
                logits = one.model.run_with_hooks(tokens, fwd_hooks=[(name, edit_at(name))])
            assert torch.allclose(logits, expected, rtol=1e-9, atol=1e-9), name

        return edit

    assert in_threads([bare, read, generate, *(editor(name) for name in EDITED)]) == []
    assert differences(before, fingerprint(one.hf)) == []


def test_threads_on_two_models_do_not_meet(subject):
    """Law 3: two models of one class in two threads: an edit of one is no edit of the other."""
    one, two, tokens = subject(dtype=torch.float64), subject(dtype=torch.float64, seed=1, attn="eager"), random_tokens()
    name = "blocks.1.attn.hook_pattern"
    jobs = []
    for subject_, edits in ((one, {name: edit_at(name)}), (two, {})):
        expected, _ = subject_.golden(tokens, edits=edits)

        def job(subject_=subject_, edits=edits, expected=expected):
            with torch.no_grad(), subject_.model.hooks(fwd_hooks=list(edits.items())):
                logits, _ = subject_.model.run_with_cache(tokens, names_filter=[name])
            assert torch.allclose(logits, expected, rtol=1e-9, atol=1e-9)

        jobs.append(job)
    assert in_threads(jobs) == []


def test_a_context_belongs_to_its_thread(subject):
    """Law 5: a thread started inside `with model.hooks` is unhooked, unless it runs in a copy of the context."""
    one, tokens = subject(), random_tokens()
    plain, seen, results = one.reference(tokens).logits.detach(), [], {}

    def call(key):
        with torch.no_grad():
            results[key] = one.hf(tokens).logits

    with one.model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda x, hook: seen.append(1) or x * 0)]):
        one.hf(tokens)
        bare = threading.Thread(target=call, args=("bare",))
        copied = threading.Thread(target=contextvars.copy_context().run, args=(call, "copied"))
        for thread in (bare, copied):
            thread.start()
            thread.join()
    assert torch.equal(results["bare"], plain)
    assert (results["copied"] - plain).abs().max() > 1e-3
    assert len(seen) == 2


def test_two_models_in_nested_contexts_do_not_meet(subject):
    """Law 3: contexts of two models may be nested and interleaved; each hooks its own model only."""
    one, two, tokens = subject(dtype=torch.float64), subject(dtype=torch.float64, seed=1), random_tokens()
    name = "blocks.1.attn.hook_pattern"
    first, _ = one.golden(tokens, edits={name: edit_at(name)})
    second, _ = two.golden(tokens)
    with torch.no_grad(), one.model.hooks(fwd_hooks=[(name, edit_at(name))]), two.model.caching([name]) as cache:
        torch.testing.assert_close(two.model(tokens), second, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(one.model(tokens), first, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(two.hf(tokens).logits, second, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(cache[name], two.golden(tokens)[1][name], atol=1e-9, rtol=1e-9)


def test_a_function_may_run_another_model(subject):
    """Law 3: a function that runs another lens model in the middle of this one's run disturbs neither."""
    one, two, tokens = subject(dtype=torch.float64), subject(dtype=torch.float64, seed=1), random_tokens()
    name = "blocks.1.attn.hook_pattern"

    def borrow(x, hook):
        _, cache = two.model.run_with_cache(tokens, names_filter=[name])
        return cache[name]

    pattern = two.golden(tokens)[1][name]
    expected, _ = one.golden(tokens, edits={name: lambda x, hook: pattern})
    with torch.no_grad():
        logits = one.model.run_with_hooks(tokens, fwd_hooks=[(name, borrow)])
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)


def test_a_function_may_run_its_own_model_or_is_refused(subject):
    """Law 3: running the same model inside one of its functions is right or a clear error, and the model survives."""
    one, tokens = subject(dtype=torch.float64), random_tokens()
    name, inner = "blocks.1.hook_resid_mid", "blocks.2.hook_resid_post"
    outer, nested = [], []

    def again(x, hook):
        outer.append(1)
        if len(outer) == 1:
            nested.append(one.model.run_with_cache(tokens, names_filter=[inner])[1][inner])
        return edit_at(name)(x)

    expected, _ = one.golden(tokens, edits={name: edit_at(name)})
    with torch.no_grad():
        try:
            logits = one.model.run_with_hooks(tokens, fwd_hooks=[(name, again)])
        except errors.LensError:
            pass
        else:
            torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
        assert torch.equal(one.model(tokens), one.reference(tokens).logits)


def test_the_same_context_manager_twice_and_generators(subject):
    """Law 10: contexts left out of order by a generator leave nothing behind."""
    one, tokens, seen = subject(), random_tokens(), []
    one.hf(tokens)
    before = fingerprint(one.hf)

    def steps():
        with one.model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", lambda x, hook: seen.append("generator"))]):
            one.model(tokens)
            yield
            one.model(tokens)

    running = steps()
    next(running)
    running.close()
    one.model(tokens)
    assert seen == ["generator"]
    assert differences(before, fingerprint(one.hf)) == []


@pytest.mark.parametrize(
    "bad",
    [
        [("hook_embed",)],
        [("hook_embed", None)],
        [("hook_embed", 3)],
        ["hook_embed"],
        "hook_embed",
        [("hook_embed", lambda x, hook: None, 1, 2)],
    ],
    ids=["one-part", "no-function", "a-number", "a-name", "a-string", "four-parts"],
)
def test_entries_of_a_wrong_form_are_errors(subject, bad):
    """Law 9: an entry is (name or filter, function) or with positions; all else is an error before anything runs."""
    one, tokens = subject(), random_tokens()
    for key in ("fwd_hooks", "bwd_hooks"):
        with pytest.raises(errors.LensError):
            one.model.run_with_hooks(tokens, **{key: bad})
    assert torch.equal(one.model(tokens), one.reference(tokens).logits)
