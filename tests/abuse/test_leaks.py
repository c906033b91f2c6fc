"""A thousand runs leave no hook, no tensor and no memory behind; what nobody refers to is freed."""

import gc
import resource
import sys
import weakref

import pytest
import torch
from abuse.models import BUILDERS, GREEDY, KINDS, TOKENS, victim

import lens_core as lens


def halve(x, hook):
    """Return half the value."""
    return x * 0.5


def jobs(model):
    """List what is done over and over."""
    inside = next(name for name in model.table if name.endswith(("hook_pattern", "hook_ssm_state")))

    def gradients():
        model.run_with_cache(TOKENS, names_filter=("resid_pre", 1), return_type="loss", incl_bwd=True)
        model.hf_model.zero_grad(set_to_none=True)

    def adds():
        model.add_hook(("resid_post", 1), halve)
        model(TOKENS)
        model.reset_hooks()

    return {
        "read": lambda: model.run_with_cache(TOKENS, names_filter=[inside, ("resid_pre", 1)]),
        "edit": lambda: model.run_with_hooks(TOKENS, fwd_hooks=[(inside, halve), (("resid_post", 1), halve)]),
        "gradients": gradients,
        "add": adds,
        "generate": lambda: model.generate(TOKENS, 1, return_cache=True, names_filter=("resid_pre", 1), **GREEDY),
    }


def count(kind):
    """Count what the collector knows of a type."""
    return sum(issubclass(type(found), kind) for found in gc.get_objects())


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_runs_leak_nothing(kind):
    """As many tensors and objects after them as before, no memory, no hooks (250 runs for each architecture)."""
    one = victim(kind)
    work = list(jobs(one.model).values())
    for _ in range(5):
        for job in work:
            job()
    gc.collect()
    tensors, objects, blocks = count(torch.Tensor), len(gc.get_objects()), sys.getallocatedblocks()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(50):
        for job in work:
            job()
    gc.collect()
    assert count(torch.Tensor) <= tensors
    assert len(gc.get_objects()) - objects < 100  # of 250 runs: not one object a run
    assert sys.getallocatedblocks() - blocks < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 32 * 1024  # KiB
    assert one.left() + one.generates_otherwise() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_freed_with_the_last_reference(kind):
    """Without the collector's help, as HF's own: after runs, blocks, errors, copies and hooks that were added."""
    model = lens.load(BUILDERS[kind](), tokenizer=False)
    for job in jobs(model).values():
        job()
    model.add_hook("hook_embed", halve)
    with pytest.raises(lens.UnknownHookError):
        model.run_with_cache(TOKENS, names_filter="hook_nothing")
    known = [weakref.ref(model), weakref.ref(model.hf_model)]
    gc.collect()
    gc.disable()
    try:
        del model, job
        assert [ref() for ref in known] == [None, None]
    finally:
        gc.enable()


def test_a_cache_keeps_its_model_and_a_loaded_or_pickled_one_does_not(tmp_path):
    """As documented: `cache.model` is the model that was run, None for a cache from a file."""
    model = lens.load(BUILDERS["gpt2"](), tokenizer=False)
    _, cache = model.run_with_cache(TOKENS)
    known = weakref.ref(model)
    del model
    assert cache.model is known()
    cache.save(tmp_path / "c")
    again = lens.ActivationCache.load(tmp_path / "c")
    assert torch.equal(again["hook_embed"], cache["hook_embed"])
    del cache
    gc.collect()
    assert known() is None
    assert again.model is None


def test_a_state_does_not_keep_its_model():
    """A state is HF's cache and a description of the config."""
    model = lens.load(BUILDERS["gpt2"](), tokenizer=False)
    with torch.no_grad():
        _, state = model(TOKENS, return_state=True)
    known = weakref.ref(model), weakref.ref(model.hf_model)
    del model
    gc.collect()
    assert [ref() for ref in known] == [None, None]
    assert state.length == 3
