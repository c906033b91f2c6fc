"""The benchmark beside other libraries: that it measures lens and judges values; no other library is needed for it."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).parents[1]
PAIRED = ("forward", "hook", "cache", "residuals", "generate")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Measure lens on tiny models, and give the folder of results and what was printed."""
    folder = tmp_path_factory.mktemp("results")
    rows = [*PAIRED, "sweep", "harvest", "state", "states"]
    command = [sys.executable, "-m", "benchmarks.peers", "--quick", "--only", "lens", "--models", "gpt2", "mamba"]
    command += ["--results", str(folder), "--rows", *rows]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder, run.stdout


def test_each_row_is_measured_and_right(results):
    """Values are HF's own, bit for bit; each row has a ratio for each size of its input."""
    cells = json.loads((results[0] / "lens.json").read_text())["cells"]
    assert [cell["row"] for cell in cells].count("forward") == 2
    assert {cell["row"] for cell in cells} == {*PAIRED, "sweep", "harvest", "state", "states"}
    assert all(cell["values"] and min(cell["values"]) > 0 for cell in cells)
    assert {cell["difference"] for cell in cells} == {0.0}
    assert "gpt2 harvest" in results[1]


def test_results_name_no_path(results):
    """They are published."""
    text = (results[0] / "lens.json").read_text()
    assert str(ROOT) not in text
    assert "/tmp" not in text


@pytest.fixture
def report(monkeypatch):
    """Import from the repository's root, where no package is installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    return import_module("benchmarks.peers.report"), import_module("benchmarks.peers.record")


def _write(record, folder, library, *cells):
    record.write_results(folder / f"{library}.json", {"system": "one", "versions": library}, cells)


def test_the_table_tells_who_is_ahead_who_is_wrong_and_who_cannot(report, tmp_path):
    """A fast wrong number is not the best, and ten is more than nine."""
    table, record = report
    cell = record.Cell(model="gpt2", row="hook", size="1 × 8 tokens", values=(9.0, 10.0, 11.0), difference=0.0)
    _write(record, tmp_path, "lens", cell)
    _write(record, tmp_path, "transformer-lens-3", attrs.evolve(cell, values=(9.5,), difference=1e-6))
    _write(record, tmp_path, "transformer-lens-4", attrs.evolve(cell, values=(1.0,), difference=0.5))
    _write(record, tmp_path, "nnsight", record.Cell(model="gpt2", row="hook", cannot="it has no hooks"))
    written = table.table(table.read(tmp_path))
    assert "| 10.00 (9.20 to 10.80) | **9.50** (9.50 to 9.50) | 1.00 (1.00 to 1.00, wrong by 0.5) | cannot |" in written
    assert "transformer-lens 3.1.0 has 9.50, lens 10.00; the spreads overlap." in written
    assert "4.3.0 has" not in written
    assert "nnsight 0.8.1: one hook: the residual stream after the middle layer is read. It has no hooks." in written
    assert "- system: one" in written
    assert "transformer-lens 4.3.0: off by 0.5 at most" in written


def test_a_cell_that_is_measured_again_takes_the_place_of_the_old_one(report):
    """The others stay: one library or row can be measured alone."""
    _, record = report
    old = [record.Cell(model="gpt2", row=row, values=(1.0,)) for row in ("import", "memory")]
    new = record.Cell(model="gpt2", row="memory", values=(2.0,))
    assert record.merged(old, [new]) == [old[0], new]
    assert record.Cell(model="gpt2", row="import", values=(1.0, 2.0)) != old[0]


def test_a_wrong_value_is_seen(report):
    """The largest difference counts, HF's largest value being 1; another shape is no value of that kind."""
    import torch

    rows = import_module("benchmarks.peers.rows")
    expected = torch.tensor([1.0, -4.0])
    assert rows._furthest([expected + torch.tensor([0.0, 2.0])], [expected]) == 0.5
    with pytest.raises(RuntimeError, match="has the shape"):
        rows._furthest([expected[None]], [expected])
