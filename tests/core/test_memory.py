"""What a run held is free as soon as nobody refers to it, without the garbage collector's help."""

import gc

import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2

import lens_core as lens

TOKENS = random_tokens()


def read(model):
    """Cache the default names."""
    model.run_with_cache(TOKENS)


def edit(model):
    """Edit inside attention, per head, and the residual stream."""
    names = ["pattern", "result", "q_input", "resid_mid"]
    model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda value, hook: value * 2) for name in names])


def gradients(model):
    """Keep gradients of a backward pass."""
    model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)


def undetached(model):
    """Keep the graph, take gradients through it."""
    with model.caching(["z", "resid_post", "pattern"], detach=False) as cache:
        logits = model(TOKENS)
    logits.sum().backward()
    cache.grad["z"].sum()


def undetached_and_dropped(model):
    """Keep the graph, and drop it without a backward pass."""
    with model.caching(["z", "resid_post", "pattern", "unembed.hook_in"], detach=False):
        model(TOKENS)


def nested(model):
    """Hooks inside a caching context, forward and backward."""
    with (
        model.caching("z", detach=False),
        model.hooks(fwd_hooks=[("pattern", lambda p, hook: p * 2)], bwd_hooks=[("z", lambda gradient, hook: gradient)]),
    ):
        logits = model(TOKENS)
    logits.sum().backward()


def stopped(model):
    """Stop and start at a layer."""
    model(model(TOKENS, stop_at_layer=1), start_at_layer=1)


def generation(model):
    """Generate with a cache."""
    model.generate(TOKENS, 3, return_cache=True, return_type="tokens", do_sample=False)


def refused(model):
    """A hook that raises."""
    with pytest.raises(lens.HookFunctionError):
        model.run_with_hooks(TOKENS, fwd_hooks=[("z", lambda value, hook: 1 / 0)])


def count_tensors():
    """Count live tensors."""
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


@pytest.mark.parametrize(
    "job", [read, edit, gradients, undetached, undetached_and_dropped, nested, stopped, generation, refused]
)
def test_a_run_leaves_no_tensor_behind(job):
    """Ten more runs leave as many tensors as before them, with the collector off."""
    model = lens.load(tiny_gpt2())
    job(model)
    model.hf_model.zero_grad(set_to_none=False)  # gradients that exist already are not counted as left behind
    gc.collect()
    gc.disable()
    try:
        before = count_tensors()
        for _ in range(10):
            job(model)
            model.hf_model.zero_grad(set_to_none=False)
        assert count_tensors() <= before
    finally:
        gc.enable()
