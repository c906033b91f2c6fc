"""Reading a store: entries in order, where they come from, and what is said of one that is damaged."""

import os
import pickle
import subprocess
import sys
import threading

import attrs
import numpy as np
import pytest
import torch
from golden.tiny import fresh, random_tokens, tiny_gpt2

import lens_core as lens
from lens_core.errors import ArgumentError, EmptyFilterError, StoreError, UnknownHookError
from lens_core.store import ActivationStore

from .made_store import COUNT, LAST, POINTS, RESID, Z, made


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write a store of seven shards, one without rows."""
    return made(tmp_path_factory.mktemp("stores") / "store")


@pytest.fixture
def store(written):
    """Open it anew."""
    return ActivationStore(written.folder)


def test_a_harvest_is_read_as_the_model_computed_it(tmp_path):
    """Each entry against HF's own hidden states, by the row and position that the store names."""
    model, tokens = tiny_gpt2(), random_tokens(batch=7, pos=6)
    folder = tmp_path / "store"
    lens.store.harvest(lens.load(model), tokens, folder, "resid_post", pack=False, unit_documents=3, shard_rows=2)
    store = ActivationStore(folder)
    with torch.no_grad():
        states = fresh(model)(tokens, output_hidden_states=True).hidden_states
    found = store.entries(slice(None))
    assert torch.equal(found.tokens.long(), tokens[found.documents, found.offsets])
    assert torch.equal(found.rows * 6 + found.positions, torch.arange(42))
    for layer in (0, 1):  # HF's last hidden state is after the final norm
        reference = states[layer + 1][found.documents, found.offsets]
        torch.testing.assert_close(store["resid_post", layer][:], reference, rtol=1e-5, atol=1e-5)
    assert store.is_complete
    assert store.n_tokens == 42


INDICES = {
    "a number": 3,
    "a negative number": -2,
    "a numpy number": np.int64(4),
    "all": slice(None),
    "a slice over shards": slice(2, 40),
    "a slice with a step": slice(1, None, 7),
    "a slice backwards": slice(30, 4, -3),
    "an empty slice": slice(9, 9),
    "numbers in any order, some twice": [40, 0, 17, 0, -1, 23],
    "no numbers": [],
    "a tensor": torch.tensor([5, 31, 30]),
    "an array": np.array([12, 2]),
    "a range": range(3, 20, 5),
}


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("name", [point.name for point in POINTS])
def test_values_are_those_that_were_written(written, store, name, index):
    """In the order asked, each a copy."""
    asked = INDICES[index]
    whole = written.values[name].view(torch.int16) if name == LAST else written.values[name]
    expected = whole.numpy()[list(asked) if isinstance(asked, range) else asked]
    found = store[name][asked]
    assert found.dtype == written.values[name].dtype
    assert np.array_equal((found.view(torch.int16) if name == LAST else found).numpy(), expected)
    if found.numel():
        found.zero_()
        again = store[name][asked]
        assert np.array_equal((again.view(torch.int16) if name == LAST else again).numpy(), expected)


def test_a_mask_chooses(written, store):
    """Of every entry, as a tensor or an array."""
    mask = torch.rand(len(store), generator=torch.Generator().manual_seed(3)) < 0.3
    assert torch.equal(store[RESID][mask], written.values[RESID][mask])
    assert torch.equal(store[RESID][mask.numpy()], written.values[RESID][mask])


def test_what_can_be_asked_of_values(written, store):
    """Shape, dtype, length, iteration, repr."""
    values = store["z", 3]
    assert values.shape == (len(store), 2, 3)
    assert values.dtype == torch.float32
    assert len(values) == len(store) == len(written.values[Z])
    assert torch.equal(torch.stack(list(values)), written.values[Z])
    assert repr(values) == f"StoredActivations({Z}, float32[{len(store)}, 2, 3]: entry n_heads d_head)"


@pytest.mark.parametrize("index", [slice(None), 11, [50, 3, 3, 20]])
def test_where_entries_come_from(written, store, index):
    """Token, document, offset, position and row of each."""
    found = store.entries(index)
    for name, expected in written.entries.items():
        assert torch.equal(getattr(found, name).long(), expected[index].long())
    assert not found.sources.any()


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 1), (9, 9)])
def test_the_context_of_an_entry_is_its_row(written, store, before, after):
    """-1 beyond the row, on either side."""
    chosen = list(range(0, len(store), 3))
    windows = store.context(chosen, before=before, after=after)
    assert windows.shape == (len(chosen), before + 1 + after)
    for entry, window in zip(chosen, windows.tolist(), strict=True):
        row = written.rows[written.entries["rows"][entry]]["tokens"].tolist()
        at = int(written.entries["positions"][entry])
        assert window == [row[i] if 0 <= i < len(row) else -1 for i in range(at - before, at + after + 1)]
    assert torch.equal(store.context(chosen[2], before, after), windows[2])


def test_rows_are_those_that_were_run(written, store):
    """By number, in the order asked."""
    assert store.n_rows == len(written.rows)
    found = store.rows([7, 0, 12])
    for name in ("tokens", "documents", "offsets", "kept"):
        assert torch.equal(getattr(found, name), torch.stack([written.rows[row][name] for row in (7, 0, 12)]))
    assert store.rows(-1).tokens.shape == (1, 7)


def test_names_are_found_by_short_forms(store):
    """As in a cache; layers count among those stored."""
    assert store.names == (RESID, LAST, Z, COUNT)
    assert store["resid_post", 0].point.name == RESID
    assert store["resid_post", -1].point.name == LAST
    assert store["z"].point.name == Z
    assert store["count"].point.name == COUNT
    assert store.select("*resid_post") == (RESID, LAST)
    assert ("z", 3) in store
    assert ("z", 1) not in store
    assert 3 not in store
    with pytest.raises(UnknownHookError, match=f"'resid_post' stands for 2 hook points of this store: '{RESID}'"):
        store["resid_post"]
    with pytest.raises(UnknownHookError, match=f"'pattern', 1\\) is not in this store, which has '{RESID}'"):
        store["pattern", 1]
    with pytest.raises(EmptyFilterError, match="nothing"):
        store.select("*nothing*")


@pytest.mark.parametrize("index", [10_000, -10_000, [3, 70_000]])
def test_an_entry_that_is_not_there_is_named(store, index):
    """With how many there are."""
    for ask in (store["z"].__getitem__, store.entries, store.context):
        with pytest.raises(ArgumentError, match=rf"entry -?\d0000 is not there: the store has {len(store)}, 0 to"):
            ask(index)
    with pytest.raises(ArgumentError, match="row .* is not there"):
        store.rows(index)


@pytest.mark.parametrize("index", ["x", 1.5, True, None, [True, False], [[1, 2]], torch.zeros(2), object()])
def test_what_is_no_index_is_refused(store, index):
    """By its type."""
    with pytest.raises(ArgumentError, match="an index is a number"):
        store["z"][index]


def test_the_counts_of_the_context_are_checked(store):
    """Not below 0."""
    with pytest.raises(ArgumentError, match="got -1 and 4"):
        store.context(0, before=-1)


def test_a_store_says_what_it_has(tmp_path, written, store):
    """Whole, and with a unit that was never made, or made in part."""
    assert repr(store) == f"ActivationStore({len(store)} entries of 4 hook points, {store.n_tokens} tokens, complete)"
    assert "blocks.3.attn.hook_z" in store._repr_html_()
    assert store.n_tokens == sum(int((row["tokens"] >= 0).sum()) for row in written.rows)
    made(tmp_path / "part")
    for stem in ("00-000003-0001", "00-000001-0000"):
        for suffix in (".json", ".safetensors"):
            (tmp_path / "part" / f"{stem}{suffix}").unlink()
    part = ActivationStore(tmp_path / "part")
    assert part.missing == ((0, 1), (0, 3))
    assert not part.is_complete
    assert "2 of 4 units of documents missing" in repr(part)


def test_an_empty_store_can_be_opened(tmp_path):
    """Of a harvest that was stopped at once."""
    store = ActivationStore(made(tmp_path / "store", ((0,),)).folder)
    assert len(store) == 0
    assert store["z"][:].shape == (0, 2, 3)
    assert list(store["z"]) == []
    assert store.context([]).shape == (0, 13)


def test_damage_is_told_with_what_to_do(tmp_path):
    """A shard that is cut or gone, at opening and at reading; one whose header is not what its record says."""
    folder = made(tmp_path / "store").folder
    opened, shard = ActivationStore(folder), folder / "00-000002-0000.safetensors"
    whole = shard.read_bytes()
    for damage in (lambda: shard.write_bytes(whole[:-8]), shard.unlink):
        damage()
        with pytest.raises(StoreError, match=r"00-000002-0000.*lens store verify"):
            ActivationStore(folder)
        with pytest.raises(StoreError, match=r"00-000002-0000.*lens store verify"):
            opened["z"][:]
    shard.write_bytes(whole.replace(b"hook_z", b"hook_q"))
    with pytest.raises(StoreError, match=r"another 'blocks.3.attn.hook_z' than.*lens store verify"):
        ActivationStore(folder)["count"][:]
    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(StoreError, match=r"is damaged.*lens store verify"):
        ActivationStore(folder)["z"][:]
    with pytest.raises(StoreError, match="there is no folder"):
        ActivationStore(tmp_path / "none")


def test_a_store_can_be_pickled_and_read_by_threads(written, store):
    """What was opened goes along as it was, though the folder may have grown since."""
    store["z"][0]
    again = pickle.loads(pickle.dumps(store))
    found: list[bool] = []

    def read(seed: int) -> None:
        order = torch.randperm(len(store), generator=torch.Generator().manual_seed(seed))
        found.append(torch.equal(again["z"][order], written.values[Z][order]))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


LIMITED = """
import resource, sys, torch
from lens_core.store import ActivationStore
store, name = ActivationStore(sys.argv[1]), ("resid_post", 0)
for batch in store.batches(name, 500, buffer=1000, block=50):
    break
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
room = 36 << 20  # 8 shards that are mapped take 20 MiB of it, as Linux counts
resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))
assert store.nbytes > 4 * room, store.nbytes
total = torch.zeros((), dtype=torch.float64)
for start in range(0, len(store), 500):
    total += store[name][start : start + 500].double().sum()
seen = torch.zeros(len(store), dtype=torch.bool)
for batch in store.batches(name, 500, buffer=1000, block=50):
    seen[batch.entries] = True
    total -= batch.value.double().sum()
assert bool(seen.all()) and abs(total) < 1e-6, total
try:
    store[name][:]
except RuntimeError:
    print("refused")
"""
"""All entries twice, in a process that has no room for a quarter of them; all at once are too much for it."""


def test_a_store_larger_than_memory_is_read(tmp_path):
    """By slices and by batches, where the system refuses what does not fit."""
    point = attrs.evolve(POINTS[2], name=RESID, axes="d_model", shape=(1536,))
    folder = made(tmp_path / "store", ((100,),) * 64, points=(point,), kept=1.0).folder
    plain = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}  # what is freed goes back to the system
    command = [sys.executable, "-c", LIMITED, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=plain)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
