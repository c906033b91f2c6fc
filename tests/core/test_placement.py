"""Hooks on models that accelerate spreads out: values and edits are those of the plain model."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from golden.tiny import fresh, random_tokens, tiny_gpt2

import lens_core as lens

DEVICE_MAP = {
    "transformer.wte": "cpu",
    "transformer.wpe": "cpu",
    "transformer.drop": "cpu",
    "transformer.h.0": "cpu",
    "transformer.h.1": "disk",
    "transformer.h.2": "cpu",
    "transformer.ln_f": "disk",
    "lm_head": "cpu",
}


def placed(kind, hf, folder):
    """Spread a copy of the model out."""
    copy = fresh(hf)
    if kind == "cpu offload":
        cpu_offload(copy)
    elif kind == "disk offload":
        disk_offload(copy, folder)
    else:
        copy = dispatch_model(copy, device_map=DEVICE_MAP, offload_dir=folder, main_device="cpu")
    return copy


@pytest.fixture(params=["cpu offload", "disk offload", "device map"])
def pair(request, tmp_path):
    """Give a plain model and the same one spread out."""
    hf = tiny_gpt2(tie_word_embeddings=False)
    return lens.load(hf), lens.load(placed(request.param, hf, tmp_path))


def everything(name):
    """Choose every hook point."""
    return True


@pytest.mark.filterwarnings("ignore::lens_core.errors.CostWarning")
def test_values_are_the_same_under_offload(pair):
    """Every hook point, starred ones too, and the weights stay where accelerate put them."""
    plain, spread = pair
    devices = [parameter.device for parameter in spread.parameters()]
    tokens = random_tokens()
    with torch.no_grad():
        logits, expected = plain.run_with_cache(tokens, names_filter=everything)
        found, cache = spread.run_with_cache(tokens, names_filter=everything)
    assert torch.equal(found, logits)
    for name in expected:
        assert torch.equal(cache[name], expected[name]), name
    assert [parameter.device for parameter in spread.parameters()] == devices


def test_edits_are_the_same_under_offload(pair):
    """One block's every hook point: an edit gives the same logits, bit for bit."""
    plain, spread = pair
    tokens = random_tokens()
    for name in [name for name in plain.table if name.startswith(("blocks.1", "ln_final", "unembed"))]:

        def bend(value, hook):
            return torch.where(value.isfinite(), value * value * 0.7 + 0.03, value)

        with torch.no_grad():
            expected = plain.run_with_hooks(tokens, fwd_hooks=[(name, bend)])
            assert torch.equal(spread.run_with_hooks(tokens, fwd_hooks=[(name, bend)]), expected), name


def test_partial_runs_and_generation_are_the_same_under_offload(pair):
    """start_at_layer, stop_at_layer, generate and weight views."""
    plain, spread = pair
    tokens = random_tokens()
    with torch.no_grad():
        residual = plain(tokens, stop_at_layer=1)
        assert torch.equal(spread(tokens, stop_at_layer=1), residual)
        assert torch.equal(spread(residual, start_at_layer=1), plain(residual, start_at_layer=1))
        assert torch.equal(spread.W_Q, plain.W_Q)
    options = {"max_new_tokens": 4, "do_sample": False, "return_type": "tokens"}
    assert torch.equal(spread.generate(tokens, **options), plain.generate(tokens, **options))
