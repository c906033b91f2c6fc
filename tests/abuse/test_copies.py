"""fork, pickle and copy: equal outputs, or an error that says what to do."""

import copy
import os
import pickle
import signal
import threading
import warnings

import pytest
import torch
from abuse.models import GREEDY, KINDS, TOKENS, victim

import lens_core as lens
from lens_core import _functions
from lens_core.errors import LensError, NotCachedError, UnsupportedHookError


def halve(x, hook):
    """Return half the value; can be pickled."""
    return x * 0.5


def pickled(given):
    """Pickle, and read it again."""
    return pickle.loads(pickle.dumps(given))


@pytest.mark.parametrize("way", [copy.deepcopy, pickled, copy.copy])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_copied_with_its_added_hooks(kind, way):
    """Equal logits, hooked and not; hooks added later are of one model only."""
    one = victim(kind)
    one.model.add_hook(("resid_post", 1), halve)
    edited = one.model(TOKENS)
    other = way(one.model)
    assert type(other) is lens.LensModel
    assert (other.hf_model is one.hf) == (way is copy.copy)
    assert torch.equal(other(TOKENS), edited)
    assert not torch.equal(edited, one.logits)
    other.reset_hooks()
    assert torch.equal(other(TOKENS), one.logits)
    assert torch.equal(one.model(TOKENS), edited)
    assert torch.equal(other.generate(TOKENS, 2, **GREEDY), one.generated)
    assert other.cfg == one.model.cfg
    one.model.reset_hooks()
    assert one.left() == []


@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps])
def test_a_hooked_model_is_not_copied(way):
    """Inside a block and inside a function, the model and HF's own refuse by a clear error, and are as before."""
    one = victim("gpt2")

    def copies(x, hook):
        way(one.hf)

    with one.model.hooks([(("resid_post", 1), halve)]):
        for thing in (one.model, one.hf):
            with pytest.raises(UnsupportedHookError, match=r"outside of hooks\(\) and caching\(\) blocks"):
                way(thing)
        one.model(TOKENS)
    with pytest.raises(UnsupportedHookError, match="the model has hooks on it"):
        one.model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", copies)])
    assert one.left() == []


def test_a_function_that_cannot_be_pickled_is_named():
    """A lambda that was added: the message says where, and what to do."""
    one = victim("gpt2")
    one.model.add_hook("hook_embed", lambda x, hook: None)
    with pytest.raises(UnsupportedHookError, match=r"'<lambda>' that was added at 'hook_embed'.*reset_hooks"):
        pickle.dumps(one.model)
    assert len(copy.deepcopy(one.model).added_hooks) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_copied_with_its_model_and_pickled_without(kind):
    """Bits, names, gradients and gaps are the same; nothing is shared with a deep copy but the model."""
    one = victim(kind)
    _, cache = one.model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True, pos_slice=[0, 2])
    one.hf.zero_grad(set_to_none=True)
    for way in (copy.deepcopy, pickled, copy.copy):
        other = way(cache)
        assert list(other) == list(cache)
        assert all(torch.equal(other[name], cache[name]) for name in cache)
        assert list(other.grad) == list(cache.grad)
        assert all(torch.equal(other.grad[name], cache.grad[name]) for name in cache.grad)
        assert other.has_gaps
        assert other.model is (None if way is pickled else one.model)
        assert torch.equal(other["resid_post", -1], cache["resid_post", -1])
        if way is copy.deepcopy:
            other["hook_embed"].zero_()
            assert cache["hook_embed"].any()
    assert len(pickle.dumps(cache)) < 200_000
    with pytest.raises(NotCachedError):
        pickled(cache)["hook_nothing"]
    assert one.left() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no-graph"])
def test_a_state_is_copied_and_pickled(kind, graph):
    """What follows a copy is what follows the state; a copy shares nothing."""
    one = victim(kind)
    with torch.set_grad_enabled(graph):
        _, state = one.model(TOKENS, return_state=True)
    expected = one.model(TOKENS[:, :1], past_key_values=state)
    for way in (copy.deepcopy, pickled):
        other = way(state)
        logits, longer = one.model(TOKENS[:, :1], past_key_values=other, return_state=True)
        assert torch.equal(logits, expected)
        assert longer.length == 4
        assert torch.equal(one.model(TOKENS[:, :1], past_key_values=state), expected)


def test_entries_and_hook_points_are_copied():
    """What `added_hooks` and `hook_dict` give."""
    one = victim("gpt2")
    one.model.add_hook("hook_embed", halve)
    entry = pickled(one.model.added_hooks[0])
    assert (entry.names, entry.fn) == (("hook_embed",), halve)
    assert pickled(one.model.hook_dict["hook_embed"]).has_hooks()


# ---------------------------------------------------------------------- fork


def in_a_child(job):
    """Run a job in a forked child; give what it returned as a status, 99 where it raised or hung."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forking a process with threads
        child = os.fork()
    if child == 0:
        status = 99
        try:
            signal.alarm(30)
            torch.set_num_threads(1)
            status = job()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", KINDS)
def test_a_forked_child_has_the_blocks_of_its_parent(kind):
    """Hooks that are live stay live in the child, end there, and the parent sees nothing of it."""
    one = victim(kind)
    with one.model.hooks([(("resid_post", 1), halve)]) as model, torch.no_grad():
        edited = model(TOKENS)

        def job():
            same = torch.equal(model(TOKENS), edited)
            with model.caching(("resid_pre", 2)) as cache:
                same = same and torch.equal(model(TOKENS), edited)
            model.reset_hooks()
            return 0 if same and ("resid_pre", 2) in cache else 1

        assert in_a_child(job) == 0
        assert torch.equal(model(TOKENS), edited)
    assert in_a_child(lambda: len(one.left())) == 0
    assert one.left() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_another_thread_installs_hooks_does_not_hang():
    """The lock of the dispatchers is free in the child, whoever held it."""
    one, held, go = victim("gpt2"), threading.Event(), threading.Event()

    def hold():
        with _functions._lock:
            held.set()
            go.wait(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def job():
        with torch.no_grad():
            one.model.run_with_hooks(TOKENS, fwd_hooks=[(("pattern", 1), halve)])
        return 0

    try:
        assert in_a_child(job) == 0
    finally:
        go.set()
        thread.join()


def test_a_block_may_end_while_another_begins():
    """The garbage collector may end a block in the middle of another one's installation, in the same thread."""
    one = victim("gpt2")

    def holder():
        with one.model.hooks([(("pattern", 1), halve)]):
            one.model(TOKENS)
            yield

    generator = holder()
    next(generator)
    taken = _functions._Taken

    class Ends(taken):
        def __init__(self, *args):
            generator.close()
            super().__init__(*args)

    other = victim("llama")
    _functions._Taken = Ends
    try:
        worker = threading.Thread(
            target=lambda: other.model.run_with_cache(TOKENS, names_filter="pattern"), daemon=True
        )
        worker.start()
        worker.join(60)
        assert not worker.is_alive(), "a block that ended inside another one's installation waits for itself"
    finally:
        _functions._Taken = taken
    with torch.no_grad():
        assert torch.equal(one.hf(TOKENS).logits, one.logits)
    assert isinstance(UnsupportedHookError(""), LensError)
