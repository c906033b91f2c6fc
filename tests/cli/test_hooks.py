"""`lens hooks`: a table or JSON of a model's hook points."""

import json
import shutil

import pytest

import lens_core as lens
from lens_core._commands._hooks import collapsed
from lens_core.hook_points import HookPoint


@pytest.fixture
def points(tiny):
    """Give the model's own list, to compare with."""
    return lens.load(tiny).hook_points()


def test_json_holds_every_point_with_its_fields(run, tiny, points):
    """As `model.hook_points()` has them, in its order; the seam by its kind."""
    done = run("hooks", tiny, "--json")
    listed = json.loads(done.out)
    assert done.code == 0
    assert [entry["name"] for entry in listed] == [point.name for point in points]
    for entry, point in zip(listed, points, strict=True):
        assert entry == {
            "name": point.name,
            "shape": point.shape,
            "equation": point.equation,
            "layer": point.layer,
            "default": point.default,
            "seam": entry["seam"],
        }
    assert {"module input", "module output", "attention"} <= {entry["seam"] for entry in listed}


def test_the_table_has_one_row_for_all_layers(run, tiny):
    """With shape, equation, star and seam; wide where it does not go to a terminal."""
    done = run("hooks", tiny)
    lines = done.out.splitlines()
    (row,) = [line for line in lines if "attn.hook_result" in line]
    assert row.split("  ")[0] == "blocks.{0..2}.attn.hook_result *"
    assert "batch pos n_heads d_model" in row
    assert "z W_O of each head" in row
    assert lines[-2].endswith("3 layers, d_model 21, n_heads 3, n_kv_heads 3, d_head 7, d_mlp 37, d_vocab 29")
    assert lines[-1].startswith("* ")
    assert sum("hook_pattern" in line for line in lines) == 1


def test_all_has_a_row_for_each_layer(run, tiny, points):
    """Every canonical name stands there in full."""
    words = run("hooks", tiny, "--all").out.split()
    assert {point.name for point in points} <= set(words)
    assert "{" not in "".join(words)


def test_names_and_layer_choose(run, tiny):
    """Globs, short forms, several of them; a negative layer counts from the last."""

    def names(*options):
        return [entry["name"] for entry in json.loads(run("hooks", tiny, "--json", *options).out)]

    assert names("--names", "*hook_pattern", "--layer", -1) == ["blocks.2.attn.hook_pattern"]
    assert names("--names", "z", "--names", "hook_embed") == [
        "hook_embed",
        *(f"blocks.{i}.attn.hook_z" for i in range(3)),
    ]
    assert all(name.startswith("blocks.1.") for name in names("--layer", 1))


def test_no_star_is_explained_where_there_is_none(run, tiny):
    """The note belongs to the starred."""
    assert "*" not in run("hooks", tiny, "--names", "hook_embed").out


def test_a_narrow_terminal_cuts_no_name(run, tiny, monkeypatch):
    """Equations are wrapped instead."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = run("hooks", tiny)
    assert "blocks.{0..2}.attn.hook_attn_scores" in done.out
    assert "seam" not in done.out


def test_the_config_is_enough(run, tiny, tmp_path):
    """No weights are read, so a large model's table costs no download."""
    shutil.copy(tiny / "config.json", tmp_path / "config.json")
    assert run("hooks", tmp_path, "--json").out == run("hooks", tiny, "--json").out


def point(name: str, layer: int | None, equation: str = "x") -> HookPoint:
    """Return a made point."""
    return HookPoint(name=name, layer=layer, shape="batch pos d_model", equation=equation, seam=None)


def test_layers_that_differ_have_rows_of_their_own():
    """As in a model whose layers are of two kinds."""
    made = [point(f"blocks.{i}.hook_x", i, "odd" if i in (1, 4) else "even") for i in range(7)]
    rows = collapsed([point("hook_first", None), *made, point("blocks.3.hook_y", 3)])
    assert [(name, each.equation) for name, each in rows] == [
        ("hook_first", "x"),
        ("blocks.{0,2..3,5..6}.hook_x", "even"),
        ("blocks.{1,4}.hook_x", "odd"),
        ("blocks.3.hook_y", "x"),
    ]
