"""The golden Llama family against plain HF in true float64: logits, insides, edits by torch's hooks, gradients."""

import functools

import pytest
import torch
from golden.tiny import pad, random_tokens
from golden.tiny_llama import KIN, VARIANTS, tiny_llama
from lens_conformance.edits import bend
from lens_conformance.float64 import true_float64
from lens_conformance.golden.llama import COPIES, golden, is_starred, names

ROTATED_BY_LENGTH = {"llama-dynamic", "phi3-longrope"}
EAGER_ONLY = {"gemma2", *KIN}  # HF has no SDPA for Gemma 2; further types are tried one way
CASES = [(key, attn) for key in VARIANTS for attn in ("eager", "sdpa") if attn == "eager" or key not in EAGER_ONLY]


@pytest.fixture(autouse=True)
def _true_float64():
    """Run every test of this file in true float64."""
    with true_float64():
        yield


@functools.lru_cache
def model_of(key, attn="eager", seed=0):
    """Build a model once for all tests that leave it as it is."""
    return tiny_llama(key, attn=attn, seed=seed)


def close(ours, theirs, atol=1e-10):
    """Compare in float64."""
    assert theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-12)


@pytest.mark.parametrize(("key", "attn"), CASES)
def test_logits_equal_hf(key, attn):
    """Golden logits are those of HF for every type, with windows shorter than the sequence."""
    for seed in (0,) if key in KIN else (0, 1):
        model, tokens = tiny_llama(key, attn=attn, seed=seed), random_tokens(3, 9, seed=seed)
        with torch.no_grad():
            logits, _ = golden(model.state_dict(), model.config, tokens)
            close(logits, model(tokens).logits)


@pytest.mark.parametrize(("key", "side"), [(key, s) for key in VARIANTS for s in ("left", "right")[: 2 - (key in KIN)]])
def test_padded_rows_equal_hf(key, side):
    """Golden logits are HF's eager ones under padding, on padding positions too, and those of each row alone."""
    model = tiny_llama(key, attn="eager")
    rows = [random_tokens(1, n, seed=n)[0] for n in (3, 7, 5)]
    tokens, mask = pad(rows, side, amount=2)
    ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits, _ = golden(model.state_dict(), model.config, tokens, mask)
        close(logits, model(tokens, attention_mask=mask, position_ids=ids).logits)
        if key in ROTATED_BY_LENGTH:
            return  # the rotation of every row hangs on the longest
        for row, tensor in enumerate(rows):
            close(logits[row][mask[row].bool()], model(tensor[None]).logits[0])


@pytest.mark.parametrize("key", ["llama", "gemma", "granite", "smollm3"])
def test_position_ids_and_embeddings_are_taken(key):
    """Golden takes position ids and input embeddings as HF does: Gemma scales tokens only, Granite both."""
    model = model_of(key)
    embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[4, 0, 31, 7, 7]])
    with torch.no_grad():
        logits, values = golden(model.state_dict(), model.config, embeds, position_ids=ids)
        mask = torch.ones(2, 5, dtype=torch.long)
        close(logits, model(inputs_embeds=embeds, position_ids=ids, attention_mask=mask).logits)
    assert "hook_tokens" not in values


@pytest.mark.parametrize("key", VARIANTS)
def test_every_name_has_a_value_and_insides_are_hfs(key):
    """Golden records each name once; hidden states, patterns and router logits are HF's."""
    model, tokens = tiny_llama(key, attn="eager"), random_tokens(2, 6)
    with torch.no_grad():
        _, values = golden(model.state_dict(), model.config, tokens)
        out = model(tokens, output_hidden_states=True, output_attentions=True)
    assert sorted(values) == sorted(names(model.config))
    for layer in range(3):
        close(values[f"blocks.{layer}.hook_resid_pre"], out.hidden_states[layer])
        close(values[f"blocks.{layer}.attn.hook_pattern"], out.attentions[layer])
    close(values["hook_embed"], out.hidden_states[0])
    close(values["unembed.hook_in"], out.hidden_states[3])


def input_of(change):
    """Make a pre-hook that changes a module's first input, however it is given."""

    def hook(module, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return lambda module: module.register_forward_pre_hook(hook, with_kwargs=True)


def output_of(change, of=0):
    """Make a hook that changes a module's output, or one element of it."""

    def hook(module, args, out):
        return (*out[:of], change(out[of]), *out[of + 1 :]) if isinstance(out, tuple) else change(out)

    return lambda module: module.register_forward_hook(hook)


A, B = input_of, output_of
L1 = "model.layers.1."
COMMON = {
    "hook_embed": (L1.replace("1", "0"), A),
    "blocks.1.hook_resid_pre": (L1, A),
    "blocks.1.hook_resid_post": (L1, B),
    "blocks.1.attn.hook_out": (L1 + "self_attn.o_proj", B),
    "blocks.1.mlp.hook_in": (L1 + "mlp", A),
    "blocks.1.mlp.hook_out": (L1 + "mlp", B),
    "ln_final.hook_out": ("model.norm", B),
    "unembed.hook_in": ("lm_head", A),
    "unembed.hook_out": ("lm_head", B),
}
GATED = {
    "blocks.1.mlp.hook_pre": (L1 + "mlp.gate_proj", B),
    "blocks.1.mlp.hook_pre_linear": (L1 + "mlp.up_proj", B),
    "blocks.1.mlp.hook_post": (L1 + "mlp.down_proj", A),
}
BEFORE = {
    "blocks.1.ln1.hook_out": (L1 + "input_layernorm", B),
    "blocks.1.ln2.hook_out": (L1 + "post_attention_layernorm", B),
    "blocks.1.hook_mlp_in": (L1 + "post_attention_layernorm", A),
}
SPLIT = {f"blocks.1.attn.hook_{which}": (L1 + f"self_attn.{which}_proj", B) for which in "qkv"}
HEAD_NORMS = {f"blocks.1.attn.hook_{which}_normed": (L1 + f"self_attn.{which}_norm", B) for which in "qk"}
AFTER = {
    "blocks.1.ln1_post.hook_out": (L1 + "post_attention_layernorm", B),
    "blocks.1.hook_attn_out": (L1 + "post_attention_layernorm", B),
    "blocks.1.hook_mlp_out": (L1 + "post_feedforward_layernorm", B),
}
EXPERTS = {"blocks.1.mlp.hook_expert_weights": (L1 + "mlp.gate", lambda change: output_of(change, 1))}
EXPERTS |= {"blocks.1.mlp.hook_expert_indices": (L1 + "mlp.gate", lambda change: output_of(change, 2))}
TORCH_EDITS = {
    "llama": COMMON | GATED | BEFORE | SPLIT,
    "qwen3": COMMON | GATED | BEFORE | SPLIT | HEAD_NORMS,
    "gemma": COMMON | GATED | BEFORE | SPLIT,
    "gemma2": COMMON
    | GATED
    | SPLIT
    | AFTER
    | {
        "blocks.1.ln2.hook_out": (L1 + "pre_feedforward_layernorm", B),
        "blocks.1.hook_mlp_in": (L1 + "pre_feedforward_layernorm", A),
    },
    "gemma3_text": COMMON | GATED | SPLIT | AFTER | HEAD_NORMS,
    "olmo2": COMMON | GATED | SPLIT | AFTER | HEAD_NORMS | {"blocks.1.hook_mlp_in": (L1 + "mlp", A)},
    "granite": COMMON | GATED | BEFORE | SPLIT,
    "phi3": COMMON | BEFORE | {"blocks.1.mlp.hook_post": (L1 + "mlp.down_proj", A)},
    "stablelm": COMMON | GATED | BEFORE | SPLIT,
    "stablelm-parallel": COMMON | GATED | SPLIT | {"blocks.1.ln1.hook_out": (L1 + "input_layernorm", B)},
    "starcoder2": COMMON | BEFORE | SPLIT | {"blocks.1.mlp.hook_pre": (L1 + "mlp.act", A)},
    "mixtral": COMMON | BEFORE | SPLIT | EXPERTS,
    "qwen3_moe": COMMON | BEFORE | SPLIT | HEAD_NORMS | EXPERTS,
    "qwen2_moe": COMMON | BEFORE | SPLIT | EXPERTS,
    "glm4": COMMON
    | BEFORE
    | SPLIT
    | {
        "blocks.1.hook_attn_out": (L1 + "post_self_attn_layernorm", B),
        "blocks.1.hook_mlp_out": (L1 + "post_mlp_layernorm", B),
    },
    "phi": COMMON
    | SPLIT
    | {
        "blocks.1.ln1.hook_out": (L1 + "input_layernorm", B),
        "blocks.1.attn.hook_out": (L1 + "self_attn.dense", B),
        "blocks.1.mlp.hook_pre": (L1 + "mlp.fc1", B),
        "blocks.1.mlp.hook_post": (L1 + "mlp.fc2", A),
        "ln_final.hook_out": ("model.final_layernorm", B),
    },
    "apertus": COMMON
    | {"blocks.1.mlp.hook_pre": (L1 + "mlp.up_proj", B), "blocks.1.mlp.hook_post": (L1 + "mlp.down_proj", A)},
    "bitnet": COMMON
    | GATED
    | BEFORE
    | SPLIT
    | {
        "blocks.1.attn.hook_z": (L1 + "self_attn.attn_sub_norm", A),
        "blocks.1.mlp.hook_post": (L1 + "mlp.ffn_sub_norm", A),
    },
    "hunyuan_v1_dense": COMMON
    | GATED
    | SPLIT
    | {
        "blocks.1.attn.hook_rot_q": (L1 + "self_attn.query_layernorm", A),
        "blocks.1.attn.hook_rot_k": (L1 + "self_attn.key_layernorm", A),
        "blocks.1.attn.hook_q_normed": (L1 + "self_attn.query_layernorm", B),
        "blocks.1.attn.hook_k_normed": (L1 + "self_attn.key_layernorm", B),
    },
    "gpt_oss": COMMON
    | BEFORE
    | SPLIT
    | {
        "blocks.1.mlp.hook_expert_weights": (L1 + "mlp.router", lambda change: output_of(change, 1)),
        "blocks.1.mlp.hook_expert_indices": (L1 + "mlp.router", lambda change: output_of(change, 2)),
    },
}


def change_of(name):
    """Choose a change that makes sense at the name."""
    return (lambda x, hook=None: (x + 1) % 5) if name.endswith("indices") else bend


@pytest.mark.parametrize("key", TORCH_EDITS)
def test_edits_equal_torch_hooks_on_hf(key):
    """An edit in golden has the effect that the same edit by a torch hook has on HF's own modules."""
    model, tokens = model_of(key), random_tokens(2, 6)
    plain = model(tokens).logits
    for name, (path, hooked) in TORCH_EDITS[key].items():
        change = change_of(name)
        with torch.no_grad():
            logits, _ = golden(model.state_dict(), model.config, tokens, edits={name: change})
            handle = hooked(change)(model.get_submodule(path.rstrip(".")))
            theirs = model(tokens).logits
            handle.remove()
        torch.testing.assert_close(logits, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()), msg=name)
        assert (logits - plain).abs().max() > 1e-3, name


@pytest.mark.parametrize("key", ["mixtral", "qwen3_moe", "qwen3_moe-sparse"])
def test_an_edit_of_router_logits_reroutes(key):
    """Edited logits choose other experts and weights, by the type's rule: the same as an added bias of the router."""
    model, tokens = model_of(key), random_tokens(2, 6)
    other = tiny_llama(key, attn="eager")
    shift = torch.tensor([3.0, -2.0, 1.0, 0.5, -1.0])
    router, name = other.model.layers[1].mlp.gate, "blocks.1.mlp.hook_router_logits"

    def forward(hidden):
        logits = hidden @ router.weight.T + shift
        top, chosen = logits.softmax(-1).topk(3, dim=-1)
        return logits, top / top.sum(-1, keepdim=True) if key != "qwen3_moe" else top, chosen

    router.forward = forward
    with torch.no_grad():
        _, plain = golden(model.state_dict(), model.config, tokens)
        logits, values = golden(model.state_dict(), model.config, tokens, edits={name: lambda x, hook: x + shift})
        close(logits, other(tokens).logits)
    chosen = "blocks.1.mlp.hook_expert_indices"
    assert not torch.equal(values[chosen], plain[chosen])


@pytest.mark.parametrize("key", ["llama", "llama-mha", "olmo2", "phi3", "qwen3"])
def test_copies_reach_their_head_only(key):
    """An edit of one head's copy moves that head's q, k or v alone; a query head's own k moves that head's scores."""
    model, tokens, at = model_of(key), random_tokens(2, 6), "blocks.1."
    run = functools.partial(golden, model.state_dict(), model.config, tokens)

    def second_head(x, hook):
        x[:, :, 1] = bend(x[:, :, 1])

    with torch.no_grad():
        _, plain = run()

        def moved(edited, name, axis=2):
            change = (run(edits={at + edited: second_head})[1][at + name] - plain[at + name]).abs().nan_to_num()
            return change.amax([a for a in range(4) if a != axis]) > 1e-3

        for copy in (name for name in COPIES if at + name in plain and not name.endswith("rep")):
            for which in "qkv":
                reached = copy in (f"hook_{which}_input", "hook_attn_in")
                found = moved(copy, f"attn.hook_{which}").tolist()
                assert found == [reached and head == 1 for head in range(len(found))], (copy, which)
        if key != "llama-mha":
            for which in "kv":
                assert moved(f"hook_{which}_input_rep", f"attn.hook_{which}_rep").tolist() == [
                    False,
                    True,
                    False,
                    False,
                ]
                assert not moved(f"hook_{which}_input_rep", f"attn.hook_{which}").any()
            assert moved("attn.hook_k_rep", "attn.hook_attn_scores", 1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("key", ["llama", "olmo2", "qwen3", "mistral", "smollm3"])
def test_own_inputs_of_all_query_heads_are_that_of_their_kv_head(key):
    """The same edit at `k_input_rep` of every query head and at `k_input` of every kv head gives the same logits."""
    model, tokens = model_of(key), random_tokens(2, 6)
    with torch.no_grad():
        for which in "kv":
            one, _ = golden(model.state_dict(), model.config, tokens, edits={f"blocks.1.hook_{which}_input": bend})
            all_, _ = golden(model.state_dict(), model.config, tokens, edits={f"blocks.1.hook_{which}_input_rep": bend})
            if key == "olmo2" and which == "k":  # there a query head sees the other kv head's key unedited in the norm
                assert (one - all_).abs().max() > 1e-6
            else:
                close(one, all_)


@pytest.mark.parametrize("key", ["llama", "gemma3_text", "stablelm-parallel", "mixtral"])
def test_an_identical_run_through_the_copies_changes_nothing(key):
    """Going through the copies, as for their gradients, leaves the logits."""
    model, tokens = model_of(key), random_tokens(2, 6)
    copies = {name for name in names(model.config) if name.endswith((*COPIES, "hook_mlp_in"))}
    with torch.no_grad():
        plain, _ = golden(model.state_dict(), model.config, tokens)
        through, _ = golden(model.state_dict(), model.config, tokens, through=copies)
        close(through, plain)


@pytest.mark.parametrize("key", VARIANTS)
def test_parameter_gradients_equal_hf(key):
    """Golden is differentiable: the gradient of every parameter through it is HF's."""
    model, tokens = tiny_llama(key, attn="eager"), random_tokens(2, 6)
    state = {name: value.detach().requires_grad_() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    golden(state, model.config, tokens)[0].pow(2).sum().backward()
    model(tokens).logits.pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(state[name].grad, parameter.grad, rtol=1e-9, atol=1e-10 * scale + 1e-12, msg=name)


@pytest.mark.parametrize("key", ["llama", "gemma3_text", "stablelm-parallel", "mixtral"])
def test_gradient_at_a_cut_is_the_effect_of_a_small_edit(key):
    """The gradient recorded at each cut of the middle layer predicts a small additive edit there."""
    model, tokens = model_of(key), random_tokens(1, 4)
    weight = torch.randn(1, 4, 29, generator=torch.Generator().manual_seed(1))

    def gradients(through):
        logits, values = golden(model.state_dict(), model.config, tokens, through=through)
        (logits * weight).sum().backward()
        return {name: value.grad for name, value in values.items()}

    def metric(name, change):
        with torch.no_grad():
            edited, _ = golden(model.state_dict(), model.config, tokens, edits={name: lambda x, hook: x + change})
        return (edited * weight).sum()

    plain = gradients(())
    for name in names(model.config):
        if name.startswith(("blocks.0", "blocks.2")) or name == "hook_tokens" or name.endswith("indices"):
            continue
        gradient = gradients({name})[name] if name.endswith((*COPIES, "hook_mlp_in")) else plain[name]
        step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(2)) * 1e-5
        change = (metric(name, step) - metric(name, -step)) / 2
        torch.testing.assert_close((gradient * step).sum(), change, rtol=1e-5, atol=1e-8, msg=name)


def test_stars_and_unknown_names():
    """Starred names are those of the contract; an edit of a name that does not exist is an error."""
    model = model_of("mixtral")
    starred = {name.split(".", 2)[2] for name in names(model.config) if is_starred(name)}
    assert starred == {
        "hook_q_input",
        "hook_k_input",
        "hook_v_input",
        "hook_k_input_rep",
        "hook_v_input_rep",
        "attn.hook_k_rep",
        "attn.hook_v_rep",
        "attn.hook_result",
        "hook_mlp_in",
        "mlp.hook_expert_out",
    }
    with pytest.raises(KeyError, match="hook_attn_in"):
        golden(model.state_dict(), model.config, random_tokens(), edits={"blocks.1.hook_attn_in": bend})
