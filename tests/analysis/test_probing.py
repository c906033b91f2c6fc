"""Probes against scikit-learn called by hand, on activations made by hand and on tiny models."""

import math

import numpy as np
import pytest
import torch
from analysis.four_families import FAMILIES, tiny
from scipy.stats import binomtest
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lens_core as lens
from lens_core.analysis import probing
from lens_core.analysis._linear_probe import separation, wilson
from lens_core.analysis.activations import Activations, collect_activations
from lens_core.errors import ArgumentError, UnknownHookError

NAME = "blocks.0.hook_resid_post"
G = np.random.default_rng(0)


def made(values, texts=None, tokens=None):
    """Give activations of one hook point and position, made by hand."""
    n = len(values)
    tokens = torch.arange(n) if tokens is None else torch.tensor(tokens)
    texts = torch.arange(n) if texts is None else torch.tensor(texts)
    ids = tuple(tokens[texts == text] for text in range(int(texts.max()) + 1))
    at = torch.cat([torch.arange(len(own)) for own in ids])[:, None]
    return Activations(
        values={NAME: torch.as_tensor(values, dtype=torch.float32)[:, None]},
        positions=(-1,),
        tokens=tokens[:, None],
        texts=texts,
        ids=ids,
        at=at,
        table=tiny("gpt2").table,
    )


def blobs(n=60, width=5, classes=2, distance=2.0, seed=0):
    """Give points around a mean for each class, of very different spread along each axis."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    means = rng.normal(size=(classes, width)) * distance
    return (means[y] + rng.normal(size=(n, width))) * np.array([1e-2, 1, 10, 100, 1][:width]), y


@pytest.mark.parametrize("classes", [2, 3])
def test_held_out_accuracy_is_that_of_scikit_learn(classes):
    """The same folds through a pipeline of its own."""
    x, y = blobs(classes=classes, distance=0.7)
    found = probing.fit_probes(made(x), y, C=0.3, folds=4, seed=7)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=2000))
    x32 = torch.as_tensor(x, dtype=torch.float32).double().numpy()
    predicted = cross_val_predict(pipeline, x32, y, cv=StratifiedKFold(4, shuffle=True, random_state=7))
    assert 0.5 < (predicted == y).mean() < 1.0
    assert found.accuracy.item() == pytest.approx((predicted == y).mean())
    fitted = pipeline.fit(x32, y)
    probe = found.probe(NAME)
    assert np.array_equal(probe.predict(torch.tensor(x32)).numpy(), fitted.predict(x32))
    assert np.allclose(probe.scores(torch.tensor(x32)).squeeze(-1), fitted.decision_function(x32), atol=1e-6)


def test_the_interval_is_wilsons():
    """At the number of texts."""
    for right, n in [(9, 10), (60, 60), (0, 7), (31, 50)]:
        expected = binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)
    x, y = blobs()
    found = probing.fit_probes(made(x), y)
    assert (found.low.item(), found.high.item()) == pytest.approx(wilson(found.accuracy.item(), 60))


def test_labels_without_meaning_cannot_be_learned_from_few_values():
    """The probe is right about the classes and at chance about shuffled ones; selectivity is the difference."""
    x, y = blobs(n=200, distance=3.0)
    found = probing.fit_probes(made(x), y, n_controls=3)
    assert found.accuracy.item() > 0.95
    assert found.majority == 0.5
    assert (found.control - 0.5).abs().max() < 0.15
    assert found.selectivity.item() == pytest.approx((found.accuracy - found.control.mean(0)).item())


def test_tokens_of_one_text_are_not_split_between_fitting_and_measuring():
    """Copies of a point with its random label would be recalled; kept together they are not."""
    rng = np.random.default_rng(1)
    points, labels = rng.normal(size=(40, 30)), np.arange(40) % 2
    x, y, texts = points.repeat(5, 0), labels.repeat(5), np.arange(40).repeat(5)
    leaking = probing.fit_probes(made(x), y)
    together = probing.fit_probes(made(x, texts=texts.tolist()), y)
    assert leaking.accuracy.item() > 0.95
    assert together.accuracy.item() < 0.7
    assert together.n_texts == 40
    assert together.high.item() == pytest.approx(wilson(together.accuracy.item(), 40)[1])
    # and shuffled labels stay the same within a text
    fake = probing.control_labels(made(x, texts=texts.tolist()), torch.tensor(y), 0, "shuffled", torch.Generator())
    assert all(len(set(fake[texts == text].tolist())) == 1 for text in range(40))
    assert fake.bincount().tolist() == [100, 100]


def test_control_labels_by_token_are_learned_from_the_token():
    """A one-hot of the token solves Hewitt and Liang's control task, so that nothing is selective about it."""
    tokens = (np.arange(120) % 6).tolist()
    x, y = np.eye(6)[tokens], np.array([0, 0, 0, 1, 1, 1])[tokens]
    found = probing.fit_probes(made(x, tokens=tokens), y, control="tokens", n_controls=4, seed=2)
    assert found.accuracy.item() == 1.0
    assert (found.control == 1.0).all()
    with pytest.raises(ArgumentError, match="1 different tokens"):
        probing.fit_probes(made(x, tokens=[3] * 120), y, control="tokens")


def test_random_features_know_the_tokens_so_far_and_nothing_else():
    """Written out for each example from the same random vectors."""
    model, texts = tiny("gpt2"), [[1, 2, 3, 2], [2, 2], [5, 1, 1]]
    generator = torch.Generator().manual_seed(4)
    here, before = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)  # ids 1 2 3 5
    index = {1: 0, 2: 1, 3: 2, 5: 3}
    found = probing.random_features(collect_activations(model, texts, positions=[0, -1]), 6, seed=4)
    for row, ids in enumerate(texts):
        for column, at in enumerate([0, len(ids) - 1]):
            past = sum((before[index[token]] for token in ids[:at]), torch.zeros(6)) / max(at, 1) ** 0.5
            assert torch.allclose(found[row, column], here[index[ids[at]]] + past)
    mean = probing.random_features(collect_activations(model, texts, positions="mean"), 6, seed=4)
    for row, ids in enumerate(texts):
        assert torch.allclose(mean[row, 0], sum(before[index[token]] for token in ids) / len(ids) ** 0.5)


def test_the_difference_of_means_by_hand():
    """Direction, boundary half way, and the gap is the distance of the means."""
    x = np.array([[0.0, 1], [0, 3], [4, 1], [4, 3], [0, 2], [4, 2]])
    y = [False, False, True, True, False, True]
    probe = probing.fit_probes(made(x), y, kind="difference", folds=3).probe(NAME)
    assert probe.weights.tolist() == [[4.0, 0.0]]
    assert probe.bias.tolist() == [-8.0]
    assert probe.direction().tolist() == [1.0, 0.0]
    assert probe.direction(label=False).tolist() == [-1.0, 0.0]
    assert probe.gap() == probe.gap(False) == 4.0
    assert probe.norm == pytest.approx(np.linalg.norm(x, axis=1).mean())


def test_the_gap_of_one_among_several_classes():
    """Along the direction towards a class, its mean less that of all others."""
    x, y = blobs(classes=3)
    x, probe = torch.as_tensor(x, dtype=torch.float32).double(), probing.fit_probes(made(x), y).probe(NAME)
    for label in range(3):
        along = x @ probe.direction(label)
        own = torch.tensor(y == label)
        assert probe.gap(label) == pytest.approx((along[own].mean() - along[~own].mean()).item())
        assert probe.direction(label).norm().item() == pytest.approx(1.0)
    with pytest.raises(ArgumentError, match="say which"):
        probe.direction()
    with pytest.raises(ArgumentError, match="no class 5"):
        probe.direction(5)


def test_sparse_probes_find_the_neurons_that_were_planted():
    """Two of thirty tell the classes; each k uses k, chosen within the fold."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(100, 30)), np.arange(100) % 2
    x[:, 7] += 3 * y
    x[:, 19] -= 2 * y
    sparse = probing.fit_sparse_probes(made(x), y, ks=(1, 2, 5), random=False)
    assert sparse.neurons(NAME, 1) == (7,)
    assert sparse.neurons(NAME, 2) == (7, 19)
    assert len(sparse.neurons(NAME, 5)) == 5
    accuracies = [result.accuracy.item() for result in sparse.results]
    assert accuracies[0] > 0.85
    assert accuracies[1] > accuracies[0]
    assert math.isnan(sparse.results[0].random.item())
    assert sorted(sparse.to_dataframe().k) == [1, 2, 5]
    assert "number of neurons" in sparse._repr_html_()
    # chosen on all examples, noise would look like signal
    noise = rng.normal(size=(40, 2000))
    chosen = probing.fit_sparse_probes(made(noise), np.arange(40) % 2, ks=(8,), random=False)
    assert chosen.results[0].accuracy.item() < 0.7


def test_separation_is_the_f_statistic():
    """Scikit-learn's, but for degrees of freedom; 0 where nothing varies."""
    x, y = blobs(classes=3)
    expected, _ = f_classif(x, y)
    found = separation(torch.tensor(x), torch.tensor(y), 3)
    assert np.allclose(found * (60 - 3) / (3 - 1), expected)
    assert separation(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]), 2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probes_direction_moves_the_model_across_its_boundary(family):
    """The identity of the second token is read at the last; adding the gap turns the probe's mind."""
    model = tiny(family)
    texts = [[first, second, 3] for first in range(5, 15) for second in (1, 2)]
    found = collect_activations(model, texts, ["resid_post"])
    results = probing.fit_probes(found, ["one", "two"] * 10, folds=2, n_controls=1)
    assert results.names == tuple(f"blocks.{layer}.hook_resid_post" for layer in range(3))
    probe = results.probe(("resid_post", 1))
    step = lens.edits.add(4 * probe.gap("two") * probe.direction("two"), pos=-1)
    with model.hooks([(("resid_post", 1), step)]):
        moved = collect_activations(model, texts, ("resid_post", 1))
    assert probe.predict(moved["resid_post", 1][:, 0]).tolist() == [1] * 20


def test_labels_for_texts_tokens_and_examples():
    """A class for each text goes to its tokens; a list for each text is one for each token."""
    model, texts = tiny("gpt2"), [[1, 2, 3], [4, 5], [6, 7, 8], [9, 10]]
    found = collect_activations(model, texts, NAME, positions="all")
    y, classes = probing.read_labels(found, ["a", "b", "a", "b"])
    assert y.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1]
    assert classes == ("a", "b")
    y, _ = probing.read_labels(found, [[1, 0, 1], [0, 0], (1, 1, 1), [0, 1]])
    assert y.tolist() == [1, 0, 1, 0, 0, 1, 1, 1, 0, 1]
    y, classes = probing.read_labels(collect_activations(model, texts, NAME), torch.tensor([5, 3, 5, 3]))
    assert (y.tolist(), classes) == ([1, 0, 1, 0], (3, 5))


def test_tables_and_pictures_hold_the_numbers():
    """By hook point and position; the best is named."""
    model, texts = tiny("gpt2"), [[first, second, 3] for first in range(5, 15) for second in (1, 2)]
    found = collect_activations(model, texts, ["resid_post"], positions=[0, 1])
    results = probing.fit_probes(found, [0, 1] * 10, folds=2, n_controls=1)
    frame = results.to_dataframe().set_index(["name", "position"])
    assert frame.loc[(NAME, 1), "accuracy"] == 1.0
    assert frame.loc[(NAME, 0), "accuracy"] <= 0.5  # the first token tells nothing
    assert results.best() == (NAME, 1)
    assert "majority 0.50" in results._repr_html_()
    with pytest.raises(ArgumentError, match="no probe at"):
        results.probe(NAME)
    with pytest.raises(UnknownHookError):
        results.probe("hook_residual", 1)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1] * 29, {}, "58 labels for 60 examples"),
        ([0.5, 1.0] * 30, {}, "not numbers of a scale"),
        ([1] * 60, {}, "one class only"),
        (["a", 1] * 30, {}, "of one kind"),
        ("ab" * 30, {}, "labels are a list"),
        ([0] * 57 + [1] * 3, {}, "5 folds need each class in 5 texts or more, and one is in 3"),
        ([0, 1, 2] * 20, {"kind": "difference"}, "there are 3"),
        ([0, 1] * 30, {"kind": "svm"}, "'svm'"),
        ([0, 1] * 30, {"k": 6}, "from 1 to 5; got 6"),
        ([0, 1] * 30, {"C": 0}, "above 0; got 0"),
        ([0, 1] * 30, {"folds": 1}, "folds is a number from 2; got 1"),
        ([0, 1] * 30, {"control": "none"}, "'none'"),
    ],
)
def test_what_cannot_be_is_refused(labels, options, message):
    """By name, with the value."""
    with pytest.raises(ArgumentError, match=message):
        probing.fit_probes(made(blobs()[0]), labels, **options)
