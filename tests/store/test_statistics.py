"""Running statistics against numpy on all entries at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_core.errors import ArgumentError, StoreError
from lens_core.store import ActivationStore, Statistics, merge
from lens_core.store import _statistics as statistics_module
from lens_core.store._moments import Moments
from lens_core.store._picked import Top, hashes

from .made_store import COUNT, LAST, RESID, Z, made


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write a store of eight shards."""
    return made(tmp_path_factory.mktemp("stores") / "store", ((9, 8), (0,), (16,), (3, 1, 9)))


@pytest.fixture(scope="module")
def store(written):
    """Open it."""
    return ActivationStore(written.folder)


def close(found: torch.Tensor, expected: np.ndarray, rtol: float = 1e-12) -> None:
    """Hold to numpy."""
    np.testing.assert_allclose(found.numpy(), expected, rtol=rtol, atol=1e-12)


def holds(found: Statistics, store: ActivationStore, values: np.ndarray, top: int) -> None:
    """Hold all statistics to numpy on all values `[entry, feature]`."""
    assert found.count == len(values)
    close(found.mean, values.mean(0))
    close(found.variance(), values.var(0, ddof=1))
    close(found.variance(0), values.var(0))
    close(found.covariance(), np.cov(values, rowvar=False))
    close(found.quantile([0, 0.25, 0.5, 1]), np.quantile(values, [0, 0.25, 0.5, 1], axis=0))
    order = np.argsort(-values, axis=0, kind="stable")[:top]
    examples = found.examples(store)
    assert np.array_equal(examples.entries.numpy(), order)
    assert np.array_equal(examples.values.numpy(), np.take_along_axis(values, order, 0))


def test_they_are_those_of_all_entries(written, store, monkeypatch):
    """Of a float64 point, counted a few entries at a time."""
    monkeypatch.setattr(statistics_module, "_BYTES", 8 * 5 * 3)
    found = Statistics.begin(store, RESID, covariance=True, top=4).update(store)
    holds(found, store, written.values[RESID].numpy(), 4)
    assert found.quantile_error() == 0
    assert found.quantile(0.5).shape == (5,)


@pytest.mark.parametrize("name", [LAST, Z, COUNT])
def test_any_dtype_and_shape_is_counted(written, store, name):
    """In float64."""
    found = Statistics.begin(store, name).update(store)
    values = written.values[name].double().numpy()
    close(found.mean, values.mean(0))
    close(found.variance(), values.var(0, ddof=1), rtol=1e-11)
    close(found.quantile(0.3), np.quantile(values, 0.3, axis=0))


class Part:
    """A store that has some of the shards, in some order."""

    def __init__(self, store: ActivationStore, chosen: list[int]) -> None:
        whole = ActivationStore(store.path)
        self.store = ActivationStore.__new__(ActivationStore)
        vars(self.store).update(vars(whole))
        self.store.records = tuple(whole.records[i] for i in chosen)
        self.store._shards = type(whole._shards)(whole.path, whole.manifest, self.store.records)


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(7)), st.lists(st.integers(0, 7), max_size=3), st.integers(0, 2))
def test_neither_order_nor_interruptions_matter(tmp_path_factory, store, written, order, stops, pieces):
    """Shards in any order, saved and loaded between, in one tally or in two that are merged."""
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    options = {"covariance": True, "top": 3, "sample": 20, "transform": halved}
    direct = Statistics.begin(store, RESID, **options).update(store)
    found = Statistics.begin(store, RESID, **options)
    first = order[: 2 * pieces]
    for stop in [*sorted(stops), 7]:
        found.update(Part(store, [i for i in order[:stop] if i not in first]).store)
        found.save(path)
        found = Statistics.load(path, halved)
    other = Statistics.begin(store, RESID, **options).update(Part(store, first).store)
    found = other.merged(found) if first else found
    close(found.mean, direct.mean.numpy())
    close(found.covariance(), direct.covariance().numpy())
    assert torch.equal(found.quantile([0.1, 0.9]), direct.quantile([0.1, 0.9]))
    examples, expected = found.examples(store), direct.examples(store)
    assert torch.equal(examples.entries, expected.entries)
    assert torch.equal(examples.values, expected.values)
    close(direct.mean, (written.values[RESID].clamp(min=0) / 2).numpy().mean(0))
    assert repr(found) == repr(direct)


def halved(values: torch.Tensor) -> torch.Tensor:
    """Make many equal values, as an SAE does."""
    return values.clamp(min=0) / 2


def test_equal_values_are_those_of_earlier_entries(written, store):
    """Where a feature is off at most entries."""
    values = (written.values[RESID] > 12).double().numpy()
    found = Statistics.begin(store, RESID, transform=lambda x: x > 12, top=30).update(store)
    assert np.array_equal(found.examples(store).entries.numpy(), np.argsort(-values, axis=0, kind="stable")[:30])


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 9), st.lists(st.integers(0, 4), min_size=30, max_size=30))
def test_the_top_of_any_pieces(count, size, cut, drawn):
    """As sorting all at once gives it; what is not a number is last."""
    values = torch.tensor(drawn[:count], dtype=torch.float32).where(torch.arange(count) % 5 != 4, float("nan"))[:, None]
    cut = min(cut, count)
    found = Top.of(size, values[:cut], 7, 0).merged(Top.of(size, values[cut:], 7, cut))
    order = np.argsort(-np.nan_to_num(values[:, 0].numpy(), nan=-np.inf), kind="stable")[:size]
    assert found.entries[:, 0].tolist() == order.tolist()


def test_moments_of_values_far_from_zero():
    """Where a sum of squares would have lost everything."""
    values = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e9
    found = Moments.none(2, products=False)
    for start in range(0, 1000, 37):
        found = found.merged(Moments.of(values[start : start + 37], products=False))
    np.testing.assert_allclose(found.squares.numpy() / 999, values.numpy().var(0, ddof=1), rtol=1e-6)


def test_a_sample_of_quantiles_keeps_its_bound():
    """At all quantiles at once: of 200 seeds, no more break the bound of 0.9 than chance allows."""
    values, errors = np.arange(20_000) / 20_000, []
    for seed in range(200):
        drawn = np.sort(values[hashes(seed, 3, 20_000).argsort()[:100].numpy()])
        steps = np.arange(101) / 100
        errors.append(max(np.abs(drawn - steps[1:]).max(), np.abs(drawn - steps[:-1]).max()))
    bound = np.sqrt(np.log(2 / 0.1) / 200)
    assert 0 < (np.array(errors) > bound).mean() < 0.1 + 3 * np.sqrt(0.1 * 0.9 / 200)


def test_the_bound_is_that_of_the_sample(store):
    """Dvoretzky, Kiefer and Wolfowitz; 1 without a sample."""
    found = Statistics.begin(store, RESID, sample=50).update(store)
    assert found.quantile_error(0.9) == pytest.approx(np.sqrt(np.log(20) / 100))
    assert Statistics.begin(store, RESID, sample=0).update(store).quantile_error() == 1


def test_a_growing_store_is_counted_once(tmp_path):
    """And a shard that is another than before is refused."""
    whole = made(tmp_path / "store")
    store, record = ActivationStore(whole.folder), whole.folder / "00-000002-0000.json"
    text = record.read_text()
    record.unlink()
    told: list[tuple[int, int]] = []
    found = Statistics.begin(store, "z").update(ActivationStore(whole.folder))
    record.write_text(text)
    found.update(store, report=lambda done, total: told.append((done, total)))
    assert told == [(len(store), len(store))]
    close(found.mean, whole.values[Z].double().numpy().mean(0))
    record.write_text(text.replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(StoreError, match="00-000002-0000 was counted with other content"):
        found.update(ActivationStore(whole.folder))


def test_an_interrupted_shard_does_not_count(store):
    """What a transform that fails has begun is left out, and counted when it no longer does."""
    calls: list[int] = []

    def failing(values: torch.Tensor) -> torch.Tensor:
        calls.append(len(values))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return values

    found = Statistics.begin(store, RESID, transform=failing, covariance=True, top=2)
    with pytest.raises(KeyboardInterrupt):
        found.update(store)
    assert 0 < found.count < len(store)
    holds(found.update(store), store, store[RESID][:].numpy(), 2)


def test_what_does_not_belong_together_is_refused(tmp_path, store, written):
    """Another store, another transform, other settings, the same shards twice, a damaged file."""
    other = ActivationStore(made(tmp_path / "other", seed=5).folder)
    found = Statistics.begin(store, RESID, transform=halved, top=1).update(store)
    for act in (found.update, found.examples):
        with pytest.raises(StoreError, match="of another store"):
            act(other)
    path = tmp_path / "s.safetensors"
    found.save(path)
    for transform, told in ((None, "without its transform"), (torch.relu, "with another transform")):
        with pytest.raises(StoreError, match=told):
            Statistics.load(path, transform)
    with pytest.raises(StoreError, match="the transform fails"):
        Statistics.load(path, lambda x: x @ torch.ones(3))
    with pytest.raises(StoreError, match="both have the shard 00-000000-0000"):
        found.merged(Statistics.load(path, halved))
    with pytest.raises(StoreError, match="top: 1 and 2"):
        found.merged(Statistics.begin(store, RESID, transform=halved, top=2))
    with pytest.raises(StoreError, match="transforms differ"):
        found.merged(Statistics.begin(store, RESID, transform=torch.relu, top=1))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match="damaged"):
        Statistics.load(path, halved)


def test_mistakes_are_told(store):
    """Numbers, names, transforms, and statistics of nothing."""
    with pytest.raises(ArgumentError, match="top is a number from 0 on"):
        Statistics.begin(store, RESID, top=-1)
    with pytest.raises(ArgumentError, match="a transform gives a tensor"):
        Statistics.begin(store, RESID, transform=lambda x: x.sum())
    nothing = Statistics.begin(store, RESID, sample=0)
    with pytest.raises(StoreError, match="0 entries so far, and this takes 2"):
        nothing.variance()
    with pytest.raises(ArgumentError, match="covariance=True"):
        nothing.covariance()
    for q in (1.5, [-0.1]):
        with pytest.raises(ArgumentError, match="quantiles go from 0 to 1"):
            Statistics.begin(store, RESID).update(store).quantile(q)


def test_examples_are_found_in_a_merged_store(tmp_path):
    """By the source of their shard."""
    one, two = (made(tmp_path / name, seed=i, label=name) for i, name in enumerate("ab"))
    store = merge([one.folder, two.folder], tmp_path / "both")
    found = Statistics.begin(store, RESID, covariance=True, top=5).update(store)
    holds(found, store, torch.cat([one.values[RESID], two.values[RESID]]).numpy(), 5)
