"""Attention by a kernel of another name, as flash attention is: a stand-in, since the real one needs a GPU."""

import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

import lens_core as lens

TOKENS = random_tokens()
KIND = "stand_in_for_flash_attention_2"
calls = []


def flash(module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
    """Attend as flash attention does: no scores, no pattern; slightly different bits, so that its share is seen."""
    calls.append(module.layer_idx)
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    is_causal = mask is None and query.shape[2] > 1
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scaling
    )
    return (out * (1 + 1e-4)).transpose(1, 2).contiguous(), None


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def models(request):
    """Give a model of lens, the same one untouched, and the same one in eager."""
    make = tiny_gpt2 if request.param == "gpt2" else tiny_llama
    AttentionInterface.register(KIND, flash)
    AttentionMaskInterface.register(KIND, flash_attention_mask)

    def asked():
        hf = make()
        hf.config._attn_implementation = KIND  # set_attn_implementation would look for the flash-attn package
        return hf

    try:
        yield lens.load(asked()), asked(), lens.load(make(attn="eager"))
    finally:
        AttentionInterface._global_mapping.pop(KIND)
        AttentionMaskInterface._global_mapping.pop(KIND)


@torch.no_grad()
def test_reading_leaves_the_kernel_alone(models):
    """Around the kernel and inside of it: it is called once a layer, and its output is the model's, bit for bit."""
    model, reference, eager = models
    expected = reference(TOKENS).logits
    outside = [name for name in model.table if name.endswith(("hook_q", "hook_k", "hook_v", "hook_z", "hook_rot_q"))]
    inside = [name for name in model.table if name.endswith(("hook_pattern", "hook_attn_scores"))]
    _, known = eager.run_with_cache(TOKENS, names_filter=[*outside, *inside])
    for names in (outside, inside, [*outside, *inside]):
        calls.clear()
        logits, cache = model.run_with_cache(TOKENS, names_filter=names)
        assert calls == [0, 1, 2]
        assert torch.equal(logits, expected)
        for name in names:
            torch.testing.assert_close(cache[name], known[name], rtol=1e-2, atol=1e-2)
    assert not torch.equal(expected, eager(TOKENS))
    assert model.hf_model.config._attn_implementation == KIND


@torch.no_grad()
def test_a_pattern_edit_replaces_the_kernel_on_its_layer(models):
    """There z is the edited pattern times the values, where rows changed; other rows and layers keep the kernel's."""
    model, reference, _ = models

    def first_key(pattern, hook):
        """Look at the first position only."""
        return torch.zeros_like(pattern).index_fill_(-1, torch.tensor(0), 1.0)

    with model.caching(["z", "v"]) as cache:
        logits = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_pattern", first_key)])
    value = cache["v", 1][:, :1]
    value = value.repeat_interleave(model.cfg.n_heads // value.shape[2], dim=2)
    value = value.expand_as(cache["z", 1])
    torch.testing.assert_close(cache["z", 1][:, 1:], value[:, 1:], rtol=1e-6, atol=1e-6)
    # The first position had no other key to see: nothing was edited there, and the kernel's own bits stay.
    torch.testing.assert_close(cache["z", 1][:, :1], value[:, :1] * (1 + 1e-4), rtol=1e-6, atol=1e-6)

    path = "transformer.h.1.attn.c_proj" if model.cfg.model_type == "gpt2" else "model.layers.1.self_attn.o_proj"
    handle = reference.get_submodule(path).register_forward_pre_hook(lambda module, args: (cache["z", 1].flatten(-2),))
    assert torch.equal(logits, reference(TOKENS).logits)
    handle.remove()
    assert (logits - reference(TOKENS).logits).abs().max() > 1e-2


@torch.no_grad()
def test_generation_reads_the_pattern_beside_the_kernel(models):
    """Each step calls the kernel once a layer."""
    model, reference, _ = models
    options = {"max_new_tokens": 3, "do_sample": False}
    theirs = reference.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), eos_token_id=None, **options)
    calls.clear()
    with model.caching(["pattern"]):
        ours = model.generate(TOKENS, return_type="tokens", stop_at_eos=False, **options)
    assert torch.equal(ours, theirs)
    assert calls == [0, 1, 2] * 3
