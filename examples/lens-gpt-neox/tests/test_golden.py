"""The golden GPT-NeoX against plain HF in true float64: logits, insides, edits by torch's hooks, gradients."""

import pytest
import torch
from golden.tiny import pad, random_tokens
from lens_conformance.edits import bend
from lens_conformance.float64 import true_float64
from neox_golden import golden, names
from neox_tiny import VARIANTS, tiny_neox

TOKENS = random_tokens(2, 7)
L1 = "gpt_neox.layers.1"
INPUTS = {
    "blocks.1.hook_resid_pre": L1,
    "blocks.1.hook_mlp_in": f"{L1}.post_attention_layernorm",
    "blocks.1.mlp.hook_post": f"{L1}.mlp.dense_4h_to_h",
    "unembed.hook_in": "lm_head",
}
OUTPUTS = {
    "hook_embed": "gpt_neox.embed_in",
    "blocks.1.ln1.hook_out": f"{L1}.input_layernorm",
    "blocks.1.ln2.hook_out": f"{L1}.post_attention_layernorm",
    "blocks.1.attn.hook_out": f"{L1}.attention.dense",
    "blocks.1.hook_attn_out": f"{L1}.post_attention_dropout",
    "blocks.1.mlp.hook_pre": f"{L1}.mlp.dense_h_to_4h",
    "blocks.1.mlp.hook_out": f"{L1}.mlp",
    "blocks.1.hook_mlp_out": f"{L1}.post_mlp_dropout",
    "blocks.0.hook_resid_post": "gpt_neox.layers.0",
    "ln_final.hook_out": "gpt_neox.final_layer_norm",
}


@pytest.fixture(autouse=True)
def _true_float64():
    """Run every test of this file in true float64."""
    with true_float64():
        yield


def close(ours, theirs):
    """Compare in float64."""
    assert theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-12)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_hf(variant, attn):
    """Golden logits are HF's, at given positions and from embeddings too."""
    for seed in (0, 1):
        model = tiny_neox(variant, attn=attn, seed=seed)
        embeds, ids = torch.randn(2, 5, 24), torch.tensor([[4, 0, 31, 7, 7]])
        with torch.no_grad():
            close(golden(model.state_dict(), model.config, TOKENS)[0], model(TOKENS).logits)
            given = {"position_ids": ids, "attention_mask": torch.ones(2, 5)}
            theirs = model(inputs_embeds=embeds, **given).logits
            close(golden(model.state_dict(), model.config, embeds, **given)[0], theirs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_rows_equal_hf(variant, side):
    """Under padding golden logits are HF's eager ones, on padding too, and those of each row alone."""
    model, rows = tiny_neox(variant, attn="eager"), [random_tokens(1, n, seed=n)[0] for n in (3, 7)]
    tokens, mask = pad(rows, side, amount=2)
    with torch.no_grad():
        logits, _ = golden(model.state_dict(), model.config, tokens, mask)
        close(logits, model(tokens, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits)
        for row, own in enumerate(rows):
            close(logits[row][mask[row].bool()], model(own[None]).logits[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_name_has_a_value_and_insides_are_hfs(variant):
    """Golden records each name once; hidden states, patterns, and q, k, v of HF's own layout are HF's."""
    model, seen = tiny_neox(variant, attn="eager"), []
    model.gpt_neox.layers[1].attention.query_key_value.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        _, values = golden(model.state_dict(), model.config, TOKENS)
        out = model(TOKENS, output_hidden_states=True, output_attentions=True, use_cache=True)
    assert sorted(values) == sorted(names(model.config))
    for layer in range(2):
        close(values[f"blocks.{layer}.hook_resid_pre"], out.hidden_states[layer])
        close(values[f"blocks.{layer}.attn.hook_pattern"], out.attentions[layer])
        close(values[f"blocks.{layer}.attn.hook_rot_k"], out.past_key_values.layers[layer].keys.transpose(1, 2))
        close(values[f"blocks.{layer}.attn.hook_v"], out.past_key_values.layers[layer].values.transpose(1, 2))
    parts = seen[0].view(2, 7, 3, 24).chunk(3, dim=-1)  # as HF cuts it
    for part, theirs in zip("qkv", parts, strict=True):
        close(values[f"blocks.1.attn.hook_{part}"], theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_edits_equal_torch_hooks_on_hf(variant):
    """An edit in golden has the effect that the same edit by a torch hook has on HF's own modules."""
    model = tiny_neox(variant)
    places = {name: (path, "register_forward_pre_hook") for name, path in INPUTS.items()}
    places |= {name: (path, "register_forward_hook") for name, path in OUTPUTS.items()}
    with torch.no_grad():
        plain = model(TOKENS).logits
        for name, (path, register) in places.items():
            logits, _ = golden(model.state_dict(), model.config, TOKENS, edits={name: bend})
            change = (lambda m, args: bend(args[0])) if name in INPUTS else lambda m, args, out: bend(out)
            if name == "blocks.1.hook_resid_pre":
                change = lambda m, args: (bend(args[0]), *args[1:])  # noqa: E731
            handle = getattr(model.get_submodule(path), register)(change)
            theirs = model(TOKENS).logits
            handle.remove()
            torch.testing.assert_close(logits, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()), msg=name)
            assert (logits - plain).abs().max() > 1e-3, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_gradients_equal_hf(variant):
    """Golden is differentiable: the gradient of every parameter through it is HF's."""
    model = tiny_neox(variant, attn="eager")
    state = {name: value.detach().requires_grad_() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["gpt_neox.embed_in.weight"]
    golden(state, model.config, TOKENS)[0].pow(2).sum().backward()
    model(TOKENS).logits.pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(state[name].grad, parameter.grad, rtol=1e-9, atol=1e-10 * scale + 1e-12, msg=name)
