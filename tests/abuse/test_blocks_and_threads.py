"""Blocks that end out of turn or in another thread, and threads that share one: right, or refused; nothing left."""

import contextvars
import sys
import threading

import pytest
import torch
from abuse.models import GREEDY, KINDS, TOKENS, victim

from lens_core.errors import HookFunctionError, UnsupportedHookError


def halve(x, hook):
    """Return half the value."""
    return x * 0.5


def entered(model, seen, name):
    """Enter a block whose hook writes its name down."""
    block = model.hooks([(("resid_pre", 1), lambda x, hook: seen.append(name))])
    block.__enter__()
    return block


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_blocks_that_end_out_of_turn_take_their_own_hooks_only(order):
    """Whichever ends first, the others stay live until they end, and nothing comes back later."""
    one, seen = victim("gpt2"), []
    blocks = [entered(one.model, seen, name) for name in range(3)]
    live = [0, 1, 2]
    for index in (*order, None):
        one.hf(TOKENS)
        one.model(TOKENS)
        one.model.run_with_hooks(TOKENS, fwd_hooks=[(("resid_pre", 1), lambda x, hook: seen.append("own"))])
        assert seen == [*live, *live, *live, "own"]
        seen.clear()
        if index is not None:
            blocks[index].__exit__(None, None, None)
            live.remove(index)
    assert one.left() == []


def test_a_cache_of_a_block_that_has_ended_is_filled_no_more():
    """A caching block that ends before one inside of it."""
    one = victim("gpt2")
    caching = one.model.caching(("resid_pre", 1))
    cache = caching.__enter__()
    inner = entered(one.model, [], "inner")
    one.model(TOKENS)
    value = cache["resid_pre", 1].clone()
    caching.__exit__(None, None, None)
    one.model(TOKENS.flip(1))
    assert torch.equal(cache["resid_pre", 1], value)
    inner.__exit__(None, None, None)
    assert one.left() == []


def test_a_block_may_end_in_another_thread():
    """A generator that another thread closes: its hooks go, and are no part of later blocks here."""
    one, seen = victim("gpt2"), []

    def holder():
        with one.model.hooks([(("resid_pre", 1), lambda x, hook: seen.append("held"))]):
            one.model(TOKENS)
            yield

    generator = holder()
    next(generator)
    closer = threading.Thread(target=generator.close)
    closer.start()
    closer.join()
    seen.clear()
    one.model.run_with_hooks(TOKENS, fwd_hooks=[(("resid_pre", 1), lambda x, hook: seen.append("own"))])
    assert seen == ["own"]
    assert one.left() == []


def test_a_call_that_failed_is_forgotten_by_the_next():
    """HF's model raises in a block; then its base, and a part by itself, are called."""
    one, seen = victim("gpt2"), []

    def fails(module, args):
        raise ValueError("theirs")

    with torch.no_grad(), one.model.hooks([(("resid_pre", 1), lambda x, hook: seen.append(1))]):
        handle = one.hf.transformer.h[2].register_forward_pre_hook(fails)
        with pytest.raises(ValueError, match="theirs"):
            one.hf(TOKENS)
        handle.remove()
        one.hf.transformer(TOKENS)
        assert seen == [1, 1]
        one.hf.transformer.h[1](torch.randn(1, 3, 21))
        assert seen == [1, 1]
    assert one.left() == []


def test_a_function_that_calls_its_model_in_the_same_block_is_refused():
    """By a message that says how; in a run of its own it may."""
    one, seen = victim("gpt2"), []

    def again(x, hook):
        if not seen:
            seen.append(1)
            one.hf(TOKENS)

    with one.model.hooks([(("resid_pre", 1), again)]):
        with pytest.raises(UnsupportedHookError, match="called its own model in the block that hooks it"):
            one.model(TOKENS)
    assert one.left() == []


def in_threads(jobs):
    """Run jobs at once, switching often; give what they raised."""
    raised, start = [], threading.Barrier(len(jobs))

    def work(job):
        start.wait()
        try:
            job()
        except BaseException as error:
            raised.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=contextvars.copy_context().run, args=(work, job)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return raised


def test_threads_that_share_a_block_are_right_or_refused():
    """A block serves one call at a time: another thread's call in the middle of it is refused by name, never wrong."""
    one = victim("gpt2")
    entry = (("pattern", 1), halve)
    expected = one.model.run_with_hooks(TOKENS, fwd_hooks=[entry])
    wrong, refused = [], []

    def call():
        for _ in range(20):
            try:
                wrong.append(not torch.equal(one.hf(TOKENS).logits, expected))
            except UnsupportedHookError as error:
                refused.append("give each thread a block of its own" in str(error))

    with one.model.hooks([entry]):
        one.model(TOKENS)
        raised = in_threads([call, call])
    assert raised == []
    assert not any(wrong)
    assert all(refused)
    assert one.left() == []


def test_the_model_may_be_called_while_it_streams():
    """Between two pieces of a stream the caller may run the model in the same block."""
    one = victim("gpt2")
    entry = (("pattern", 1), halve)
    options = {**GREEDY, "max_new_tokens": 12}
    with torch.no_grad(), one.model.hooks([entry]):
        logits, whole = one.model(TOKENS), one.model.generate(TOKENS, **options)
        pieces = []
        for piece in one.model.generate_stream(TOKENS, **options):
            pieces.append(piece)
            assert torch.equal(one.model(TOKENS), logits)
    assert torch.equal(torch.cat(pieces, dim=1), whole[:, 3:])
    assert one.left() == []


@pytest.mark.parametrize("kind", KINDS)
def test_failing_and_working_threads_on_one_model_do_not_meet(kind):
    """Raising functions, edits, caches and generation at once: each has its own result."""
    one, other = victim(kind), victim(kind, seed=1)
    edited = one.model.run_with_hooks(TOKENS, fwd_hooks=[(("resid_post", 1), halve)])

    def boom(x, hook):
        raise RuntimeError("boom")

    def fails():
        for name in one.names[:15]:
            with pytest.raises(HookFunctionError, match="boom"):
                one.model.run_with_hooks(TOKENS, fwd_hooks=[(name, boom)])

    def edits():
        for _ in range(10):
            logits = one.model.run_with_hooks(TOKENS, fwd_hooks=[(("resid_post", 1), halve)])
            assert torch.equal(logits, edited)

    def generates():
        for _ in range(3):
            assert one.generates_otherwise() == []

    def elsewhere():
        for _ in range(10):
            assert torch.equal(other.model.run_with_cache(TOKENS)[0], other.logits)

    assert in_threads([fails, edits, generates, elsewhere]) == []
    assert one.left() + other.left() == []
