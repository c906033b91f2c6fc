"""What is particular to single kin of Llama, beside what the conformance kit holds all of them to."""

import copy

import pytest
import torch
from lens_conformance.families import known_families
from lens_conformance.oracle import new_pair, tiny_config
from lens_llama._dense import DENSE
from lens_llama._sparse import SPARSE

import lens_core as lens
from lens_core import errors
from lens_core.plugin import declare

IDS = torch.randint(0, 26, (2, 7), generator=torch.Generator().manual_seed(0))


def pair(model_type, **options):
    """Build a tiny noisy model, and a twin that lens has not touched."""
    return new_pair(known_families()[model_type], **options)


def config_of(model_type, **fields):
    """Make a tiny config."""
    return tiny_config(known_families()[model_type], fields)


# ---------------------------------------------------------------------- what refuses


@pytest.mark.parametrize(
    ("model_type", "field"),
    [("mixtral", "router_jitter_noise"), ("minimax_m2", "router_jitter_noise"), ("phimoe", "input_jitter_noise")],
)
def test_noise_that_hf_writes_into_what_experts_read_refuses_in_training(model_type, field):
    """In evaluation there is none."""
    model = pair(model_type, overrides={field: 0.1}).model
    model(IDS)
    model.train()
    with pytest.raises(errors.InputError, match=field):
        model(IDS)


def test_a_model_that_sees_what_comes_later_is_refused():
    """HF reads the key although no config class has it."""
    hf_model = pair("llama").reference
    hf_model.config.is_causal = False
    with pytest.raises(errors.UnsupportedConfigError, match="is_causal"):
        lens.load(hf_model)


def test_weights_in_mxfp4_are_refused_where_hf_keeps_them(monkeypatch):
    """On a GPU another MLP runs, which calls no experts; dequantised it is the same one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = config_of("gpt_oss")
    config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(errors.UnsupportedConfigError, match="dequantize=True"):
        SPARSE["gpt_oss"](config)
    config.quantization_config["dequantize"] = True
    assert SPARSE["gpt_oss"](config).moe.n_experts == 5


def test_blocks_that_choose_different_numbers_of_experts_are_refused():
    """Shapes are one for all blocks."""
    config = config_of("hunyuan_v1_moe")
    config.moe_topk = [3, 2, 3]
    with pytest.raises(errors.UnsupportedConfigError, match="moe_topk"):
        SPARSE["hunyuan_v1_moe"](config)


def test_a_checkpoint_may_reach_further_than_its_rotary_embeddings_say():
    """Command R's do."""
    config = config_of("cohere")
    config.model_max_length = 128
    assert declare(DENSE["cohere"](config), config).cfg.n_ctx == 128


# ---------------------------------------------------------------------- experts


def test_reading_a_router_that_draws_draws_nothing():
    """In training Phi-MoE samples its experts: its router is run again with the same draws."""
    one = pair("phimoe")
    one.hf.train(), one.reference.train()
    torch.manual_seed(0)
    expected, state = one.reference(IDS, use_cache=False).logits, torch.get_rng_state()
    torch.manual_seed(0)
    with one.model.hooks(fwd_hooks=[("blocks.1.mlp.hook_router_logits", lambda x, hook: x.clone())]):
        assert torch.equal(one.model(IDS), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral"])
def test_experts_edited_at_one_position_leave_the_others_bits(model_type):
    """In half precision, where another order of sums would show; in the last block, behind which nothing reroutes."""
    one = pair(model_type, dtype=torch.bfloat16)
    name = f"blocks.{one.model.cfg.n_layers - 1}.mlp.hook_expert_out"
    with torch.no_grad():
        before = one.model(IDS)
        after = one.model.run_with_hooks(IDS, fwd_hooks=[(name, lambda x, hook: x * 0, [3])])
    moved = (before != after).any(-1).any(0)
    assert moved.tolist() == [at == 3 for at in range(IDS.shape[1])]


# ---------------------------------------------------------------------- images beside the text


def test_images_go_through_hf_s_own_call_and_the_hooks_see_them():
    """Inside a block: `hook_embed` has the tokens' embeddings, the stream the image's in their place."""
    one = pair("gemma3")
    ids = copy.copy(IDS[:1])
    ids[0, 2:6] = one.config.image_token_id
    is_image = ids == one.config.image_token_id
    given = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8), "token_type_ids": is_image.long()}
    with torch.no_grad():
        expected = one.reference(**given).logits
        with one.model.caching() as cache:
            assert torch.equal(one.hf(**given).logits, expected)
        moved = (cache["blocks.0.hook_resid_pre"] != cache["hook_embed"]).any(-1)
        assert torch.equal(moved, is_image)
        with one.model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", lambda x, hook: x * 0)]):
            assert not torch.allclose(one.hf(**given).logits, expected, atol=0.1)
