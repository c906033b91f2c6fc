"""Stacks, products and sums of weights: what a hybrid has, what is refused, and by what words."""

import pytest
import torch
from golden.tiny import tiny_gpt2, tiny_tokenizer
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from lens_conformance.families import known_families
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lens_core as lens
from lens_core.errors import ArgumentError, TokenIdError, WeightError


@pytest.fixture(scope="module")
def hybrid():
    """Give a Bamba of three blocks, the first and the last with attention."""
    config = AutoConfig.for_model("bamba", **{**known_families()["bamba"].config, "attn_layer_indices": [0, 2]})
    return lens.load(AutoModelForCausalLM.from_config(config).eval())


@pytest.fixture(scope="module")
def gpt2():
    """Give GPT-2."""
    return lens.load(tiny_gpt2(), tokenizer=tiny_tokenizer())


def test_a_hybrid_stacks_what_it_has_and_says_of_which_blocks(hybrid):
    """Row i is block layers[i]; the stack of all blocks refuses, and names the way."""
    for name, expected in (("W_Q", (0, 2)), ("b_O", (0, 2)), ("W_in_proj", (1,)), ("W_in", (0, 1, 2))):
        layers, stack = hybrid.stacked_weight(name)
        assert layers == expected
        for row, layer in zip(stack, layers, strict=True):
            assert torch.equal(row, hybrid.weight(name, layer))
    layers, OV = hybrid.stacked_weight("OV")
    assert layers == (0, 2)
    torch.testing.assert_close(OV[1].AB, hybrid.factored_weight("OV", -1).AB)
    assert torch.equal(hybrid.W_in, hybrid.stacked_weight("W_in")[1])
    with pytest.raises(
        WeightError, match=r"block 1 of this model has no W_Q; layers, stack = model.stacked_weight\('W_"
    ):
        _ = hybrid.W_Q
    with pytest.raises(WeightError, match=r"blocks 0, 2 of this model have no W_in_proj"):
        _ = hybrid.W_in_proj
    with pytest.raises(WeightError, match=r"block 1 of this model has no QK; .*stacked_weight\('QK'\)"):
        _ = hybrid.QK
    with pytest.raises(WeightError, match="block 1 has no W_Q; blocks 0, 2 have"):
        hybrid.factored_weight("QK", 1)
    assert hybrid.all_head_labels[0] == "L0H0"
    assert hybrid.all_head_labels[-1] == f"L2H{hybrid.cfg.n_heads - 1}"
    assert len(hybrid.all_head_labels) == 2 * hybrid.cfg.n_heads


def test_a_model_without_attention_has_no_heads():
    """By name, not by a missing W_Q."""
    model = lens.load(tiny_ssm("mamba2"))
    for name in ("QK", "OV"):
        with pytest.raises(WeightError, match=f"{name} is of attention heads, and no block"):
            getattr(model, name)
    with pytest.raises(WeightError, match="no block of this model has attention heads"):
        _ = model.all_head_labels


def test_names_that_are_not_there_are_told_with_those_that_are(gpt2):
    """Errors of methods are WeightErrors; attributes are AttributeErrors, so that hasattr works."""
    for ask in (lambda: gpt2.stacked_weight("W_gate"), lambda: gpt2.weight("W_gate", 0)):
        with pytest.raises(WeightError, match="no weight 'W_gate' in GPT-2; there are W_E, W_pos"):
            ask()
    assert not hasattr(gpt2, "W_gate")
    with pytest.raises(WeightError, match="W_E is not of the blocks; model.W_E"):
        gpt2.stacked_weight("W_E")
    with pytest.raises(ArgumentError, match="'QK' or 'OV'; got 'KQ'"):
        gpt2.factored_weight("KQ", 0)
    with pytest.raises(WeightError, match="blocks 0 to 2"):
        gpt2.factored_weight("QK", 3)


def test_blocks_of_different_shapes_do_not_stack():
    """The two that differ are named; each is there by itself."""
    hf = tiny_gpt2()
    hf.transformer.h[2].mlp.c_fc.weight = nn.Parameter(torch.zeros(21, 5))
    model = lens.load(hf)
    with pytest.raises(WeightError, match=r"W_in is \[21, 37\] in block 0 and \[21, 5\] in block 2"):
        _ = model.W_in
    assert model.weight("W_in", 2).shape == (21, 5)


def test_factors_are_views_of_the_live_parameters_where_they_can_be(gpt2):
    """All heads have their own keys, or all share one: nothing is copied."""
    for model in (gpt2, lens.load(tiny_llama("llama", num_key_value_heads=1))):
        for name, parts in (("QK", ("W_Q", "W_K")), ("OV", ("W_V", "W_O"))):
            made = model.factored_weight(name, 1)
            assert made.shape[0] == model.cfg.n_heads
            for factor, part in zip(made.pair, parts, strict=True):
                assert factor.data_ptr() == model.weight(part, 1).data_ptr()


def test_parameters_are_counted_once(gpt2):
    """Tied ones too."""
    assert gpt2.n_params_total == sum(p.numel() for p in gpt2.hf_model.parameters())
    tied, untied = (lens.load(tiny_llama("llama", tie_word_embeddings=tied)) for tied in (True, False))
    assert untied.n_params_total - tied.n_params_total == tied.W_E.numel()


def test_biases_of_MLPs_can_be_left_out(gpt2):
    """By hand, to the layer and to its MLP."""
    torch.testing.assert_close(gpt2.accumulated_bias(2, include_mlp_biases=False), gpt2.b_O[0] + gpt2.b_O[1])
    both = gpt2.b_O[0] + gpt2.b_out[0] + gpt2.b_O[1]
    torch.testing.assert_close(gpt2.accumulated_bias(1, mlp_input=True), both)
    for wrong, told in (((4,), "0 to 3"), ((-2,), "got -2"), ((3, True), "one block"), (("1",), "got '1'")):
        with pytest.raises(ArgumentError, match=told):
            gpt2.accumulated_bias(*wrong)


def test_a_bias_that_a_post_norm_scales_is_no_constant():
    """OLMo 2 with biases: refused, and where to look; without them it is zeros."""
    with pytest.raises(WeightError, match="b_O of block 0 goes through ln1_post.*get_full_resid_decomposition"):
        lens.load(tiny_llama("olmo2")).accumulated_bias(1)
    assert not lens.load(tiny_llama("gemma2", attn="eager")).accumulated_bias(None).any()


def test_biases_of_half_precision_are_summed_in_float32():
    """The values of the halves."""
    hf = tiny_gpt2(dtype=torch.bfloat16)
    made = lens.load(hf).accumulated_bias(3)
    assert made.dtype == torch.float32
    expected = sum(block.attn.c_proj.bias.float() + block.mlp.c_proj.bias.float() for block in hf.transformer.h)
    torch.testing.assert_close(made, expected)


def test_directions_of_tokens_are_columns_of_the_unembedding(gpt2):
    """For text, ids and tensors of ids; ids outside of the vocabulary are told."""
    W_U = gpt2.W_U
    assert torch.equal(gpt2.tokens_to_residual_directions("w3"), W_U[:, 3])
    assert torch.equal(gpt2.tokens_to_residual_directions(5), W_U[:, 5])
    assert torch.equal(gpt2.tokens_to_residual_directions(["w3", 5]), W_U[:, [3, 5]].T)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    made = gpt2.tokens_to_residual_directions(ids)
    assert made.shape == (2, 3, 21)
    assert torch.equal(made[1, 2], W_U[:, 6])
    for wrong in (29, -1, torch.tensor([0, 40])):
        with pytest.raises(TokenIdError, match="outside the vocabulary of 29"):
            gpt2.tokens_to_residual_directions(wrong)
