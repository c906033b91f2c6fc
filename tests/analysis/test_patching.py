"""Sweeps against one forward for each cell: every family, every kind of axis, both engines."""

import pytest
import torch
from analysis.patching_subject import CLEAN, CORRUPTED, FAMILIES, N_POS, assert_close, difference, one_by_one, subject
from golden.tiny import pad, random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from lens_conformance.float64 import true_float64

import lens_core as lens
from lens_core.analysis import _sweep, _sweep_packed
from lens_core.analysis.patching import patch_sweep
from lens_core.errors import ArgumentError, CacheError, UnknownHookError

ALL = slice(None)
POSITIONS = range(N_POS)
SOME = [1, 4]


def by_pos(p):
    """Give one position."""
    return ALL, p


def by_pos_and(p, h):
    """Give one position of one head, neuron or channel."""
    return ALL, p, h


ATTENTION = {  # name: axes, ranges below the layer, the slice, what is chosen
    "resid_pre": (("layer", "position"), [POSITIONS], by_pos, {}),
    "resid_mid": (("layer", "position"), [POSITIONS], by_pos, {}),
    "resid_post": (("layer", "position"), [SOME], by_pos, {"patch_positions": SOME}),
    "attn_out": (("layer", "position"), [SOME], by_pos, {"patch_positions": SOME}),
    "mlp_out": (("layer", "position"), [POSITIONS], by_pos, {}),
    "mlp_in": (("layer", "position"), [SOME], by_pos, {"patch_positions": SOME}),
    "z": (("layer", "position", "head"), [POSITIONS, [0, 2]], by_pos_and, {"heads": [0, 2]}),
    "q": (("layer", "position", "head"), [SOME, [1]], by_pos_and, {"heads": [1], "patch_positions": SOME}),
    "k": (("layer", "position", "head"), [POSITIONS, [0, 1]], by_pos_and, {"heads": [0, 1]}),
    "v": (("layer", "head"), [range(2)], lambda h: (ALL, ALL, h), {"heads": [0, 1]}),
    "mlp.hook_post": (
        ("layer", "position", "neuron"),
        [SOME, [0, 9]],
        by_pos_and,
        {"neurons": [0, 9], "patch_positions": SOME},
    ),
    "pattern": (("layer", "head"), [range(2)], lambda h: (ALL, h), {"heads": [0, 1]}),
    "attn_scores": (
        ("layer", "head", "destination"),
        [[1], [2, 5]],
        lambda h, q: (ALL, h, q),
        {"heads": [1], "patch_positions": [2, 5]},
    ),
    "ln1.hook_scale": (("layer", "position"), [SOME], by_pos, {"patch_positions": SOME}),
}
SSM = {
    "resid_pre": (("layer", "position"), [POSITIONS], by_pos, {}),
    "mixer_out": (("layer", "position"), [POSITIONS], by_pos, {}),
    "conv_in": (("layer", "position"), [SOME], by_pos, {"patch_positions": SOME}),
    "delta": (("layer", "position"), [SOME], by_pos, {"patch_positions": SOME}),
    "ssm_state": (("layer", "position"), [POSITIONS], by_pos, {}),
    "ssm_output": (("layer",), [], lambda: (ALL,), {}),
}
CASES = [("gpt2", name) for name in ATTENTION]
CASES += [("llama", name) for name in ("resid_pre", "z", "k", "v", "mlp.hook_post", "pattern")]
CASES += [(family, name) for family in ("mamba", "mamba2") for name in SSM]


@pytest.fixture(scope="module")
def subjects():
    """Give a tiny model of each family and its clean cache."""
    models = {family: subject(family) for family in FAMILIES}
    return {
        family: (model, model.run_with_cache(CLEAN, names_filter=_names(model))[1]) for family, model in models.items()
    }


def _names(model):
    return [point.name for point in model.hook_points() if point.shape.startswith("batch") and "rep" not in point.name]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_cell_is_one_forward(subjects, family, name):
    """To rounding by the engine of its choice; to the bit with the shapes of single runs."""
    model, clean = subjects[family]
    axes, ranges, place, chosen = (SSM if family.startswith("mamba") else ATTENTION)[name]
    layers = [0, 2]
    expected = one_by_one(model, CORRUPTED, clean, difference, name, [layers, *ranges], place)
    given = {"axes": axes, "layers": layers, **chosen}
    fast = patch_sweep(model, CORRUPTED, clean, difference, name, positions=-1, **given)
    assert_close(fast.values, expected)
    same = patch_sweep(model, CORRUPTED, clean, difference, name, exact=True, batch_size=1, **given)
    assert torch.equal(same.values, expected)
    assert same.engine == "exact"
    assert fast.effect.abs().max() > 1e-3, "the patches do something"
    assert fast.engine == ("packed" if "position" in axes and not family.startswith("mamba") else "exact")


def test_which_engine_ran(subjects):
    """Positions of attention blocks are packed; recurrent states, whole rows and entries of two positions are not."""
    for family, name, axes, engine in [
        ("gpt2", "resid_pre", ("layer", "position"), "packed"),
        ("llama", "k", ("layer", "position", "head"), "packed"),
        ("llama", "v", ("layer", "head"), "exact"),
        ("gpt2", "pattern", ("layer", "head"), "exact"),
        ("mamba", "resid_pre", ("layer", "position"), "exact"),
        ("mamba2", "ssm_state", ("layer", "position"), "exact"),
    ]:
        model, clean = subjects[family]
        assert patch_sweep(model, CORRUPTED, clean, difference, name, axes=axes).engine == engine, (family, name)


def test_source_by_destination(subjects):
    """One weight of the attention at a time."""
    for family in ("gpt2", "llama"):
        model, clean = subjects[family]
        expected = one_by_one(
            model, CORRUPTED, clean, difference, "pattern", [[1], [2], [3, 5], [0, 2]], lambda h, q, k: (ALL, h, q, k)
        )
        axes = ("layer", "head", "destination", "source")
        chosen = {"layers": 1, "heads": 2, "patch_positions": [3, 5], "sources": [0, 2]}
        found = patch_sweep(model, CORRUPTED, clean, difference, "pattern", axes=axes, **chosen)
        assert_close(found.values, expected)
        assert found.axes == axes
        assert found.indices == ((1,), (2,), (3, 5), (0, 2))


def test_places_outside_of_the_blocks(subjects):
    """The embeddings, and what follows the blocks."""
    model, clean = subjects["gpt2"]
    for name in ("hook_embed", "ln_final.hook_normalized", "unembed.hook_out"):
        expected = one_by_one(model, CORRUPTED, clean, difference, name, [[None], POSITIONS], by_pos)[0]
        found = patch_sweep(model, CORRUPTED, clean, difference, name, positions=-1)
        assert found.axes == ("position",)
        assert_close(found.values, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_float64(family):
    """Where single precision hides nothing."""
    with true_float64():
        model = subject(family, dtype=torch.float64) if family != "llama" else subject(family).to(torch.float64)
        _, clean = model.run_with_cache(CLEAN, names_filter="resid_pre")
        expected = one_by_one(model, CORRUPTED, clean, difference, "resid_pre", [range(3), POSITIONS], by_pos)
        found = patch_sweep(model, CORRUPTED, clean, difference)
    assert found.values.dtype == torch.float64
    assert_close(found.values, expected, share=1e-12)


def test_half_precision():
    """As near as the dtype's own rounding."""
    model = lens.load(tiny_gpt2(dtype=torch.bfloat16))
    _, clean = model.run_with_cache(CLEAN, names_filter="resid_pre")
    expected = one_by_one(model, CORRUPTED, clean, difference, "resid_pre", [range(3), POSITIONS], by_pos)
    found = patch_sweep(model, CORRUPTED, clean, difference)
    assert found.values.dtype == torch.float32
    assert_close(found.values, expected.float(), share=0.05)
    assert torch.equal(
        patch_sweep(model, CORRUPTED, clean, difference, exact=True, batch_size=1).values, expected.float()
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(subjects, family, side):
    """A padded batch, the metric at each row's last token: as one forward for each cell."""
    model, _ = subjects[family]
    corrupted, mask = pad([random_tokens(1, 4)[0], random_tokens(1, 6, seed=3)[0]], side)
    clean_ids, _ = pad([random_tokens(1, 4, seed=5)[0], random_tokens(1, 6, seed=6)[0]], side)
    _, clean = model.run_with_cache(clean_ids, attention_mask=mask, names_filter="resid_pre")
    last = mask.cumsum(1).argmax(1)

    def at_last(logits):
        rows = logits[torch.arange(2), last] if logits.shape[1] > 1 else logits[:, 0]
        return rows[:, 3] - rows[:, 5]

    layers = [0, 2]
    expected = one_by_one(
        model, corrupted, clean, at_last, "resid_pre", [layers, range(2, 6)], by_pos, attention_mask=mask
    )
    options = {"layers": layers, "patch_positions": range(2, 6), "attention_mask": mask}
    found = patch_sweep(model, corrupted, clean, at_last, positions=last, **options)
    assert_close(found.values, expected)
    assert found.engine == ("exact" if family.startswith("mamba") else "packed")
    assert_close(patch_sweep(model, corrupted, clean, at_last, exact=True, **options).values, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_has_its_own_positions(subjects, family):
    """A column patches another position in each row; with no axis of positions all of them at once."""
    model, clean = subjects[family]
    own = torch.tensor([[1, 4], [3, -1]])

    def place(column):
        return torch.arange(2), own[:, column]

    expected = one_by_one(model, CORRUPTED, clean, difference, "resid_pre", [[0, 1], [0, 1]], place)
    found = patch_sweep(model, CORRUPTED, clean, difference, layers=[0, 1], patch_positions=own, positions=-1)
    assert_close(found.values, expected)
    listed = patch_sweep(model, CORRUPTED, clean, difference, layers=[0, 1], patch_positions=own.tolist())
    assert_close(listed.values, expected)
    assert found.indices[1] == (0, 1)
    together = patch_sweep(
        model, CORRUPTED, clean, difference, axes=("layer",), layers=[0, 1], patch_positions=own, positions=-1
    )
    pairs = torch.arange(2)[:, None], own
    assert_close(together.values, one_by_one(model, CORRUPTED, clean, difference, "resid_pre", [[0, 1]], lambda: pairs))


def test_states_in_each_row_at_its_own_position(subjects):
    """Inside the recurrence as well, where a function sees one position at a time."""
    for family in ("mamba", "mamba2"):
        model, clean = subjects[family]
        own = torch.tensor([2, 4])
        found = patch_sweep(model, CORRUPTED, clean, difference, "ssm_state", layers=1, patch_positions=own)
        for row in range(2):
            alone = one_by_one(model, CORRUPTED, clean, difference, "ssm_state", [[1], [int(own[row])]], by_pos)
            torch.testing.assert_close(found.values[0, 0, row], alone[0, 0, row], rtol=1e-5, atol=1e-5)


def test_the_metric_sees_the_positions_it_asked_for(subjects):
    """And all of them where it asked for none."""
    model, clean = subjects["gpt2"]
    shapes = []

    def metric(logits):
        shapes.append(tuple(logits.shape))
        return logits[:, 0, 3]

    for positions, n in [(None, 6), (-1, 1), ([1, 3], 2), (slice(2, 5), 3), (torch.tensor([4, 2]), 1)]:
        shapes.clear()
        found = patch_sweep(model, CORRUPTED, clean, metric, positions=positions)
        assert set(shapes) == {(2, n, 29)}
        naive = one_by_one(
            model,
            CORRUPTED,
            clean,
            lambda logits, at=positions: logits[
                torch.arange(2), at if isinstance(at, torch.Tensor) else torch.arange(6)[at or slice(None)].flatten()[0]
            ][:, 3],
            "resid_pre",
            [range(3), POSITIONS],
            by_pos,
        )
        assert_close(found.values, naive)


def test_cells_that_cannot_differ_are_not_run(subjects):
    """Where both texts agree so far, and after the last position that the metric looks at."""
    model, _ = subjects["gpt2"]
    clean_ids = CORRUPTED.clone()
    clean_ids[:, 3:] = CLEAN[:, 3:]
    _, clean = model.run_with_cache(clean_ids, names_filter="resid_pre")
    found = patch_sweep(model, CORRUPTED, clean, lambda logits: logits[:, -1, 3], positions=4)
    assert found.n_run == 3 * 2
    assert torch.equal(found.effect[:, :3], torch.zeros(3, 3, 2))
    assert torch.equal(found.effect[:, 5], torch.zeros(3, 2))
    expected = one_by_one(
        model, CORRUPTED, clean, lambda logits: logits[:, 4, 3], "resid_pre", [range(3), POSITIONS], by_pos
    )
    assert_close(found.values, expected)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_any_number_of_cells_at_once(subjects, batch_size):
    """Packed or beside each other."""
    for family in ("llama", "mamba2"):
        model, clean = subjects[family]
        expected = one_by_one(model, CORRUPTED, clean, difference, "resid_pre", [range(3), POSITIONS], by_pos)
        assert_close(patch_sweep(model, CORRUPTED, clean, difference, batch_size=batch_size).values, expected)


def test_few_logits_at_once(subjects, monkeypatch):
    """What waits for its logits is measured in pieces."""
    model, clean = subjects["gpt2"]
    expected = patch_sweep(model, CORRUPTED, clean, difference).values
    monkeypatch.setattr(_sweep, "LOGITS", 29 * 20)
    monkeypatch.setattr(_sweep, "AT_ONCE", {"cpu": 17})
    assert_close(patch_sweep(model, CORRUPTED, clean, difference).values, expected)


# ---------------------------------------------------------------------- where packing applies


@pytest.mark.parametrize(
    ("variant", "overrides", "engine"),
    [
        ("mistral", {"sliding_window": 3}, "exact"),
        ("mistral", {"sliding_window": 16}, "packed"),
        ("gemma2", {"sliding_window": 3, "attn": "eager"}, "exact"),
        ("gemma2", {"sliding_window": 32, "attn": "eager"}, "packed"),
        ("llama-dynamic", {}, "packed"),
        ("stablelm-parallel", {}, "packed"),
        ("mixtral", {"sliding_window": None}, "packed"),
        ("gpt_oss", {"sliding_window": 32, "attn": "eager"}, "packed"),
    ],
)
def test_attention_that_looks_back_less_far_runs_whole_rows(variant, overrides, engine):
    """By itself, and the result says so."""
    model = lens.load(tiny_llama(variant, **overrides))
    _, clean = model.run_with_cache(CLEAN, names_filter="resid_pre")
    expected = one_by_one(model, CORRUPTED, clean, difference, "resid_pre", [[0, 2], [0, 2, 4]], by_pos)
    given = {"layers": [0, 2], "patch_positions": [0, 2, 4], "positions": -1}
    found = patch_sweep(model, CORRUPTED, clean, difference, **given)
    assert_close(found.values, expected)
    assert found.engine == engine


def test_eager_attention_is_packed_too():
    """Its mask is added to the scores as well."""
    for model in (lens.load(tiny_gpt2(attn="eager")), lens.load(tiny_llama(attn="eager"))):
        _, clean = model.run_with_cache(CLEAN, names_filter="resid_pre")
        expected = one_by_one(model, CORRUPTED, clean, difference, "resid_pre", [range(3), POSITIONS], by_pos)
        found = patch_sweep(model, CORRUPTED, clean, difference)
        assert found.engine == "packed"
        assert_close(found.values, expected)


def test_a_model_whose_attention_ignores_the_mask_runs_whole_rows(monkeypatch):
    """Two cells are run both ways first."""
    model = lens.load(tiny_gpt2())
    _, clean = model.run_with_cache(CLEAN, names_filter="resid_pre")
    expected = one_by_one(model, CORRUPTED, clean, difference, "resid_pre", [range(3), POSITIONS], by_pos)
    real = _sweep_packed._mask
    monkeypatch.setattr(_sweep_packed, "_mask", lambda *args: torch.zeros_like(real(*args)))
    found = patch_sweep(model, CORRUPTED, clean, difference)
    assert found.engine == "exact"
    assert_close(found.values, expected)


# ---------------------------------------------------------------------- metrics, hooks, errors


def test_several_metrics_and_a_single_number(subjects):
    """Each cell's logits are handed over by themselves, so that a metric may know its rows' answers."""
    model, clean = subjects["gpt2"]
    answers = torch.tensor([3, 7])

    def answered(logits):
        return logits[torch.arange(2), -1, answers]

    found = patch_sweep(
        model,
        CORRUPTED,
        clean,
        {"rows": answered, "one": lambda logits: answered(logits).mean(), "float": lambda _: 1.5},
    )
    assert list(found) == ["rows", "one", "float"]
    assert found["one"].values.shape == (3, N_POS, 1)
    torch.testing.assert_close(found["one"].mean, found["rows"].mean)
    assert found["float"].values.unique().tolist() == [1.5]
    with torch.no_grad():
        torch.testing.assert_close(found["rows"].baseline, answered(model(CORRUPTED)))


def test_live_hooks_are_run_in_every_cell(subjects):
    """As in a forward of its own."""
    model, clean = subjects["gpt2"]
    seen = []

    def halve(value, hook):
        seen.append(tuple(value.shape))
        return value * 0.5

    with model.hooks(fwd_hooks=[("blocks.2.hook_mlp_out", halve), ("blocks.0.hook_attn_out", halve)]):
        found = patch_sweep(model, CORRUPTED, clean, difference, positions=-1)
        shapes = set(seen)
        expected = one_by_one(model, CORRUPTED, clean, difference, "resid_pre", [range(3), POSITIONS], by_pos)
    assert shapes == {(2, N_POS, 21)}
    assert found.engine == "exact"
    assert_close(found.values, expected)


def test_one_clean_row_serves_all(subjects):
    """And a cache without its batch axis."""
    model, _ = subjects["gpt2"]
    _, clean = model.run_with_cache(CLEAN[:1], names_filter="resid_pre")
    wide = {name: value.expand(2, -1, -1) for name, value in clean.items()}
    expected = one_by_one(model, CORRUPTED, wide, difference, "resid_pre", [range(3), POSITIONS], by_pos)
    assert_close(patch_sweep(model, CORRUPTED, clean, difference).values, expected)
    assert_close(patch_sweep(model, CORRUPTED, clean.remove_batch_dim(), difference).values, expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "resid_pro"}, UnknownHookError, "did you mean"),
        ({"name": ["q", "k"]}, ArgumentError, "attn.hook_k, attn.hook_q"),
        ({"name": "hf.transformer.h.0.output"}, ArgumentError, "run_with_hooks"),
        ({"axes": ("layer", "head")}, ArgumentError, "has no axis 'head'; it has layer, position, d_model"),
        ({"axes": ("layer", "position", "pos")}, ArgumentError, "twice"),
        ({"axes": ("position",)}, ArgumentError, "3 layers and no axis 'layer'"),
        ({"layers": 3}, ArgumentError, "layers are from -3 to 2; got 3"),
        ({"layers": [1, -2]}, ArgumentError, "each once"),
        ({"heads": [0]}, ArgumentError, "no axis 'head'"),
        ({"name": "z", "heads": [3], "axes": ("layer", "head")}, ArgumentError, "head are from -3 to 2; got 3"),
        ({"patch_positions": [6]}, ArgumentError, "from -6 to 5; got 6"),
        ({"patch_positions": torch.tensor([1, 2, 3])}, ArgumentError, "one or more for each row"),
        ({"patch_positions": [[1], [2, 3]]}, ArgumentError, "as many positions as the others"),
        ({"positions": [9]}, ArgumentError, "positions are from -6 to 5; got 9"),
        ({"batch_size": 0}, ArgumentError, "1 or more; got 0"),
        ({"metric": lambda logits: logits[0]}, ArgumentError, "one number for each of the 2 rows"),
        ({"metric": 3}, ArgumentError, "function of the logits"),
        ({"metric": {}}, ArgumentError, "function of the logits"),
        ({"stop_at_layer": 2}, ArgumentError, "no stop_at_layer"),
        ({"clean_cache": {}}, CacheError, "does not hold 'blocks.0.hook_resid_pre'"),
        ({"corrupted": CORRUPTED[:, :4]}, CacheError, "has 6 positions at .* input has 4"),
        ({"corrupted": random_tokens(3, 6)}, CacheError, "has 2 rows at"),
    ],
)
def test_mistakes_are_told(subjects, options, error, message):
    """And the model is as it was."""
    model, clean = subjects["gpt2"]
    call = {"corrupted": CORRUPTED, "clean_cache": clean, "metric": difference, **options}
    with pytest.raises(error, match=message):
        patch_sweep(model, **call)
    assert patch_sweep(model, CORRUPTED, clean, difference, layers=1, patch_positions=2).values.isfinite().all()


def test_training_mode_is_refused():
    """Dropout makes no two runs alike."""
    model = lens.load(tiny_gpt2())
    _, clean = model.run_with_cache(CLEAN, names_filter="resid_pre")
    model.train()
    with pytest.raises(ArgumentError, match=r"call model\.eval\(\)"):
        patch_sweep(model, CORRUPTED, clean, difference)
