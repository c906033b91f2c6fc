"""What is particular to Llama and its kin, beside the laws that all families are held to in `tests/families`."""

import copy

import pytest
import torch
import transformers
from golden.tiny_llama import KIN, VARIANTS, tiny_llama
from lens_llama import lens_architectures
from lens_llama._dense import DENSE
from lens_llama._sparse import SPARSE
from transformers import StaticCache

import lens_core as lens
from lens_core import errors

OWN = [variant for variant in VARIANTS if variant not in KIN]  # the kit tries the others
TOKENS = torch.randint(0, 28, (2, 7), generator=torch.Generator().manual_seed(0))


def loaded(variant, **options):
    """Load a tiny model, and keep a twin that lens has not touched."""
    if variant == "gemma2":
        options.setdefault("attn", "eager")  # it has no other
    hf_model = tiny_llama(variant, **options)
    if hasattr(hf_model.config, "num_experts_per_tok"):
        hf_model.set_experts_implementation("eager")  # the other ways need widths that are multiples of 16 bytes
    return lens.load(hf_model), copy.deepcopy(hf_model)


def run(model, **options):
    """Run and cache the default names, without a graph."""
    with torch.no_grad():
        return model.run_with_cache(TOKENS, **options)[1]


def close(ours, expected, tolerance=2e-5):
    """Compare in units of the scale."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


# ---------------------------------------------------------------------- descriptor


def test_every_type_has_a_record_of_its_own():
    """Config fields are held to one type's own class."""
    records = lens_architectures()
    assert all(len(record.model_types) == 1 for record in records)
    assert {record.model_types[0] for record in records} == DENSE.keys() | SPARSE.keys()


@pytest.mark.parametrize(
    ("variant", "field", "value"),
    [
        ("gemma", "use_bidirectional_attention", True),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3_text", "use_bidirectional_attention", True),
    ],
)
def test_what_is_not_held_refuses_by_name(variant, field, value):
    """A field that changes equations that nothing here declares."""
    hf_model = tiny_llama(variant, attn="eager")
    setattr(hf_model.config, field, value)
    with pytest.raises(errors.UnsupportedConfigError, match=field):
        lens.load(hf_model)


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("variant", OWN)
def test_attention_weights_recompute_the_projections(variant):
    """What a view says it is makes q, k and v of what attention reads, and the results of z."""
    model, _ = loaded(variant)
    cache = run(model, names_filter=["q", "k", "v", "z", "result", "hf.model.layers.1.self_attn.input"])
    read = cache["hf.model.layers.1.self_attn.input"]
    for letter in "qkv":
        weight, bias = model.weight(f"W_{letter.upper()}", 1), model.weight(f"b_{letter.upper()}", 1)
        close(torch.einsum("bpd,hde->bphe", read, weight) + bias, cache[letter, 1])
    close(torch.einsum("bphe,hed->bphd", cache["z", 1], model.weight("W_O", 1)), cache["result", 1])


@pytest.mark.parametrize("variant", OWN)
def test_mlp_weights_recompute_the_neurons(variant):
    """Gate, up and down projections, biases included; in a mixture, the router's."""
    model, _ = loaded(variant)
    cache = run(model)
    for layer in range(model.cfg.n_layers):
        read = cache[f"blocks.{layer}.mlp.hook_in"]
        if f"blocks.{layer}.mlp.hook_router_logits" in cache:
            close(read @ model.weight("W_router", layer), cache["router_logits", layer])
            with pytest.raises(errors.WeightError, match=f"block {layer} has no W_in|no weight 'W_in'"):
                model.weight("W_in", layer)
            continue
        linear = read @ model.weight("W_in", layer) + model.weight("b_in", layer)
        name = "mlp.hook_pre"
        if model.cfg.gated_mlp:
            close(read @ model.weight("W_gate", layer) + model.weight("b_gate", layer), cache["pre", layer])
            name = "mlp.hook_pre_linear"
        close(linear, cache[f"blocks.{layer}.{name}"])
        out = cache["post", layer] @ model.weight("W_out", layer) + model.weight("b_out", layer)
        close(out, cache[f"blocks.{layer}.mlp.hook_out"])


def test_stacked_weights_need_every_layer():
    """A mixture beside dense layers gives no stack, and says which blocks have the weight."""
    model, _ = loaded("qwen3_moe")
    with pytest.raises(errors.WeightError, match="blocks 1, 2 of this model have no W_in; .*stacked_weight"):
        _ = model.W_in


@pytest.mark.parametrize("variant", OWN)
def test_ends_recompute_the_logits(variant):
    """Embedding with its scale, final norm, unembedding and what follows it."""
    model, reference = loaded(variant)
    cache = run(model)
    close(model.embed(TOKENS), cache["hook_embed"])
    close(cache["hook_embed"], cache["resid_pre", 0])
    normed = model.ln_final(cache["resid_post", -1])
    close(normed @ model.W_U + model.b_U, cache["unembed.hook_out"])
    with torch.no_grad():
        assert torch.equal(cache["hook_logits"], reference(TOKENS).logits)


# ---------------------------------------------------------------------- parts


@pytest.mark.parametrize("variant", OWN)
def test_heads_and_neurons_sum_to_the_stream(variant):
    """With the factor or post-norm that their branch goes through, biases included, and as logits."""
    model, _ = loaded(variant)
    cache = run(model)
    stack = cache.get_full_resid_decomposition()
    close(stack.sum(0), cache["resid_post", -1])
    normalized = cache.get_full_resid_decomposition(apply_ln=True, pos_slice=-1)
    close(normalized.sum(0), cache["ln_final.hook_normalized"][:, -1])
    attrs, bias = cache.logit_attrs(stack, TOKENS, return_bias=True)
    scaled = cache["unembed.hook_out"] if variant.startswith("gemma") else cache["hook_logits"]  # before the soft cap
    close(attrs.sum(0) + bias, scaled.gather(-1, TOKENS[..., None])[..., 0])


def test_parts_need_the_post_norm(monkeypatch):
    """The check above fails where the post-norm is left out."""
    from lens_core import _components

    model, _ = loaded("gemma2")
    cache = run(model)
    monkeypatch.setattr(_components, "onward_of", lambda parts, layer, writer: _components.Onward(factor=1.0))
    error = (cache.get_full_resid_decomposition().sum(0) - cache["resid_post", -1]).abs().max()
    assert error > 1e-2


# ---------------------------------------------------------------------- windows and caches


@pytest.mark.parametrize("variant", ["mistral", "gemma2", "gemma3_text", "qwen2"])
def test_keys_that_a_window_dropped_are_masked(variant):
    """The key axis is all positions so far in every step, on sliding layers too, whose cache holds the last few."""
    model, _ = loaded(variant)
    names = ["pattern", "attn_scores"]
    whole = run(model, names_filter=names)
    with torch.no_grad(), model.caching(names) as cache:
        past = model.hf_model(TOKENS[:, :4], use_cache=True).past_key_values
        for position in range(4, 7):
            model.hf_model(TOKENS[:, position : position + 1], past_key_values=past, use_cache=True)
    for name in names:
        for layer in range(3):
            close(cache[name, layer].nan_to_num(neginf=-9.0), whole[name, layer].nan_to_num(neginf=-9.0))


@pytest.mark.parametrize("variant", ["llama", "mistral"])
def test_a_chunk_may_continue_a_sequence(variant):
    """Three positions after four have the values of the whole, an edit of their rotated keys included."""
    model, _ = loaded(variant)
    entry = ("blocks.1.attn.hook_rot_k", lambda x, hook: x * 0.5 + 0.1)
    names = ["rot_q", "rot_k", "pattern", "z", "resid_post"]
    with torch.no_grad(), model.hooks(fwd_hooks=[entry]):
        _, whole = model.run_with_cache(TOKENS, names_filter=names)
        with model.caching(names) as cache:
            past = model.hf_model(TOKENS[:, :4], use_cache=True).past_key_values
            model.hf_model(TOKENS[:, 4:], past_key_values=past, use_cache=True)
    for name in whole:
        close(cache[name], whole[name])


def test_a_static_cache_shows_real_keys_only():
    """Unused slots are trimmed from patterns and repeated keys."""
    model, reference = loaded("llama")
    past = StaticCache(config=model.hf_model.config, max_cache_len=20)
    names = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_k_rep"]
    with torch.no_grad(), model.caching(names) as cache:
        logits = model.hf_model(TOKENS, past_key_values=past, use_cache=True).logits
    whole = run(model, names_filter=names)
    assert cache["pattern", 1].shape[-1] == cache["k_rep", 1].shape[1] == 7
    for name in names:
        close(cache[name], whole[name])
    with torch.no_grad():
        close(logits, reference(TOKENS).logits)


def test_repeated_keys_are_those_of_the_group():
    """Query head h sees the keys of head h // groups, in each step all of them."""
    model, _ = loaded("llama")
    cache = run(model, names_filter=["rot_k", "v", "k_rep", "v_rep"])
    close(cache["k_rep", 0], cache["rot_k", 0].repeat_interleave(2, dim=2), 0)
    close(cache["v_rep", 0], cache["v", 0].repeat_interleave(2, dim=2), 0)


# ---------------------------------------------------------------------- ends


@pytest.mark.parametrize("variant", ["gemma2", "granite"])
def test_logits_differ_from_the_unembedding_where_they_are_finished(variant):
    """An edit of either reaches the logits; in generation all positions are shown, and the last one is HF's."""
    model, reference = loaded(variant)
    finish = {"gemma2": lambda x: torch.tanh(x / 5.0) * 5.0, "granite": lambda x: x / 1.3}[variant]
    with torch.no_grad():
        edited = model.run_with_hooks(TOKENS, fwd_hooks=[("unembed.hook_out", lambda x, hook: x * 0.5)])
        close(edited, finish(run(model)["unembed.hook_out"] * 0.5))
        edited = model.run_with_hooks(TOKENS, fwd_hooks=[("hook_logits", lambda x, hook: x * 0.5)])
        assert torch.equal(edited, reference(TOKENS).logits * 0.5)
        names = ["hook_logits", "unembed.hook_out"]
        _, cache = model.generate(TOKENS, 2, do_sample=False, return_cache=True, names_filter=names, stop_at_eos=False)
    close(cache["hook_logits"], finish(cache["unembed.hook_out"]))
    assert cache["hook_logits"].shape[1] == 8


def test_a_loss_that_an_edit_of_the_logits_would_miss_is_refused():
    """HF computes its loss before the model's forward is over."""
    model, _ = loaded("gemma2")
    with model.hooks(fwd_hooks=[("hook_logits", lambda x, hook: x * 0.5)]), pytest.raises(errors.UnsupportedHookError):
        model.hf_model(TOKENS, labels=TOKENS)
    loss = model.run_with_hooks(TOKENS, fwd_hooks=[("hook_logits", lambda x, hook: x * 0.5)], return_type="loss")
    assert loss.ndim == 0


def test_a_scaled_branch_is_written_as_a_sum():
    """An edited attn_out is in the stream bit for bit, in bfloat16 too, where dividing by the factor would not be."""
    model, _ = loaded("granite")
    model.to(torch.bfloat16)
    edit = ("blocks.1.hook_attn_out", lambda x, hook: x * x + 0.001)
    with torch.no_grad(), model.hooks(fwd_hooks=[edit]):
        _, cache = model.run_with_cache(TOKENS)
    assert torch.equal(cache["resid_mid", 1], cache["resid_pre", 1] + cache["attn_out", 1])


# ---------------------------------------------------------------------- experts


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
def test_logits_of_the_router_reroute(variant):
    """An expert whose logit is raised is chosen at every position, with the type's own weights."""
    model, _ = loaded(variant)

    def prefer(logits, hook):
        return logits.index_fill(-1, torch.tensor([3]), 50.0)

    names = ["router_logits", "expert_weights", "expert_indices", "expert_out", "mlp.hook_out"]
    entry = ("blocks.1.mlp.hook_router_logits", prefer)
    with torch.no_grad(), model.hooks(fwd_hooks=[entry]):
        _, cache = model.run_with_cache(
            TOKENS, names_filter=[f"blocks.1.mlp.hook_{n}" for n in names[:4]] + ["blocks.1.mlp.hook_out"]
        )
    assert (cache["expert_indices", 1][..., 0] == 3).all()
    assert (cache["router_logits", 1][..., 3] == 50).all()
    weighted = torch.einsum("bpkd,bpk->bpd", cache["expert_out", 1], cache["expert_weights", 1])
    close(weighted, cache["blocks.1.mlp.hook_out"])


def test_an_expert_can_be_silenced():
    """An edit of what one choice returns takes its weighted part out of the MLP's output."""
    model, _ = loaded("mixtral")
    before = run(model, names_filter=["expert_out", "expert_weights", "mlp_out"])

    def silence(outputs, hook):
        outputs[:, :, 1] = 0

    entry = ("blocks.2.mlp.hook_expert_out", silence)
    with torch.no_grad(), model.hooks(fwd_hooks=[entry]):
        _, after = model.run_with_cache(TOKENS, names_filter=["mlp_out"])
    lost = before["expert_out", 2][:, :, 1] * before["expert_weights", 2][:, :, 1, None]
    close(after["mlp_out", 2], before["mlp_out", 2] - lost)


# ---------------------------------------------------------------------- what was wrong once


def test_a_copy_for_the_mlp_is_not_the_stream():
    """Granite's sum is of the stream, also where a function changed the copy that the MLP reads."""
    model, _ = loaded("granite")
    edits = [
        ("blocks.1.hook_mlp_in", lambda x, hook: x * 0),
        ("blocks.1.hook_mlp_out", lambda x, hook: x + 1),
    ]
    with torch.no_grad(), model.hooks(fwd_hooks=edits):
        _, cache = model.run_with_cache(TOKENS, names_filter=["resid_mid", "mlp_out", "resid_post"])
    close(cache["resid_post", 1], cache["resid_mid", 1] + cache["mlp_out", 1])


def test_dropped_embeddings_are_what_the_first_block_reads():
    """StarCoder2 drops embeddings between their module and the first block."""
    model, _ = loaded("starcoder2", embedding_dropout=0.3)
    model.train()
    cache = run(model)
    assert torch.equal(cache["hook_embed"], cache["resid_pre", 0])
    close(cache.decompose_resid().sum(0), cache["resid_post", -1])


def test_spaced_position_ids_are_no_packed_sequences():
    """Given ids rotate queries and keys; every position attends to all before it, as in HF's own call."""
    model, reference = loaded("llama")
    spaced = 2 * torch.arange(7).expand(2, 7)
    with torch.no_grad():
        assert torch.equal(model(TOKENS, position_ids=spaced), reference(TOKENS, position_ids=spaced).logits)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("expert", [-1, 5, 100])
def test_an_expert_that_does_not_exist_is_named(implementation, expert):
    """Whatever HF's implementation would make of it."""
    model, _ = loaded("mixtral")
    model.hf_model.set_experts_implementation(implementation)

    def choose(indices, hook):
        return torch.full_like(indices, expert)

    with pytest.raises(errors.HookValueError, match=f"hook_expert_indices' chose expert {expert}, and there are"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.mlp.hook_expert_indices", choose)])


def test_reading_scores_leaves_gradients_of_padded_rows():
    """A row that may see nothing is uniform in HF's eager attention, and has a gradient."""
    model, reference = loaded("llama", attn="eager")
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    reference(TOKENS, attention_mask=mask, position_ids=positions).logits.square().mean().backward()
    with model.hooks(fwd_hooks=[("attn_scores", lambda scores, hook: None)]), model.caching("attn_scores"):
        model(TOKENS, attention_mask=mask).square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_indices_of_logits_are_refused_at_the_end_of_the_model():
    """HF may keep any positions; the hook points there have all."""
    model, _ = loaded("llama")
    with pytest.raises(errors.UnsupportedHookError, match="logits_to_keep as a tensor"):
        with model.hooks(fwd_hooks=[("unembed.hook_in", lambda x, hook: None)]):
            model.hf_model(TOKENS, logits_to_keep=torch.tensor([0, 3]))
    with model.hooks(fwd_hooks=[("resid_post", lambda x, hook: None)]):
        assert model.hf_model(TOKENS, logits_to_keep=torch.tensor([0, 3])).logits.shape[1] == 2


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_a_cache_of_rows_that_are_not_returned_is_refused(option):
    """Beams swap rows, and drafts are taken back."""
    model, _ = loaded("llama")
    with pytest.raises(errors.ArgumentError, match=next(iter(option))):
        model.generate(TOKENS[:1], 3, return_cache=True, do_sample=False, **option)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 5},
    ],
)
def test_stretched_positions_reach_beyond_the_config(rope):
    """HF runs them; only what is beyond the stretch is refused."""
    config = transformers.LlamaConfig(
        vocab_size=29,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=5,
        rope_parameters={"rope_theta": 100.0, **rope},
    )
    model = lens.load(transformers.LlamaForCausalLM(config))
    with torch.no_grad():
        assert model(TOKENS).shape[1] == 7
        with pytest.raises(errors.ContextLengthError, match="context of 15|context holds 15"):
            model(torch.zeros(1, 16, dtype=torch.long))


def test_fields_that_hf_keeps_elsewhere_are_known(recwarn):
    """Phi's rotated share lives in the rotary parameters, Gemma 3's pattern in the layers' types."""
    tiny = {
        "vocab_size": 29,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": 28,
    }
    lens.load(transformers.Phi3ForCausalLM(transformers.Phi3Config(**tiny, partial_rotary_factor=0.5)))
    assert not [one for one in recwarn if issubclass(one.category, errors.ConfigWarning)]
    config = transformers.Gemma3TextConfig(**tiny, sliding_window_pattern=2)
    assert lens.load(transformers.Gemma3ForCausalLM(config)).cfg.n_layers == 2
