"""Attribution against differences of metrics, one run of the model for each value or edge, in float64."""

import pytest
import torch
from analysis.attribution_subject import CLEAN, CORRUPTED, change_of, heard, shared
from lens_conformance.float64 import true_float64

from lens_core.analysis.attribution import attribute_edges, attribute_nodes
from lens_core.analysis.graph import graph

STEP = 1e-5
TYPES = ("gpt2", "llama-biases", "gemma3_text", "stablelm-parallel", "mamba", "mamba2", "falcon_h1")


def metric(logits):
    """Give a smooth function of the last logits, for each row."""
    last = logits[:, -1].double()
    return last[:, 3] - last[:, 7] + 0.1 * last[:, :5].logsumexp(-1)


@pytest.fixture(autouse=True)
def _float64():
    with true_float64():
        yield


@pytest.fixture(scope="module")
def gpt2():
    """Give one of them."""
    return shared("gpt2")


@pytest.fixture(scope="module", params=TYPES)
def model(request):
    """Give each of them."""
    return shared(request.param)


@torch.no_grad()
def measured(model, tokens, *entries):
    """Give the metric of a run with hooks."""
    return metric(model.run_with_hooks(tokens, fwd_hooks=list(entries)))


def slope(model, tokens, name, delta):
    """Give how fast the metric grows as a value moves along a difference, by two runs."""

    def moved(by):
        def move(value, hook):
            rows = hook.positions if value.shape[1] != delta.shape[1] and value.ndim == delta.ndim else slice(None)
            return value + by * (delta if value.shape == delta.shape else delta[:, rows])

        return measured(model, tokens, (name, move))

    return (moved(STEP) - moved(-STEP)) / (2 * STEP)


def only(tensor, axes, index):
    """Keep one cell of the axes after the batch."""
    kept = torch.zeros_like(tensor)
    at = (slice(None), *(index[axes.index(axis)] if axis in axes else slice(None) for axis in ALL[: tensor.ndim - 1]))
    kept[at] = tensor[at]
    return kept


ALL = ("first", "second", "third", "fourth")
PLACES = {
    "resid_post": ("first",),
    "z": ("first", "second"),
    "mlp_out": ("first",),
    "post": ("first", "second"),
    "pattern": ("first", "second", "third"),
    "mixer_out": ("first",),
    "ssm_state": ("first", "second"),
    "delta": ("first", "second"),
    "hook_embed": ("first",),
}
"""Of the axes after the batch, those that are kept."""


def test_nodes_are_slopes_along_the_difference(model):
    """Of the metric, cell by cell: a central difference of two runs for each, at the run whose gradient is taken."""
    at = "clean" if model.cfg.model_type in ("gpt2", "mamba") else "corrupted"
    known = {point.part.rsplit("hook_", 1)[-1] for point in model.hook_points()}
    places = {name: axes for name, axes in PLACES.items() if name.removeprefix("hook_") in known}
    found = attribute_nodes(model, CLEAN, CORRUPTED, metric, names=list(places), at=at)
    tokens = CLEAN if at == "clean" else CORRUPTED
    _, clean = model.run_with_cache(CLEAN, names_filter=list(places))
    _, corrupted = model.run_with_cache(CORRUPTED, names_filter=list(places))
    generator = torch.Generator().manual_seed(0)
    for name, axes in places.items():
        full = next(key for key in found.values if key.endswith(f"hook_{name.removeprefix('hook_')}"))
        values, delta = found.values[full], clean[full] - corrupted[full]
        assert values.ndim == 1 + len(axes)
        cells = torch.ones(values.shape[1:]).nonzero()
        for index in cells[torch.randperm(len(cells), generator=generator)[:2]].tolist():
            expected = slope(model, tokens, full, only(delta, axes, index))
            torch.testing.assert_close(values[(slice(None), *index)], expected, rtol=1e-5, atol=1e-7)
    assert found.clean.equal(measured(model, CLEAN))
    assert found.corrupted.equal(measured(model, CORRUPTED))


def test_edges_are_slopes_at_what_the_reader_reads(model):
    """What the writer adds is moved at the reader's own copy of the stream only: two runs for each edge."""
    own = graph(model, heads=model.cfg.model_type != "stablelm")
    found = attribute_edges(model, CLEAN, CORRUPTED, metric, graph=own)
    delta = change_of(model, own)
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(0))[:8].tolist()
    for edge in (own.edges[index] for index in order):
        writer, reader = own.writers.index(edge.source), own.readers.index(edge.target)
        there, back = (measured(model, CORRUPTED, heard(edge.target, by * delta[writer])) for by in (STEP, -STEP))
        expected = (there - back) / (2 * STEP)
        torch.testing.assert_close(found.values[:, writer, reader], expected, rtol=1e-5, atol=1e-7)
    assert not found.values[:, ~own.mask].any()
    assert (found.values[:, own.mask].abs() > 1e-9).float().mean() > 0.5


def test_the_edges_of_a_writer_sum_to_its_attribution(gpt2):
    """Whatever a value changes, it changes by way of its readers."""
    own = graph(gpt2)
    edges = attribute_edges(gpt2, CLEAN, CORRUPTED, metric, graph=own)
    nodes = attribute_nodes(gpt2, CLEAN, CORRUPTED, metric).summed("pos")
    for writer, value in zip(own.writers, edges.node_values.T, strict=True):
        name = writer.hook.replace("hook_result", "hook_z")
        expected = nodes.values[name] if writer.head is None else nodes.values[name][:, writer.head]
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
