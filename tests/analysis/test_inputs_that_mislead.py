"""Inputs that would give an answer to another question: refused by name, or read as they are meant."""

import pytest
import torch

import lens_core as lens
from lens_core._positions import check_ends
from lens_core.analysis import attribution, circuits, paths
from lens_core.analysis.direct import direct_logit_attribution
from lens_core.errors import ArgumentError, CacheError

LONG = "king apple river moon book king apple river"
SHORT = "apple river moon book apple river"
CLEAN = [LONG, SHORT]
CORRUPTED = [text.replace("moon", "door") for text in CLEAN]


@pytest.fixture
def model():
    """Return a toy of its own: some tests change its mode or its weights."""
    return lens.load("toy:gpt2")


@pytest.fixture
def metric(model):
    """Return a difference of logits at the last position."""
    moon, door = model.to_single_token("moon"), model.to_single_token("door")
    return lambda logits: logits[:, -1, moon] - logits[:, -1, door]


@pytest.mark.parametrize(
    "given",
    [-1, [-1, 2], [[3], [-2]], torch.tensor([-1, 0]), slice(-3, None)],
    ids=["one", "some", "rows", "tensor", "slice"],
)
def test_what_counts_from_the_end_of_a_padded_row_is_refused(given):
    """Padding on the left, or none, is no trouble; nor are positions counted from the start."""
    right, left = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    with pytest.raises(ArgumentError, match="row 1 ends in padding, and at=.* counts from its end: pad on the left"):
        check_ends(given, right, "at")
    check_ends(given, left, "at")
    check_ends(given, None, "at")
    check_ends([0, 3], right, "at")


def test_the_last_position_is_no_padding(model, metric):
    """In sweeps and in direct attribution; on the left it is the last token, as if each row were alone."""
    _, cache = model.run_with_cache(CLEAN)
    with pytest.raises(ArgumentError, match="row 1 ends in padding, and positions=-1"):
        lens.patching.patch_sweep(model, CORRUPTED, cache, metric, positions=-1)
    with pytest.raises(ArgumentError, match="row 1 ends in padding, and patch_positions=-2"):
        lens.patching.patch_sweep(model, CORRUPTED, cache, metric, patch_positions=-2)
    with pytest.raises(ArgumentError, match="row 1 ends in padding, and pos=-1"):
        direct_logit_attribution(model, CLEAN, "moon", "door")
    both = direct_logit_attribution(model, CLEAN, "moon", "door", padding_side="left")
    alone = direct_logit_attribution(model, SHORT, "moon", "door")
    assert torch.allclose(both.logit[1], alone.logit[0], atol=1e-4)


def test_a_cache_of_something_else_is_not_patched_from(model, metric):
    """Another type of model, and other weights of the same; a cache without a model is taken as it is."""
    _, other = lens.load("toy:llama").run_with_cache(LONG)
    _, cache = model.run_with_cache(LONG)
    for call in (
        lambda given: lens.patching.patch_sweep(model, CORRUPTED[0], given, metric),
        lambda given: lens.patching.get_act_patch_resid_pre(model, model.to_tokens(CORRUPTED[0]), given, metric),
    ):
        with pytest.raises(CacheError, match="of a LlamaForCausalLM, and this model is a GPT2LMHeadModel"):
            call(other)
    twin = lens.load("toy:gpt2")
    assert lens.patching.patch_sweep(twin, CORRUPTED[0], cache, metric).values.isfinite().all()
    assert lens.patching.patch_sweep(model, CORRUPTED[0], dict(cache), metric).values.isfinite().all()
    model.process_weights()
    with pytest.raises(CacheError, match="after no pass, and the model's are after fold_ln"):
        lens.patching.patch_sweep(model, CORRUPTED[0], cache, metric)


def test_a_metric_of_all_rows_is_attributed_whole(model, metric):
    """Its mean over equal rows is that of one: the rows' shares are summed, not averaged once more."""
    clean, corrupted = model.to_tokens([LONG] * 4), model.to_tokens([CORRUPTED[0]] * 4)

    def mean(logits):
        return metric(logits).mean()

    edges = [attribution.attribute_edges(model, clean, corrupted, one) for one in (metric, mean)]
    assert torch.allclose(edges[0].scores, edges[1].scores, atol=1e-5)
    assert edges[0].top_edges(5) == [(label, pytest.approx(value, abs=1e-4)) for label, value in edges[1].top_edges(5)]
    frames = [one.to_dataframe() for one in edges]
    assert frames[0]["value"].tolist() == pytest.approx(frames[1]["value"].tolist(), abs=1e-5)
    assert frames[1]["stderr"].isna().all()
    nodes = [attribution.attribute_nodes(model, clean, corrupted, one, names="z") for one in (metric, mean)]
    for name, score in nodes[0].scores.items():
        assert torch.allclose(score, nodes[1].scores[name], atol=1e-5)


def test_dropout_and_modes_without_gradients_are_told(model, metric):
    """Two runs would differ by what dropout draws; in inference mode nothing has a gradient."""
    with torch.inference_mode(), pytest.raises(ArgumentError, match="inside torch.inference_mode"):
        attribution.attribute_edges(model, LONG, CORRUPTED[0], metric)
    model.train()
    for call in (
        lambda: attribution.attribute_nodes(model, LONG, CORRUPTED[0], metric),
        lambda: paths.path_sweep(model, LONG, CORRUPTED[0], "logits", metric),
        lambda: circuits.acdc(model, LONG, CORRUPTED[0], 1.0, metric=metric),
    ):
        with pytest.raises(ArgumentError, match="training mode"):
            call()


def test_the_tools_of_saes_take_one_by_its_hook_point(model):
    """As `model.saes` does, and as the error for a nameless one says; several are refused."""
    sae = lens.saes.SparseAutoencoder(lens.saes.SaeConfig(d_in=model.cfg.d_model, d_sae=8))
    name = "blocks.0.hook_resid_post"
    named = lens.saes.reconstruction_quality(model, {name: sae}, [LONG])
    assert named == lens.saes.reconstruction_quality(model, sae, [LONG], hook_name=name)
    with pytest.raises(ArgumentError, match="one SAE.*got 2 and"):
        lens.saes.reconstruction_quality(model, {name: sae, "blocks.1.hook_resid_post": sae}, [LONG])


def test_results_show_their_largest_entries(model, metric):
    """In a terminal too."""
    edges = attribution.attribute_edges(model, LONG, CORRUPTED[0], metric)
    (label, value), *_ = edges.top_edges(1)
    assert repr(edges).startswith(f"EdgeAttribution({label} {value:+.3g}, ")
    assert repr(edges).endswith(f", of {len(edges.graph.edges)} edges)")
    nodes = attribution.attribute_nodes(model, LONG, CORRUPTED[0], metric, names="z")
    assert repr(nodes).startswith(f"NodeAttribution({nodes.top_nodes(1)[0][0]} ")
    parts = direct_logit_attribution(model, LONG, "moon", "door")
    assert repr(parts).startswith(f"DirectLogitAttribution(by component, in logits: {parts.top(1)[0][0]} ")
