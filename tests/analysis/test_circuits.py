"""Circuits against sums over edges written out on the golden forwards, in float64; search and curves against loops."""

import pytest
import torch
from analysis.circuit_subject import OTHER, TOKENS, close, metric, of_kit, subject
from lens_conformance.float64 import true_float64

import lens_core as lens
from lens_core.analysis import circuits
from lens_core.analysis.attribution import attribute_edges
from lens_core.analysis.circuits import Circuit
from lens_core.analysis.graph import graph
from lens_core.errors import AnalysisFileError, ArgumentError

GOLDEN = ("gpt2", "llama", "stablelm-parallel", "granite", "gemma2", "olmo2", "mamba", "mamba2")
KIT = ("phi", "falcon_h1", "jamba", "nemotron_h")


def random_mask(found, seed=0, share=0.5):
    """Keep about this share of the edges."""
    draw = torch.rand(found.mask.shape, generator=torch.Generator().manual_seed(seed))
    return (draw < share) & found.mask


# ---------------------------------------------------------------------- the oracle


def written(one, label, values):
    """Say what a writer, or a bias behind a post-norm, adds, from a golden forward's values so far."""
    if label in ("embed", "pos_embed"):
        return values[f"hook_{label}"]
    layer = int(label[1])
    block = f"blocks.{layer}."
    if label.endswith((".mlp", ".mixer")):
        return values[f"{block}hook_{label.split('.')[1]}_out"]
    weights = one.hf.state_dict()
    if one.name == "mamba2":
        head = slice(11 * int(label[3:]), 11 * int(label[3:]) + 11)
        rows = weights[f"backbone.layers.{layer}.mixer.out_proj.weight"].T[head]
        return values[f"{block}mixer.hook_gated"][..., head] @ rows
    if label.endswith("bias"):
        result = weights[f"model.layers.{layer}.self_attn.o_proj.bias"]
    else:
        result = values[f"{block}attn.hook_result"][:, :, int(label[3:])]
    if one.name in ("gemma2", "olmo2"):
        gain = weights[f"model.layers.{layer}.post_attention_layernorm.weight"]
        return result / values[f"{block}ln1_post.hook_scale"] * (gain + (one.name == "gemma2"))
    return result * getattr(one.hf.config, "residual_multiplier", 1.0)


def by_hand(one, keep, source, tokens=TOKENS):
    """Run the golden forward with each cut edge's writer swapped at each reader, one edge after the other.

    `source` gives what stands for a writer, by label; None leaves a bias as it is.
    """
    found = graph(one.model)
    values, edits = {}, {}

    def record(x, hook):
        values[hook.name] = x.clone()

    for name in found.writer_names:
        edits[name.replace("hook_z", "hook_result")] = record
    scaled = one.name in ("gemma2", "olmo2")
    biased = scaled and "model.layers.0.self_attn.o_proj.bias" in one.hf.state_dict()

    def read(x, hook):
        for column, reader in enumerate(found.readers):
            if reader.hook != hook.name:
                continue
            view = x if reader.head is None else x[:, :, reader.head]
            change = torch.zeros_like(view)
            for row, writer in enumerate(found.before(reader)):
                cut = 1 - float(keep[row, column])
                if cut:
                    change = change + cut * (source(writer.label) - written(one, writer.label, values))
            for layer in {writer.layer for writer in found.before(reader) if biased and writer.kind == "attn"}:
                rows = [row for row, w in enumerate(found.writers) if w.layer == layer and w.kind == "attn"]
                cut = sum(1 - float(keep[row, column]) for row in rows) / len(rows)
                label = f"L{layer}.attn.bias"
                if source(label) is not None:
                    change = change + cut * (source(label) - written(one, label, values))
            view += change
        return x

    edits |= dict.fromkeys(found.reader_names, read)
    return one.golden(tokens, edits)[0]


def resampled(one, tokens=OTHER):
    """Give the source of resampling."""
    _, values = one.golden(tokens)
    return lambda label: written(one, label, values)


# ---------------------------------------------------------------------- running


@pytest.mark.parametrize("name", GOLDEN)
def test_any_set_of_edges_is_cut_as_by_hand(name):
    """Half of the edges, a third of them in part, and one alone: heads, groups, parallel blocks, post-norms, mixers."""
    one = subject(name)
    found, source = graph(one.model), resampled(one)
    mask = random_mask(found).double() - 0.4 * random_mask(found, 1, 0.3)
    close(one(circuits.run_circuit, TOKENS, OTHER, mask), by_hand(one, mask, source))
    if name not in ("gpt2", "llama", "mamba2"):
        return
    single = found.mask
    middle = found.reach.index(max(found.reach[:-1]))
    single[found.reach[middle] - 1, middle] = False
    cut = one(circuits.run_circuit, TOKENS, OTHER, Circuit(graph=found, kept=single))
    close(cut, by_hand(one, single, source))
    assert (cut - one.golden()[0]).abs().max() > 1e-6


@pytest.mark.parametrize("name", [*GOLDEN, *KIT])
def test_all_edges_are_the_model_and_none_the_corrupted_run(name):
    """All: bit for bit. None: the corrupted input's logits, to rounding in float64. Both from labels, too."""
    model = of_kit(name) if name in KIT else subject(name).model
    found = graph(model)
    labels = [node.label for node in (*found.writers, *found.constants)]
    assert len(set(labels)) == len(labels)
    with true_float64(), torch.no_grad():
        full = circuits.run_circuit(model, TOKENS, OTHER, Circuit.full(found))
        assert torch.equal(full, model(TOKENS))
        assert torch.equal(circuits.run_circuit(model, TOKENS, OTHER, found.mask.double()), full)
        none = circuits.run_circuit(model, TOKENS, OTHER, [])
        close(none, model(OTHER))
        assert (none - full).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba", *KIT])
def test_a_writer_with_all_edges_cut_is_a_patched_writer(name):
    """What it writes on the corrupted input stands in its place for everything downstream."""
    model = of_kit(name) if name in KIT else subject(name).model
    found = graph(model)
    with true_float64(), torch.no_grad():
        _, other = model.run_with_cache(OTHER, names_filter=list(found.writer_names))
        for index in (0, len(found.writers) // 2):
            node = found.writers[index]
            name = next(n for n in (node.hook.replace("hook_result", "hook_z"), node.hook) if n in other)

            def patch(value, hook, node=node, name=name):
                if node.head is None:
                    return other[name]
                own = value if value.ndim == 4 else value.unflatten(-1, (model.cfg.sizes["ssm_heads"], -1))
                new = own.clone()
                new[:, :, node.head] = other[name].view_as(own)[:, :, node.head]
                return new.view_as(value)

            mask = found.mask
            mask[index] = False
            cut = circuits.run_circuit(model, TOKENS, OTHER, mask)
            close(cut, model.run_with_hooks(TOKENS, fwd_hooks=[(name, patch)]))


def test_query_heads_read_their_groups_keys_by_themselves_if_asked():
    """With readers of their own, a group's keys are those of all its heads: cutting all cuts the group's."""
    one = subject("llama")
    own, shared = graph(one.model, per_query_head=True), graph(one.model)
    mask, grouped = own.mask, shared.mask
    for head in (2, 3):
        mask[1, own.readers.index(own.reader(f"L1H{head}.k"))] = False
    grouped[1, shared.readers.index(shared.reader("L1KV1.k"))] = False
    both = one(circuits.run_circuit, TOKENS, OTHER, Circuit(graph=own, kept=mask))
    close(both, one(circuits.run_circuit, TOKENS, OTHER, grouped))
    mask[1, own.readers.index(own.reader("L1H2.k"))] = True
    assert (one(circuits.run_circuit, TOKENS, OTHER, mask, graph=own) - both).abs().max() > 1e-6


@pytest.mark.parametrize(("heads", "merge"), [(False, False), (True, True), (False, True)])
def test_coarser_graphs_cut_the_same_where_all_heads_are_cut(heads, merge):
    """Whole attention, and embeddings as one writer."""
    one = subject("llama")
    fine, coarse = graph(one.model), graph(one.model, heads, merge_embeddings=merge)
    draw = torch.rand(99, 99, generator=torch.Generator().manual_seed(0)) < 0.5

    def mask_of(found):
        mask = found.mask
        for row, writer in enumerate(found.writers):
            for column, reader in enumerate(found.readers):
                kinds = [("embed", "attn", "mlp", "logits").index(node.kind) for node in (writer, reader)]
                at = [kind + 4 * (node.layer or 0) for kind, node in zip(kinds, (writer, reader), strict=True)]
                mask[row, column] &= draw[at[0], at[1] + 20 * "qkv".index(reader.part or "q")]
        return mask

    close(
        one(circuits.run_circuit, TOKENS, OTHER, mask_of(fine), graph=fine),
        one(circuits.run_circuit, TOKENS, OTHER, mask_of(coarse), graph=coarse),
    )


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean_by_position"])
@pytest.mark.parametrize("name", ["gpt2", "olmo2", "mamba2"])
def test_means_and_nothing_may_stand_for_a_writer(name, ablation):
    """The mean over rows and positions, or rows alone, of any number of them; biases are never set to zero."""
    one = subject(name)
    mask = random_mask(graph(one.model), 2)
    rows = torch.cat([OTHER, TOKENS.flip(1)])
    _, values = one.golden(rows)
    axes = {"mean": (0, 1), "mean_by_position": (0,)}

    def source(label):
        if ablation == "zero":
            return None if label.endswith("bias") else torch.zeros(())
        value = written(one, label, values)
        if value.ndim == 1:
            return value
        return value.mean(axes[ablation], keepdim=True)

    given = None if ablation == "zero" else rows
    close(one(circuits.run_circuit, TOKENS, given, mask, ablation=ablation), by_hand(one, mask, source))


def test_means_leave_padding_out():
    """And runs with padding have the values of the rows by themselves."""
    one = subject("gpt2")
    mask = random_mask(graph(one.model))
    pad = torch.full((2, 1), 28)
    attention = torch.tensor([[0, 1, 1, 1, 1, 1]] * 2)
    padded = [torch.cat([pad, tokens], 1) for tokens in (TOKENS, OTHER)]
    for ablation in ("resample", "mean"):
        found = one(circuits.run_circuit, *padded, mask, ablation=ablation, attention_mask=attention)
        close(found[:, 1:], one(circuits.run_circuit, TOKENS, OTHER, mask, ablation=ablation))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba", "mamba2"])
def test_gradients_reach_a_mask(name):
    """As finite differences say, in float64; the values are those without a gradient."""
    one = subject(name)
    found = graph(one.model)
    mask = (random_mask(found).double() * 0.8 + 0.1).requires_grad_()
    logits = one(circuits.run_circuit, TOKENS, OTHER, mask)
    metric(logits).sum().backward()
    with torch.no_grad():
        close(logits, one(circuits.run_circuit, TOKENS, OTHER, mask.detach()))
        for writer, reader in ((0, 0), (1, len(found.readers) - 2), (len(found.writers) - 1, len(found.readers) - 1)):
            step = torch.zeros_like(mask)
            step[writer, reader] = 1e-5
            ends = [metric(one(circuits.run_circuit, TOKENS, OTHER, mask + by)).sum() for by in (step, -step)]
            assert mask.grad[writer, reader].item() == pytest.approx(
                (ends[0] - ends[1]).item() / 2e-5, rel=1e-4, abs=1e-7
            )
    assert (mask.grad[~found.mask] == 0).all()


# ---------------------------------------------------------------------- one edge, one component at a time


@pytest.mark.parametrize("name", ["llama", "mamba", "mamba2"])
def test_effects_of_single_edges_are_single_runs(name):
    """Whatever the number of rows in a forward, and though the blocks below a reader are not run anew."""
    one = subject(name)
    found = graph(one.model)
    effects = one(circuits.edge_effects, TOKENS, OTHER, metric, batch_size=14)
    assert effects.values.isnan().equal(~found.mask.expand_as(effects.values))
    close(effects.baseline, metric(one.golden()[0]))
    for edge in found.edges[:: max(1, len(found) // 3)]:
        kept = found.mask
        row, column = found.writers.index(edge.source), found.readers.index(edge.target)
        kept[row, column] = False
        close(effects.values[:, row, column], metric(one(circuits.run_circuit, TOKENS, OTHER, kept)))
    label, effect = effects.top(1)[0]
    assert abs(effect) == pytest.approx(effects.scores.nan_to_num().abs().max().item())
    frame = effects.to_dataframe()
    assert len(frame) == 2 * len(found)
    line = frame[(frame.source + " -> " + frame.target == label) & (frame.row == 1)]
    edge = found.edge(label)
    row, column = found.writers.index(edge.source), found.readers.index(edge.target)
    assert line.effect.item() == pytest.approx(effects.effect[1, row, column].item())
    assert effect == pytest.approx(effects.scores[row, column].item())


def test_a_component_is_cut_with_all_its_edges():
    """Those it reads by, and those from it."""
    one = subject("gpt2")
    circuit = Circuit(graph=graph(one.model), kept=random_mask(graph(one.model), 3, 0.8))
    effects = one(circuits.component_effects, TOKENS, OTHER, circuit, metric, batch_size=6)
    assert effects.components == tuple(name for name in circuit.components if name != "logits")
    for name in ("embed", "L1H2", "L2.mlp"):
        edges = [e.label for e in circuit.edges if name not in (e.source.component, e.target.component)]
        assert len(edges) < len(circuit)
        expected = metric(one(circuits.run_circuit, TOKENS, OTHER, edges))
        close(effects.values[effects.components.index(name)], expected)
    close(effects.baseline, metric(one(circuits.run_circuit, TOKENS, OTHER, circuit)))
    assert effects.top(1)[0][0] == effects.components[int(effects.effect.mean(1).abs().argmax())]
    assert "L1H2" in effects._repr_html_()
    with pytest.raises(ArgumentError, match="no component 'L7'"):
        circuit.without("L7")


# ---------------------------------------------------------------------- choosing


def divergence(logits, full):
    """Write KL(full || circuit) of the last position out, in nats, as mean over the rows."""
    p, q = full[:, -1].softmax(-1), logits[:, -1].softmax(-1)
    return (p * (p / q).log()).sum(-1).mean().item()


def acdc_by_loop(one, found, threshold, distance):
    """Write the search out: one run for each edge, in order, nothing skipped."""
    kept, current = found.mask, 0.0
    for reader in reversed(range(len(found.readers))):
        for writer in reversed(range(found.reach[reader])):
            tried = kept.clone()
            tried[writer, reader] = False
            now = distance(one(circuits.run_circuit, TOKENS, OTHER, tried, graph=found))
            if now - current < threshold:
                kept, current = tried, now
    return kept


@torch.no_grad()
@pytest.mark.parametrize(("name", "batch_size"), [("mamba", 2), ("llama", 64)])
def test_the_search_is_one_cut_after_the_other(name, batch_size):
    """However many are tried at once, and with readers that nobody reads left out."""
    one = subject(name)
    full, small = one.golden()[0], graph(one.model, heads=False)
    options, distance, threshold = {}, lambda logits: divergence(logits, full), 0.2
    if name == "llama":
        options, threshold = {"metric": metric}, 0.05

        def distance(logits):
            return (metric(logits) - metric(full)).abs().mean().item()

    found = one(circuits.acdc, TOKENS, OTHER, threshold, graph=small, batch_size=batch_size, **options)
    assert found.kept.equal(acdc_by_loop(one, small, threshold, distance))
    assert 0 < len(found) < len(small)
    assert (found.scores[found.kept] >= threshold).all()


def test_where_the_divergence_is_taken():
    """At positions, or at each row's last real one."""
    one = subject("mamba")
    options = {"batch_size": 8}
    last = one(circuits.acdc, TOKENS, OTHER, 0.2, **options)
    assert last.kept.equal(one(circuits.acdc, TOKENS, OTHER, 0.2, positions=-1, **options).kept)
    first = one(circuits.acdc, TOKENS, OTHER, 0.2, positions=0, **options)
    assert not first.kept.equal(last.kept)
    attention = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    each = torch.zeros(2, 5, dtype=torch.bool)
    each[0, 4], each[1, 2] = True, True
    padded = one(circuits.acdc, TOKENS, OTHER, 0.2, attention_mask=attention, **options)
    given = one(circuits.acdc, TOKENS, OTHER, 0.2, attention_mask=attention, positions=each, **options)
    assert padded.kept.equal(given.kept)


def test_a_grown_circuit_leads_to_the_logits():
    """Each next edge is the largest into what is there; written out as a search over all edges."""
    found = graph(subject("llama").model)
    scores = torch.randn(found.mask.shape, generator=torch.Generator().manual_seed(0))
    feeds = {"L0KV0": {"L0H0", "L0H1"}, "L0KV1": {"L0H2", "L0H3"}}
    feeds |= {
        f"L{layer}KV{g}": {h.replace("L0", f"L{layer}") for h in feeds[f"L0KV{g}"]}
        for layer in range(3)
        for g in (0, 1)
    }
    chosen, there = [], {"logits"}
    while len(chosen) < 40:
        open_edges = [
            edge
            for edge in found.edges
            if edge not in chosen
            and (edge.target.component in there or feeds.get(edge.target.component, set()) & there)
        ]
        row = max(
            open_edges, key=lambda e: abs(scores[found.writers.index(e.source), found.readers.index(e.target)].item())
        )
        chosen.append(row)
        there.add(row.source.component)
        circuit = circuits.circuit_of_scores(found, scores, len(chosen))
        assert {edge.label for edge in circuit.edges} == {edge.label for edge in chosen}
    top = circuits.circuit_of_scores(found, scores, 10, method="top")
    assert top.kept[found.mask].sum() == 10
    assert scores.abs()[top.kept].min() >= scores.abs()[found.mask & ~top.kept].max()
    assert len(circuits.circuit_of_scores(found, scores, len(found))) == len(found)


def test_what_is_on_no_path_may_go():
    """Paths by enumeration; resampled, the circuit does the same without."""
    one = subject("llama")
    found = graph(one.model)
    for seed in range(3):
        circuit = Circuit(graph=found, kept=random_mask(found, seed, 0.12))
        connected = circuit.connected()
        on_path = set()

        def follow(label, path, circuit=circuit, on_path=on_path):
            for edge in circuit.edges:
                if edge.source.label == label:
                    target = edge.target.component
                    heads = [label for label in (w.label for w in found.writers) if fed(target, label)]
                    if target == "logits":
                        on_path |= {*path, edge.label}
                    for head in heads:
                        follow(head, (*path, edge.label))

        follow("embed", ())
        assert {edge.label for edge in connected.edges} == on_path
        close(one(circuits.run_circuit, TOKENS, OTHER, circuit), one(circuits.run_circuit, TOKENS, OTHER, connected))


def fed(reader, writer):
    """Whether what a component reads goes into what another writes: itself, or a group's head."""
    layer, _, group = reader.partition("KV")
    return writer == reader or (group and writer in (f"{layer}H{2 * int(group)}", f"{layer}H{2 * int(group) + 1}"))


# ---------------------------------------------------------------------- judging


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_curves_are_runs_of_circuits(ablation):
    """Shares, areas by hand; faithfulness of the circuit, completeness of the rest."""
    one = subject("gpt2")
    found = graph(one.model)
    scores = one(circuits.edge_effects, TOKENS, OTHER, metric).scores
    options = {"sizes": [4, 20, 100], "ablation": ablation, "batch_size": 4}
    given = None if ablation == "zero" else OTHER
    faithful = one(circuits.faithfulness, TOKENS, given, metric, scores, **options)
    complete = one(circuits.completeness, TOKENS, given, metric, scores, **options)
    full = metric(one.golden()[0])
    ablated = metric(one(circuits.run_circuit, TOKENS, given, [], ablation=ablation))
    shares = {"faithfulness": [0.0], "completeness": [1.0]}
    for index, size in enumerate((4, 20, 100)):
        circuit = circuits.circuit_of_scores(found, scores, size)
        for curve, mask in ((faithful, circuit.kept), (complete, found.mask & ~circuit.kept)):
            value = metric(one(circuits.run_circuit, TOKENS, given, mask, ablation=ablation))
            close(curve.values[index], value)
            close(curve.per_example[index], (value - ablated) / (full - ablated))
            shares[curve.kind].append(((value - ablated).mean() / (full - ablated).mean()).item())
            assert curve.normalized[index].item() == pytest.approx(shares[curve.kind][-1])
    at = torch.tensor([0, 4, 20, 100, len(found)]) / len(found)
    for curve, end in ((faithful, 1.0), (complete, 0.0)):
        heights = torch.tensor([*shares[curve.kind], end])
        assert curve.area == pytest.approx(torch.trapezoid(heights, at).item(), rel=1e-5)
        assert curve.distance == pytest.approx(torch.trapezoid((heights - end).abs(), at).item(), rel=1e-5)
    if ablation == "resample":
        close(faithful.ablated, metric(one.golden(OTHER)[0]))


def test_the_ends_of_a_curve_are_known():
    """No edges are full ablation, all are the model; the default sizes reach from 1 to all."""
    one = subject("mamba")
    scores = one(circuits.edge_effects, TOKENS, OTHER, metric).scores
    curve = one(circuits.faithfulness, TOKENS, OTHER, metric, scores, sizes=[0, 10])
    close(curve.normalized, torch.tensor([0.0, 1.0]))
    default = one(circuits.faithfulness, TOKENS, OTHER, metric, scores)
    assert (default.sizes[0], default.sizes[-1]) == (1, 10)
    assert len(default.to_dataframe()) == 2 * len(default.sizes)
    assert default.smallest(0.999) in default.circuits
    assert default.smallest(99.0) is None
    assert "Faithfulness by size" in default._repr_html_()
    given = one(circuits.faithfulness, TOKENS, OTHER, metric, default.circuits[::-1])
    close(given.values, default.values)


# ---------------------------------------------------------------------- records, files, refusals


def test_a_circuit_comes_back_from_its_file(tmp_path):
    """Edges, scores, graph; what is no such file is refused."""
    found = graph(subject("llama").model)
    scores = torch.randn(found.mask.shape)
    circuit = circuits.circuit_of_scores(found, scores, 7)
    circuit.save(tmp_path / "circuit.json")
    again = Circuit.load(tmp_path / "circuit.json")
    assert again.graph == found
    assert again.kept.equal(circuit.kept)
    assert torch.equal(again.scores[again.kept], scores[circuit.kept])
    bare = Circuit.of(found, [edge.label for edge in circuit.edges])
    bare.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json").scores is None
    assert [file.name for file in tmp_path.iterdir()] == ["circuit.json"]
    text = (tmp_path / "circuit.json").read_text()
    for wrong in (
        "",
        "[]",
        "{}",
        text[:400],
        text.replace("lens-circuit", "other"),
        text.replace(circuit.edges[0].label, "L9H9 -> logits"),
    ):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(AnalysisFileError, match=r"wrong\.json"):
            Circuit.load(tmp_path / "wrong.json")
    with pytest.raises(AnalysisFileError, match="nowhere"):
        Circuit.load(tmp_path / "nowhere.json")


def test_a_circuit_says_what_it_is():
    """Its size, members, largest edges, a frame and a table."""
    found = graph(subject("gpt2").model)
    scores = torch.randn(found.mask.shape)
    labels = ["embed -> L0H1.v", "L0H1 -> L2H0.k", "L2H0 -> logits"]
    circuit = Circuit.of(found, labels, scores)
    assert repr(circuit) == "Circuit(3 of 203 edges, 4 of 15 components)"
    assert [edge.label for edge in circuit.edges] == labels
    assert "L0H1 -> L2H0.k" in circuit
    assert "L0H1 -> L2H0.q" not in circuit
    assert "L2H0" in circuit
    assert len(circuit.complement()) == len(found) - 3
    assert circuit.top(1)[0][1] == max((circuit.score(label) for label in labels), key=abs)
    frame = circuit.to_dataframe()
    assert frame.iloc[1].tolist()[:3] == ["L0H1", "L2H0", "k"]
    assert "L2H0.k" in circuit._repr_html_()


def test_what_is_no_circuit_is_refused():
    """By name, and the model stays usable."""
    one = subject("gpt2")
    found = graph(one.model)
    with pytest.raises(ArgumentError, match="'L0H9'"):
        one(circuits.run_circuit, TOKENS, OTHER, ["L0H9 -> logits"])
    with pytest.raises(ArgumentError, match="labels of edges"):
        one(circuits.run_circuit, TOKENS, OTHER, "L0H1 -> logits")
    with pytest.raises(ArgumentError, match=r"\[3, 3\].*14 writers and 31 readers"):
        one(circuits.run_circuit, TOKENS, OTHER, torch.ones(3, 3))
    with pytest.raises(ArgumentError, match="bools, or floating"):
        one(circuits.run_circuit, TOKENS, OTHER, found.mask.long())
    with pytest.raises(ArgumentError, match=r"\[2, 4\]"):
        one(circuits.run_circuit, TOKENS, OTHER[:, :4], found.mask)
    with pytest.raises(ArgumentError, match="none is given"):
        one(circuits.run_circuit, TOKENS, None, found.mask)
    with pytest.raises(ArgumentError, match="'swap'"):
        one(circuits.run_circuit, TOKENS, OTHER, found.mask, ablation="swap")
    with pytest.raises(ArgumentError, match="positions are where"):
        one(circuits.acdc, TOKENS, OTHER, 0.1, metric=metric, positions=1)
    with pytest.raises(ArgumentError, match="threshold"):
        one(circuits.acdc, TOKENS, OTHER, float("nan"))
    with pytest.raises(ArgumentError, match="0 to 203 edges; got 204"):
        circuits.circuit_of_scores(found, found.mask.float(), 204)
    with pytest.raises(ArgumentError, match="'best'"):
        circuits.circuit_of_scores(found, found.mask.float(), 3, method="best")
    with pytest.raises(ArgumentError, match=r"\[14, 31\]; got \[2, 2\]"):
        one(circuits.faithfulness, TOKENS, OTHER, metric, torch.ones(2, 2))
    with pytest.raises(ArgumentError, match="sizes are numbers of edges"):
        one(circuits.faithfulness, TOKENS, OTHER, metric, found.mask.float(), sizes=[-1])
    with pytest.raises(ArgumentError, match="got list"):
        one(circuits.faithfulness, TOKENS, OTHER, metric, [])
    both = [Circuit.full(found), Circuit.full(graph(one.model, merge_embeddings=True))]
    with pytest.raises(ArgumentError, match="several graphs"):
        one(circuits.faithfulness, TOKENS, OTHER, metric, both)
    with pytest.raises(ArgumentError, match="one number for each"):
        one(circuits.edge_effects, TOKENS, OTHER, lambda logits: logits)
    assert torch.equal(one(circuits.run_circuit, TOKENS, OTHER, found.mask), one(lens.LensModel.forward, TOKENS))


# ---------------------------------------------------------------------- a known circuit


WORDS = ("king", "apple", "river", "moon", "book", "dog", "cat", "hat", "sun", "tree")


@pytest.fixture(scope="module")
def induction():
    """Give the toy, repeated sequences with the answer's first context spoilt in the corrupted ones, and the metric."""
    model = lens.load("toy:gpt2")
    words = [model.to_single_token(word) for word in WORDS]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.randperm(len(words), generator=generator) for _ in range(6)])
    first = torch.tensor(words)[drawn][:, :6]
    spoilt = first.clone()
    spoilt[:, 2] = torch.tensor(words)[drawn][:, 6]  # another token stands before the answer
    rows, other = torch.cat([first, first[:, :3]], 1), torch.cat([spoilt, first[:, :3]], 1)
    answer = first[:, 3]

    def logit(logits):
        return logits[:, -1].gather(1, answer[:, None])[:, 0] - logits[:, -1].mean(-1)

    return model, rows, other, logit


CORE = ["embed -> L0H2.v", "L0H2 -> L1H0.k", "L1H0 -> L1.mlp", "L1H0 -> logits", "L1.mlp -> logits"]
"""The previous-token head (0.95 of its attention there), the keys of an induction head, its output and the MLP's."""


def test_the_search_finds_the_induction_circuit(induction):
    """Of 137 edges the five that are known, and at a lower threshold those of the second previous-token head."""
    model, rows, other, logit = induction
    found = circuits.acdc(model, rows, other, 0.1)
    assert [edge.label for edge in found.edges] == CORE
    finer = circuits.acdc(model, rows, other, 0.005)
    assert {edge.label for edge in finer.edges} == {*CORE, "embed -> L0H0.v", "L0H0 -> L1H0.k", "L0H2 -> L1H0.v"}
    faithful = circuits.faithfulness(model, rows, other, logit, [found, finer]).normalized
    assert faithful[0] > 0.8
    assert faithful[1] > 0.95
    complete = circuits.completeness(model, rows, other, logit, [found, finer]).normalized
    assert complete.abs().max() < 0.05


def test_scores_of_edges_find_the_induction_circuit(induction):
    """By the exact effect of each edge; five edges of 137 do most of the work, and none of them can be left out."""
    model, rows, other, logit = induction
    scores = circuits.edge_effects(model, rows, other, logit, batch_size=128).scores
    curve = circuits.faithfulness(model, rows, other, logit, scores, sizes=[3, 5, 8, 20])
    assert [edge.label for edge in curve.circuits[1].edges] == CORE
    assert curve.normalized[1] > 0.8
    assert curve.normalized[2:].min() > 0.95
    assert curve.smallest(0.8) is curve.circuits[1]
    attributed = attribute_edges(model, rows, other, logit).scores
    by_attribution = circuits.circuit_of_scores(curve.circuits[1].graph, attributed, 5)
    assert [edge.label for edge in by_attribution.edges] == CORE
    needed = circuits.component_effects(model, rows, other, curve.circuits[1], logit)
    assert needed.effect.mean(1).max() < -1.5  # logits
