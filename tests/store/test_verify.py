"""Looking over a store, and taking out of it what is damaged."""

import json
from pathlib import Path

import pytest
from filelock import FileLock
from golden.tiny import random_tokens, tiny_gpt2

import lens_core as lens
from lens_core.errors import StoreError
from lens_core.store import ActivationStore, verify

from .made_store import made


@pytest.fixture
def folder(tmp_path):
    """Write a store."""
    return made(tmp_path / "store").folder


def faults(folder: Path, **options) -> list[tuple[str, str]]:
    """Give kind and file of what is wrong."""
    return [(fault.kind, fault.file) for fault in verify(folder, **options)]


def test_a_whole_store_has_no_faults(folder):
    """And every byte of it is read."""
    told: list[tuple[int, int]] = []
    assert verify(folder, report=lambda done, total: told.append((done, total))) == ()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert told[-1] == (size, size)


def flip(path: Path, at: int) -> None:
    """Change one byte."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


STEM = "00-000003-0001"


def edit_record(folder: Path, **fields) -> None:
    """Change a record."""
    path = folder / f"{STEM}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGE = {
    "a byte of a value": (lambda folder: flip(folder / f"{STEM}.safetensors", -3), "its SHA-256 is"),
    "a byte of the header": (lambda folder: flip(folder / f"{STEM}.safetensors", 12), ""),
    "a file cut short": (
        lambda folder: (folder / f"{STEM}.safetensors").write_bytes(b""),
        "has 0 bytes",
    ),
    "a file that is gone": (lambda folder: (folder / f"{STEM}.safetensors").unlink(), "is missing"),
    "a count in a record": (lambda folder: edit_record(folder, tokens=3), "and its record says 3,"),
    "another shape in a record": (lambda folder: edit_record(folder, entries=1), "another"),
    "another checksum": (lambda folder: edit_record(folder, sha256="0" * 64), "and was 0000000000000000"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_taken_out(folder, damage):
    """The shard alone; the others stay, and the store can be read."""
    act, message = DAMAGE[damage]
    before = len(ActivationStore(folder).records)
    act(folder)
    found = verify(folder)
    assert [(fault.kind, fault.file) for fault in found] == [
        ("damaged", f"{STEM}.safetensors"),
        ("missing", "00-000003"),
    ]
    assert message in found[0].what
    assert "documents 6 to 7 of 'corpus'" in str(found[1])
    assert verify(folder, repair=True) == found
    assert faults(folder) == [("missing", "00-000003")]
    store = ActivationStore(folder)
    assert len(store.records) == before - 1
    assert store.missing == ((0, 3),)
    store["z"][:]


def test_a_damaged_record_takes_its_shard_along(folder):
    """As nothing says any longer what it should be."""
    (folder / f"{STEM}.json").write_text("{")
    assert faults(folder, repair=True) == [("damaged", f"{STEM}.json"), ("missing", "00-000003")]
    assert not (folder / f"{STEM}.json").exists()
    assert (folder / f"{STEM}.safetensors.damaged").exists()
    assert faults(folder) == [("missing", "00-000003")]


def test_records_beyond_the_manifest_are_damage(folder):
    """Such as those of another store's files."""
    for suffix in (".json", ".safetensors"):
        path = folder / f"00-000009-0000{suffix}"
        path.write_bytes((folder / f"00-000001-0000{suffix}").read_bytes())
    record = json.loads((folder / "00-000009-0000.json").read_text())
    (folder / "00-000009-0000.json").write_text(json.dumps(record | {"unit": 9}))
    assert faults(folder) == [("damaged", "00-000009-0000.safetensors")]


def test_files_that_do_not_count_are_named(folder):
    """What an interrupted process left, and what somebody else put there."""
    (folder / ".00-000009-0000.safetensors.part").touch()
    (folder / "00-000000-0009.safetensors").touch()
    (folder / "notes.txt").touch()
    (folder / "lock-0").touch()
    assert faults(folder) == [
        ("uncommitted", ".00-000009-0000.safetensors.part"),
        ("uncommitted", "00-000000-0009.safetensors"),
        ("unknown", "notes.txt"),
    ]


def test_nobody_repairs_what_is_being_written(folder):
    """Looking is free, meanwhile."""
    with FileLock(folder / "lock-1"):
        (folder / f"{STEM}.safetensors").unlink()
        assert len(verify(folder)) == 2
        with pytest.raises(StoreError, match="another process is writing"):
            verify(folder, repair=True)
    assert (folder / f"{STEM}.json").exists()


def test_many_missing_units_are_counted(tmp_path):
    """The first twenty are named."""
    folder = made(tmp_path / "store", ((1,),) * 30).folder
    for path in folder.glob("00-*"):
        path.unlink()
    found = verify(folder)
    assert len(found) == 21
    assert found[-1].what == "10 units of documents more"


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_repaired_store_is_harvested_to_the_same_bits(tmp_path, part):
    """Whichever part of a unit was damaged, it alone is made again."""
    model, tokens, folder = lens.load(tiny_gpt2()), random_tokens(batch=14, pos=6), tmp_path / "store"

    def harvest() -> ActivationStore:
        return lens.store.harvest(
            model, tokens, folder, ["resid_post", "z"], pack=False, unit_documents=5, shard_rows=2
        )

    harvest()
    whole = {path.name: path.read_bytes() for path in folder.glob("00-*")}
    assert len(whole) == 16
    victim = folder / f"00-000001-000{part}.safetensors"
    flip(victim, -1)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("00-*") if path.stem != victim.stem}
    assert faults(folder, repair=True) == [("damaged", victim.name), ("missing", "00-000001")]
    assert harvest().is_complete
    assert {path.name: path.read_bytes() for path in folder.glob("00-*") if path.suffix != ".damaged"} == whole
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("00-*") if path.name in times} == times
    assert faults(folder) == []
