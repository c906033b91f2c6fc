"""The weights that passes make, against the same by hand, head by head and column by column, in float64."""

import copy

import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from lens_conformance.float64 import true_float64
from passes.by_hand import folded_rms_norm, processed_gpt2

import lens_core as lens
from lens_core.passes import fold_ln, fold_value_biases, refactor_factored_attn_matrices

TOKENS = random_tokens()


def same(ours, expected, tolerance=1e-12):
    """Assert that two weights agree."""
    assert ours.shape == expected.shape
    assert torch.allclose(ours.double(), expected.double(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_of_gpt2_is_what_transformerlens_defaults_make_of_it(tied):
    """All sixteen views, from formulas that share nothing with the passes."""
    hf = tiny_gpt2(dtype=torch.float64, tie_word_embeddings=tied)
    with torch.no_grad():
        expected = processed_gpt2(lens.load(copy.deepcopy(hf)))
    model = lens.load(hf).process_weights()
    assert set(expected) == set(model.weight_names)
    for name, value in expected.items():
        same(getattr(model, name), value)


def test_grouped_queries_and_gated_mlps_take_an_rms_norms_gain():
    """Each of q, k, v, gate and up; the embedding stays, though it was tied to the unembedding."""
    raw = lens.load(tiny_llama("llama-tied").double())
    model = fold_ln(raw, copy=True)
    for layer, block in enumerate(raw.hf_model.model.layers):
        for name in ("W_Q", "W_K", "W_V"):
            for ours, own in zip(model.weight(name, layer), raw.weight(name, layer), strict=True):
                same(ours, folded_rms_norm(own, block.input_layernorm.weight))
        for name in ("W_in", "W_gate"):
            same(
                model.weight(name, layer),
                folded_rms_norm(raw.weight(name, layer), block.post_attention_layernorm.weight),
            )
    same(model.W_U, folded_rms_norm(raw.W_U, raw.hf_model.model.norm.weight))
    assert torch.equal(model.W_E, raw.W_E)


def test_gemmas_gain_is_one_more_than_its_weight():
    """It is folded with the offset, and its weight becomes 0."""
    raw = lens.load(tiny_llama("gemma").double())
    model = fold_ln(raw, copy=True)
    gain = 1 + raw.hf_model.model.layers[0].input_layernorm.weight
    same(model.weight("W_Q", 0)[0], folded_rms_norm(raw.weight("W_Q", 0)[0], gain))
    assert not model.hf_model.model.layers[0].input_layernorm.weight.any()


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "mamba2"])
def test_a_mixer_takes_the_gain_of_the_norm_before_it(kind):
    """in_proj takes the block norm's gain; Mamba-2's out_proj that of the gated norm."""
    raw = lens.load(tiny_ssm(kind, dtype=torch.float64))
    model = fold_ln(raw, copy=True)
    for layer, block in enumerate(raw.hf_model.backbone.layers):
        same(model.weight("W_in_proj", layer), folded_rms_norm(raw.weight("W_in_proj", layer), block.norm.weight))
        if kind == "mamba2":
            own = folded_rms_norm(raw.weight("W_out_proj", layer), block.mixer.norm.weight)
            same(model.weight("W_out_proj", layer), own)
            assert bool((model.weight("W_inner_norm", layer) == 1).all())
        assert bool((model.hf_model.backbone.layers[layer].norm.weight == 1).all())


def test_experts_routers_and_shared_experts_take_the_gain():
    """Every expert of the stack, the router, the expert beside them and its gate."""
    raw = lens.load(tiny_llama("qwen2_moe").double())
    model = fold_ln(raw, copy=True)
    for ours, own in zip(model.hf_model.model.layers, raw.hf_model.model.layers, strict=True):
        gain = own.post_attention_layernorm.weight
        if not hasattr(own.mlp, "experts"):
            continue
        for expert, before in zip(ours.mlp.experts.gate_up_proj, own.mlp.experts.gate_up_proj, strict=True):
            same(expert.T, folded_rms_norm(before.T, gain))
        for name in ("gate", "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert_gate"):
            same(ours.mlp.get_submodule(name).weight.T, folded_rms_norm(own.mlp.get_submodule(name).weight.T, gain))
        same(ours.mlp.experts.down_proj, own.mlp.experts.down_proj, 0)


def test_a_value_bias_arrives_in_an_output_that_had_none():
    """Qwen2's values have biases, its output none: one is made, and each query head reads its group's."""
    raw = lens.load(tiny_llama("qwen2").double())
    model = fold_value_biases(raw, copy=True)
    for layer in range(3):
        b_V, W_O = raw.weight("b_V", layer), raw.weight("W_O", layer)
        expected = sum(b_V[head // 2] @ W_O[head] for head in range(4))
        same(model.weight("b_O", layer), expected)
    assert not model.b_V.any()
    assert raw.hf_model.model.layers[0].self_attn.o_proj.bias is None


def test_refactored_heads_are_in_their_singular_bases():
    """W_Q W_K^T and W_V W_O of every head, biases included, stay; their factors are of the singular vectors."""
    raw = lens.load(tiny_gpt2(dtype=torch.float64))
    model = refactor_factored_attn_matrices(raw, copy=True)

    def with_bias(of, part, layer, head):
        return torch.cat([of.weight(f"W_{part}", layer)[head], of.weight(f"b_{part}", layer)[head][None]])

    for layer in range(3):
        for head in range(3):
            q, k = (with_bias(model, part, layer, head) for part in "QK")
            circuit = with_bias(raw, "Q", layer, head) @ with_bias(raw, "K", layer, head).T
            same(q @ k.T, circuit, 1e-11)
            singular = torch.linalg.svdvals(circuit)[:7]
            same(q.T @ q, singular.diag(), 1e-11)
            same(k.T @ k, singular.diag(), 1e-11)
            v, o = model.weight("W_V", layer)[head], model.weight("W_O", layer)[head]
            same(v @ o, raw.weight("W_V", layer)[head] @ raw.weight("W_O", layer)[head], 1e-11)
            same(o @ o.T, torch.eye(7, dtype=torch.float64), 1e-11)
            singular = torch.linalg.svdvals(v @ o)[:7]
            same(v.T @ v, (singular**2).diag(), 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    """Every bit is that of the float32 weights' result, rounded."""
    half = tiny_gpt2(dtype=dtype)
    wide = fold_ln(lens.load(copy.deepcopy(half).float()))
    model = fold_ln(lens.load(half))
    for name, value in model.hf_model.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, wide.hf_model.state_dict()[name].to(dtype)), name


def test_float64_stays_float64():
    """Log-probabilities agree to 1e-13: TransformerLens goes by way of float32, and is off by 5e-8."""
    hf = tiny_gpt2(dtype=torch.float64)
    with torch.no_grad(), true_float64():
        expected = hf(TOKENS).logits.log_softmax(-1)
        model = lens.load(hf).process_weights(refactor_factored_attn_matrices=True)
        same(model(TOKENS).log_softmax(-1), expected, 1e-12)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
