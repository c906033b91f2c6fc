"""What only hybrids have: blocks of several kinds, what refuses, and mixers that are those of the SSM plugins."""

import pytest
import torch
from lens_conformance.families import known_families
from lens_hybrid import lens_architectures
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import lens_core as lens
from lens_core.analysis.ssm_gradients import stop_gradients
from lens_core.analysis.ssm_tokens import token_attribution
from lens_core.errors import ArgumentError, InputError, UnknownHookError, UnsupportedHookError, WeightError

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
TYPES = [architecture.model_types[0] for architecture in lens_architectures()]
BLOCKS = {
    "bamba": ("mamba2", "attention", "mamba2"),
    "jamba": ("mamba", "attention", "mamba", "attention"),
    "granitemoehybrid": ("mamba2", "attention", "mamba2"),
    "nemotron_h": ("mamba2", "mlp", "attention", "mlp"),
    "falcon_h1": ("attention+mamba2",) * 3,
}


def tiny(model_type, **fields):
    """Give a tiny model with noise in every parameter."""
    family = known_families()[model_type]
    config = AutoConfig.for_model(model_type, **{**family.config, **fields})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(family.noise(name, parameter))
    return lens.load(model.eval())


@pytest.mark.parametrize("model_type", TYPES)
def test_every_block_says_what_it_is(model_type):
    """By its own hook points."""
    model = tiny(model_type)
    assert model.layer_types() == BLOCKS[model_type]
    for layer, kind in enumerate(model.layer_types()):
        assert ("attention" in kind) == (f"blocks.{layer}.attn.hook_pattern" in model.table)
        assert ("mamba" in kind) == (f"blocks.{layer}.mixer.hook_ssm_state" in model.table)


def test_models_of_one_kind_say_so_too():
    """Also those that are no decoders of this plugin."""
    assert lens.load("toy:mamba2").layer_types() == ("mamba2", "mamba2")
    assert lens.load("toy:gpt2").layer_types() == ("attention", "attention")


@torch.no_grad()
@pytest.mark.parametrize("model_type", TYPES)
def test_the_stream_comes_apart_into_what_each_block_has(model_type):
    """The parts sum to the stream, whichever of mixer, attention and MLP a block has; a norm reads each block's."""
    model = tiny(model_type)
    _, cache = model.run_with_cache(TOKENS)
    for layer in range(model.cfg.n_layers):
        parts, labels = cache.decompose_resid(layer, apply_ln=True, return_labels=True)
        assert not any(f"{layer}_" in label for label in labels)
        norm = next(n for n in ("ln1", "ln2") if f"blocks.{layer}.{n}.hook_scale" in cache)
        torch.testing.assert_close(parts.sum(0), cache[f"blocks.{layer}.{norm}.hook_normalized"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.decompose_resid().sum(0), cache["resid_post", model.cfg.n_layers - 1])
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert len(stack) == len(labels)


@torch.no_grad()
@pytest.mark.parametrize("model_type", TYPES)
def test_logits_come_apart_into_heads_tokens_and_neurons(model_type):
    """Heads sum to attention's output, also behind the type's factor; tokens to the mixers'."""
    model = tiny(model_type)
    _, cache = model.run_with_cache(TOKENS)
    heads, labels = cache.stack_head_results(return_labels=True)
    for layer, kind in enumerate(model.layer_types()):
        if "attention" in kind:
            own = sum(head for head, label in zip(heads, labels, strict=True) if label.startswith(f"L{layer}H"))
            bias = model.weight("b_O", layer) * model.declaration.factor_of("hook_attn_out")
            torch.testing.assert_close(own + bias, cache["attn_out", layer], rtol=1e-4, atol=1e-4)
    found = token_attribution(cache, TOKENS[:, 0])
    assert found.error < 1e-4


def test_an_analysis_of_mixers_takes_mixers_and_refuses_attention_by_name():
    """The layer that has none is told, and what it is."""
    model = tiny("bamba")
    _, cache = model.run_with_cache(TOKENS)
    assert cache.effective_attention(0).error < 1e-4
    assert cache.effective_attention(0).axes[1] == "head"
    with pytest.raises(ArgumentError, match="block 1 is attention and has no SSM mixer; blocks .0, 2. have one"):
        cache.effective_attention(1)
    model = tiny("nemotron_h")
    with pytest.raises(ArgumentError, match="block 1 is an MLP alone"):
        model.run_with_cache(TOKENS)[1].effective_attention(1)


def test_stacks_hold_the_blocks_that_have_the_name_and_weights_refuse_the_others():
    """A stack of queries has one entry for each block with attention."""
    model = tiny("bamba", attn_layer_indices=[0, 2])
    _, cache = model.run_with_cache(TOKENS)
    assert (len(cache["q"]), len(cache["delta"]), len(cache["resid_mid"])) == (2, 1, 3)
    with pytest.raises(WeightError, match="block 1 has no W_Q; blocks 0, 2 have"):
        model.weight("W_Q", 1)
    with pytest.raises(UnknownHookError):
        model.run_with_cache(TOKENS, names_filter="blocks.1.attn.hook_q")


@torch.no_grad()
@pytest.mark.parametrize("model_type", TYPES)
def test_a_state_goes_on_and_forks_and_comes_back_from_a_file(model_type, tmp_path):
    """Whatever the blocks remember: keys, windows and states, or nothing."""
    model = tiny(model_type)
    whole = model(TOKENS)
    _, state = model(TOKENS[:, :-1], return_state=True)
    model.save_state(state, tmp_path / "state.safetensors")
    for given in (state, state.fork(), model.load_state(tmp_path / "state.safetensors")):
        last = model(TOKENS[:, -1:], past_key_values=given)
        torch.testing.assert_close(last[:, 0], whole[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_mixer_gives_the_same_numbers_as_mamba2s():
    """One mixer's weights in a Mamba-2 model of one block: every value inside is bit for bit the same."""
    hybrid, kin = tiny("bamba"), known_families()["mamba2"]
    sizes = {"hidden_size": 32, "expand": 3, "num_heads": 6, "head_dim": 16, "num_hidden_layers": 1}
    fields = {**sizes, "layer_norm_epsilon": hybrid.cfg.eps}
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba2", **{**kin.config, **fields})).eval()
    block = hybrid.hf_model.model.layers[0]
    other.backbone.layers[0].mixer.load_state_dict(block.mamba.state_dict())
    other.backbone.layers[0].norm.load_state_dict(block.input_layernorm.state_dict())
    other.backbone.embeddings.load_state_dict(hybrid.hf_model.model.embed_tokens.state_dict())
    mamba2 = lens.load(other)
    names = [name for name in mamba2.table if name.startswith("blocks.0.mixer.")]
    assert names == [name for name in hybrid.table if name.startswith("blocks.0.mixer.")]
    _, ours = hybrid.run_with_cache(TOKENS, names_filter=names)
    _, theirs = mamba2.run_with_cache(TOKENS, names_filter=names)
    for name in names:
        assert torch.equal(ours[name], theirs[name]), name


@torch.no_grad()
def test_what_hf_would_compute_wrongly_refuses():
    """Limits of the step size in decoding, a bias under padding, chunks on top of a Mamba cache, right padding."""
    limited = tiny("bamba", time_step_limit=(0.3, 0.6))
    with pytest.raises(InputError, match="time_step_limit"):
        limited.generate(TOKENS, 2)
    assert limited(TOKENS).shape[1] == TOKENS.shape[1]
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    with pytest.raises(InputError, match="in_proj has a bias"):
        tiny("falcon_h1", mamba_proj_bias=True)(TOKENS, attention_mask=mask)
    jamba = tiny("jamba")
    _, state = jamba(TOKENS[:, :4], return_state=True)
    with pytest.raises(InputError, match="starts its scan from zero"):
        jamba(TOKENS[:, 4:], past_key_values=state)
    with pytest.raises(InputError, match="padding on the right"):
        tiny("bamba")(TOKENS, attention_mask=mask.flip(1), return_state=True)


@torch.no_grad()
def test_nemotron_h_refuses_a_scan_whose_step_size_hf_left_unlimited():
    """Nothing inside is true there; outside of it, HF's own numbers stand."""
    model = tiny("nemotron_h", time_step_min=5.0)
    past = DynamicCache(config=model.hf_model.config)
    model(TOKENS[:, :-1], past_key_values=past)
    with pytest.raises(UnsupportedHookError, match="limits"):
        model.run_with_cache(TOKENS[:, -1:], past_key_values=past, names_filter="blocks.0.mixer.hook_delta")


@torch.no_grad()
def test_bamba_counts_its_positions_from_where_a_cache_ends():
    """HF counts from 0 in every call, unless it is told."""
    model = tiny("bamba")
    _, whole = model.run_with_cache(TOKENS, names_filter="rot_k")
    past = DynamicCache(config=model.hf_model.config)
    model(TOKENS[:, :5], past_key_values=past)
    _, rest = model.run_with_cache(TOKENS[:, 5:], past_key_values=past, names_filter="rot_k")
    torch.testing.assert_close(rest["rot_k", 1], whole["rot_k", 1][:, 5:])


@torch.no_grad()
@pytest.mark.parametrize("kinds", [["full_attention"] * 2, ["linear_attention"] * 2])
def test_a_hybrid_of_one_kind_is_served_too(kinds):
    """Granite's dense models are attention alone; then nothing of a mixer is there, and nothing of it refuses."""
    model = tiny("granitemoehybrid", layer_types=kinds, num_hidden_layers=2, num_local_experts=0)
    is_attention = kinds[0] == "full_attention"
    assert model.layer_types() == ("attention" if is_attention else "mamba2",) * 2
    assert ("W_Q" in model.weight_names, "W_in_proj" in model.weight_names) == (is_attention, not is_attention)
    mask = torch.ones_like(TOKENS)
    mask[0, -2:] = 0
    if is_attention:
        model(TOKENS, attention_mask=mask, return_state=True)
    else:
        with pytest.raises(InputError, match="by its attention layers"):
            model(TOKENS, return_state=True)
        assert model.run_with_cache(TOKENS)[1].effective_attention(1).error < 1e-4
        return
    whole, (_, state) = model(TOKENS), model(TOKENS[:, :-1], return_state=True)
    torch.testing.assert_close(model(TOKENS[:, -1:], past_key_values=state)[:, 0], whole[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_edit_of_one_branch_of_falcon_h1_leaves_the_other():
    """Both are added to the stream in one sum, which is written anew with what stands for either."""
    model = tiny("falcon_h1")
    _, plain = model.run_with_cache(TOKENS)
    halved = [("blocks.0.hook_attn_out", lambda x, hook: x * 0.5)]
    with model.hooks(fwd_hooks=halved):
        _, cache = model.run_with_cache(TOKENS)
    assert torch.equal(cache["mixer_out", 0], plain["mixer_out", 0])
    expected = plain["resid_pre", 0] + plain["mixer_out", 0] + plain["attn_out", 0] * 0.5
    torch.testing.assert_close(cache["resid_mid", 0], expected)
    with model.hooks(fwd_hooks=[("blocks.0.hook_mixer_in", lambda x, hook: x * 0.5 + 1)]):
        _, cache = model.run_with_cache(TOKENS)
    assert torch.equal(cache["attn_out", 0], plain["attn_out", 0])
    assert not torch.equal(cache["mixer_out", 0], plain["mixer_out", 0])


def test_gradients_stop_inside_the_mixers_of_a_hybrid():
    """Attention keeps its own."""
    model = tiny("bamba")
    with model.hooks(fwd_hooks=stop_gradients(model)):
        _, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    assert float(cache.grad["delta_pre", 0].abs().max()) == 0
    assert float(cache.grad["attn_scores", 1].nan_to_num().abs().max()) > 0
