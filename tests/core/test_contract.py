"""What the core knows of the hook contract is what the contract's page says."""

import re
from pathlib import Path

import pytest

from lens_core import shapes
from lens_core._contract import CONTRACT, STARRED
from lens_core.errors import ArgumentError
from lens_core.plugin import ModuleInput, point

PAGE = (Path(__file__).parents[2] / "docs/hooks.md").read_text(encoding="utf-8")


def test_every_name_is_on_the_page():
    """As it is written there, or by its last word where a row lists several."""
    named = set(re.findall(r"`(?:blocks\.L\.)?([\w.]+)`", PAGE))
    assert [name for name in CONTRACT if not {name, name.rpartition(".")[2]} & named] == []


def test_shapes_are_in_the_words_of_the_contract():
    """So that their sizes are known."""
    assert {axis for shape, _ in CONTRACT.values() for axis in shape.split()} <= shapes.AXES.keys()


def test_starred_names_are_names():
    """And stay out of the default cache."""
    assert CONTRACT.keys() >= STARRED
    assert not point("hook_mlp_in", ModuleInput(path="h.0"), layer=0).default


def test_what_a_plugin_says_goes_before_what_the_contract_says():
    """The equation and the type differ by architecture."""
    seam = ModuleInput(path="lm_head")
    ours = point("hook_logits", seam, equation="capped", dtype="float32")
    assert (ours.shape, ours.equation, ours.dtype, ours.default) == ("batch pos d_vocab", "capped", "float32", True)
    assert point("hook_tokens", seam).dtype == "int64"


def test_a_name_of_no_contract_must_say_what_it_is():
    """A slip of the pen is an error; a name of a plugin's own has shape and equation."""
    with pytest.raises(ArgumentError, match="'hook_resid_prae' is no name of the hook contract"):
        point("hook_resid_prae", ModuleInput(path="h.0"), layer=0)
    ours = point("hook_mood", ModuleInput(path="h.0"), layer=0, shape="batch pos", equation="how it feels")
    assert ours.name == "blocks.0.hook_mood"
