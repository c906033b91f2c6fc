"""Which of two words came second: where a probe reads it, in two toys."""

import random

import lens_core as lens
from docs.figures._style import BLUE, GREEN, GREY, ORANGE, subplots
from lens_core.analysis.activations import collect_activations
from lens_core.analysis.probing import fit_probes

OTHERS = [
    "house",
    "door",
    "room",
    "bed",
    "table",
    "chair",
    "mat",
    "hat",
    "coat",
    "book",
    "box",
    "cup",
    "ball",
    "boat",
    "road",
    "town",
]
POSITIONS = (-5, -4, -3, -2, -1)


def draw():
    rng = random.Random(0)
    texts, labels = [], []
    for number in range(120):
        pair = ["cat", "sun"] if number % 2 else ["sun", "cat"]
        texts.append(" ".join([*rng.sample(OTHERS, 2), *pair, *rng.sample(OTHERS, 3)]))
        labels.append(pair[1])
    figure, panels = subplots(1, 2, size=(7.4, 3.1), sharey=True)
    for axes, name in zip(panels, ("toy:gpt2", "toy:mamba"), strict=True):
        found = collect_activations(lens.load(name), texts, ["hook_embed", "resid_post"], positions=POSITIONS)
        results = fit_probes(found, labels, n_controls=1)
        x = range(len(POSITIONS))
        lines = ((ORANGE, "embedding"), (BLUE, "after block 0"), (GREEN, "after block 1"))
        for row, (colour, told) in enumerate(lines):
            axes.plot(x, results.accuracy[row], color=colour, marker="o", ms=4, label=told)
            axes.fill_between(x, results.low[row], results.high[row], color=colour, alpha=0.12, lw=0)
        axes.plot(x, results.random[0], color=GREY, ls="--", label="random features of the tokens")
        axes.axhline(results.majority, color="black", lw=0.8, ls=":", label="majority")
        axes.set_xticks(x, ["1st word", "2nd word", "+1", "+2", "+3"])
        axes.set_title(f"{name}: which word came second?", loc="left")
        axes.set_ylim(0.35, 1.03)
    panels[0].set_ylabel("held-out accuracy")
    panels[0].legend(frameon=False, fontsize=7, loc="lower left")
    return {"probing-positions": figure}
