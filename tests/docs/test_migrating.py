"""The list of what TransformerLens offers: every name of ours that it gives is there."""

import importlib.util
import sys
from pathlib import Path

import pytest

import lens_core

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def table():
    """Return the script that writes the list."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("migrating_table", SCRIPTS / "migrating_table.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


@pytest.fixture(scope="module")
def roots():
    """Return what names of the list begin with."""
    model = lens_core.load("toy:gpt2")
    _, cache = model.run_with_cache("the cat")
    return {"lens": lens_core, "model": model, "cache": cache, "hook": model.hook_dict["blocks.0.hook_resid_pre"]}


def test_every_name_in_the_list_is_there(table, roots):
    """And has the arguments that the list says."""
    rows = [row for section in table.sections() for row in section["rows"]]
    assert len(rows) > 150
    assert [mistake for row in rows for mistake in table.mistakes(row, roots)] == []


@pytest.mark.parametrize(
    ("row", "mistake"),
    [
        (["`f`", "same", "model.frobnicate", ""], "there is no model.frobnicate"),
        (["`f`", "same", "lens.analysis.nothing.f", ""], "there is no lens.analysis.nothing.f"),
        (["`f`", "same", "model.forward(speed)", ""], "model.forward has no argument speed"),
        (["`f`", "refused", "", ""], "refused, and nothing says why"),
        (["`f`", "renamed", "", ""], "nothing says where it is"),
        (["`f`", "soon", "", ""], "the verdict is one of"),
    ],
)
def test_a_wrong_row_is_noticed(table, roots, row, mistake):
    """A check that cannot fail would say nothing."""
    assert [told for told in table.mistakes(row, roots) if mistake in told]
