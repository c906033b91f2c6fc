"""A harvest by several processes: whatever their number each time, the store is the one that a single process makes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from golden.tiny import tiny_gpt2, tiny_tokenizer
from golden.tiny_llama import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from store.cut_worker import NAMES, SETTINGS
from store.subject import digests, id_rows, shards, texts

import lens_core as lens
from lens_core.store._corpus import open_corpus
from lens_core.store._layout import Manifest, RowRules
from lens_core.store._ranks import Ranks
from lens_core.store._writing import Job

TESTS = Path(__file__).parents[1]
OPTIONS = ["--names", "*hook_resid_post", "--context", "8", "--unit-documents", "25", "--shard-rows", "4"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Give a folder with a model, its tokenizer and documents."""
    folder = tmp_path_factory.mktemp("corpus")
    tiny_gpt2().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts(800))]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return folder


def launched(corpus, target, n):
    """Launch `lens harvest` in n processes, as a user would."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(n),
                "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
                "-m", "lens_core"]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(corpus / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.Popen(
        [*launcher, "harvest", str(corpus / "model"), str(corpus / "corpus.jsonl"), "--out", str(target), *OPTIONS],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_two_processes_killed_and_gone_on_with_by_three(corpus, tmp_path):
    """Bit for bit the store of one process; every shard is made once."""
    model = lens.load(corpus / "model")
    single = lens.store.harvest(
        model,
        corpus / "corpus.jsonl",
        tmp_path / "single",
        "*hook_resid_post",
        context=8,
        unit_documents=25,
        shard_rows=4,
    )
    target = tmp_path / "several"
    two = launched(corpus, target, 2)
    deadline = time.monotonic() + 240
    while len(list(target.glob("00-*.json"))) < 8:
        assert two.poll() is None, two.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in [*psutil.Process(two.pid).children(recursive=True), psutil.Process(two.pid)]:
        process.kill()  # the launcher gives each worker a session of its own
    two.communicate()
    made = digests(target)
    assert 8 <= len(made) < len(single.records)
    written = {path: path.stat().st_mtime_ns for path in target.glob("00-*.json")}
    three = launched(corpus, target, 3)
    said = three.communicate(timeout=280)[0]
    assert three.returncode == 0, said
    assert f"{len(single)} entries in {len(single.records)} shards" in said
    assert digests(target) == digests(tmp_path / "single")
    assert {path: path.stat().st_mtime_ns for path in written} == written, "what was complete is left as it was"
    assert {path.name for path in target.glob("lock-*")} == {"lock-0", "lock-1", "lock-2"}


def test_all_processes_are_told_why_the_first_refuses(corpus, tmp_path):
    """None of them waits for ever."""
    (tmp_path / "thesis.tex").write_text("...")
    both = launched(corpus, tmp_path, 2)
    said = both.communicate(timeout=240)[0]
    assert both.returncode != 0
    assert "thesis.tex" in said
    assert "process 0 could not begin" in said
    assert not list(tmp_path.glob("00-*"))


def test_a_model_that_is_cut_over_processes_is_harvested_once(tmp_path):
    """By tensor parallelism each process has a part of each layer; the first alone writes, and writes whole tensors."""
    tiny_llama().save_pretrained(tmp_path / "model")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, TESTS / "store" / "cut_worker.py", tmp_path / "model", tmp_path / "cut"],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = lens.load(tiny_llama(), tokenizer=False)
    whole = lens.store.harvest(model, id_rows(), tmp_path / "whole", NAMES, **SETTINGS)
    cut = lens.store.ActivationStore(tmp_path / "cut")
    assert [record.stem for record in cut.records] == [record.stem for record in whole.records]
    assert cut.is_complete
    for a, b in zip(shards(cut), shards(whole), strict=True):
        assert torch.equal(a["tokens"], b["tokens"])
        for name in NAMES:
            assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5), name


@given(n_documents=st.integers(1, 300), size=st.integers(1, 40), count=st.integers(1, 9))
def test_each_unit_falls_to_one_process(n_documents, size, count):
    """Without overlap or gap, whatever the numbers."""
    corpus = open_corpus([[1]] * n_documents)
    rules = RowRules(context=4, pack=True, prepend_bos=None, bos=None, separator=None, positions=None, skipped=())
    manifest = Manifest(
        points=(), origin={}, sources=(corpus.source(unit_documents=size, shard_rows=1),), rows=rules
    )  # fmt: skip
    jobs = [
        Job(
            model=None, corpus=corpus, manifest=manifest, folder=Path(), batch_size=1, mine=Ranks(i, count), report=None
        )
        for i in range(count)
    ]
    units = sorted(unit for job in jobs for unit in job.units())
    assert units == list(range(manifest.sources[0].n_units))
    assert sum(job.n_documents(unit) for job in jobs for unit in job.units()) == n_documents


def test_locks_of_processes_that_live_are_respected(tmp_path):
    """Any lock of an earlier launch that is still held, not the first process's alone."""
    from filelock import FileLock

    model, rows = lens.load(tiny_gpt2(), tokenizer=False), id_rows()
    lens.store.harvest(model, rows, tmp_path, "hook_embed")
    with FileLock(tmp_path / "lock-5"), pytest.raises(lens.StoreError, match=r"another process .*lock-5 is held"):
        lens.store.harvest(model, rows, tmp_path, "hook_embed")
    lens.store.harvest(model, rows, tmp_path, "hook_embed")
