"""Whatever ends a harvest, the next one goes on, and the store is the one that an undisturbed harvest makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from store.subject import digests, id_rows, texts, tiny, worded

import lens_core as lens
from lens_core.errors import ArgumentError, StoreError

TESTS = Path(__file__).parents[1]
SETTINGS = {"context": 8, "unit_documents": 20, "shard_rows": 5, "batch_size": 2}


def drive(what, folder):
    """Run the driver in a process of its own; gives what it printed, as a dictionary."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(
        [sys.executable, TESTS / "store" / "driver.py", what, folder],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Give the digests of the driver's store, harvested in one go."""
    from golden.tiny import tiny_gpt2
    from store import driver

    driver.MODEL = lens.load(tiny_gpt2(), tokenizer=False)
    folder, threads = tmp_path_factory.mktemp("whole"), torch.get_num_threads()
    torch.set_num_threads(1)
    driver.harvest(folder)
    torch.set_num_threads(threads)
    return digests(folder)


def test_killed_again_and_again(whole, tmp_path):
    """By kill -9, at random moments, at least five times: the same bytes in the end, and nothing more."""
    said = drive("kill_again_and_again", tmp_path)
    assert int(said["kills"]) >= 5
    assert digests(tmp_path) == whole
    assert not list(tmp_path.glob(".*"))


def test_two_processes_on_one_folder(whole, tmp_path):
    """The second is refused, whatever the first is doing; once that one is dead, the folder is free."""
    said = drive("two_at_once", tmp_path)
    assert said["second"] == "3"
    assert "another process is writing to" in said["refused"]
    assert said["third"] == "0"
    assert digests(tmp_path) == whole


def test_a_full_disk(whole, tmp_path):
    """Says so; what is complete stays, nothing half-written is left, and the same call goes on."""
    said = drive("full_disk", tmp_path)
    assert said["full"] == "3"
    assert "no more room" in said["refused"]
    assert (said["kept"], said["parts"], said["again"]) == ("True", "0", "0")
    assert digests(tmp_path) == whole


def test_memory_is_bounded(tmp_path):
    """It grows by a small part of what is stored."""
    said = drive("memory", tmp_path)
    assert int(said["stored"]) > 300
    assert int(said["grew"]) < 100


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_stopped_at_every_batch(error, tmp_path):
    """By an exception or Ctrl-C at the 1st, 2nd, ... batch in turn: every call brings it further."""
    model, rows = tiny("gpt2"), id_rows()
    expected = digests(lens.store.harvest(model, rows, tmp_path / "whole", "resid_post", **SETTINGS).path)
    target, stops = tmp_path / "parts", 0

    def stop_at(batch):
        seen = []

        def report(progress):
            seen.append(progress)
            if len(seen) == batch:
                raise error("stop")

        return report

    while True:
        try:
            lens.store.harvest(model, rows, target, "resid_post", report=stop_at(5 + stops % 4), **SETTINGS)
        except error:
            stops += 1
            assert not list(target.glob(".*"))
        else:
            break
    assert stops > 5
    assert digests(target) == expected


def test_a_complete_store_is_left_as_it_is(tmp_path):
    """Nothing is run; what there is comes back."""
    model, rows = worded(), texts()
    lens.store.harvest(model, rows, tmp_path, "resid_post", **SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.*")}
    calls = []
    model.hf_model.transformer.register_forward_hook(lambda *_: calls.append(1))
    model.hf_model.transformer.h[0].register_forward_hook(lambda *_: calls.append(1))
    store = lens.store.harvest(model, rows, tmp_path, "resid_post", **SETTINGS)
    assert len(calls) == 1  # of one token, for the sizes
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.*")} == before
    assert len(store) == sum(record.entries for record in store.records)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"names": "z"}, "points"),
        ({"dtype": "float64"}, r"points\[0\]\.dtype: 'float32' there, 'float64' here"),
        ({"context": 7}, "rows.context: 8 there, 7 here"),
        ({"pack": False}, "rows.pack"),
        ({"positions": -1}, "rows.positions"),
        ({"shard_rows": 6}, r"sources\[0\].shard_rows: 5 there, 6 here"),
        ({"unit_documents": 10}, "unit_documents"),
        ({"limit": 30}, "n_documents: 60 there, 30 here"),
        ({"data": id_rows(seed=1)}, "digest"),
        ({"model": "weights"}, "origin.weights"),
        ({"model": "passes"}, "origin.passes"),
    ],
)
def test_going_on_with_something_else_is_refused(change, where, tmp_path):
    """The message says what is different; the store stays as it was."""
    given = {"model": tiny("gpt2"), "data": id_rows(), "names": "resid_post", **SETTINGS}
    lens.store.harvest(folder=tmp_path, **given)
    before = digests(tmp_path)
    other = {**given, **change}
    if change.get("model") == "weights":
        other["model"] = tiny("gpt2")
        with torch.no_grad():
            other["model"].hf_model.transformer.h[2].mlp.c_fc.weight.add_(1e-3)
    elif change.get("model") == "passes":
        other["model"] = lens.load(tiny("gpt2").hf_model, process=["fold_ln"])
    with pytest.raises(StoreError, match=f"begun with something else .*{where}"):
        lens.store.harvest(folder=tmp_path, **other)
    assert digests(tmp_path) == before


def test_a_shard_that_is_gone_or_cut_is_told(tmp_path):
    """With its name, and what to do."""
    given = {"model": tiny("gpt2"), "data": id_rows(), "names": "resid_post", **SETTINGS}
    store = lens.store.harvest(folder=tmp_path, **given)
    file = store.records[1].file(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(StoreError, match=rf"{file.name}.* has \d+ bytes, and had {len(content)}; .*verify --repair"):
        lens.store.harvest(folder=tmp_path, **given)
    file.unlink()
    with pytest.raises(StoreError, match=rf"{file.name}.* is missing"):
        lens.store.harvest(folder=tmp_path, **given)
    file.write_bytes(content)
    record = file.with_suffix(".json")
    for damage in ("{", "[]", "{}", record.read_text().replace('"unit": 0', '"unit": 7')):
        record.write_text(damage)
        with pytest.raises(StoreError, match="verify --repair"):
            lens.store.harvest(folder=tmp_path, **given)
    record.unlink()  # as if it had not been complete
    assert len(lens.store.harvest(folder=tmp_path, **given)) == len(store)


def test_a_folder_with_other_things_is_refused(tmp_path):
    """Nothing is mixed into somebody's files; nor is a manifest of another format read."""
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(StoreError, match=r"other files \(thesis.tex\).*new or empty folder"):
        lens.store.harvest(tiny("gpt2"), id_rows(), tmp_path, "hook_embed")
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["thesis.tex"]
    lens.store.harvest(tiny("gpt2"), id_rows(), tmp_path / "ok", "hook_embed")
    manifest = tmp_path / "ok" / "manifest.json"
    good = json.loads(manifest.read_text())
    wrong = [{"format_version": 2}, {"points": [{}]}, {"rows": {}}, {"sources": []}, {"format": "?"}]
    for change in wrong:
        manifest.write_text(json.dumps({**good, **change}))
        with pytest.raises(StoreError, match=r"format version|damaged|not the manifest"):
            lens.store.ActivationStore(tmp_path / "ok")


def test_arguments_that_are_not_given_are_those_that_it_was_begun_with(tmp_path):
    """Sizes of units and shards that were chosen by hand once need not be repeated."""
    model, rows = tiny("gpt2"), id_rows()
    with pytest.raises(ArgumentError):
        lens.store.harvest(model, rows, tmp_path, "z", shard_rows=True)
    store = lens.store.harvest(model, rows, tmp_path, "z", unit_documents=7, shard_rows=3)
    assert len(lens.store.harvest(model, rows, tmp_path, "z")) == len(store)
