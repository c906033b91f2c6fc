"""The induction circuit of the toy, drawn, and how faithful circuits of each size are."""

import re

import torch

import lens_core as lens
from docs.figures._style import BLUE, GREEN, GREY, ORANGE, subplots
from lens_core.analysis.attribution import attribute_edges
from lens_core.analysis.circuits import acdc, completeness, edge_effects, faithfulness
from lens_core.analysis.graph import graph

WORDS = ["king", "apple", "river", "moon", "book", "dog", "cat", "hat", "sun", "tree"]
PARTS = {"q": GREEN, "k": ORANGE, "v": BLUE}


def data(model):
    """Give repeated sequences, corrupted ones, and the metric, as the page has them."""
    words = torch.tensor([model.to_single_token(word) for word in WORDS])
    drawn = torch.stack([torch.randperm(10, generator=torch.Generator().manual_seed(seed)) for seed in range(6)])
    first, other = words[drawn[:, :6]], words[drawn[:, :6]]
    other[:, 2] = words[drawn[:, 6]]
    answers = first[:, 3]

    def logit(logits):
        return logits[:, -1].gather(1, answers[:, None])[:, 0] - logits[:, -1].mean(-1)

    return torch.cat([first, first[:, :3]], 1), torch.cat([other, first[:, :3]], 1), logit


def place(label):
    """Say where a component stands: embeddings at the bottom, then heads and MLP of each layer, the logits on top."""
    matched = re.fullmatch(r"L(\d)(?:H(\d)|\.mlp)", label)
    if matched is None:
        return {"embed": (0.8, -0.9), "pos_embed": (2.2, -0.9), "logits": (1.5, 4.0)}[label]
    layer, head = int(matched[1]), matched[2]
    return (3.7, 2 * layer + 1.0) if head is None else (float(head), 2.0 * layer)


def circuit_figure(model, clean, corrupted):
    """Draw the graph with the circuit's edges: as wide as what their loss costs."""
    circuit = acdc(model, clean, corrupted, 0.005)
    figure, axes = subplots(size=(5.6, 5.2))
    for label in circuit.graph.components:
        x, y = place(label)
        is_in = label in circuit.components
        box = {
            "boxstyle": "round,pad=0.35",
            "fc": "white" if is_in else "#f4f4f4",
            "ec": "#333333" if is_in else "#dddddd",
        }
        axes.text(x, y, label, ha="center", va="center", bbox=box, color="black" if is_in else "#bbbbbb", zorder=3)
    for edge in circuit.edges:
        start, end = place(edge.source.label), place(edge.target.component)
        color = PARTS.get(edge.target.part, GREY)
        width = 0.9 + 1.5 * min(circuit.score(edge), 3.0)
        bend = {"q": 0.2, "k": 0.1, "v": -0.15}.get(edge.target.part, -0.18 if end[0] > start[0] else 0.12)
        arrow = {"arrowstyle": "-|>", "color": color, "lw": width, "shrinkA": 14, "shrinkB": 14}
        axes.annotate("", end, start, arrowprops={**arrow, "connectionstyle": f"arc3,rad={bend}"}, zorder=2)
    for part, name in (("q", "queries"), ("k", "keys"), ("v", "values")):
        axes.plot([], [], color=PARTS[part], lw=2, label=f"into {name}")
    axes.plot([], [], color=GREY, lw=2, label="into an MLP, the logits")
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    axes.set_title(f"Found by ACDC: {len(circuit)} of {len(circuit.graph)} edges of toy:gpt2", loc="left")
    axes.set_xlim(-0.6, 4.6)
    axes.set_ylim(-1.4, 4.5)
    axes.axis("off")
    return figure


def curve_figure(model, clean, corrupted, logit):
    """Draw faithfulness by size for three ways to choose, and what is left without the circuit."""
    found = graph(model)
    exact = edge_effects(model, clean, corrupted, logit).scores
    ways = {
        "exact effect of each edge": (exact, BLUE),
        "attribution (EAP)": (attribute_edges(model, clean, corrupted, logit).scores, ORANGE),
        "at random": (torch.rand(found.mask.shape, generator=torch.Generator().manual_seed(0)), GREY),
    }
    sizes = [1, 2, 3, 4, 5, 6, 8, 10, 14, 20, 30, 45, 70, 100, 137]
    figure, (left, right) = subplots(1, 2, size=(8.4, 3.3), sharey=True)
    for name, (scores, color) in ways.items():
        for axes, judge in ((left, faithfulness), (right, completeness)):
            curve = judge(model, clean, corrupted, logit, scores, sizes=sizes)
            axes.plot(curve.sizes, curve.normalized, color=color, marker="o", ms=3, label=name)
    for axes, title in ((left, "Faithfulness: by themselves"), (right, "Completeness: without them")):
        axes.set_xscale("log")
        axes.set_xticks([1, 3, 10, 30, 137], ["1", "3", "10", "30", "137"])
        axes.minorticks_off()
        axes.set_xlabel("edges in the circuit")
        axes.set_title(title, loc="left")
        axes.axhline(1, color="#cccccc", lw=0.8, zorder=0)
        axes.axhline(0, color="#cccccc", lw=0.8, zorder=0)
    left.set_ylabel("share of what the model does")
    right.legend(frameon=False, loc="center left", fontsize=8, title="edges chosen by")
    return figure


def draw():
    """Give both figures."""
    model = lens.load("toy:gpt2")
    clean, corrupted, logit = data(model)
    return {
        "circuits-induction": circuit_figure(model, clean, corrupted),
        "circuits-curve": curve_figure(model, clean, corrupted, logit),
    }
