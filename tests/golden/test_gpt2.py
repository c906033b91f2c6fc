"""The golden GPT-2 against plain HF in float64: logits, insides, and edits that torch's own hooks can make."""

import pytest
import torch
from golden.tiny import fresh, pad, random_tokens, tiny_gpt2
from lens_conformance.golden.gpt2 import golden, names

CONFIGS = {
    "three-heads": {},
    "one-head": {"n_head": 1},
    "seven-heads": {"n_head": 7},
    "default-inner": {"n_inner": None},
    "untied": {"tie_word_embeddings": False},
    "inverse-layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"scale_attn_weights": False},
    "unscaled-inverse-layer": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "one-layer": {"n_layer": 1},
    "epsilon": {"layer_norm_epsilon": 1e-2},
    **{f"act-{act}": {"activation_function": act} for act in ("gelu", "relu", "silu", "tanh", "gelu_pytorch_tanh")},
}


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 1e-12) -> None:
    """Compare in float64."""
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-12)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("key", sorted(CONFIGS))
def test_logits_equal_hf(key, attn):
    """Golden logits are those of HF, for every kind of config."""
    model = tiny_gpt2(dtype=torch.float64, attn=attn, **CONFIGS[key])
    tokens = random_tokens(3, 11)
    with torch.no_grad():
        logits, _ = golden(model.state_dict(), model.config, tokens)
        close(logits, model(tokens).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_hf(side):
    """Golden logits are those of HF's eager path under padding, on padding positions too."""
    model = tiny_gpt2(dtype=torch.float64, attn="eager")
    rows = [random_tokens(1, n, seed=n)[0] for n in (3, 7, 5)]
    tokens, mask = pad(rows, side, amount=2)
    ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits, _ = golden(model.state_dict(), model.config, tokens, mask)
        close(logits, model(tokens, attention_mask=mask, position_ids=ids).logits)
        for row, tensor in enumerate(rows):
            close(logits[row][mask[row].bool()], model(tensor[None]).logits[0])


def test_position_ids_and_embeddings_are_taken():
    """Golden takes position ids and input embeddings as HF does."""
    model = tiny_gpt2(dtype=torch.float64)
    embeds = torch.randn(2, 5, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[4, 0, 31, 7, 7]])
    with torch.no_grad():
        logits, values = golden(model.state_dict(), model.config, embeds, position_ids=ids)
        close(logits, model(inputs_embeds=embeds, position_ids=ids).logits)
    assert "hook_tokens" not in values


def test_every_name_has_a_value_and_the_residual_stream_is_hfs():
    """Golden records each name once; hidden states and patterns are HF's."""
    model = tiny_gpt2(dtype=torch.float64, attn="eager")
    tokens = random_tokens()
    with torch.no_grad():
        _, values = golden(model.state_dict(), model.config, tokens)
        out = model(tokens, output_hidden_states=True, output_attentions=True)
    assert sorted(values) == sorted(names(3))
    for layer in range(3):
        close(values[f"blocks.{layer}.hook_resid_pre"], out.hidden_states[layer])
        close(values[f"blocks.{layer}.attn.hook_pattern"], out.attentions[layer])
    close(values["unembed.hook_in"], out.hidden_states[3])


def bend(x, hook=None):
    """Change every element, nonlinearly."""
    return x * x * 0.3 + x * 0.5 + 0.1


def pre(module, args):
    """Bend a module's input."""
    return (bend(args[0]), *args[1:])


def post(module, args, out):
    """Bend a module's output."""
    return (bend(out[0]), *out[1:]) if isinstance(out, tuple) else bend(out)


def third(index):
    """Make a hook that bends q, k or v in the fused projection's output."""

    def change(module, args, out):
        parts = list(out.split(21, dim=2))
        parts[index] = bend(parts[index])
        return torch.cat(parts, dim=2)

    return change


# name -> (HF module path, pre-hook or hook): the edits that plain torch hooks can make on HF's own model.
TORCH_EDITS = {
    "hook_embed": ("transformer.wte", post),
    "hook_pos_embed": ("transformer.wpe", post),
    "blocks.1.hook_resid_pre": ("transformer.h.1", pre),
    "blocks.1.hook_resid_post": ("transformer.h.1", post),
    "blocks.1.ln1.hook_out": ("transformer.h.1.ln_1", post),
    "blocks.1.ln2.hook_out": ("transformer.h.1.ln_2", post),
    "blocks.1.attn.hook_q": ("transformer.h.1.attn.c_attn", third(0)),
    "blocks.1.attn.hook_k": ("transformer.h.1.attn.c_attn", third(1)),
    "blocks.1.attn.hook_v": ("transformer.h.1.attn.c_attn", third(2)),
    "blocks.1.attn.hook_z": ("transformer.h.1.attn.c_proj", pre),
    "blocks.1.attn.hook_out": ("transformer.h.1.attn.c_proj", post),
    "blocks.1.hook_attn_out": ("transformer.h.1.attn", post),
    "blocks.1.hook_mlp_in": ("transformer.h.1.ln_2", pre),
    "blocks.1.mlp.hook_in": ("transformer.h.1.mlp", pre),
    "blocks.1.mlp.hook_pre": ("transformer.h.1.mlp.act", pre),
    "blocks.1.mlp.hook_post": ("transformer.h.1.mlp.c_proj", pre),
    "blocks.1.mlp.hook_out": ("transformer.h.1.mlp.c_proj", post),
    "blocks.1.hook_mlp_out": ("transformer.h.1.mlp", post),
    "ln_final.hook_out": ("transformer.ln_f", post),
    "unembed.hook_in": ("lm_head", pre),
    "unembed.hook_out": ("lm_head", post),
}


@pytest.mark.parametrize("name", sorted(TORCH_EDITS))
def test_edits_equal_torch_hooks_on_hf(name):
    """An edit in golden has the effect that the same edit by a torch hook has on HF's own modules."""
    model = tiny_gpt2(dtype=torch.float64)
    tokens, other = random_tokens(), fresh(model)
    path, hook = TORCH_EDITS[name]
    module = other.get_submodule(path)
    module.register_forward_pre_hook(hook) if hook is pre else module.register_forward_hook(hook)
    with torch.no_grad():
        logits, _ = golden(model.state_dict(), model.config, tokens, edits={name: bend})
        close(logits, other(tokens).logits, atol=1e-11)
        assert (logits - model(tokens).logits).abs().max() > 1e-3


def test_per_head_inputs_reach_their_head_only():
    """An edit of one head's q input moves that head's q alone; `attn_in` moves q, k and v of its head."""
    model = tiny_gpt2(dtype=torch.float64)
    tokens = random_tokens()

    def second_head(x, hook):
        x[:, :, 1] = bend(x[:, :, 1])

    with torch.no_grad():
        _, plain = golden(model.state_dict(), model.config, tokens)
        for edited, moved in (("q_input", "q"), ("k_input", "k"), ("v_input", "v"), ("attn_in", "qkv")):
            _, values = golden(model.state_dict(), model.config, tokens, edits={f"blocks.1.hook_{edited}": second_head})
            for which in "qkv":
                change = (values[f"blocks.1.attn.hook_{which}"] - plain[f"blocks.1.attn.hook_{which}"]).abs()
                assert (change.amax((0, 1, 3)) > 1e-3).tolist() == [False, which in moved, False]
            close(values["blocks.1.ln1.hook_out"], plain["blocks.1.ln1.hook_out"])


def test_middle_of_the_residual_stream_reaches_both_branches():
    """An edit of resid_mid reaches the MLP and the residual sum."""
    model = tiny_gpt2(dtype=torch.float64)
    with torch.no_grad():
        _, values = golden(model.state_dict(), model.config, random_tokens(), edits={"blocks.1.hook_resid_mid": bend})
        mid, mlp_out = values["blocks.1.hook_resid_mid"], values["blocks.1.hook_mlp_out"]
        close(values["blocks.1.hook_resid_post"], mid + mlp_out)
        close(values["blocks.1.hook_mlp_in"], mid)


def test_parameter_gradients_equal_hf():
    """Golden is differentiable: the embedding's gradient through it is HF's."""
    model = tiny_gpt2(dtype=torch.float64)
    tokens = random_tokens()
    state = {key: value.detach().requires_grad_() for key, value in model.state_dict().items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    golden(state, model.config, tokens)[0].pow(2).sum().backward()
    model(tokens).logits.pow(2).sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(state[key].grad, parameter.grad, rtol=1e-9, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", [name for name in names(3) if name != "hook_tokens"])
def test_gradient_at_a_cut_is_the_effect_of_a_small_edit(name):
    """The gradient recorded at each cut predicts a small additive edit there, by central differences."""
    model = tiny_gpt2(dtype=torch.float64)
    tokens = random_tokens(1, 4)
    logits, values = golden(model.state_dict(), model.config, tokens, through={name})
    weight = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (logits * weight).sum().backward()
    step = torch.randn(values[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 1e-5

    def metric(sign):
        edits = {name: lambda x, hook: x + sign * step}
        return (golden(model.state_dict(), model.config, tokens, edits=edits)[0] * weight).sum()

    with torch.no_grad():
        change = (metric(1) - metric(-1)) / 2
    torch.testing.assert_close((values[name].grad * step).sum(), change, rtol=1e-5, atol=1e-9)
