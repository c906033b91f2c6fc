"""Law 6: a cached tensor, and one that a function was handed, never changes later, and keeps alive only itself."""

import gc
import weakref

import pytest
import torch
from golden.tiny import random_tokens
from lens_conformance.edits import edit_at, in_place
from lens_conformance.golden.gpt2 import names_at
from transformers import DynamicCache, StaticCache


def same(ours, theirs):
    """Compare bit for bit, -inf included."""
    return ours.shape == theirs.shape and torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_cached_values_never_change(subject, attn, mode):
    """Law 6: what was handed out and what was cached stays what it was.

    Through edits in the same run, later runs, decoding on the same key-value cache, and an optimiser's step.
    """
    one, tokens = subject(attn=attn), random_tokens(2, 6)
    for make in (
        lambda: DynamicCache(config=one.hf.config),
        lambda: StaticCache(config=one.hf.config, max_cache_len=9),
    ):
        handed, clones, past = {}, {}, make()

        def keep(x, hook, handed=handed, clones=clones):
            handed[hook.name] = x
            clones[hook.name] = x.detach().clone()

        edited = [
            "blocks.0.hook_resid_mid",
            "blocks.1.attn.hook_k",
            "blocks.2.hook_resid_pre",
            "blocks.1.ln2.hook_scale",
        ]
        entries = [(name, keep) for name in one.names()]
        entries += [(name, in_place(edit_at(name))) for name in edited]
        with mode():
            with one.model.hooks(fwd_hooks=entries):
                _, cache = one.model.run_with_cache(
                    tokens[:, :4], names_filter=one.names(), past_key_values=past, use_cache=True
                )
            snapshot = {name: cache[name].detach().clone() for name in cache}
            for name in one.names():
                assert same(handed[name], clones[name]), f"{name}: the tensor that a function was handed changed"
                if name not in edited:
                    assert same(cache[name], clones[name]), f"{name}: cache and function disagree"
            one.model(tokens[:, 4:5], past_key_values=past, use_cache=True)
            one.model.run_with_hooks(
                tokens[:, 5:],
                past_key_values=past,
                use_cache=True,
                fwd_hooks=[(name, in_place(edit_at(name, causal=True))) for name in edited],
            )
            one.model.run_with_hooks(tokens, fwd_hooks=[(name, in_place(edit_at(name))) for name in edited])
        if mode is torch.enable_grad:
            with torch.no_grad():
                for parameter in one.hf.parameters():
                    parameter.mul_(1.01)
        for name in one.names():
            assert same(cache[name], snapshot[name]), f"{name}: the cached tensor changed later"
            assert same(handed[name], clones[name]), f"{name}: the tensor that a function was handed changed later"


def test_no_name_holds_a_parameter(subject):
    """Law 6: an optimiser step in place does not reach cached values (position rows, embeddings, biases)."""
    one, tokens = subject(), random_tokens()
    _, cache = one.model.run_with_cache(tokens, names_filter=one.names())
    owned = {parameter.untyped_storage().data_ptr() for parameter in one.hf.parameters()}
    for name in cache:
        assert cache[name].untyped_storage().data_ptr() not in owned, name


def test_writing_into_the_argument_affects_only_what_it_should(subject, attn):
    """Law 6: an in-place edit does not reach values upstream or beside that share storage in HF."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    for edited in names_at(1):
        _, expected = one.golden(tokens, edits={edited: edit_at(edited)})
        with torch.no_grad(), one.model.hooks(fwd_hooks=[(edited, in_place(edit_at(edited)))]):
            _, cache = one.model.run_with_cache(tokens, names_filter=one.names())
        for name in one.names():
            ours, want = cache[name].double(), expected[name].double()
            torch.testing.assert_close(
                ours, want, atol=1e-8, rtol=1e-9, msg=lambda m, n=name, e=edited: f"{n}, writing into {e}: {m}"
            )


def test_reusing_the_users_own_input_buffer_changes_no_cache(subject):
    """Law 6: ids or embeddings that the user writes over after the run do not reach what was cached of them."""
    one, tokens = subject(), random_tokens()
    for given, name in ((tokens, "hook_tokens"), (torch.randn(2, 5, 21), "hook_embed")):
        before = given.clone()
        _, cache = one.model.run_with_cache(given, names_filter=[name])
        given.zero_()
        assert same(cache[name], before), name


def test_one_name_keeps_alive_no_more_than_itself(subject, attn):
    """Law 6: cached alone, a value's storage is no larger than the value."""
    one, tokens = subject(attn=attn), random_tokens(2, 6)
    for mode in (torch.no_grad, torch.enable_grad):
        for name in names_at(1):
            with mode():
                _, cache = one.model.run_with_cache(tokens, names_filter=[name])
            value = cache[name]
            held, needed = value.untyped_storage().nbytes(), value.numel() * value.element_size()
            assert held <= needed, f"{name}: {held} bytes are kept alive for {needed}"
            assert not value.requires_grad, name


def test_one_name_keeps_alive_no_more_while_decoding(subject, attn):
    """Law 6: with a static key-value cache, a trimmed value does not keep the untrimmed one."""
    one, tokens = subject(attn=attn), random_tokens(2, 6)
    for name in names_at(1):
        past = StaticCache(config=one.hf.config, max_cache_len=20)
        with torch.no_grad():
            one.model(tokens[:, :5], past_key_values=past, use_cache=True)
            _, cache = one.model.run_with_cache(
                tokens[:, 5:], names_filter=[name], past_key_values=past, use_cache=True
            )
        value = cache[name]
        assert value.untyped_storage().nbytes() <= value.numel() * value.element_size(), name


def test_sliced_positions_keep_alive_no_more_than_the_slice(subject):
    """Law 6: pos_slice keeps the slice, not the whole."""
    one, tokens = subject(), random_tokens(2, 6)
    for name in names_at(1):
        _, whole = one.model.run_with_cache(tokens, names_filter=[name])
        _, cache = one.model.run_with_cache(tokens, names_filter=[name], pos_slice=slice(-2, None))
        axis = 2 if name.endswith(("scores", "pattern")) else 1
        assert same(cache[name], whole[name].narrow(axis, 4, 2)), name
        assert cache[name].untyped_storage().nbytes() <= cache[name].numel() * cache[name].element_size(), name


def test_a_run_is_not_kept_alive(subject, attn):
    """Law 6: after a run, the tensors that functions saw are freed once the user lets them go."""
    one, tokens, seen = subject(attn=attn), random_tokens(), {}

    def note(x, hook):
        seen[hook.name] = weakref.ref(x)

    with torch.no_grad():
        one.model.run_with_hooks(tokens, fwd_hooks=[(name, note) for name in one.names()])
    gc.collect()
    assert [name for name, ref in seen.items() if ref() is not None and ref() is not tokens] == []
