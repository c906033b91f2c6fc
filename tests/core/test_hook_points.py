"""Names of hook points: every form of a name leads to one canonical name, or to a clear error."""

import pytest

from lens_core.errors import ArgumentError, EmptyFilterError, UnknownHookError
from lens_core.hook_points import HookPoint, HookTable

PARTS = ["hook_resid_pre", "ln1.hook_scale", "attn.hook_q", "attn.hook_out", "ln2.hook_scale", "mlp.hook_out"]


@pytest.fixture
def table():
    """Give the table of a model of three blocks."""

    def point(name, layer=None, *, default=True):
        return HookPoint(name=name, layer=layer, shape="batch pos d_model", equation="", seam=None, default=default)

    blocks = [point(f"blocks.{n}.{part}", n, default="q" not in part) for n in range(3) for part in PARTS]
    ends = [point("ln_final.hook_scale"), point("hook_logits")]
    hf = {"hf.wte.output": point("hf.wte.output", default=False)}
    return HookTable([point("hook_embed"), *blocks, *ends], hf_point=hf.get)


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("blocks.1.attn.hook_q", "blocks.1.attn.hook_q"),
        (("q", 1), "blocks.1.attn.hook_q"),
        (("q", -1), "blocks.2.attn.hook_q"),
        (("query", 0), "blocks.0.attn.hook_q"),
        ("q2", "blocks.2.attn.hook_q"),
        (("attn.hook_q", 0), "blocks.0.attn.hook_q"),
        (("attn.q", 0), "blocks.0.attn.hook_q"),
        (("scale", 1, "ln2"), "blocks.1.ln2.hook_scale"),
        ("scale1ln1", "blocks.1.ln1.hook_scale"),
        (("out", 0, "a"), "blocks.0.attn.hook_out"),
        (("out", 0, "m"), "blocks.0.mlp.hook_out"),
        ("scale", "ln_final.hook_scale"),
        (("scale", None, "ln_final"), "ln_final.hook_scale"),
        ("logits", "hook_logits"),
        ("embed.hook_out", "hook_embed"),
        ("blocks.2.hook_in", "blocks.2.hook_resid_pre"),
        ("hf.wte.output", "hf.wte.output"),
    ],
)
def test_every_form_leads_to_one_name(table, given, canonical):
    """Canonical names, short forms, TransformerLens' grammar and aliases."""
    assert table.canonical(given) == canonical
    assert table[given].name == canonical


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("blocks.1.attn.hook_k", "attn.hook_q"),
        (("q", 3), "layers are 0 to 2"),
        (("scale", 1), "ln1.hook_scale"),
        ("q", "3 hook points"),
        ("hf.nothing.output", "hf.MODULE_PATH"),
        ("resid_prae", "did you mean"),
        ("zzzz", "model.hook_points()"),
    ],
)
def test_what_is_no_name_says_what_to_do(table, given, says):
    """Unknown, out of range, ambiguous: the message holds the way out."""
    with pytest.raises(UnknownHookError, match=says.replace("(", r"\(").replace(")", r"\)")):
        table.canonical(given)


def test_finding_gives_every_name_or_none(table):
    """Where `canonical` raises, for several names or none, `find` gives them."""
    assert table.find("q") == tuple(f"blocks.{n}.attn.hook_q" for n in range(3))
    assert table.find(("q", 1)) == table.find("q1") == ("blocks.1.attn.hook_q",)
    assert table.find("resid_prae") == table.find(("zzzz", 0)) == ()


@pytest.mark.parametrize("given", [3, 3.5, b"q", ("q", True), ("q", 1, 2), object()])
def test_other_types_are_refused(table, given):
    """A filter of the wrong type is an ArgumentError."""
    with pytest.raises(ArgumentError):
        table.select(given)


def test_filters_choose_in_the_order_of_computation(table):
    """None, short forms for all layers, globs, lists and predicates."""
    assert "blocks.0.attn.hook_q" not in table.select(None).names
    assert table.select("q").names == tuple(f"blocks.{n}.attn.hook_q" for n in range(3))
    assert table.select("blocks.*.hook_resid_pre").names == tuple(f"blocks.{n}.hook_resid_pre" for n in range(3))
    assert table.select([("q", 1), "hook_embed"]).names == ("hook_embed", "blocks.1.attn.hook_q")
    assert table.select(lambda name: name.endswith("logits")).names == ("hook_logits",)
    assert table.select([("q", 1), "hf.wte.output"]).names == ("blocks.1.attn.hook_q", "hf.wte.output")


def test_only_names_given_one_by_one_are_exact(table):
    """A glob or predicate may choose what a run leaves out; a name may not."""
    assert table.select(["hook_embed", ("q", 0)]).exact
    assert not table.select(["hook_embed", "blocks.*"]).exact
    assert not table.select(lambda name: True).exact


@pytest.mark.parametrize("given", [[], "nothing.*", lambda name: False, ["hook_embed", None], [lambda name: False]])
def test_a_filter_that_matches_nothing_is_an_error(table, given):
    """Nothing is cached or hooked by mistake."""
    with pytest.raises(EmptyFilterError):
        table.select(given)


def test_depth_orders_embeddings_blocks_and_the_end(table):
    """What start_at_layer and stop_at_layer leave out follows from it."""
    assert [table.depth(n) for n in ("hook_embed", "blocks.1.attn.hook_q", "hook_logits", "hf.wte.output")] == [
        -1,
        1,
        3,
        None,
    ]
