"""Attribution of edges against cutting each of them, and the edges that come out on top."""

import torch

import lens_core as lens
from docs.figures._style import BLUE, GREY, ORANGE, subplots
from lens_core.analysis.attribution import agreement, attribute_edges
from lens_core.analysis.circuits import edge_effects

WORDS = "king queen apple river moon book bread stone"


def pairs(model, rows=16):
    """Give texts `a b c d e a b c`, after which comes d; the same with another word for the first c; d and e."""
    generator = torch.Generator().manual_seed(0)
    words = torch.tensor([model.to_single_token(f" {word}") for word in WORDS.split()])
    a, b, c, d, e, other = torch.stack([words[torch.randperm(8, generator=generator)[:6]] for _ in range(rows)], 1)
    start = torch.full_like(a, model.tokenizer.bos_token_id)
    return torch.stack([start, a, b, c, d, e, a, b, c], 1), torch.stack([start, a, b, other, d, e, a, b, c], 1), d, e


def compared(name):
    """Give a toy's attribution by gradient and by integrated gradients, and the exact effects, mean over the texts."""
    model = lens.load(name)
    clean, corrupted, right, wrong = pairs(model)
    rows = torch.arange(len(clean))

    def metric(logits):
        return logits[rows, -1, right] - logits[rows, -1, wrong]

    gradient = attribute_edges(model, clean, corrupted, metric, at="clean")
    integrated = attribute_edges(model, clean, corrupted, metric, method="ig-inputs")
    effects = edge_effects(model, clean, corrupted, metric)
    mask = gradient.graph.mask
    exact = effects.effect.mean(0)[mask]
    return gradient.graph, gradient.scores[mask], integrated.scores[mask], exact


def draw():
    figure, panels = subplots(1, 3, size=(10.2, 3.4), width_ratios=(1, 1, 0.95))
    for axes, name in zip(panels, ("toy:gpt2", "toy:llama"), strict=False):
        found, gradient, integrated, exact = compared(name)
        for values, label, colour, marker in (
            (gradient, "gradient", ORANGE, "x"),
            (integrated, "integrated, inputs", BLUE, "o"),
        ):
            told = f"{label}: r = {agreement(values, exact).pearson:.2f}"
            axes.scatter(values, exact, s=22, marker=marker, alpha=0.75, color=colour, lw=1.2, label=told)
        ends = min(gradient.min(), exact.min(), integrated.min()), max(gradient.max(), exact.max(), integrated.max())
        axes.plot(ends, ends, color=GREY, lw=0.8, zorder=0)
        axes.set_title(f"{name}: {len(exact)} edges", loc="left")
        axes.set_xlabel("attribution (logits)")
        axes.legend(frameon=False, fontsize=8, loc="lower right", handletextpad=0.2)
        if name == "toy:gpt2":
            best = found, integrated, exact
    panels[0].set_ylabel("exact effect of the edge (logits)")
    found, integrated, exact = best
    columns = found.mask.nonzero().tolist()
    top = integrated.abs().topk(8).indices.flip(0).tolist()
    labels = [f"{found.writers[columns[i][0]].label} → {found.readers[columns[i][1]].label}" for i in top]
    places = torch.arange(len(top))
    panels[2].barh(places + 0.2, integrated[top], 0.4, color=BLUE, label="integrated")
    panels[2].barh(places - 0.2, exact[top], 0.4, color=GREY, label="exact")
    panels[2].set_yticks(places, labels)
    panels[2].set_xlabel("logits")
    panels[2].set_title("toy:gpt2: the edges of induction", loc="left")
    panels[2].legend(frameon=False, fontsize=8, loc="lower right")
    return {"attribution-edges": figure}
