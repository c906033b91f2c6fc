"""Several stores made one."""

import attrs
import pytest
import torch
from filelock import FileLock
from golden.tiny import random_tokens, tiny_gpt2

import lens_core as lens
from lens_core.errors import ArgumentError, StoreError
from lens_core.store import ActivationStore, merge, verify
from lens_core.store import _merge as merging

from .made_store import POINTS, made


@pytest.fixture
def three(tmp_path):
    """Write three stores."""
    sizes = [((5, 4), (0,), (6,)), ((2,),), ((3, 1, 4), (1,))]
    return [made(tmp_path / f"s{i}", parts, seed=i, label=f"corpus {i}") for i, parts in enumerate(sizes)]


@pytest.mark.parametrize("link", [False, True])
def test_entries_stand_one_store_after_the_other(tmp_path, three, link):
    """With their values, tokens and documents; the sources tell them apart."""
    told: list[tuple[int, int]] = []
    report = lambda done, total: told.append((done, total))  # noqa: E731
    store = merge([one.folder for one in three], tmp_path / "out", link=link, report=report)
    assert store.is_complete
    assert verify(tmp_path / "out") == ()
    for name in store.names:
        assert torch.equal(store[name][:], torch.cat([one.values[name] for one in three]))
    found = store.entries(slice(None))
    assert torch.equal(found.tokens, torch.cat([one.entries["tokens"] for one in three]))
    assert torch.equal(found.documents, torch.cat([one.entries["documents"] for one in three]))
    assert found.sources.tolist() == [i for i, one in enumerate(three) for _ in one.entries["tokens"]]
    assert [source.label for source in store.manifest.sources] == ["corpus 0", "corpus 1", "corpus 2"]
    assert told[-1] == (store.nbytes, store.nbytes)
    assert {path.stat().st_nlink for path in (tmp_path / "out").glob("*.safetensors")} == {2 if link else 1}


def test_a_merged_store_can_be_merged(tmp_path, three):
    """Its sources keep their order."""
    both = merge([three[1].folder, three[2].folder], tmp_path / "both")
    store = merge([both.path, three[0].folder], tmp_path / "all")
    assert [source.label for source in store.manifest.sources] == ["corpus 1", "corpus 2", "corpus 0"]
    assert torch.equal(store["z"][:], torch.cat([three[i].values["blocks.3.attn.hook_z"] for i in (1, 2, 0)]))
    assert verify(store.path) == ()


def test_an_interrupted_merge_goes_on(tmp_path, three, monkeypatch):
    """After the shards that are complete, which are left as they are."""
    folders, out = [one.folder for one in three], tmp_path / "out"
    copied, calls = merging._copied, []

    def stopping(source, part, count):
        calls.append(source)
        if len(calls) == 4:
            part.write_bytes(b"half")
            raise KeyboardInterrupt
        return copied(source, part, count)

    monkeypatch.setattr(merging, "_copied", stopping)
    with pytest.raises(KeyboardInterrupt):
        merge(folders, out)
    assert len(ActivationStore(out).records) == 3
    store = merge(folders, out)
    assert len(calls) == 4 + len(store.records) - 3
    assert verify(out) == ()
    merge(folders, out)
    assert len(calls) == 4 + len(store.records) - 3


DIFFERENT = {
    "a dtype": (
        {"points": (attrs.evolve(POINTS[0], dtype="float32"), *POINTS[1:])},
        "points[0].dtype: 'float32' there",
    ),
    "fewer points": ({"points": POINTS[:2]}, "points: "),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_stores_that_differ_are_refused(tmp_path, three, case):
    """By the field; nothing is made."""
    given, message = DIFFERENT[case]
    other = made(tmp_path / "other", label="other", **given)
    with pytest.raises(StoreError) as caught:
        merge([three[0].folder, other.folder], tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged_is_refused(tmp_path, three):
    """The same documents twice, an incomplete store, damage, too few, a folder in use or with other files."""
    first, second, third = (one.folder for one in three)
    again = made(tmp_path / "again", ((1,), (1,), (1,)), seed=0, label="corpus 0").folder
    with pytest.raises(StoreError, match="documents of 'corpus 0' would be in the merged store twice"):
        merge([first, again], tmp_path / "out")
    with pytest.raises(ArgumentError, match="at least two"):
        merge([first], tmp_path / "out")
    with pytest.raises(ArgumentError, match="is one of the stores"):
        merge([first, second], second)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(StoreError, match="other files"):
        merge([first, second], tmp_path / "full")
    merge([first, second], tmp_path / "out")
    with pytest.raises(StoreError, match="was begun with something else"):
        merge([first, third], tmp_path / "out")
    with FileLock(tmp_path / "out" / "lock-0"), pytest.raises(StoreError, match="another process is writing"):
        merge([first, second], tmp_path / "out")
    shard = second / "00-000000-0000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StoreError, match=f"{second.name}/00-000000-0000.safetensors' is damaged"):
        merge([third, second], tmp_path / "new")
    assert not list((tmp_path / "new").glob("02-*"))
    assert not list((tmp_path / "new").glob(".*.part"))
    (second / "00-000000-0000.json").unlink()
    with pytest.raises(StoreError, match="lacks 1 of 1 units of documents: finish its harvest"):
        merge([first, second], tmp_path / "part")


def test_nothing_is_harvested_into_a_merged_store(tmp_path):
    """It was made from other documents than any harvest's; two halves read as the whole."""
    model, tokens = lens.load(tiny_gpt2()), random_tokens(batch=12, pos=6)

    def harvest(rows: torch.Tensor, name: str) -> ActivationStore:
        options = {"pack": False, "unit_documents": 3, "shard_rows": 2}
        return lens.store.harvest(model, rows, tmp_path / name, "resid_post", **options)

    whole = harvest(tokens, "whole")
    halves = [harvest(tokens[:6], "a"), harvest(tokens[6:], "b")]
    store = merge([half.path for half in halves], tmp_path / "out")
    for name in store.names:
        assert torch.equal(store[name][:], whole[name][:])
    with pytest.raises(StoreError, match="begun with something else.*sources"):
        harvest(tokens[:6], "out")
