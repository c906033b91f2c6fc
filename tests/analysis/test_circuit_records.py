"""Circuits judged and kept: curves against runs, files, representations and refusals."""

import pytest
import torch
from analysis.circuit_subject import OTHER, TOKENS, close, metric, subject

import lens_core as lens
from lens_core.analysis import circuits
from lens_core.analysis.circuits import Circuit
from lens_core.analysis.graph import graph
from lens_core.errors import AnalysisFileError, ArgumentError


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
