"""Steering vectors: by loops over texts, added by hand, generated token by token, saved and refused."""

import attrs
import pytest
import torch
from analysis.four_families import FAMILIES, tiny
from golden.tiny import random_tokens, tiny_gpt2, tiny_tokenizer
from safetensors.torch import load_file, save_file

import lens_core as lens
from lens_core.analysis.activations import collect_activations
from lens_core.analysis.dose_response import dose_response
from lens_core.analysis.probing import fit_probes
from lens_core.analysis.steering import SteeringVector, activation_addition, steering_from_probe, steering_vector
from lens_core.errors import AnalysisFileError, ArgumentError, InputError, UnsupportedHookError

HIGH = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
LOW = [[2, 2, 1], [3, 9, 9, 5], [4, 6, 1]]
PLACE = "blocks.1.hook_resid_post"
TOKENS = random_tokens()


def last(model, ids, name=PLACE):
    """Give one text's activation at its last token, in float64."""
    _, cache = model.run_with_cache(torch.tensor([ids]), names_filter=name)
    return cache[name][0, -1].double().flatten()


def vector_of(model, *, scale=1.0):
    """Give a steering vector at layer 1 made by hand."""
    rows = scale * torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    return SteeringVector(vectors={PLACE: rows}, norms={PLACE: 5.0}, method="by hand", n_examples=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_difference_is_the_difference_of_the_means(family):
    """At every layer, and at any position; the sides need not be of one size."""
    model = tiny(family)
    found = steering_vector(model, HIGH, LOW[:2])
    assert list(found.vectors) == [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    for name, vector in found.vectors.items():
        sides = [torch.stack([last(model, ids, name) for ids in side]) for side in (HIGH, LOW[:2])]
        assert torch.allclose(vector.double(), sides[0].mean(0) - sides[1].mean(0), atol=1e-5)
        assert found.norms[name] == pytest.approx(torch.cat(sides).norm(dim=1).mean().item(), rel=1e-5)
    assert found.n_examples == 5


def test_the_principal_component_holds_most_of_the_differences():
    """The first eigenvector of the sum of outer products, towards the positive side, as long as the mean along it."""
    model = tiny("llama")
    found = steering_vector(model, HIGH, LOW, PLACE, method="pca").vectors[PLACE].double()
    rows = torch.stack([last(model, high) - last(model, low) for high, low in zip(HIGH, LOW, strict=True)])
    unit = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
    assert torch.allclose(found, (rows @ unit).mean() * unit, atol=1e-4)
    assert (rows @ found).mean() > 0
    with pytest.raises(ArgumentError, match="3 positive and 2 negative"):
        steering_vector(model, HIGH, LOW[:2], PLACE, method="pca")


def test_a_probe_steers_towards_its_class():
    """Its direction, as long as the classes lie apart; towards either, or one of several."""
    model = tiny("mamba")
    texts = [[first, second, 3] for first in range(5, 11) for second in (1, 2)]
    activations = collect_activations(model, texts, PLACE)
    probes = fit_probes(activations, ["one", "two"] * 6, folds=2, n_controls=1)
    probe = probes.probe(PLACE)
    to_two, to_one = (steering_from_probe(model, probes, label=label) for label in (None, "one"))
    assert torch.allclose(to_two.vectors[PLACE].double(), probe.gap() * probe.direction(), atol=1e-5)
    assert torch.allclose(to_one.vectors[PLACE], -to_two.vectors[PLACE])
    assert to_two.method == "probe of 'two'"
    assert to_two.norms[PLACE] == pytest.approx(activations[PLACE].norm(dim=-1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hooks_add_the_vector_and_nothing_else(family):
    """Like a function written by hand, in three units, at chosen positions."""
    model = tiny(family)
    vector = vector_of(model)
    v = vector.vectors[PLACE]
    for units, step in (("vector", v), ("unit", v / v.norm()), ("activation", 5 * v / v.norm())):
        for positions, where in ((None, slice(None)), (-1, slice(4, 5)), (slice(2, None), slice(2, None))):

            def add(resid, hook, where=where, step=step):
                resid[:, where] += -1.5 * step

            by_hand = model.run_with_hooks(TOKENS, fwd_hooks=[(PLACE, add)])
            found = model.run_with_hooks(TOKENS, fwd_hooks=vector.hooks(-1.5, positions=positions, units=units))
            assert torch.allclose(found, by_hand, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_steered_at_every_step(family):
    """Greedy by whole forwards of the growing text, the vector added from a position on."""
    model = tiny(family)
    hooks = vector_of(model, scale=4.0).hooks(positions=slice(3, None))
    with model.hooks(hooks):
        found = model.generate(TOKENS, max_new_tokens=5, do_sample=False, stop_at_eos=False)
    by_hand = TOKENS
    for _ in range(5):
        logits = model.run_with_hooks(by_hand, fwd_hooks=hooks)
        by_hand = torch.cat([by_hand, logits[:, -1:].argmax(-1)], dim=1)
    assert found.tolist() == by_hand.tolist()
    plain = model.generate(TOKENS, max_new_tokens=5, do_sample=False, stop_at_eos=False)
    assert plain.tolist() != found.tolist()


def test_heads_and_channels_are_steered_as_one_width():
    """At `hook_z` the vector is over all heads; their difference of means too."""
    model, name = tiny("gpt2"), "blocks.1.attn.hook_z"
    vector = steering_vector(model, HIGH, LOW, name)
    by_hand = vector.vectors[name].reshape(3, 7)
    found = model.run_with_hooks(TOKENS, fwd_hooks=vector.hooks())
    assert torch.allclose(
        found, model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda z, hook: z + by_hand)]), atol=1e-5
    )
    with model.hooks(vector.ablation_hooks()):
        _, cache = model.run_with_cache(TOKENS, names_filter=name)
    assert (cache[name].flatten(2) @ vector.vectors[name]).abs().max() < 1e-4


def test_one_pair_is_added_position_by_position():
    """The shorter prompt is padded on the right, and later positions are left alone."""
    model = tiny("gpt2")
    vector = activation_addition(model, "w1 w2 w3", "w4 w5", ("resid_pre", 1), pad=" w9")
    rows = [model.run_with_cache(text)[1]["resid_pre", 1] for text in ("w1 w2 w3", "w4 w5 w9")]
    difference = (rows[0] - rows[1])[0]
    assert torch.allclose(vector.vectors["blocks.1.hook_resid_pre"], difference, atol=1e-5)

    def add(resid, hook):
        resid[:, : len(difference)] += 5 * difference

    by_hand = model.run_with_hooks(TOKENS, fwd_hooks=[(("resid_pre", 1), add)])
    assert torch.allclose(model.run_with_hooks(TOKENS, fwd_hooks=vector.hooks(5.0)), by_hand, atol=1e-4)
    with model.hooks(vector.hooks(5.0)):
        model.generate(TOKENS, max_new_tokens=3, do_sample=False)
    with pytest.raises(ArgumentError, match="leave positions out"):
        vector.hooks(positions=0)
    with pytest.raises(ArgumentError, match="ablate one direction"):
        vector.ablation_hooks()
    with pytest.raises(InputError, match="pad=' x y' is not one token"):
        activation_addition(model, "w1 w2", "w3", ("resid_pre", 1), pad=" x y")
    with pytest.raises(ArgumentError, match="names 3"):
        activation_addition(model, "w1", "w3", "resid_pre")


def test_the_control_has_the_norms_and_no_direction():
    """Drawn from its seed, of each vector and of each position."""
    model = tiny("gpt2")
    vectors = {PLACE: torch.randn(21), "blocks.0.hook_resid_pre": torch.randn(4, 21)}
    vector = SteeringVector(vectors=vectors, norms={}, method="by hand", n_examples=0)
    first, again, second = vector.random_like(1), vector.random_like(1), vector.random_like(2)
    for name, given in vectors.items():
        assert torch.allclose(first.vectors[name].norm(dim=-1), given.norm(dim=-1))
        assert torch.equal(first.vectors[name], again.vectors[name])
        assert not torch.allclose(first.vectors[name], second.vectors[name])
    assert model.run_with_hooks(TOKENS, fwd_hooks=first.hooks()).shape == (2, 5, 29)


@pytest.mark.parametrize(("family", "max_rows"), [("gpt2", 1), ("gpt2", 64), *((family, 5) for family in FAMILIES)])
def test_a_dose_response_is_one_forward_for_each_cell(family, max_rows):
    """The vector and each random direction, at each scale; answers may be given for each row."""
    model = tiny(family)
    vector, answers = vector_of(model), torch.tensor([3, 11])

    def metric(logits):
        return logits[torch.arange(2), -1, answers]

    scales = (-1.0, 0.0, 2.0)
    found = dose_response(
        model, vector, TOKENS, metric, scales=scales, n_random=2, seed=9, max_rows=max_rows, positions=[1, -1]
    )
    assert torch.allclose(found.baseline, metric(model(TOKENS)), atol=1e-5)
    for index, scale in enumerate(scales):
        for own, values in [(vector, found.values), *((vector.random_like(9 + d), found.control[d]) for d in (0, 1))]:
            hooks = own.hooks(scale, positions=[1, -1])
            assert torch.allclose(values[index], metric(model.run_with_hooks(TOKENS, fwd_hooks=hooks)), atol=1e-4)


def test_a_dose_response_of_padded_texts_and_positions_of_their_own():
    """Padding is the model's business; a vector for each position works too."""
    model = tiny("gpt2")
    texts = ["w1 w2 w3", "w4"]
    vector = activation_addition(model, "w1 w2", "w4 w5", ("resid_pre", 1))
    found = dose_response(
        model, vector, texts, lambda logits: logits[:, -1, 2], scales=[3.0], units="unit", padding_side="left"
    )
    with model.hooks(vector.hooks(3.0, units="unit")):
        expected = model(texts, padding_side="left")[:, -1, 2]
    assert torch.allclose(found.values[0], expected, atol=1e-5)


def test_a_dose_response_tells_its_numbers():
    """Means, standard errors over rows, and the spread of random directions."""
    model = tiny("gpt2")
    found = dose_response(model, vector_of(model), TOKENS, lambda logits: logits[:, -1, 2], scales=(1, 2), n_random=3)
    frame = found.to_dataframe().set_index("scale")
    assert frame.loc[2.0, "effect"] == pytest.approx((found.values[1] - found.baseline).mean().item(), rel=1e-5)
    assert frame.loc[1.0, "stderr"] == pytest.approx(found.values[0].std().item() / 2**0.5, rel=1e-5)
    draws = (found.control[:, 1] - found.baseline).mean(-1)
    assert frame.loc[2.0, "control_std"] == pytest.approx(draws.std().item(), rel=1e-5)
    assert "control_effect" in found._repr_html_()
    for options, message in [
        ({"scales": []}, "empty"),
        ({"n_random": -1}, "n_random is a number from 0; got -1"),
        ({"units": "logits"}, "'logits'"),
        ({"layers": 0}, "no vector for layer 0"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            dose_response(model, vector_of(model), TOKENS, lambda logits: logits[:, -1, 2], **options)
    with pytest.raises(ArgumentError, match=r"each of the 2 rows; got \[\]"):
        dose_response(model, vector_of(model), TOKENS, lambda logits: logits.mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_comes_back_bit_for_bit(family, tmp_path):
    """With how it was made; and steers as before."""
    model = tiny(family)
    vector = steering_vector(model, HIGH, LOW, ["resid_post", "resid_pre"])
    vector.save(tmp_path / "vector.safetensors")
    again = SteeringVector.load(tmp_path / "vector.safetensors", model)
    assert all(torch.equal(again.vectors[name], value) for name, value in vector.vectors.items())
    assert (again.norms, again.method, again.n_examples) == (vector.norms, "mean", 6)
    assert again.origin["model_type"] == model.cfg.model_type
    hooks = [own.hooks(layers=[0, 2]) for own in (vector, again)]
    first, second = (model.run_with_hooks(TOKENS, fwd_hooks=own) for own in hooks)
    assert torch.equal(first, second)


def test_another_model_is_refused_and_another_dtype_is_not(tmp_path):
    """By what differs; `strict=False` carries it over where it fits."""
    model, path = tiny("gpt2"), tmp_path / "vector.safetensors"
    steering_vector(model, HIGH, LOW).save(path)
    half = lens.load(tiny_gpt2(dtype=torch.bfloat16))
    assert half.run_with_hooks(TOKENS, fwd_hooks=SteeringVector.load(path, half).hooks()).dtype == torch.bfloat16
    longer = lens.load(tiny_gpt2(n_positions=64), tokenizer=tiny_tokenizer())
    with pytest.raises(AnalysisFileError, match="n_positions is 32 there and 64 here"):
        SteeringVector.load(path, longer)
    assert SteeringVector.load(path, longer, strict=False).method == "mean"
    wider = lens.load(tiny_gpt2(n_embd=24))
    with pytest.raises(AnalysisFileError, match=r"shape \[21\] .* 24 wide here"):
        SteeringVector.load(path, wider, strict=False)
    with pytest.raises(AnalysisFileError, match="another model"):
        SteeringVector.load(path, tiny("mamba"))
    shallow = lens.load(tiny_gpt2(n_layer=2))
    with pytest.raises(AnalysisFileError, match="does not have"):
        SteeringVector.load(path, shallow, strict=False)


def test_damaged_files_are_refused(tmp_path):
    """Whatever was changed."""
    model, path = tiny("gpt2"), tmp_path / "vector.safetensors"
    vector = steering_vector(model, HIGH, LOW, PLACE)
    vector.save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for change in (
        {"norms": "[1]"},
        {"norms": '{"blocks.1.hook_resid_post": "x"}'},
        {"config": "nothing"},
        {"n_examples": "-1"},
        {"tensors": "{}"},
        {"format": "another"},
        {"format_version": "2"},
    ):
        save_file(tensors, path, metadata={**metadata, **change})
        with pytest.raises(AnalysisFileError):
            SteeringVector.load(path, model)
    save_file({PLACE: torch.full((21,), torch.nan)}, path, metadata=metadata)
    with pytest.raises(AnalysisFileError, match="not finite"):
        SteeringVector.load(path, model)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AnalysisFileError):
        SteeringVector.load(path, model)
    with pytest.raises(AnalysisFileError, match="no file"):
        SteeringVector.load(tmp_path / "none", model)
    with pytest.raises(AnalysisFileError, match="cannot be written"):
        vector.save(tmp_path / "none" / "vector")


def test_what_cannot_be_is_refused():
    """By name, with the value."""
    model = tiny("gpt2")
    with pytest.raises(ArgumentError, match="'median'"):
        steering_vector(model, HIGH, LOW, method="median")
    with pytest.raises(ArgumentError, match="same activations"):
        steering_vector(model, HIGH, HIGH)
    with pytest.raises(UnsupportedHookError, match="pattern"):
        steering_vector(model, HIGH, LOW, "pattern")
    vector = vector_of(model)
    for options, message in [
        ({"layers": 2}, r"layer 2; there are vectors for layers \[1\]"),
        ({"layers": slice(0, 2)}, "an int or several"),
        ({"scale": "big"}, "'big'"),
        ({"units": "sd"}, "'sd'"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            vector.hooks(**options)
    with pytest.raises(ArgumentError, match="not known"):
        attrs.evolve(vector, norms={}).hooks(units="activation")
