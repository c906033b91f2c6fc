"""TransformerLens' patching functions, by its names, argument orders and shapes, against one forward for each cell."""

import pytest
import torch
from analysis.patching_subject import assert_close, difference, one_by_one, subject
from golden.tiny import random_tokens

import lens_core as lens
from lens_core.analysis import patching
from lens_core.errors import ArgumentError

N_LAYERS, N_POS = 2, 4
ALL, POSITIONS, LAYERS = slice(None), range(N_POS), range(N_LAYERS)
CORRUPTED, CLEAN = random_tokens(2, N_POS), random_tokens(2, N_POS, seed=7)
DEPTH = {"gpt2": {"n_layer": N_LAYERS}, "llama": {"num_hidden_layers": N_LAYERS}}
N_HEADS = {"gpt2": 3, "llama": 4}
N_KV_HEADS = {"gpt2": 3, "llama": 2}


def mean_difference(logits):
    """Give a metric as TransformerLens' notebooks have it: one number."""
    return difference(logits).mean()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def given(request):
    """Give a model, its clean cache and its counts of heads."""
    model = subject(request.param, **DEPTH[request.param])
    names = ["resid_pre", "resid_mid", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern"]
    _, clean = model.run_with_cache(CLEAN, names_filter=names)
    return model, clean, N_HEADS[request.param], N_KV_HEADS[request.param]


def naive(model, clean, name, ranges, place):
    """Patch cell by cell."""
    return one_by_one(model, CORRUPTED, clean, mean_difference_of_one, name, [LAYERS, *ranges], place)[..., 0]


def mean_difference_of_one(logits):
    """Give the same number as an axis of one."""
    return mean_difference(logits)[None]


@pytest.mark.parametrize("name", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_layer_by_position(given, name):
    """A plain tensor `[layer, pos]`."""
    model, clean, _, _ = given
    found = getattr(lens.patching, f"get_act_patch_{name}")(model, CORRUPTED, clean, mean_difference)
    assert isinstance(found, torch.Tensor)
    assert_close(found, naive(model, clean, name, [POSITIONS], lambda p: (ALL, p)))


def test_heads_and_their_bundle_at_all_positions(given):
    """`[layer, head]`, key-value heads for k and v; the bundle is NaN where there is no such head."""
    model, clean, n_heads, n_kv_heads = given
    every = patching.get_act_patch_attn_head_all_pos_every(model, CORRUPTED, clean, mean_difference)
    assert every.shape == (5, N_LAYERS, n_heads)
    for number, (part, name) in enumerate([("out", "z"), ("q", "q"), ("k", "k"), ("v", "v"), ("pattern", "pattern")]):
        heads = n_kv_heads if part in "kv" else n_heads
        sweep = getattr(patching, f"get_act_patch_attn_head_{part}_all_pos")
        found = sweep(model, CORRUPTED, clean, mean_difference)
        place = (lambda h: (ALL, h)) if part == "pattern" else (lambda h: (ALL, ALL, h))
        assert_close(found, naive(model, clean, name, [range(heads)], place))
        assert torch.equal(every[number, :, :heads], found)
        assert every[number, :, heads:].isnan().all()


def test_heads_and_their_bundle_by_position(given):
    """`[layer, pos, head]`; in the bundle the attention's position is the one that attends."""
    model, clean, n_heads, n_kv_heads = given
    every = patching.get_act_patch_attn_head_by_pos_every(model, CORRUPTED, clean, mean_difference, positions=-1)
    assert every.shape == (5, N_LAYERS, N_POS, n_heads)
    assert every[2:4, ..., n_kv_heads:].isnan().all()
    assert not every[2:4, ..., :n_kv_heads].isnan().any()
    found = patching.get_act_patch_attn_head_v_by_pos(model, CORRUPTED, clean, mean_difference)
    expected = naive(model, clean, "v", [POSITIONS, range(n_kv_heads)], lambda p, h: (ALL, p, h))
    assert_close(found, expected)
    assert_close(every[3, ..., :n_kv_heads], expected)
    expected = naive(model, clean, "z", [POSITIONS, range(n_heads)], lambda p, h: (ALL, p, h))
    assert_close(every[0], expected)
    found = patching.get_act_patch_attn_head_pattern_by_pos(model, CORRUPTED, clean, mean_difference)
    expected = naive(model, clean, "pattern", [range(n_heads), POSITIONS], lambda h, q: (ALL, h, q))
    assert_close(found, expected)
    assert_close(every[4], expected.transpose(1, 2))


def test_block_every(given):
    """`[3, layer, pos]`: stream, attention, MLP."""
    model, clean, _, _ = given
    every = patching.get_act_patch_block_every(model, CORRUPTED, clean, mean_difference, positions=-1)
    for found, name in zip(every, ("resid_pre", "attn_out", "mlp_out"), strict=True):
        assert_close(found, naive(model, clean, name, [POSITIONS], lambda p: (ALL, p)))


def test_one_weight_of_the_attention():
    """`[layer, head, dest, src]`, a short text."""
    model = subject("gpt2", **DEPTH["gpt2"])
    clean_ids, corrupted = CLEAN[:, :3], CORRUPTED[:, :3]
    _, clean = model.run_with_cache(clean_ids, names_filter="pattern")
    sweep = patching.get_act_patch_attn_head_pattern_dest_src_pos
    found = sweep(model, corrupted, clean, mean_difference, reduce="none")
    assert found.axes == ("layer", "head", "destination", "source")
    ranges = [LAYERS, range(3), range(3), range(3)]
    place = lambda h, q, k: (ALL, h, q, k)  # noqa: E731
    assert_close(found.values, one_by_one(model, corrupted, clean, mean_difference_of_one, "pattern", ranges, place))


def test_rows_are_averaged_unless_they_are_asked_for(given):
    """A metric with one number for each row gives the mean, or the whole result."""
    model, clean, _, _ = given
    mean = patching.get_act_patch_resid_pre(model, CORRUPTED, clean, difference)
    result = patching.get_act_patch_resid_pre(model, CORRUPTED, clean, difference, reduce="none")
    assert torch.equal(mean, result.mean)
    assert result.values.shape == (N_LAYERS, N_POS, 2)
    every = patching.get_act_patch_block_every(model, CORRUPTED, clean, difference, reduce="none")
    assert list(every) == ["resid_pre", "attn_out", "mlp_out"]
    with pytest.raises(ArgumentError, match="'mean' or 'none'; got 'sum'"):
        patching.get_act_patch_resid_pre(model, CORRUPTED, clean, difference, reduce="sum")


def test_a_setter_of_ones_own(given):
    """It writes into its argument, or returns another tensor; the index is TransformerLens'."""
    model, clean, _, _ = given
    seen = []

    def half(corrupted_activation, index, clean_activation):
        seen.append(index)
        _, pos = index
        new = corrupted_activation.clone()
        new[:, pos] = (new[:, pos] + clean_activation[:, pos]) / 2
        return new

    call = (model, CORRUPTED, clean, mean_difference, half, "resid_pre")
    found = patching.generic_activation_patch(*call, index_axis_names=["layer", "pos"])
    cells = []
    for layer in LAYERS:
        for pos in POSITIONS:

            def patch(value, hook, pos=pos):
                value[:, pos] = (value[:, pos] + clean[hook.name][:, pos]) / 2
                return value

            with torch.no_grad():
                logits = model.run_with_hooks(CORRUPTED, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", patch)])
            cells.append(mean_difference(logits))
    assert_close(found, torch.stack(cells).reshape(N_LAYERS, N_POS))
    assert seen[:2] == [[0, 0], [0, 1]]


def test_indices_from_a_data_frame(given):
    """One axis, in the frame's order; the frame comes back if wanted."""
    model, clean, _, _ = given
    frame = patching.make_df_from_ranges([N_LAYERS, N_POS], ["layer", "pos"])
    assert frame.iloc[N_POS].tolist() == [1, 0]
    whole = patching.get_act_patch_resid_pre(model, CORRUPTED, clean, mean_difference)
    some = frame.iloc[[7, 2, 5]]
    found, back = patching.get_act_patch_resid_pre(
        model, CORRUPTED, clean, mean_difference, index_df=some, return_index_df=True
    )
    assert back is some
    assert_close(found, whole.flatten()[[7, 2, 5]])
    again, made = patching.get_act_patch_resid_pre(model, CORRUPTED, clean, mean_difference, return_index_df=True)
    assert torch.equal(again, whole)
    assert made.equals(frame)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give index_axis_names"),
        ({"index_axis_names": ["pos", "layer"]}, "'layer' and then some of"),
        ({"index_axis_names": ["layer", "position"]}, "'layer' and then some of"),
        ({"index_axis_names": ["layer", "pos"], "stop_at_layer": 1}, "no stop_at_layer"),
        ({"index_axis_names": ["layer"], "activation_name": "hook_embed"}, "outside of the blocks"),
    ],
)
def test_mistakes_are_told(given, options, message):
    """As errors of ours."""
    model, clean, _, _ = given
    call = {
        "corrupted_tokens": CORRUPTED,
        "clean_cache": clean,
        "patching_metric": mean_difference,
        "patch_setter": lambda corrupted, index, clean: corrupted,
        "activation_name": "resid_pre",
        **options,
    }
    with pytest.raises(ArgumentError, match=message):
        patching.generic_activation_patch(model, **call)


def test_setters_check_their_index():
    """The names of what is missing stand in the message."""
    value = torch.zeros(1, 2, 3)
    with pytest.raises(ArgumentError, match=r"index is \[layer, pos\]; got \[1\]"):
        patching.layer_pos_patch_setter(value, [1], value)
    clean = torch.ones(1, 2, 3, 4)
    patched = patching.layer_pos_head_vector_patch_setter(torch.zeros(1, 2, 3, 4), [0, 1, 2], clean)
    assert patched.nonzero()[:, :3].unique(dim=0).tolist() == [[0, 1, 2]]


def test_a_function_of_transformer_lens_is_in_lens_patching():
    """By the names that its 3.1 has."""
    assert set(dir(lens.patching)) >= set(patching.__all__)
    assert lens.patching.get_act_patch_resid_pre.__doc__.startswith("Patch the stream that enters a block")
