"""Batches of a store: every entry once, in one sequence, whoever takes part of it."""

import pickle
import subprocess
import sys
import warnings
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lens_core.errors import ArgumentError, UnknownHookError
from lens_core.store import ActivationStore
from lens_core.store._batches import _between, _Order, _read

from .made_store import LAST, RESID, Z, made


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write a store of eight shards."""
    return made(tmp_path_factory.mktemp("stores") / "store", ((9, 8), (0,), (16,), (3, 1, 9)))


@pytest.fixture(scope="module")
def store(written):
    """Open it."""
    return ActivationStore(written.folder)


class Counted:
    """A store of numbers alone, that notes which entries are read."""

    def __init__(self, count: int) -> None:
        self.count, self.read, self.most = count, [], 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, name: object) -> "Counted":
        return self if isinstance(name, str) else self._taken(name)

    def _taken(self, entries: torch.Tensor) -> torch.Tensor:
        assert bool((entries[1:] > entries[:-1]).all()), "read in the order of the disk"
        self.read += entries.tolist()
        self.most = max(self.most, len(entries))
        return entries * 10


SIZES = st.integers(1, 40)


@settings(deadline=None)  # a small buffer reads many times
@given(st.integers(0, 300), SIZES, SIZES, SIZES, st.integers(0, 3), st.booleans(), st.integers(1, 4), st.integers(1, 4))
def test_every_entry_comes_once(count, size, block, blocks, seed, shuffle, world, workers):
    """Over processes and workers, each of which reads its own entries and no others, a buffer at a time."""
    order = _Order(count=count, block=block, blocks=blocks, seed=seed, epoch=0, shuffle=shuffle)
    whole = list(_read(Counted(count), ["x"], order, size, range(-(-count // size))))
    assert sorted(torch.cat([torch.empty(0), *(batch.entries for batch in whole)]).tolist()) == list(range(count))
    assert [len(batch) for batch in whole[:-1]] == [size] * (len(whole) - 1)
    assert all(torch.equal(batch.values["x"], batch.entries * 10) for batch in whole)
    if not shuffle:
        assert torch.equal(torch.cat([torch.empty(0), *(batch.entries for batch in whole)]).long(), torch.arange(count))
    found = {}
    for rank in range(world):
        span = range(len(whole) * rank // world, len(whole) * (rank + 1) // world)
        for worker in range(workers):
            mine, source = span[worker::workers], Counted(count)
            given = list(_read(source, ["x"], order, size, mine))
            found |= dict(zip(mine, given, strict=True))
            assert sorted(source.read) == sorted(entry for batch in given for entry in batch.entries.tolist())
            assert source.most <= block * blocks
    assert [found[at].entries.tolist() for at in range(len(whole))] == [batch.entries.tolist() for batch in whole]


@given(st.integers(0, 9), st.integers(0, 40), st.integers(1, 6), st.integers(0, 50), st.integers(0, 50))
def test_a_range_within_another(start, length, step, first, last):
    """As written out."""
    mine = range(start, start + length, step)
    assert list(_between(mine, first, last)) == [one for one in mine if first <= one < last]


def entries(batches) -> list[list[int]]:
    """List the entries of each batch."""
    return [batch.entries.tolist() for batch in batches]


def listed(parts) -> list:
    """Put lists one after the other."""
    return list(chain.from_iterable(parts))


def test_batches_hold_the_values_of_their_entries(written, store):
    """At each hook point, in its dtype."""
    seen = []
    for batch in store.batches(["resid_post", "z"], 10, buffer=40, block=4):
        assert list(batch.values) == [RESID, LAST, Z]
        for name, value in batch.values.items():
            assert torch.equal(value, written.values[name][batch.entries])
        assert torch.equal(batch["resid_post", 0], batch.values[RESID])
        seen += batch.entries.tolist()
    assert sorted(seen) == list(range(len(store)))
    assert seen != sorted(seen)


def test_the_order_follows_from_seed_and_epoch(store):
    """And is the store's own without shuffling."""
    given = {"buffer": 30, "block": 3}
    first = entries(store.batches("z", 7, **given))
    assert entries(store.batches("z", 7, **given)) == first
    assert entries(store.batches(None, 7, **given)) == first
    assert entries(store.batches("z", 7, seed=1, **given)) != first
    second = entries(store.batches("z", 7, epoch=1, **given))
    assert second != first
    assert entries(store.batches("z", 7, **given).epoch(1)) == second
    plain = store.batches("z", 7, shuffle=False, **given)
    assert listed(entries(plain)) == list(range(len(store)))
    assert torch.equal(torch.cat([batch.value for batch in plain]), store["z"][:])


def test_an_order_is_mixed_beyond_its_blocks(store):
    """Within a buffer of everything, neighbours are no more often neighbours than by chance."""
    order = listed(entries(store.batches("z", 7, buffer=1000, block=3)))
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < len(order) / 8


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")  # on two processors
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_give_the_sequence_of_one_process(store, workers):
    """And so does any process that goes on after some batches."""
    given = {"buffer": 30, "block": 3}
    alone = entries(store.batches("z", 7, **given))
    for skip in (0, 4):
        batches = store.batches("z", 7, skip=skip, **given)
        assert len(batches) == len(alone) - skip
        loader = DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context="fork")
        assert entries(loader) == alone[skip:]


@pytest.mark.parametrize(("world", "drop_last"), [(2, False), (3, False), (3, True)])
def test_processes_divide_the_sequence(store, world, drop_last):
    """Without overlap or gap; with `drop_last`, into equal numbers of whole batches."""
    alone = entries(store.batches("z", 7))
    shares = [entries(store.batches("z", 7, rank=rank, world=world, drop_last=drop_last)) for rank in range(world)]
    if drop_last:
        each = len(store) // 7 // world
        assert [len(share) for share in shares] == [each] * world
        assert listed(shares) == alone[: each * world]
        assert all(len(batch) == 7 for batch in listed(shares))
    else:
        assert listed(shares) == alone
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    resumed = entries(store.batches("z", 7, rank=1, world=world, drop_last=drop_last, skip=2))
    assert resumed == shares[1][2:]


def test_an_epoch_may_be_skipped_whole(store):
    """Then nothing is left."""
    assert entries(store.batches("z", 7, skip=10_000)) == []


SPAWNED = """
import sys
from torch.utils.data import DataLoader
from lens_core.store import ActivationStore

if __name__ == "__main__":
    store = ActivationStore(sys.argv[1])
    store["z"][0]
    batches = store.batches("z", 16, buffer=30, block=3)
    loader = DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert [b.entries.tolist() for b in loader] == [b.entries.tolist() for b in batches]
    print("same")
"""


def test_workers_may_be_spawned(written):
    """As on macOS: the store goes to them pickled."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SPAWNED, written.folder], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


def test_entries_by_number_are_a_dataset(written, store):
    """Whose batches a `DataLoader` reads in one go, here and in workers."""
    dataset = store.dataset(["resid_post", "z"])
    assert len(dataset) == len(store)
    assert list(dataset[3]) == [RESID, LAST, Z]
    assert len(list(dataset)) == len(store)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[-1][Z], written.values[Z][-1])
    for workers in (0, 2):
        with warnings.catch_warnings():
            loader = DataLoader(dataset, batch_size=9, num_workers=workers)
            for name in dataset.names:
                assert torch.equal(torch.cat([batch[name] for batch in loader]), written.values[name])


def test_a_batch_is_moved_with_its_values(store):
    """Into a dtype, as `Tensor.to` has it; one hook point needs no name."""
    batch = next(iter(store.batches(("resid_post", 3), 5)))
    assert batch.to(torch.float64).value.dtype == torch.float64
    assert torch.equal(batch.to("cpu").entries, batch.entries)
    both = next(iter(store.batches("resid_post", 5)))
    with pytest.raises(ArgumentError, match="2 hook points"):
        _ = both.value
    with pytest.raises(UnknownHookError):
        both["z"]


WRONG = {
    "batch_size": ({"batch_size": 0}, "batch_size is a positive number; got 0"),
    "buffer": ({"buffer": -1}, "buffer is a positive number"),
    "block": ({"block": True}, "block is a positive number"),
    "rank": ({"rank": 2, "world": 2}, "rank counts processes from 0 to 1"),
    "skip": ({"skip": -1}, "skip is a number from 0 on"),
    "seed": ({"seed": 0.5}, "seed is a number from 0 on"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_sense_is_refused(store, case):
    """With the value."""
    given, message = WRONG[case]
    with pytest.raises(ArgumentError, match=message):
        store.batches("z", **({"batch_size": 3} | given))
    with pytest.raises(UnknownHookError, match="not in this store"):
        store.batches("pattern", 3)
