"""Time edges of states against differences of metrics, one pair of runs for each, in float64."""

import pytest
import torch
from analysis.attribution_subject import CLEAN, CORRUPTED, shared
from lens_conformance.float64 import true_float64

import lens_core as lens
from lens_core.analysis.ssm_flow import attribute_states
from lens_core.errors import ArgumentError

STEP = 1e-5
LAYER = "blocks.0.mixer.hook_"


@pytest.fixture(autouse=True)
def _float64():
    with true_float64():
        yield


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def model(request):
    """Give a tiny model of each kind in float64."""
    return shared(request.param)


def metric(logits):
    """Give a smooth function of the last logits, for each row."""
    last = logits[:, -1].double()
    return last[:, 3] - last[:, 7] + 0.1 * last[:, :5].logsumexp(-1)


@torch.no_grad()
def slope(model, tokens, name, position, change):
    """Give how fast the metric grows as the value at one position moves, by two runs."""
    there, back = (
        metric(model.run_with_hooks(tokens, fwd_hooks=[(name, lambda v, hook, by=by: v + by * change, position)]))
        for by in (STEP, -STEP)
    )
    return (there - back) / (2 * STEP)


@pytest.mark.parametrize("at", ["clean", "corrupted"])
def test_each_part_is_a_slope(model, at):
    """Of the metric as the state after one position moves by what was carried, faded or written, or as y does."""
    found = attribute_states(model, CLEAN, CORRUPTED, metric, at=at, layers=0)
    names = [LAYER + part for part in ("ssm_state", "decay", "ssm_write", "C")]
    _, clean = model.run_with_cache(CLEAN, names_filter=names)
    _, corrupted = model.run_with_cache(CORRUPTED, names_filter=names)
    own, other, tokens = (clean, corrupted, CLEAN) if at == "clean" else (corrupted, clean, CORRUPTED)
    state, decay, write, C = names
    spread = (None,) * (clean[state].ndim - clean[decay].ndim)
    change, faster = clean[state] - corrupted[state], clean[decay] - corrupted[decay]
    pos = 3
    moves = {
        "carried": own[decay][:, pos][(..., *spread)] * change[:, pos - 1],
        "faded": faster[:, pos][(..., *spread)] * other[state][:, pos - 1],
        "written": (clean[write] - corrupted[write])[:, pos],
    }
    for part, move in moves.items():
        values = getattr(found, part)[0][:, pos - 1 if part == "carried" else pos].sum(-1)
        expected = slope(model, tokens, state, pos, move[:, None])
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-8)
        assert values.abs().max() > 1e-5
    at_pos = own[C][:, pos]
    if at_pos.ndim == 3:  # groups of heads
        at_pos = at_pos.repeat_interleave(change.shape[2] // at_pos.shape[1], 1)[:, :, None]
    else:
        at_pos = at_pos[:, None]
    read = (change[:, pos] * at_pos).sum(-1)
    torch.testing.assert_close(
        found.read[0][:, pos].sum(-1), slope(model, tokens, LAYER + "y", pos, read[:, None]), rtol=1e-5, atol=1e-8
    )


def test_what_enters_the_states_is_what_is_read(model):
    """Head by head and layer by layer; the first position has nothing to carry, the last carries nothing on."""
    found = attribute_states(model, CLEAN, CORRUPTED, metric)
    torch.testing.assert_close((found.written + found.faded).sum(2), found.read.sum(2), rtol=1e-9, atol=1e-9)
    assert not found.carried[:, :, -1].any()
    assert not found.faded[:, :, 0].any()
    assert len(found.layers) == len(found.carried) == model.cfg.n_layers
    torch.testing.assert_close(found.state, found.carried + found.read)
    label, value = found.top_edges(1)[0]
    assert abs(value) == found.carried.sum(-1).mean(1).abs().max()
    assert label.split(" ")[2] == "->"
    assert "layer 2" in found.heatmap().html


def test_mistakes_are_named(model):
    """Models without states, runs without gradients."""
    with pytest.raises(ArgumentError, match="no block of this model has an SSM mixer"):
        attribute_states(lens.load("toy:gpt2"), CLEAN, CORRUPTED, metric)
    with pytest.raises(ArgumentError, match=r"at is 'clean' or 'corrupted'; got 'both'"):
        attribute_states(model, CLEAN, CORRUPTED, metric, at="both")
    with pytest.raises(ArgumentError, match=r"different shapes at 'blocks.0.*Clean and corrupted inputs need"):
        attribute_states(model, CLEAN, CORRUPTED[:, :4], metric)
    with pytest.raises(ArgumentError, match="k is how many"):
        attribute_states(model, CLEAN, CORRUPTED, metric).top_edges(0)
