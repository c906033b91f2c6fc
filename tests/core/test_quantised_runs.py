"""Models whose matrices torch keeps in int8: hooks see and edit what the quantised model computes."""

import copy

import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from torch import nn

import lens_core as lens
from lens_core.errors import WeightError

TOKENS = random_tokens()
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated",  # torch's own quantised modules
    "ignore::lens_core.errors.CostWarning",
)
# The blocks' path; a quantised module with its hook point; what is added to the residual stream.
FAMILIES = {
    "gpt2": ("transformer.h", "lm_head", "unembed.hook_out", ("attn_out", "mlp_out")),
    "llama": ("model.layers", "model.layers.1.self_attn.o_proj", "blocks.1.attn.hook_out", ("attn_out", "mlp_out")),
    "mamba": ("backbone.layers", "backbone.layers.1.mixer.in_proj", "blocks.1.mixer.hook_in_proj", ("mixer_out",)),
    "mamba2": ("backbone.layers", "backbone.layers.1.mixer.in_proj", "blocks.1.mixer.hook_in_proj", ("mixer_out",)),
}


def make(family):
    """Build a plain model."""
    if family == "gpt2":
        return tiny_gpt2(tie_word_embeddings=False)
    return tiny_llama() if family == "llama" else tiny_ssm(family)


def quantised(plain):
    """Give a copy in int8. GPT-2's Conv1D is none of torch's; HF's Mamba and Mamba-2 read two weights themselves."""
    is_ssm = hasattr(plain, "backbone")
    left_out = ("dt_proj", "lm_head") if is_ssm else ()
    names = [name for name, part in plain.named_modules() if type(part) is nn.Linear and not name.endswith(left_out)]
    chosen = dict.fromkeys(names, torch.ao.quantization.default_dynamic_qconfig)
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(plain), chosen, dtype=torch.qint8)


@pytest.fixture(params=FAMILIES)
def pair(request):
    """Give a model of lens, and a second quantised one that lens has not touched."""
    plain = make(request.param)
    return request.param, plain, lens.load(quantised(plain)), quantised(plain)


def square(value, hook=None):
    """Edit."""
    return value * value * 0.3 + 0.1


@torch.no_grad()
def test_reading_shows_what_the_quantised_model_computes(pair):
    """Every name fires; no bit moves; module outputs are the untouched model's, and the equations hold."""
    family, plain, model, reference = pair
    blocks, path, name, writers = FAMILIES[family]
    outputs = {}
    for at in (path, f"{blocks}.1"):
        reference.get_submodule(at).register_forward_hook(
            lambda module, args, output, at=at: outputs.update({at: output if torch.is_tensor(output) else output[0]})
        )
    expected = reference(TOKENS).logits
    logits, cache = model.run_with_cache(TOKENS, names_filter=lambda name: True)
    assert torch.equal(logits, expected)
    assert (logits - plain(TOKENS).logits).abs().max() > 1e-3
    assert set(cache) == {point.name for point in model.hook_points()}
    assert torch.equal(model.run_with_cache(TOKENS)[0], expected)
    assert torch.equal(cache[name], outputs[path])
    assert torch.equal(cache["resid_post", 1], outputs[f"{blocks}.1"])
    total = cache["resid_pre", 1] + sum(cache[f"blocks.1.hook_{writer}"] for writer in writers)
    torch.testing.assert_close(total, cache["resid_post", 1])
    if family == "llama":
        scores = cache["rot_q", 1].transpose(1, 2) @ cache["k_rep", 1].permute(0, 2, 3, 1) * 10**-0.5
        causal = torch.ones(5, 5, dtype=torch.bool).tril()
        pattern = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        torch.testing.assert_close(cache["pattern", 1], pattern)
        torch.testing.assert_close(cache["z", 1], (pattern @ cache["v_rep", 1].transpose(1, 2)).transpose(1, 2))
    elif family != "gpt2":
        own = {part: cache[f"blocks.1.mixer.hook_{part}"] for part in ("decay", "ssm_write", "ssm_state", "y", "C")}
        decay = own["decay"] if family == "mamba" else own["decay"][..., None, None]
        recurred = decay[:, 1:] * own["ssm_state"][:, :-1] + own["ssm_write"][:, 1:]
        torch.testing.assert_close(own["ssm_state"][:, 1:], recurred)
        if family == "mamba":
            torch.testing.assert_close(
                (own["ssm_state"] * own["C"][:, :, None]).sum(-1), own["y"], rtol=1e-4, atol=1e-5
            )


@torch.no_grad()
def test_edits_are_those_of_torch_hooks(pair):
    """At a quantised module and at a block; identities change no bit, and every name of a block reaches the logits."""
    family, _, model, reference = pair
    blocks, path, name, _ = FAMILIES[family]
    plain = reference(TOKENS).logits
    for point, at in ((name, path), ("blocks.1.hook_resid_post", f"{blocks}.1")):
        handle = reference.get_submodule(at).register_forward_hook(lambda module, args, output: square(output))
        expected = reference(TOKENS).logits
        handle.remove()
        assert (expected - plain).abs().max() > 1e-2
        assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=[(point, square)]), expected), point
    for point in (point.name for point in model.hook_points() if point.layer == 1):
        same = model.run_with_hooks(TOKENS, fwd_hooks=[(point, lambda value, hook: value.clone())])
        assert torch.equal(same, plain), point
        bent = model.run_with_hooks(
            TOKENS, fwd_hooks=[(point, lambda value, hook: torch.where(value.isfinite(), square(value), value))]
        )
        assert (bent - plain).abs().max() > 1e-3, point


@torch.no_grad()
def test_generation_with_a_hook_is_the_quantised_models(pair):
    """The same steps as HF's own under a torch hook."""
    family, _, model, reference = pair
    _, path, name, _ = FAMILIES[family]
    reference.get_submodule(path).register_forward_hook(lambda module, args, output: square(output))
    options = {"max_new_tokens": 4, "do_sample": False}
    theirs = reference.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), eos_token_id=None, **options)
    with model.hooks(fwd_hooks=[(name, square)]):
        ours = model.generate(TOKENS, return_type="tokens", stop_at_eos=False, **options)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_views_and_passes_of_int8_modules(pair):
    """A weight is refused or dequantised, a bias that is none is zeros, and passes refuse."""
    family, _, model, _ = pair
    name, at = {"gpt2": ("W_U", ()), "llama": ("W_O", (1,))}.get(family, ("W_in_proj", (1,)))
    with pytest.raises(WeightError, match=f"{name} of .*quantised"):
        model.weight(name, *at)
    module = model.hf_model.get_submodule(FAMILIES[family][1])
    full = model.weight(name, *at, dequantize=True)
    assert torch.equal(full.reshape(-1, full.shape[-1]), module.weight().dequantize().T)
    bias = model.weight(name.replace("W_", "b_"), *at)
    assert bias.shape == full.shape[-1:]
    assert not bias.any()
    with pytest.raises(WeightError, match="quantised"):
        model.process_weights(fold_ln=True, center_writing_weights=False, center_unembed=False)
