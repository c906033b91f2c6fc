"""Law 2: the value at a name equals its defining equation."""

import pytest
import torch
from golden.tiny import pad, random_tokens
from lens_conformance.edits import at_steps, pos_axis
from transformers import DynamicCache

CONFIGS = {
    "three-heads": {},
    "one-head": {"n_head": 1},
    "default-inner": {"n_inner": None},
    "untied": {"tie_word_embeddings": False},
    "scales": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "silu": {"activation_function": "silu"},
    "epsilon": {"layer_norm_epsilon": 1e-2},
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6}


def same(name, ours, expected, tolerance):
    """Compare one value with golden's, in units of its own scale (at least 1)."""
    assert tuple(ours.shape) == tuple(expected.shape), f"{name}: shape {tuple(ours.shape)}, not {tuple(expected.shape)}"
    if not ours.is_floating_point():
        assert torch.equal(ours, expected), name
        return
    hidden = expected == -torch.inf
    assert torch.equal(ours == -torch.inf, hidden), f"{name}: other cells are masked"
    ours, expected = ours.double().masked_fill(hidden, 0), expected.masked_fill(hidden, 0)
    error = float((ours - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    assert error <= tolerance, f"{name}: off by {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("key", sorted(CONFIGS))
def test_every_value_equals_golden(subject, attn, key, dtype):
    """Law 2: every name, starred ones too, in a whole run."""
    one, tokens = subject(dtype=dtype, attn=attn, **CONFIGS[key]), random_tokens()
    _, expected = one.golden(tokens)
    logits, cache = one.model.run_with_cache(tokens, names_filter=one.names())
    assert sorted(cache) == sorted(one.names())
    same("logits", logits.detach(), expected["hook_logits"], TOLERANCE[dtype])
    for name in one.names():
        same(name, cache[name], expected[name], TOLERANCE[dtype])


def test_default_cache_is_every_name_without_a_star(subject):
    """Law 2: run_with_cache without a filter holds exactly the names without a star, with golden's values."""
    one, tokens = subject(dtype=torch.float64), random_tokens()
    _, expected = one.golden(tokens)
    _, cache = one.model.run_with_cache(tokens)
    starred = ("attn_in", "q_input", "k_input", "v_input", "hook_result", "mlp_in")
    assert sorted(cache) == sorted(name for name in one.names() if not name.endswith(starred))
    for name in cache:
        same(name, cache[name], expected[name], 1e-10)


def test_what_a_function_sees_equals_golden(subject, attn):
    """Law 2: functions see the values that the cache holds."""
    one, tokens, seen = subject(dtype=torch.float64, attn=attn), random_tokens(), {}

    def look(x, hook):
        seen[hook.name] = x.detach().clone()

    one.model.run_with_hooks(tokens, fwd_hooks=[(name, look) for name in one.names()])
    for name, value in one.golden(tokens)[1].items():
        same(name, seen[name], value, 1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_values_under_padding_equal_golden(subject, attn, side):
    """Law 2: under a mask, every value at real positions (and pattern rows of padding: HF's eager ones)."""
    one = subject(dtype=torch.float64, attn=attn)
    tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (3, 6)], side, amount=1)
    _, expected = one.golden(tokens, attention_mask=mask)
    _, cache = one.model.run_with_cache(tokens, attention_mask=mask, names_filter=one.names())
    for name in one.names():
        for row in range(2):
            real = mask[row].nonzero()[:, 0]
            axis = pos_axis(name) - 1
            ours, theirs = cache[name][row], expected[name][row]
            same(name, ours.index_select(axis, real), theirs.index_select(axis, real), 1e-10)
        if name.endswith("hook_pattern") and side == "left":  # rows of left padding may see nothing
            same(name, cache[name], expected[name], 1e-10)


def test_values_while_decoding_equal_golden(subject, attn):
    """Law 2: position axes hold this call's positions, key axes all real ones."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens(2, 6)
    _, expected = one.golden(tokens)
    past = DynamicCache(config=one.hf.config)
    for start, stop in ((0, 2), (2, 3), (3, 5), (5, 6)):
        with torch.no_grad():
            _, cache = one.model.run_with_cache(
                tokens[:, start:stop], names_filter=one.names(), past_key_values=past, use_cache=True
            )
        for name in one.names():
            same(name, cache[name], at_steps(name, expected[name], slice(start, stop)), 1e-10)


def test_static_cache_is_trimmed(subject, attn):
    """Law 2: with a static key-value cache the key axis holds real positions only."""
    from transformers import StaticCache

    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens(2, 6)
    _, expected = one.golden(tokens)
    past = StaticCache(config=one.hf.config, max_cache_len=11)
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        with torch.no_grad():
            _, cache = one.model.run_with_cache(
                tokens[:, start:stop], names_filter=one.names(), past_key_values=past, use_cache=True
            )
        for name in one.names():
            same(name, cache[name], at_steps(name, expected[name], slice(start, stop)), 1e-10)


def test_values_with_embeddings_equal_golden(subject):
    """Law 2: with embeddings as input."""
    one = subject(dtype=torch.float64)
    embeds = torch.randn(2, 5, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, expected = one.golden(embeds)
    wanted = [name for name in one.names() if name != "hook_tokens"]
    _, cache = one.model.run_with_cache(embeds, names_filter=wanted)
    for name in wanted:
        same(name, cache[name], expected[name], 1e-10)


def test_given_position_ids_are_used(subject):
    """Law 2: position ids that the user gives are HF's, one row for the whole batch or one each."""
    one, tokens = subject(dtype=torch.float64), random_tokens(2, 5)
    for ids in (torch.tensor([[4, 0, 31, 7, 7]]), torch.tensor([[4, 0, 31, 7, 7], [1, 2, 3, 4, 5]])):
        _, expected = one.golden(tokens, position_ids=ids)
        mask = torch.ones_like(tokens)  # without one, HF reads ids that do not grow as several packed sequences
        _, cache = one.model.run_with_cache(tokens, position_ids=ids, attention_mask=mask)
        for name in cache:
            same(name, cache[name], expected[name], 1e-10)


def test_residual_stream_adds_up(subject):
    """Law 2: embed + pos_embed is the first resid_pre; each block adds attn_out and mlp_out; posts are next pres."""
    one = subject(dtype=torch.float64)
    _, cache = one.model.run_with_cache(random_tokens())
    stream = cache["hook_embed"] + cache["hook_pos_embed"]
    for layer in range(3):
        torch.testing.assert_close(cache["resid_pre", layer], stream)
        torch.testing.assert_close(cache["resid_mid", layer], stream + cache["attn_out", layer])
        stream = stream + cache["attn_out", layer] + cache["mlp_out", layer]
        torch.testing.assert_close(cache["resid_post", layer], stream)


def test_declared_shapes_are_observed(subject):
    """Law 2: the table's axes, with the config's sizes put in, are the shapes of the values."""
    one, tokens = subject(), random_tokens(2, 5)
    sizes = {"batch": 2, "pos": 5, "query": 5, "key": 5, "d_model": 21, "n_heads": 3, "d_head": 7, "d_mlp": 37}
    sizes |= {"d_vocab": 29, "n_kv_heads": 3, "1": 1}
    _, cache = one.model.run_with_cache(tokens, names_filter=one.names())
    for point in one.model.hook_points():
        if not point.name.startswith("hf."):
            axes = point.shape.split() if isinstance(point.shape, str) else [str(axis) for axis in point.shape]
            assert tuple(cache[point.name].shape) == tuple(sizes[axis] for axis in axes), point.name


def test_hf_names_hold_hfs_own_values(subject):
    """Law 2: `hf.<path>.input` and `.output` are what that module was given and gave."""
    one, tokens, seen = subject(), random_tokens(), {}
    mlp = one.reference.transformer.h[1].mlp
    mlp.register_forward_hook(lambda module, args, out: seen.update(input=args[0], output=out))
    one.reference(tokens)
    wanted = ["hf.transformer.h.1.mlp.input", "hf.transformer.h.1.mlp.output"]
    _, cache = one.model.run_with_cache(tokens, names_filter=wanted)
    assert sorted(cache) == wanted
    for name in wanted:
        assert torch.equal(cache[name], seen[name.rsplit(".", 1)[1]])
