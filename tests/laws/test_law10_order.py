"""Law 10: permanent hooks, outer contexts, inner contexts, the call's own, in order given; then the cache."""

import contextlib

import pytest
import torch
from golden.tiny import random_tokens
from lens_conformance.edits import edit_at
from lens_conformance.golden.gpt2 import BLOCK, TOP

from lens_core import errors

PLACES = [name for name in (*TOP, *(f"blocks.1.{name}" for name in BLOCK)) if name != "hook_tokens"]


def step(log, tag, number):
    """Make a function that notes its turn and does what does not commute: times two, plus its number."""

    def fn(x, hook):
        log.append(tag)
        return x * 2 + number

    return fn


@pytest.mark.parametrize("name", PLACES)
def test_functions_run_in_order_and_the_cache_is_last(subject, attn, name):
    """Law 10: each sees the last one's result; the cache holds what comes after all of them, as golden composes it."""
    one, tokens, log = subject(dtype=torch.float64, attn=attn), random_tokens(), []
    one.model.add_hook(name, step(log, "permanent", 0.1), is_permanent=True)
    outer = [(name, step(log, "outer", 0.2))]
    inner = [(name, step(log, "inner a", 0.3)), (name, step(log, "inner b", 0.4))]
    own = [(name, step(log, "call a", 0.5)), (name, step(log, "call b", 0.6))]
    hooks, caching = one.model.hooks, one.model.caching
    with torch.no_grad(), hooks(fwd_hooks=outer), caching([name]) as cache, hooks(fwd_hooks=inner):
        logits = one.model.run_with_hooks(tokens, fwd_hooks=own)
    assert log == ["permanent", "outer", "inner a", "inner b", "call a", "call b"]

    def all_of_them(x, hook):
        for number in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
            x = x * 2 + number
        return x

    expected, values = one.golden(tokens, edits={name: all_of_them})
    scale = max(1.0, float(expected.abs().max()))
    assert float((logits - expected).abs().max()) <= 1e-9 * scale
    hidden = values[name] == -torch.inf
    ours, theirs = cache[name].masked_fill(hidden, 0), values[name].masked_fill(hidden, 0)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_order_of_filters_and_names_is_the_order_given(subject):
    """Law 10: entries by filter, short form and name run in the order of the list at a point that all match."""
    one, log = subject(), []
    entries = [
        (lambda name: "resid_mid" in name, lambda x, hook: log.append((hook.layer(), "filter"))),
        ("blocks.1.hook_resid_mid", lambda x, hook: log.append((hook.layer(), "name"))),
        (("resid_mid", 1), lambda x, hook: log.append((hook.layer(), "short"))),
    ]
    one.model.run_with_hooks(random_tokens(), fwd_hooks=entries)
    assert log == [(0, "filter"), (1, "filter"), (1, "name"), (1, "short"), (2, "filter")]
    log.clear()
    one.model.run_with_hooks(random_tokens(), fwd_hooks=entries[::-1])
    assert log == [(0, "filter"), (1, "short"), (1, "name"), (1, "filter"), (2, "filter")]


def test_backward_functions_keep_their_order(subject):
    """Law 10: backward functions compose in the same order, each seeing the last one's result."""
    one, log = subject(dtype=torch.float64), []
    name = "blocks.1.hook_resid_mid"
    one.model.add_hook(name, step(log, "permanent", 0.0), dir="bwd", is_permanent=True)
    with one.model.hooks(bwd_hooks=[(name, step(log, "outer", 0.0))]):
        logits = one.model.run_with_hooks(random_tokens(), bwd_hooks=[(name, step(log, "call", 0.0))])
    logits.sum().backward()
    assert log == ["permanent", "outer", "call"]


def test_contexts_remove_only_their_own(subject):
    """Law 10: leaving a context leaves outer contexts', added and permanent functions in place."""
    one, tokens, log = subject(), random_tokens(), []
    name = "blocks.1.attn.hook_pattern"

    def note(tag):
        return name, lambda x, hook: log.append(tag)

    def turns():
        log.clear()
        one.model(tokens)
        return list(log)

    one.model.add_hook(*note("permanent"), is_permanent=True)
    one.model.add_hook(*note("added"))
    with one.model.hooks(fwd_hooks=[note("outer")]):
        with contextlib.suppress(ZeroDivisionError), one.model.hooks(fwd_hooks=[note("inner")]):
            assert set(turns()) == {"permanent", "added", "outer", "inner"}
            raise ZeroDivisionError
        assert set(turns()) == {"permanent", "added", "outer"}
        one.model.run_with_hooks(tokens, fwd_hooks=[note("call")])
        assert set(turns()) == {"permanent", "added", "outer"}
    assert set(turns()) == {"permanent", "added"}
    one.model.reset_hooks()
    assert turns() == ["permanent"]
    one.model.reset_hooks(including_permanent=True)
    assert turns() == []


def test_reset_of_one_direction_leaves_the_other(subject):
    """Law 10: reset_hooks(direction="bwd") leaves forward functions, and the reverse."""
    one, tokens, log = subject(), random_tokens(), []
    name = "blocks.1.attn.hook_z"

    def add():
        one.model.reset_hooks()
        log.clear()
        one.model.add_hook(name, lambda x, hook: log.append("fwd"))
        one.model.add_hook(name, lambda x, hook: log.append("bwd"), dir="bwd")

    add()
    one.model(tokens).sum().backward()
    assert log == ["fwd", "bwd"]
    add()
    one.model.reset_hooks(direction="bwd")
    one.model(tokens).sum().backward()
    assert log == ["fwd"]
    add()
    one.model.reset_hooks(direction="fwd")
    one.model(tokens).sum().backward()
    assert log == ["bwd"]


def test_ctx_is_kept_until_cleared(subject):
    """Law 10: a point's ctx is one dict across runs, until reset_hooks(clear_contexts=True)."""
    one, tokens, counts = subject(), random_tokens(), []

    def count(x, hook):
        hook.ctx["n"] = hook.ctx.get("n", 0) + 1
        counts.append(hook.ctx["n"])

    entry = [("blocks.1.hook_resid_pre", count)]
    one.model.run_with_hooks(tokens, fwd_hooks=entry)
    one.model.run_with_hooks(tokens, fwd_hooks=entry)
    one.model.reset_hooks(clear_contexts=False)
    one.model.run_with_hooks(tokens, fwd_hooks=entry)
    one.model.reset_hooks(clear_contexts=True)
    one.model.run_with_hooks(tokens, fwd_hooks=entry, clear_contexts=True)
    one.model.run_with_hooks(tokens, fwd_hooks=entry)
    assert counts == [1, 2, 3, 1, 1]


def test_an_added_function_edits_generation_and_hf_calls_in_contexts(subject):
    """Law 10: an added function takes part in every run of lens, and comes off with reset_hooks."""
    one, tokens = subject(dtype=torch.float64), random_tokens()
    name = "blocks.1.hook_resid_mid"
    expected, _ = one.golden(tokens, edits={name: edit_at(name)})
    one.model.add_hook(name, edit_at(name))
    for run in (lambda: one.model(tokens), lambda: one.model.run_with_cache(tokens)[0]):
        torch.testing.assert_close(run().detach(), expected, atol=1e-9, rtol=1e-9)
    one.model.reset_hooks()
    assert torch.equal(one.model(tokens), one.reference(tokens).logits)


@pytest.mark.parametrize("wrong", ["forward", "", None, 3])
def test_a_direction_that_is_none_is_an_error(subject, wrong):
    """Law 10: directions are "fwd" and "bwd"."""
    with pytest.raises(errors.ArgumentError):
        subject().model.add_hook("hook_embed", lambda x, hook: None, dir=wrong)


def test_permanent_hooks_come_first_whenever_they_were_added(subject):
    """Law 10: permanent, then added, then the context's, then the call's own, each seeing the last one's result."""
    one, tokens, order = subject(), random_tokens(), []

    def note(what):
        return lambda value, hook: order.append(what)

    one.model.add_hook("hook_embed", note("added"))
    one.model.add_hook("hook_embed", note("permanent"), is_permanent=True)
    with one.model.hooks(fwd_hooks=[("hook_embed", note("context"))]):
        one.model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", note("own"))])
    assert order == ["permanent", "added", "context", "own"]
