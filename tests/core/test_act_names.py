"""`get_act_name` without a model against the names that models have."""

import pytest
from analysis.four_families import FAMILIES, tiny

import lens_core as lens


@pytest.mark.parametrize("family", FAMILIES)
def test_short_forms_are_written_out_as_the_table_does(family):
    """Every hook point of every family, by its short form, with the part where the table needs it."""
    table = tiny(family).table
    for name, point in table.items():
        *parts, last = point.part.split(".")
        short = last.removeprefix("hook_")
        if name in ("unembed.hook_in", "unembed.hook_out", "ln_final.hook_out"):
            continue  # TransformerLens has no short form for these
        found = lens.get_act_name(short, point.layer, parts[0] if parts else None)
        if len(parts) > 1 or (parts == ["mlp"] and short in ("in", "out")):
            continue
        assert found == name
        assert lens.get_act_name(name) == name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("q3",), "blocks.3.attn.hook_q"),
        (("scale4ln1",), "blocks.4.ln1.hook_scale"),
        (("scale", 4, "ln1"), "blocks.4.ln1.hook_scale"),
        (("k", 6, "a"), "blocks.6.attn.hook_k"),
        (("attn", 2), "blocks.2.attn.hook_pattern"),
        (("attn_logits", 1), "blocks.1.attn.hook_attn_scores"),
        (("pre5",), "blocks.5.mlp.hook_pre"),
        (("mlp_post", 5), "blocks.5.mlp.hook_post"),
        (("resid_pre", 0), "blocks.0.hook_resid_pre"),
        (("mlp_out", 7, "b"), "blocks.7.hook_mlp_out"),
        (("scale",), "ln_final.hook_scale"),
        (("normalized", 2, "ln2"), "blocks.2.ln2.hook_normalized"),
        (("pos_embed",), "hook_pos_embed"),
        (("embed",), "hook_embed"),
        (("B2",), "blocks.2.mixer.hook_B"),
    ],
)
def test_transformerlens_forms(given, expected):
    """Those of its documentation and tests, and a mixer's."""
    assert lens.get_act_name(*given) == expected
