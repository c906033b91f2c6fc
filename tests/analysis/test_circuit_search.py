"""Circuits searched for: ACDC and growth from scores against loops, and the toy's known circuit."""

import pytest
import torch
from analysis.circuit_oracle import random_mask
from analysis.circuit_subject import OTHER, TOKENS, close, metric, subject

import lens_core as lens
from lens_core.analysis import circuits
from lens_core.analysis.attribution import attribute_edges
from lens_core.analysis.circuits import Circuit
from lens_core.analysis.graph import graph


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
