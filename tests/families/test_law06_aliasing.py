"""Law 6: a cached tensor, and one that a function was handed, never changes later, and keeps alive only itself."""

import pytest
import torch
from families.subject import pair
from golden.tiny import random_tokens
from lens_conformance.edits import in_place
from transformers import DynamicCache


def assert_unchanged(names, kept, before, what):
    """Assert that no tensor changed since its copy was made."""
    changed = [name for name in names if name in kept and not torch.equal(kept[name], before[name])]
    assert not changed, f"{what} changed later"


@pytest.mark.sampled
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_cached_values_never_change(subject, attn, mode):
    """Law 6: through edits in the same run, later runs, decoding on the same cache, and an optimiser's step."""
    if mode is torch.inference_mode and not subject.full:
        return
    one, tokens = pair(subject, attn=attn), random_tokens(2, 6)
    names, past, handed, clones = one.names(), DynamicCache(config=one.hf.config), {}, {}
    edited = [n for n in names if n.endswith(("0.hook_resid_mid", "1.attn.hook_k", "2.hook_resid_pre", "1.hook_conv"))]

    def keep(x, hook):
        if not subject.per_position(hook.name):
            handed[hook.name], clones[hook.name] = x, x.detach().clone()

    def writes(causal):
        return [(name, in_place(subject.edit_at(name, causal=causal))) for name in edited]

    with mode():
        with one.model.hooks(fwd_hooks=[*((name, keep) for name in names), *writes(causal=False)]):
            _, cache = one.model.run_with_cache(tokens[:, :4], names_filter=names, past_key_values=past, use_cache=True)
        snapshot = {name: cache[name].detach().clone() for name in cache}
        untouched = [name for name in clones if name not in edited]
        assert_unchanged(untouched, cache, clones, "between function and cache, a value")
        one.model(tokens[:, 4:5], past_key_values=past, use_cache=True)
        one.model.run_with_hooks(tokens[:, 5:], past_key_values=past, use_cache=True, fwd_hooks=writes(causal=True))
        one.model.run_with_hooks(tokens, fwd_hooks=writes(causal=False))
    if mode is torch.enable_grad:
        with torch.no_grad():
            for parameter in one.hf.parameters():
                parameter.mul_(1.01)
    assert_unchanged(names, cache, snapshot, "a cached tensor")
    assert_unchanged(names, handed, clones, "a tensor that a function was handed")


@pytest.mark.once
def test_no_name_holds_a_parameter(narrow):
    """Law 6: an optimiser step in place does not reach cached values."""
    _, cache = narrow.model.run_with_cache(random_tokens(), names_filter=narrow.names())
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*narrow.hf.parameters(), *narrow.hf.buffers())}
    for name in cache:
        assert cache[name].untyped_storage().data_ptr() not in owned, name


@pytest.mark.once
@pytest.mark.sampled
def test_one_name_keeps_alive_no_more_than_itself(subject, narrow):
    """Law 6: cached alone, a value's storage is no larger than the value."""
    tokens = random_tokens(2, 6)
    for mode in (torch.no_grad, torch.enable_grad) if subject.full else (torch.no_grad,):
        for name in narrow.edited_names():
            with mode():
                _, cache = narrow.model.run_with_cache(tokens, names_filter=[name])
            size = cache[name].numel() * cache[name].element_size()
            assert cache[name].untyped_storage().nbytes() <= size, name
