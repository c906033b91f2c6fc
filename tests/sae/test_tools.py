"""Top activations, reconstruction quality and feature attribution, each against a slow loop."""

import pytest
import torch
from golden.tiny import tiny_gpt2, tiny_tokenizer
from golden.tiny_ssm import tiny_ssm
from lens_conformance.float64 import true_float64
from sae.sae_subject import TOKENS, Subject, by_hand, made
from torch import Tensor

import lens_core as lens
from lens_core.errors import ArgumentError, EmptyInputError
from lens_core.saes import feature_attribution, reconstruction_quality, top_activations

NAME = "blocks.1.hook_resid_post"
ROWS = [torch.randint(0, 28, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 2, 9, 1, 7, 4)]


@pytest.fixture(scope="module")
def worded():
    """A tiny model with a tokenizer, an SAE, and the activations of each row by hand, one row at a time."""
    model = lens.load(tiny_gpt2(dtype=torch.float64), tokenizer=tiny_tokenizer())
    sae, weights = made("jumprelu", 21)
    acts = []
    for row in ROWS:
        _, cache = model.run_with_cache(torch.tensor([row]), names_filter=NAME)
        acts.append(by_hand({"architecture": "jumprelu"}, weights, cache[NAME].detach())["acts_post"][0])
    return model, sae, weights, acts


@pytest.mark.parametrize("batch_size", [1, 4])
def test_top_activations_are_the_largest_of_all_tokens(worded, batch_size):
    """Sorted in plain Python; texts of many lengths, from a generator; padding never counts."""
    model, sae, _, acts = worded
    features = [7, 0, 19]
    found = top_activations(model, sae, iter(ROWS), features, k=4, hook_name=NAME, window=(2, 1), batch_size=batch_size)
    assert (found.n_tokens, found.features.tolist()) == (28, features)
    for index, feature in enumerate(features):
        cells = [(float(row[p, feature]), r, p) for r, row in enumerate(acts) for p in range(len(row))]
        expected = sorted(cells, key=lambda cell: -cell[0])[:4]
        assert found.acts[index].tolist() == pytest.approx([act for act, *_ in expected])
        assert found.density[index].item() == pytest.approx(sum(act > 0 for act, *_ in cells) / 28)
        for k, (act, row, position) in enumerate(expected):
            if act == 0:
                assert (found.rows[index, k], found.windows[index, k].max()) == (-1, -1)
                continue
            assert (found.rows[index, k], found.positions[index, k]) == (row, position)
            around = [ROWS[row][p] if 0 <= p < len(ROWS[row]) else -1 for p in range(position - 2, position + 2)]
            assert found.windows[index, k].tolist() == around
    act, text = found.top(7)[0]
    assert act == found.acts[0, 0]
    assert f"«w{ROWS[found.rows[0, 0]][found.positions[0, 0]]}»" in text
    assert len(found.to_dataframe()) == int((found.rows >= 0).sum())
    assert "Feature 19" in found._repr_html_()


def test_special_tokens_are_left_out_unless_wanted(worded):
    """BOS is id 28."""
    model, sae, *_ = worded
    texts = ["w1 w2", "w3"]
    kept = top_activations(model, sae, texts, k=9, hook_name=NAME, prepend_bos=True)
    every = top_activations(model, sae, texts, k=9, hook_name=NAME, prepend_bos=True, skip_special=False)
    assert (kept.n_tokens, every.n_tokens) == (3, 5)
    assert not (kept.positions == 0).any()
    assert (every.positions == 0).any()
    assert kept.features.tolist() == list(range(23))


def test_wrong_questions(worded):
    """Answered by name."""
    model, sae, *_ = worded
    for options, message in (
        ({"k": 0}, "k is a positive"),
        ({"window": 3}, "window is"),
        ({"features": [23]}, "features 0 to 22"),
        ({"features": []}, "a list of numbers"),
    ):
        with pytest.raises(ArgumentError, match=message):
            top_activations(model, sae, ROWS, hook_name=NAME, **options)
    with pytest.raises(ArgumentError, match="not looked at"):
        top_activations(model, sae, ROWS, [3], hook_name=NAME).top(4)
    with pytest.raises(EmptyInputError):
        reconstruction_quality(model, sae, [[3]], hook_name=NAME)
    with pytest.raises(ArgumentError, match="steps"):
        feature_attribution(model, sae, TOKENS, lambda logits: logits.sum(), hook_name=NAME, steps=0)
    with pytest.raises(ArgumentError, match=r"one number.*\[2, 6, 29\]"):
        feature_attribution(model, sae, TOKENS, lambda logits: logits, hook_name=NAME)


def test_quality_is_what_the_definitions_say(worded):
    """One text at a time, with plain tensors."""
    model, sae, weights, acts = worded
    values, recons, losses = [], [], {"clean": 0.0, "spliced": 0.0, "zero": 0.0}
    for row, own in zip(ROWS, acts, strict=True):
        tokens = torch.tensor([row])
        _, cache = model.run_with_cache(tokens, names_filter=NAME)
        values.append(cache[NAME][0].detach())
        recons.append(own @ weights["W_dec"] + weights["b_dec"])
        put = {"clean": cache[NAME], "spliced": recons[-1][None], "zero": cache[NAME] * 0}
        for kind, value in put.items():
            logits = model.run_with_hooks(tokens, fwd_hooks=[(NAME, lambda _, hook, value=value: value)])[0]
            for position in range(len(row) - 1):
                losses[kind] -= logits[position].float().log_softmax(-1)[row[position + 1]].item()
    x, made_of, on = torch.cat(values), torch.cat(recons), torch.cat(acts) > 0
    targets = sum(len(row) - 1 for row in ROWS)
    error = (x - made_of).square().sum()
    quality = reconstruction_quality(model, sae, ROWS, hook_name=NAME, batch_size=4)
    assert quality.n_tokens == 28
    assert quality.variance_explained == pytest.approx(1 - float(error / (x - x.mean(0)).square().sum()))
    assert quality.mse == pytest.approx(float(error) / 28)
    assert quality.l0 == pytest.approx(float(on.sum()) / 28)
    assert quality.dead == pytest.approx(float((~on.any(0)).double().mean()))
    assert quality.cosine == pytest.approx(float((x * made_of).sum(1).div(x.norm(dim=1) * made_of.norm(dim=1)).mean()))
    for kind, total in losses.items():
        assert getattr(quality, f"ce_{kind}") == pytest.approx(total / targets, abs=1e-5), kind
    low, middle, high = (losses[kind] / targets for kind in ("clean", "spliced", "zero"))
    assert quality.ce_recovered == pytest.approx((high - middle) / (high - low), abs=1e-4)
    assert quality.ce_increase == pytest.approx(middle - low, abs=1e-5)
    assert quality.to_dataframe().shape == (1, 11)
    assert "variance_explained" in quality._repr_html_()


def test_a_perfect_sae_is_perfect():
    """One that gives back what it reads: nothing is lost, and zeros are what 0 is measured from."""
    model = lens.load(tiny_ssm("mamba", dtype=torch.float64))
    eye = torch.eye(13, dtype=torch.float64)
    cfg = lens.saes.SaeConfig(d_in=13, d_sae=26, dtype=torch.float64, hook_name="blocks.1.hook_mixer_out")
    weights = {"W_enc": torch.cat([eye, -eye], 1), "W_dec": torch.cat([eye, -eye]), "b_enc": torch.zeros(26)}
    sae = lens.saes.SparseAutoencoder(cfg, weights | {"b_dec": torch.zeros(13)})
    quality = reconstruction_quality(model, sae, ROWS)
    assert quality.variance_explained == pytest.approx(1)
    assert quality.ce_recovered == pytest.approx(1, abs=1e-6)
    assert (quality.l0, quality.dead) == (13, 0)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mamba", "mamba2"])
def test_attribution_is_activation_times_the_gradient_of_the_golden_forward(kind):
    """And with the error and the decoder's bias it adds up to gradient times value."""
    subject = Subject(kind)
    sae, weights = made("jumprelu", subject.width(NAME))
    logits, values = subject.golden()

    def metric(logits: Tensor) -> Tensor:
        return (logits[:, -1, 3] - logits[:, -1, 5]).sum()

    metric(logits).backward()
    at_value = values[NAME].grad
    parts = by_hand({"architecture": "jumprelu"}, weights, values[NAME].detach())
    with true_float64():
        found = feature_attribution(subject.model, sae, TOKENS, metric, hook_name=NAME)
    assert torch.allclose(found.features, parts["acts_post"] * (at_value @ weights["W_dec"].T), atol=1e-8)
    whole = (at_value * values[NAME]).sum(-1)
    bias = at_value @ weights["b_dec"]
    assert torch.allclose(found.features.sum(-1) + found.error + bias, whole, atol=1e-8)
    assert found.metric == pytest.approx(metric(logits).item())
    row, position, feature, value = found.top(1)[0]
    assert abs(value) == float(found.features.abs().max()) == abs(float(found.features[row, position, feature]))
    best, value = found.top_features(1)[0]
    assert value == float(found.features.sum((0, 1))[best])
    assert abs(value) == float(found.features.sum((0, 1)).abs().max())
    assert all(parameter.grad is None for parameter in subject.hf.parameters())


def test_integrated_gradients_add_up_to_what_all_features_do(worded):
    """The metric with all features less the metric with none, the error term in place."""
    model, sae, *_ = worded

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 3].sum()

    with model.saes({NAME: sae}, use_error_term=True):
        off = model.run_with_hooks(TOKENS, fwd_hooks=[(f"{NAME}.hook_sae_acts_post", lambda acts, hook: acts * 0)])
    expected = (metric(model(TOKENS)) - metric(off)).item()
    errors = []
    for steps in (1, 8, 64):
        found = feature_attribution(model, sae, TOKENS, metric, hook_name=NAME, steps=steps)
        errors.append(abs(float(found.features.sum()) - expected))
    assert errors[2] < 1e-3 * abs(expected)
    assert errors[2] < errors[1] < errors[0]


def test_attribution_ranks_as_ablation_does(worded):
    """At the end of the last block, before the final norm, with one forward for each feature."""
    model, sae, *_ = worded
    name, clean = "blocks.2.hook_resid_post", float(model(TOKENS[:1])[0, -1, 3].detach())
    found = feature_attribution(model, sae, TOKENS[:1], lambda logits: logits[0, -1, 3], hook_name=name)
    exact = []
    with torch.no_grad(), model.saes({name: sae}, use_error_term=True):
        for feature in range(23):

            def off(acts: Tensor, hook: object, feature: int = feature) -> Tensor:
                return acts * (torch.arange(23) != feature)

            logits = model.run_with_hooks(TOKENS[:1], fwd_hooks=[(f"{name}.hook_sae_acts_post", off, -1)])
            exact.append(clean - float(logits[0, -1, 3]))
    linear = found.features[0, -1]
    assert not found.features[0, :-1].any()
    assert torch.corrcoef(torch.stack([linear, torch.tensor(exact)]))[0, 1] > 0.9
    assert int(linear.abs().argmax()) == max(range(23), key=lambda one: abs(exact[one]))
