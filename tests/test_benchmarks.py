"""The benchmarks run; what they measure is for people to read, not for a test to judge."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Run everything once on tiny models, and give what was printed, the page and the numbers."""
    folder = tmp_path_factory.mktemp("benchmarks")
    page, numbers = folder / "page.md", folder / "numbers.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--write", str(page), "--json", str(numbers)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout, page.read_text(), json.loads(numbers.read_text())


def test_every_goal_of_the_project_has_a_row(written):
    """The goals stand in the numbers, each with at least one measurement."""
    rows = written[2]["rows"]
    goals = {row["name"]: row["goal"] for row in rows if row["goal"] is not None}
    assert goals == {
        "`import lens_core`, added to `python -c pass`": 0.2,
        "modules of torch and transformers that it loads": 0,
        "plain forward": 1.02,
        "one residual edited": 1.03,
        "all default names cached": 1.25,
        "one residual edited at every step": 1.1,
        "peak of loading a folder": 1.05,
        "added to the peak": 1.0,
        "kept after the call": 1.0,
        "left when the cache is dropped, before any garbage collection": 0.0,
        "`patch_sweep`, one forward for each cell being 1": 1 / 11,
    }
    assert all(len(row["values"]) == row["pairs"] >= 1 for row in rows)


def test_the_page_and_the_terminal_show_every_row(written):
    """Nothing measured is left out of the table that people read."""
    shown, page, numbers = written
    for row in numbers["rows"]:
        assert f"| {row['name']} |" in page
    assert "lens against plain HuggingFace" in shown
    assert "the numbers mean nothing" in page


def test_the_machine_is_described_without_paths_or_names(written):
    """Numbers come with the machine they are from, and with nothing that tells whose it is."""
    _, page, numbers = written
    assert set(numbers["machine"]) == {"processor", "threads", "system", "versions", "load", "took"}
    assert str(ROOT) not in page + json.dumps(numbers)


def test_memory_of_one_name_is_that_tensor(written):
    """Bytes are counted, not timed, so that goals of memory hold even in a smoke test."""
    rows = [row for row in written[2]["rows"] if row["group"].startswith("memory of caching")]
    assert rows
    assert all(row["verdict"] == "met" for row in rows), rows
