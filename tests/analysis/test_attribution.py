"""Attribution against differences of metrics, one run of the model for each value or edge, in float64."""

import pytest
import torch
from analysis.attribution_subject import CLEAN, CORRUPTED, change_of, heard, shared
from golden.tiny import random_tokens
from lens_conformance.float64 import true_float64

import lens_core as lens
from lens_core.analysis.attribution import agreement, attribute_edges, attribute_nodes
from lens_core.analysis.graph import contributions, graph
from lens_core.errors import ArgumentError

STEP = 1e-5
TYPES = ("gpt2", "llama-biases", "gemma3_text", "mamba", "mamba2")


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
    own = graph(model, heads=model.cfg.model_type != "gpt2")
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


def test_integrated_gradients_at_a_hook_point_are_its_patching(gpt2):
    """Summed over the hook point, to the steps' error, which falls with their square: one run with it whole."""
    names = ["blocks.1.attn.hook_z", "blocks.0.hook_mlp_out"]
    _, clean = gpt2.run_with_cache(CLEAN, names_filter=names)
    _, corrupted = gpt2.run_with_cache(CORRUPTED, names_filter=names)
    for at, tokens, source, sign in (("corrupted", CORRUPTED, clean, 1), ("clean", CLEAN, corrupted, -1)):
        plain = measured(gpt2, tokens)
        exact = {name: sign * (measured(gpt2, tokens, (name, lens.edits.replace(source))) - plain) for name in names}
        errors = []
        for steps in (2, 8):
            options = {"names": names, "method": "ig-activations", "at": at, "steps": steps}
            found = attribute_nodes(gpt2, CLEAN, CORRUPTED, metric, **options)
            errors.append(max((found.values[n].flatten(1).sum(1) - exact[n]).abs().max() for n in names))
        assert errors[1] < errors[0] / 8
        assert errors[1] < 0.02 * max(value.abs().max() for value in exact.values())


def test_integrated_gradients_of_edges_are_their_branchs_patching(gpt2):
    """All edges from an attention layer sum to what putting its output in place does."""
    own = graph(gpt2, heads=False)
    found = attribute_edges(gpt2, CLEAN, CORRUPTED, metric, graph=own, method="ig-activations", steps=8)
    _, clean = gpt2.run_with_cache(CLEAN, names_filter="attn_out")
    entry = ("blocks.0.hook_attn_out", lens.edits.replace(clean))
    exact = measured(gpt2, CORRUPTED, entry) - measured(gpt2, CORRUPTED)
    row = own.writers.index(own.writer("L0.attn"))
    torch.testing.assert_close(found.node_values[:, row], exact, rtol=0.02, atol=0.005)


@pytest.mark.parametrize("name", ["gpt2", "mamba"])
def test_integrated_gradients_of_inputs_sum_to_the_metrics_difference(name):
    """Over the embeddings' edges; and the values of the other writers use the same gradients."""
    model = shared(name)
    errors = []
    own = graph(model, heads=False)
    for steps in (4, 16):
        found = attribute_edges(model, CLEAN, CORRUPTED, metric, graph=own, method="ig-inputs", steps=steps)
        embeddings = [row for row, node in enumerate(found.graph.writers) if node.kind == "embed"]
        whole = found.clean - found.corrupted
        errors.append((found.node_values[:, embeddings].sum(1) - whole).abs().max())
    assert errors[1] < errors[0] / 4
    if name == "gpt2":  # between two inputs of the narrow Mamba the norm is near its singularity, and steps err more
        assert errors[1] < 0.05 * whole.abs().max()
    nodes = attribute_nodes(model, CLEAN, CORRUPTED, metric, method="ig-inputs", steps=16).summed("pos")
    row = next(row for row, node in enumerate(found.graph.writers) if node.label in ("L1.mlp", "L1.mixer"))
    writer = found.graph.writers[row]
    torch.testing.assert_close(found.node_values[:, row], nodes.values[writer.hook], rtol=1e-9, atol=1e-9)


def test_baselines_without_a_corrupted_run(gpt2):
    """Zero leaves value times gradient; the mean is that over rows and positions, of another text if one is given."""
    zero = attribute_nodes(gpt2, CLEAN, None, metric, names="mlp_out", baseline="zero")
    mean = attribute_nodes(gpt2, CLEAN, None, metric, names="mlp_out", baseline="mean")
    text = random_tokens(3, 7, seed=2, vocab=24)
    other = attribute_nodes(gpt2, CLEAN, text, metric, names="mlp_out", baseline="mean")
    with gpt2.caching("mlp_out", incl_bwd=True) as cache:
        metric(gpt2(CLEAN)).sum().backward()
    gpt2.zero_grad()
    _, texts = gpt2.run_with_cache(text, names_filter="mlp_out")
    for name, value in cache.items():
        gradient = cache.grad[name]
        for found, base in ((zero, 0.0), (mean, value.mean((0, 1))), (other, texts[name].mean((0, 1)))):
            torch.testing.assert_close(found.values[name], ((value - base) * gradient).sum(-1))
    assert zero.corrupted is None
    edges = attribute_edges(gpt2, CLEAN, text, metric, baseline="mean")
    row = edges.graph.writers.index(edges.graph.writer("L1.mlp"))
    torch.testing.assert_close(edges.node_values[:, row], other.values["blocks.1.hook_mlp_out"].sum(1))
    whole = attribute_edges(gpt2, CLEAN, None, metric, baseline="zero")
    assert not torch.allclose(whole.values, edges.values)


def test_nothing_is_left_behind(gpt2):
    """No parameter gets a gradient, none needs one, and inside `no_grad` it works as well."""
    expected = attribute_edges(gpt2, CLEAN, CORRUPTED, metric)
    assert all(parameter.grad is None for parameter in gpt2.parameters())
    gpt2.requires_grad_(False)
    try:
        with torch.no_grad():
            again = attribute_edges(gpt2, CLEAN, CORRUPTED, metric)
    finally:
        gpt2.requires_grad_(True)
    assert torch.equal(again.values, expected.values)
    assert not again.values.requires_grad
    assert not again.clean.requires_grad


def test_a_stopped_gradient_starts_anew(gpt2):
    """Where functions of an enclosing block cut the graph, readers and values beyond the cut count still."""
    stop = [("blocks.1.hook_resid_mid", lens.edits.detach())]
    plain = attribute_edges(gpt2, CLEAN, CORRUPTED, metric)
    with gpt2.hooks(stop):
        found = attribute_edges(gpt2, CLEAN, CORRUPTED, metric)
        nodes = attribute_nodes(gpt2, CLEAN, CORRUPTED, metric, names="resid_post")
    late = [reader.layer == 2 or reader.label in ("L1.mlp", "logits") for reader in found.graph.readers]
    late = torch.tensor(late)
    torch.testing.assert_close(found.values[..., late], plain.values[..., late])
    assert not found.values[..., ~late].any()
    assert nodes.values["blocks.1.hook_resid_post"].any()
    assert not nodes.values["blocks.0.hook_resid_post"].any()


def test_scores_that_are_masked_do_not_count(gpt2):
    """Minus infinity less minus infinity is no number; under it there is nothing to attribute."""
    found = attribute_nodes(gpt2, CLEAN, CORRUPTED, metric, names="attn_scores")
    assert all(value.isfinite().all() for value in found.values.values())
    assert not found.values["blocks.1.attn.hook_attn_scores"].triu(1).any()


def test_one_number_for_all_rows_gives_each_rows_share(gpt2):
    """The mean of the rows' metrics, for one."""
    rows = attribute_edges(gpt2, CLEAN, CORRUPTED, metric)
    mean = attribute_edges(gpt2, CLEAN, CORRUPTED, lambda logits: metric(logits).mean())
    torch.testing.assert_close(mean.values * 2, rows.values)
    assert mean.clean.ndim == 0


def test_results_can_be_summed_stacked_ranked_and_shown(gpt2):
    """By axis, by kind of hook point, by size; as a table, a picture, and against exact effects."""
    found = attribute_nodes(gpt2, CLEAN, CORRUPTED, metric, names=["z", "mlp_out"])
    heads = found.summed("pos")
    assert heads.axes["blocks.1.attn.hook_z"] == ("n_heads",)
    stack = heads.stacked("attn.hook_z")
    assert torch.equal(stack[2], found.values["blocks.2.attn.hook_z"].sum(1))
    frame = found.to_dataframe()
    assert len(frame) == 3 * (5 * 3 + 5)
    row = frame[(frame.hook == "blocks.1.attn.hook_z") & (frame.pos == 4) & (frame.n_heads == 2)].iloc[0]
    assert row.label == "L1H2.z@4"
    values = found.values["blocks.1.attn.hook_z"][:, 4, 2]
    assert (row.value, row.stderr) == pytest.approx((values.mean().item(), (values.std() / 2**0.5).item()))
    top = found.top_nodes(3)
    assert [label for label, _ in top] == frame.sort_values("value", key=abs, ascending=False).label[:3].tolist()
    assert found.top_nodes(1, signed=True)[0][1] == pytest.approx(frame.value.max())
    assert heads.heatmap("attn.hook_z").html.count("layer 2")
    assert found.agreement(found.values).pearson == pytest.approx(1.0)
    whole = attribute_nodes(gpt2, CLEAN, CORRUPTED, metric, names="z", axes=["d_head"])
    torch.testing.assert_close(
        whole.values["blocks.0.attn.hook_z"].sum(1), found.values["blocks.0.attn.hook_z"].sum((1, 2))
    )
    edges = attribute_edges(gpt2, CLEAN, CORRUPTED, metric)
    table = edges.to_dataframe()
    best = table.sort_values("value", key=abs, ascending=False).iloc[0]
    assert edges.top_edges(1)[0] == (best.edge, pytest.approx(best.value))
    assert edges.score(best.edge) == pytest.approx(best.value)
    assert table[table.source == "L0H1"].value.sum() == pytest.approx(dict(edges.top_nodes(99))["L0H1"])
    assert edges.agreement(2 * edges.values).slope == pytest.approx(2.0)
    assert "L2H2.k" in edges.heatmap().html
    for html in (edges._repr_html_(), found._repr_html_()):
        assert "20 largest" in html


def test_agreement_by_hand():
    """Correlations of four pairs; what is not finite is left out."""
    found = agreement(torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0]), torch.tensor([1.0, 3.0, 2.0, -4.0, torch.nan]))
    x, y = torch.tensor([-1.5, -0.5, 0.5, 1.5]), torch.tensor([1.0, 3.0, 2.0, -4.0]) - 0.5
    assert found.pearson == pytest.approx(float((x @ y) / (x.norm() * y.norm())))
    assert found.spearman == pytest.approx(-0.4)  # ranks 2 4 3 1: 1 - 6 * 14 / (4 * 15)
    assert found.slope == pytest.approx((1 + 6 + 6 - 16) / 30)
    assert (found.sign, found.count) == (0.75, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrupted": None}, "no corrupted input: give one, or baseline='zero'"),
        ({"baseline": "zero"}, "'zero' compares with no other run"),
        ({"baseline": "median"}, "baseline is one of 'corrupted', 'zero', 'mean'; got 'median'"),
        ({"baseline": "mean", "at": "corrupted"}, "leave out at='corrupted'"),
        ({"method": "ig"}, "method is one of 'gradient', 'ig-inputs', 'ig-activations'; got 'ig'"),
        ({"method": "ig-inputs", "at": "clean"}, "between both runs: leave out at='clean'"),
        ({"method": "ig-inputs", "steps": 0}, "steps is a whole number from 1; got 0"),
        ({"corrupted": CORRUPTED[:, :1]}, "different shapes at.*same number of rows and tokens"),
        ({"corrupted": CORRUPTED[:1]}, "different shapes at.*same number of rows and tokens"),
        ({"corrupted": CORRUPTED[:1], "method": "ig-inputs"}, "different shapes at.*same number of rows and tokens"),
        ({"corrupted": CORRUPTED[:, :4]}, "different shapes at.*same number of rows and tokens"),
        ({"metric": lambda logits: logits[:, -1]}, r"one number for each of the 2 rows, or one; got \[2, 29\]"),
        ({"metric": lambda logits: logits[:, -1].argmax(-1)}, "no gradient"),
        ({"metric": 3}, "the metric is a function"),
        ({"return_type": "loss"}, "leave out return_type"),
    ],
)
def test_what_does_not_go_together_is_refused(gpt2, change, message):
    """By both functions, with what to do; the model works afterwards."""
    given = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": metric} | change
    for attribute in (attribute_nodes, attribute_edges):
        with pytest.raises(ArgumentError, match=message):
            attribute(gpt2, **given)
    assert gpt2(CLEAN).isfinite().all()


def test_wrong_names_and_axes_are_refused(gpt2):
    """Places without gradients or known axes; graphs of other models; results that have no such part."""
    for names, message in (("hook_tokens", "whole numbers"), ("hf.transformer.h.0.output", "axes of 'hf")):
        with pytest.raises(ArgumentError, match=message):
            attribute_nodes(gpt2, CLEAN, CORRUPTED, metric, names=names)
    with pytest.raises(ArgumentError, match=r"axes are some of batch.*got \['head'\]"):
        attribute_nodes(gpt2, CLEAN, CORRUPTED, metric, names="z", axes=["head"])
    with pytest.raises(ArgumentError, match="graph is of another model: there is no 'blocks.0.hook_mixer_out'"):
        attribute_edges(gpt2, CLEAN, CORRUPTED, metric, graph=graph(shared("mamba")))
    found = attribute_nodes(gpt2, CLEAN, CORRUPTED, metric, names="z")
    with pytest.raises(ArgumentError, match="no hook point here has an axis 'key'; there are n_heads, pos"):
        found.summed("key")
    with pytest.raises(ArgumentError, match="no 'hook_mlp_out' here; there are attn.hook_z"):
        found.stacked("hook_mlp_out")
    with pytest.raises(ArgumentError, match="one axis more"):
        found.heatmap("attn.hook_z")
    with pytest.raises(ArgumentError, match="k is how many"):
        found.top_nodes(0)
    with pytest.raises(ArgumentError, match="exact effects are of"):
        found.agreement({})
    with pytest.raises(ArgumentError, match="not of one shape"):
        agreement(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ArgumentError, match="two cells at least"):
        agreement(torch.zeros(1), torch.zeros(1))


def test_the_induction_circuit_of_the_toy_is_found():
    """The copy of the token before into the induction head's key is an edge of the top; agreement with cutting each."""
    model = lens.load("toy:gpt2", dtype=torch.float64)
    names = ("king", "queen", "apple", "river", "moon", "book", "bread", "stone")
    words = torch.tensor([model.to_single_token(f" {word}") for word in names])
    generator = torch.Generator().manual_seed(0)
    a, b, c, d, e, other = torch.stack([words[torch.randperm(8, generator=generator)[:6]] for _ in range(6)], 1)
    start = torch.full_like(a, model.tokenizer.bos_token_id)
    clean = torch.stack([start, a, b, c, d, e, a, b, c], 1)
    corrupted = torch.stack([start, a, b, other, d, e, a, b, c], 1)
    rows = torch.arange(6)

    def preference(logits):
        return logits[rows, -1, d] - logits[rows, -1, e]

    found = attribute_edges(model, clean, corrupted, preference, method="ig-inputs")
    assert {"embed -> L0H2.v", "L0H2 -> L1H0.k", "L1H0 -> L1.mlp", "L1.mlp -> logits"} <= set(dict(found.top_edges(5)))
    own, exact = found.graph, torch.full_like(found.values, torch.nan)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter=own.writer_names)
        _, base = model.run_with_cache(corrupted, names_filter=own.writer_names)
        delta, plain = contributions(cache, own.writers) - contributions(base, own.writers), preference(model(clean))
        for edge in own.edges:
            writer, reader = own.writers.index(edge.source), own.readers.index(edge.target)
            cut = model.run_with_hooks(clean, fwd_hooks=[heard(edge.target, -delta[writer])])
            exact[:, writer, reader] = plain - preference(cut)
    agrees = found.agreement(exact)
    assert agrees.pearson > 0.95  # measured 0.97 over edges and rows
    one = attribute_edges(model, clean, corrupted, preference, at="clean").agreement(exact)
    assert 0.5 < one.pearson < agrees.pearson
