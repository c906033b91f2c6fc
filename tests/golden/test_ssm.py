"""Golden Mamba, Falcon-Mamba and Mamba-2 against plain HF in true float64: logits, insides, edits and gradients."""

import functools
import math

import pytest
import torch
from golden.tiny import pad, random_tokens
from golden.tiny_ssm import KINDS, tiny_ssm
from lens_conformance.float64 import true_float64
from lens_conformance.golden import mamba, mamba2, ssm
from transformers import DynamicCache
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

ORACLES = {"mamba": mamba, "falcon_mamba": mamba, "mamba2": mamba2}
MODELING = {"mamba": modeling_mamba, "falcon_mamba": modeling_falcon_mamba, "mamba2": modeling_mamba2}
SELECTIVE = [
    *({"conv_kernel": width} for width in (2, 3, 4, 5)),
    {"use_bias": True},
    {"use_conv_bias": False},
    {"use_bias": True, "use_conv_bias": False, "conv_kernel": 2},
    {"residual_in_fp32": False},
    {"tie_word_embeddings": False},
    {"layer_norm_epsilon": 1e-2},
    {"num_hidden_layers": 1, "state_size": 1},
    {"time_step_rank": "auto", "expand": 1},
    {"hidden_act": "gelu"},
]
DUAL = [
    *({"conv_kernel": width} for width in (2, 3, 5)),
    {"use_bias": True},
    {"use_conv_bias": False},
    {"residual_in_fp32": False},
    {"tie_word_embeddings": True},
    *({"n_groups": groups} for groups in (1, 2, 6)),
    *({"chunk_size": size} for size in (1, 2, 3, 11, 64)),
    {"time_step_limit": (0.3, 0.9)},
    {"time_step_limit": (0.0, 0.5), "n_groups": 2, "chunk_size": 3},
    {"hidden_size": 35, "expand": 1, "num_heads": 5, "head_dim": 7, "n_groups": 1},
    {"hidden_size": 22, "expand": 3, "num_heads": 2, "head_dim": 33, "n_groups": 2},
    {"layer_norm_epsilon": 1e-2},
    {"hidden_act": "gelu"},
]
CONFIGS = [("mamba", c) for c in SELECTIVE] + [("falcon_mamba", c) for c in [*SELECTIVE, {"mixer_rms_eps": 1.0}]]
CONFIGS += [("mamba2", c) for c in DUAL]


@pytest.fixture(autouse=True)
def exact():
    """Run every test of this file in true float64."""
    with true_float64():
        yield


@functools.cache
def built(kind):
    """Build a model of a kind, once; nothing here changes it."""
    return tiny_ssm(kind, dtype=torch.float64)


def run(kind, model, tokens, **options):
    """Run golden without a graph."""
    with torch.no_grad():
        return ORACLES[kind].golden(model.state_dict(), model.config, tokens, **options)


def close(ours, theirs, atol=1e-12):
    """Compare in float64."""
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-11)


@pytest.mark.parametrize(("kind", "config"), CONFIGS, ids=str)
def test_logits_equal_hf(kind, config):
    """Golden logits are those of HF, with and without a cache, for every kind of config and several seeds."""
    for seed, shape in enumerate([(3, 11), (1, 1), (2, 2)]):
        model, tokens = tiny_ssm(kind, dtype=torch.float64, seed=seed, **config), random_tokens(*shape, seed=seed)
        logits, _ = run(kind, model, tokens)
        with torch.no_grad():
            close(logits, model(tokens).logits)
            close(logits, model(tokens, use_cache=False).logits)
    assert logits.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", [{}, {"use_bias": True}], ids=str)
def test_padded_rows_equal_hf(kind, side, config):
    """Golden logits are those of HF under padding, on padding positions too; real ones are the unpadded row's.

    With a bias in in_proj HF's convolution reads the bias at left padding, and zeros where there is no padding.
    """
    model = tiny_ssm(kind, dtype=torch.float64, **config)
    tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (3, 7, 5)], side, amount=2)
    logits, _ = run(kind, model, tokens, attention_mask=mask)
    with torch.no_grad():
        close(logits, model(tokens, attention_mask=mask).logits)
    if not config or side == "right":
        for row, length in enumerate((3, 7, 5)):
            alone, _ = run(kind, model, random_tokens(1, length, seed=length))
            close(logits[row][mask[row].bool()], alone[0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_has_a_value_and_the_residual_stream_is_hfs(kind):
    """Golden records each name once; hidden states and the final state are HF's. Embeddings are taken as input."""
    model, tokens = built(kind), random_tokens(2, 7)
    _, values = run(kind, model, tokens)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True, cache_params=cache)
    assert sorted(values) == sorted(ORACLES[kind].names(model.config))
    for layer in range(3):
        close(values[f"blocks.{layer}.hook_resid_post"], out.hidden_states[layer])
        close(values[f"blocks.{layer}.mixer.hook_ssm_state"][:, -1], cache.layers[layer].recurrent_states[0])
        close(values[f"blocks.{layer}.mixer.hook_conv_in"][:, -4:].mT, cache.layers[layer].conv_states[0])
    close(values["unembed.hook_in"], out.hidden_states[3])
    logits, same = run(kind, model, values["hook_embed"])
    close(logits, out.logits)
    assert "hook_tokens" not in same


def test_unknown_names_are_refused():
    """An edit that no hook point has is a mistake of the test."""
    with pytest.raises(KeyError, match="hook_z"):
        run("mamba", built("mamba"), random_tokens(), edits={"blocks.0.attn.hook_z": bend})


def bend(x, hook=None):
    """Change every element, nonlinearly."""
    return x * x * 0.3 + x * 0.5 + 0.1


def pre(module, args):
    """Bend a module's input."""
    return (bend(args[0]), *args[1:])


def post(module, args, out):
    """Bend a module's output."""
    return bend(out)


def part(start, stop):
    """Make a hook that bends some of the channels that a module returns."""

    def change(module, args, out):
        return torch.cat([out[..., :start], bend(out[..., start:stop]), out[..., stop:]], dim=-1)

    return change


EVERYWHERE = {
    "hook_embed": ("backbone.embeddings", post),
    "blocks.1.hook_resid_pre": ("backbone.layers.1", pre),
    "blocks.1.hook_resid_post": ("backbone.layers.1", post),
    "blocks.1.hook_mixer_in": ("backbone.layers.1.norm", pre),
    "blocks.1.norm.hook_out": ("backbone.layers.1.norm", post),
    "blocks.1.mixer.hook_in_proj": ("backbone.layers.1.mixer.in_proj", post),
    "blocks.1.hook_mixer_out": ("backbone.layers.1.mixer", post),
    "blocks.1.mixer.hook_gated": ("backbone.layers.1.mixer.out_proj", pre),
    "ln_final.hook_out": ("backbone.norm_f", post),
    "unembed.hook_in": ("lm_head", pre),
    "unembed.hook_out": ("lm_head", post),
}
BY_X_PROJ = {
    "blocks.1.mixer.hook_gate": ("backbone.layers.1.mixer.in_proj", part(39, 78)),
    "blocks.1.mixer.hook_conv_in": ("backbone.layers.1.mixer.in_proj", part(0, 39)),
    "blocks.1.mixer.hook_x_proj": ("backbone.layers.1.mixer.x_proj", post),
}
# name -> (HF module path, hook): the edits that plain torch hooks can make on HF's own model.
TORCH_EDITS = {
    "mamba": {
        **EVERYWHERE,
        **BY_X_PROJ,
        "blocks.1.mixer.hook_B": ("backbone.layers.1.mixer.x_proj", part(11, 18)),
        "blocks.1.mixer.hook_C": ("backbone.layers.1.mixer.x_proj", part(18, 25)),
    },
    "falcon_mamba": {
        **EVERYWHERE,
        **BY_X_PROJ,
        "blocks.1.mixer.hook_B": ("backbone.layers.1.mixer.b_layernorm", post),
        "blocks.1.mixer.hook_C": ("backbone.layers.1.mixer.c_layernorm", post),
    },
    "mamba2": {
        **EVERYWHERE,
        "blocks.1.mixer.hook_gate": ("backbone.layers.1.mixer.in_proj", part(0, 66)),
        "blocks.1.mixer.hook_conv_in": ("backbone.layers.1.mixer.in_proj", part(66, 174)),
    },
}
HOOKED = [(kind, name) for kind in KINDS for name in TORCH_EDITS[kind]]


@pytest.mark.parametrize(("kind", "name"), HOOKED, ids=str)
def test_edits_equal_torch_hooks_on_hf(kind, name):
    """An edit in golden has the effect that the same edit by a torch hook has on HF's own modules."""
    model, tokens = tiny_ssm(kind, dtype=torch.float64), random_tokens(2, 6)
    path, hook = TORCH_EDITS[kind][name]
    logits, _ = run(kind, model, tokens, edits={name: bend})
    plain, _ = run(kind, model, tokens)
    module = model.get_submodule(path)
    module.register_forward_pre_hook(hook) if hook is pre else module.register_forward_hook(hook)
    with torch.no_grad():
        close(logits, model(tokens).logits, atol=1e-11)
    assert (logits - plain).abs().max() > 1e-3


def inside_convolution(name, call, u, weight, bias=None, activation=None, **kwargs):
    """Call HF's convolution with a bent input, or bend what it returns before the activation function."""
    if name == "hook_conv_in":
        return call(bend(u), weight, bias, activation=activation, **kwargs)
    return torch.nn.functional.silu(bend(call(u, weight, bias, activation=None, **kwargs)))


def inside_selective_scan(name, call, x, dt, A, B, C, D, z, delta_bias, delta_softplus, **kwargs):
    """Call HF's Mamba scan, `[batch, channel, pos]`, with one of its inputs or results bent."""
    dt = dt + delta_bias[:, None]
    dt = torch.nn.functional.softplus(bend(dt) if name == "hook_delta_pre" else dt)
    dt, B, C = (bend(t) if name == n else t for n, t in (("hook_delta", dt), ("hook_B", B), ("hook_C", C)))
    y = call(x, dt, A, B, C, **kwargs)
    y = (bend(y) if name == "hook_y" else y) + x * D[:, None]
    return (bend(y) if name == "hook_ssm_output" else y) * torch.nn.functional.silu(z)


def inside_chunk_scan(name, call, x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus, dt_limit, **kwargs):
    """Call HF's Mamba-2 scan, `[batch, pos, head, ...]`, with one of its inputs or results bent."""
    dt = dt + dt_bias
    dt = torch.nn.functional.softplus(bend(dt) if name == "hook_delta_pre" else dt).clamp(*dt_limit)
    wanted = (("hook_ssm_input", x), ("hook_delta", dt), ("hook_B", B), ("hook_C", C))
    x, dt, B, C = (bend(t) if name == n else t for n, t in wanted)
    y = call(x, dt, A, B, C, chunk_size, dt_limit=(-math.inf, math.inf), **kwargs)
    y = (bend(y) if name == "hook_y" else y) + x * D[:, None]
    return bend(y) if name == "hook_ssm_output" else y


SCANS = {"mamba": inside_selective_scan, "falcon_mamba": inside_selective_scan, "mamba2": inside_chunk_scan}
FUNCTION_EDITS = [
    (kind, f"hook_{name}")
    for kind in KINDS
    for name in ("conv_in", "conv", "ssm_input", "delta_pre", "delta", "B", "C", "y", "ssm_output")
]


@pytest.mark.parametrize(("kind", "name"), FUNCTION_EDITS)
def test_edits_equal_hf_with_a_wrapped_function(kind, name, monkeypatch):
    """An edit in golden has the effect of HF's own convolution or scan called with that value bent in layer 1."""
    model, tokens, modeling, calls = built(kind), random_tokens(2, 6), MODELING[kind], []
    if name == "hook_ssm_input" and kind != "mamba2":  # the second masking of the mixer: x_proj reads it too
        target, at, inside = "apply_mask_to_padding_states", 3, lambda name, call, x, mask: bend(call(x, mask))
    elif name.startswith("hook_conv"):
        target, at, inside = "causal_conv1d_fn", 1, inside_convolution
    else:
        target, at = ("mamba2_chunk_scan" if kind == "mamba2" else "mamba_selective_scan"), 1
        inside = SCANS[kind]
    original = getattr(modeling, target)

    def wrapped(*args, **kwargs):
        calls.append(target)
        return inside(name, original, *args, **kwargs) if len(calls) == at + 1 else original(*args, **kwargs)

    logits, _ = run(kind, model, tokens, edits={f"blocks.1.mixer.{name}": bend})
    plain, _ = run(kind, model, tokens)
    monkeypatch.setattr(modeling, target, wrapped)
    with torch.no_grad():
        close(logits, model(tokens, use_cache=False).logits, atol=1e-11)
    assert (logits - plain).abs().max() > 1e-3
    assert len(calls) == (6 if at == 3 else 3)


@pytest.mark.parametrize("kind", KINDS)
def test_squared_decay_is_twice_the_rate(kind):
    """decay^2 in golden is HF with A_log + log 2; half the write is HF with half of what B becomes."""
    model, tokens = tiny_ssm(kind, dtype=torch.float64), random_tokens(2, 6)
    logits, _ = run(kind, model, tokens, edits={"blocks.1.mixer.hook_decay": lambda x, hook: x * x})
    half, _ = run(kind, model, tokens, edits={"blocks.1.mixer.hook_ssm_write": lambda x, hook: x * 0.5})
    less_B, _ = run(kind, model, tokens, edits={"blocks.1.mixer.hook_B": lambda x, hook: x * 0.5})
    close(half, less_B)
    with torch.no_grad():
        model.backbone.layers[1].mixer.A_log += math.log(2)
        close(logits, model(tokens).logits, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0, 2, 4])
def test_an_edited_state_is_what_hf_starts_from(kind, at):
    """Bending the last layer's state at one position gives, later, what HF gives from a cache with that state bent."""
    model, tokens, seen = built(kind), random_tokens(2, 6), []
    name = "blocks.2.mixer.hook_ssm_state"

    def once(x, hook):
        seen.append((tuple(x.shape[:2]), hook.positions.tolist()))
        return bend(x) if hook.positions.tolist() == [at] else None

    logits, _ = run(kind, model, tokens, edits={name: once})
    plain, _ = run(kind, model, tokens)
    assert seen == [((2, 1), [t]) for t in range(6)]
    cache, pieces = DynamicCache(config=model.config), []
    with torch.no_grad():
        model(tokens[:, : at + 1], cache_params=cache)
        state = cache.layers[2].recurrent_states[0]
        state.copy_(bend(state))
        for t in range(at + 1, 6):
            pieces.append(model(tokens[:, t : t + 1], cache_params=cache).logits)
    close(logits[:, at + 1 :], torch.cat(pieces, dim=1), atol=1e-11)
    close(logits[:, :at], plain[:, :at])
    assert (logits - plain)[:, at:].abs().amax((0, 2)).min() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_gradients_equal_hf(kind):
    """Golden is differentiable: every parameter's gradient through it is HF's."""
    model, tokens = tiny_ssm(kind, dtype=torch.float64), random_tokens(2, 6)
    state = {key: value.detach().requires_grad_() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["backbone.embeddings.weight"]
    ORACLES[kind].golden(state, model.config, tokens)[0].pow(2).sum().backward()
    model(tokens).logits.pow(2).sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(state[key].grad, parameter.grad, rtol=1e-9, atol=1e-9, msg=key)


FLOATS = [
    (kind, name)
    for kind, oracle in ORACLES.items()
    for name in (*ssm.TOP[1:], *(f"blocks.1.{name}" for name in oracle.BLOCK))
]


@pytest.mark.parametrize(("kind", "name"), FLOATS)
@pytest.mark.parametrize("edited", [False, True], ids=["plain", "edited"])
def test_gradient_at_a_cut_is_the_effect_of_a_small_edit(kind, name, edited):
    """The gradient recorded at each cut predicts a small additive edit there, position by position."""
    model, tokens, golden = built(kind), random_tokens(1, 4), ORACLES[kind].golden
    first = bend if edited else lambda x, hook: x
    logits, values = golden(model.state_dict(), model.config, tokens, edits={name: first})
    weight = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (logits * weight).sum().backward()
    step = torch.randn(values[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 1e-5

    def metric(sign, at):
        def change(x, hook):
            here = (hook.positions == at).view(-1, *[1] * (x.ndim - 2))
            return first(x, hook=hook) + sign * here * step[:, hook.positions]

        return (golden(model.state_dict(), model.config, tokens, edits={name: change})[0] * weight).sum()

    with torch.no_grad():
        change = torch.stack([(metric(1, at) - metric(-1, at)) / 2 for at in range(4)])
    predicted = (values[name].grad * step).flatten(2).sum((0, 2))
    torch.testing.assert_close(predicted, change, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_loss_does_not_read_has_zeros(kind):
    """The state's gradient at later positions is zero, and a loss of the trajectory itself has a gradient."""
    model, tokens = built(kind), random_tokens(2, 5)
    name = "blocks.1.mixer.hook_ssm_state"
    logits, values = ORACLES[kind].golden(model.state_dict(), model.config, tokens)
    logits[:, 2].sum().backward()
    assert not values[name].grad[:, 3:].any()
    assert values[name].grad[:, :3].flatten(2).abs().amax((0, 2)).min() > 1e-4
    _, values = ORACLES[kind].golden(model.state_dict(), model.config, tokens)
    values[name][:, 3].sum().backward()
    close(values[name].grad[:, 3], torch.ones_like(values[name][:, 3]))


@pytest.mark.parametrize("kind", KINDS)
def test_edits_at_padding_reach_nothing_real(kind):
    """Under padding, an edited row has at its real positions what the row alone has, whatever the name."""
    model, rows = built(kind), [random_tokens(1, n, seed=n)[0] for n in (2, 6)]
    for side in ("left", "right"):
        tokens, mask = pad(rows, side, amount=1)
        for name in (*ssm.TOP[1:], *(f"blocks.1.{name}" for name in ORACLES[kind].BLOCK)):
            logits, _ = run(kind, model, tokens, attention_mask=mask, edits={name: bend})
            for row, ids in enumerate(rows):
                close(logits[row][mask[row].bool()], run(kind, model, ids[None], edits={name: bend})[0][0])
