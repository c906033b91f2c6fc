"""What stays: activations, decompositions and the kit's laws on a model whose weights went through the passes."""

import copy

import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from lens_conformance import oracle
from lens_conformance.checks import all_checks
from lens_conformance.mutants.core import around
from lens_conformance.runner import find_family, try_check

import lens_core as lens
from lens_core.passes import (
    center_unembed,
    center_writing_weights,
    fold_ln,
    fold_value_biases,
    refactor_factored_attn_matrices,
)

TOKENS = random_tokens()
MODELS = {
    "gpt2": tiny_gpt2,
    "llama": lambda: tiny_llama("llama-biases"),
    "mamba": lambda: tiny_ssm("mamba"),
    "mamba2": lambda: tiny_ssm("mamba2"),
}


def raw(name):
    """Give a model in float64."""
    return lens.load(MODELS[name]().double())


def close(ours, expected, tolerance=1e-6):
    """Assert that two values agree; HF casts to float32 inside."""
    assert torch.allclose(ours.double(), expected.double(), atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_predictions_streams_and_patterns_stay(name):
    """The stream less its mean where writing weights are centred; patterns and log-probabilities as they were."""
    model = raw(name)
    logits, before = model.run_with_cache(TOKENS)
    after_logits, after = model.process_weights().run_with_cache(TOKENS)
    close(after_logits.log_softmax(-1), logits.log_softmax(-1))
    is_centred = not center_writing_weights.why_not(model)
    assert is_centred == (name == "gpt2")
    for place, value in before.items():
        if "resid_p" in place or place.endswith("hook_embed"):
            close(after[place], value - value.mean(-1, keepdim=True) if is_centred else value)
        if place.endswith(("hook_pattern", "hook_normalized", "hook_ssm_output", "mlp.hook_pre")):
            close(after[place], value)


def test_the_whole_chain_leaves_nothing_to_fold():
    """Gains 1, biases 0, readers and writers without a mean, W_U and b_U too, value biases gone."""
    model = raw("gpt2").process_weights()
    hf = model.hf_model.transformer
    for norm in [hf.ln_f, *(norm for block in hf.h for norm in (block.ln_1, block.ln_2))]:
        assert bool((norm.weight == 1).all())
        assert not norm.bias.any()
    writing = ("W_E", "W_pos", "W_O", "b_O", "W_out", "b_out")
    means = [getattr(model, name).mean(-1) for name in writing] + [model.W_U.mean(-1), model.b_U.mean()]
    means += [getattr(model, name).mean(-2) for name in ("W_Q", "W_K", "W_V", "W_in")] + [model.W_U.mean(0)]
    assert all(float(mean.detach().abs().max()) < 1e-14 for mean in means)
    assert not model.b_V.any()


def test_a_pass_that_would_undo_another_is_refused_after_it():
    """A LayerNorm's bias becomes a value bias again; centring turns an output's rows. Other orders give the same."""
    model = fold_value_biases(raw("gpt2"))
    with pytest.raises(lens.WeightError, match=r"it would undo what fold_value_biases did: model.undo_passes\(\), and"):
        fold_ln(model)
    model = refactor_factored_attn_matrices(raw("gpt2"))
    with pytest.raises(lens.WeightError, match="it would undo what refactor_factored_attn_matrices did"):
        center_writing_weights(model)
    forwards, other = raw("gpt2").process_weights(), raw("gpt2")
    for one in (center_unembed, center_writing_weights, fold_ln, fold_value_biases):
        one(other)
    for name in forwards.weight_names:
        close(getattr(other, name), getattr(forwards, name), 1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_attributions_still_sum_to_the_logits(name):
    """Parts of the stream through the final norm and the unembedding, and the constant; neurons and heads where any."""
    model = raw(name).process_weights()
    logits, cache = model.run_with_cache(TOKENS)
    stack = cache.decompose_resid()
    attrs, bias = cache.logit_attrs(stack, 7, 3, return_bias=True)
    close(attrs.sum(0) + bias, logits[..., 7] - logits[..., 3])
    close(stack.sum(0), cache["resid_post", -1])
    own = model.unembed(model.ln_final(cache["resid_post", -1]))
    close(own, cache["unembed.hook_out"])
    if name == "gpt2":
        close(cache.get_full_resid_decomposition().sum(0), cache["resid_post", -1])


@pytest.mark.parametrize(("name", "check"), [("gpt2", "equations"), ("llama", "weights"), ("mamba2", "weights")])
def test_the_kits_laws_hold_on_processed_weights(name, check, monkeypatch):
    """The contract's equations, and views that recompute activations, on weights that went through every pass."""

    def processed(new_pair, family, **options):
        one = new_pair(family, **options)
        one.model.process_weights(refactor_factored_attn_matrices=None)
        return one

    around(monkeypatch, oracle, "new_pair", processed)
    oracle.forget_pairs()
    try:
        outcome = try_check(all_checks()[check], find_family(name), level="fast")
        assert outcome.status == "passed", outcome.reason
    finally:
        oracle.forget_pairs()


def test_text_goes_on_from_a_processed_prompt():
    """Prompt and steps with a cache give the whole run's logits: made biases and moved ones are HF's own."""
    model = lens.load(tiny_llama("qwen2")).process_weights()
    _, state = model(TOKENS[:, :3], return_state=True)
    rest, _ = model(TOKENS[:, 3:], past_key_values=state, return_state=True)
    assert torch.allclose(rest, model(TOKENS)[:, 3:], atol=1e-4)


def test_training_goes_on():
    """Made parameters are trained like their neighbours, and a frozen model stays frozen."""
    model = lens.load(tiny_gpt2()).process_weights()
    model(TOKENS, return_type="loss").backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    frozen = fold_ln(lens.load(tiny_gpt2().requires_grad_(False)))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_the_copy_and_the_original_share_nothing():
    """copy=True leaves the model as it was, and a deep copy can be undone on its own."""
    model = raw("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = copy.deepcopy(model.process_weights(copy=True))
    assert model.passes == ()
    other.undo_passes()
    for own in (model, other):
        assert own.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
