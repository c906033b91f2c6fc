"""Circuits run: edges cut in one forward, against sums over edges written out on the golden forwards, in float64."""

import pytest
import torch
from analysis.circuit_oracle import GOLDEN, KIT, by_hand, random_mask, resampled, written
from analysis.circuit_subject import OTHER, TOKENS, close, metric, of_kit, subject
from lens_conformance.float64 import true_float64

from lens_core.analysis import circuits
from lens_core.analysis.circuits import Circuit
from lens_core.analysis.graph import graph
from lens_core.errors import ArgumentError


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
