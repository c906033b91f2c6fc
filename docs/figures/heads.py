"""Heads of two toys by kind, with control and chance."""

import lens_core as lens
from docs.figures._style import BLUE, GREY, ORANGE, subplots
from lens_core.analysis.head_kinds import score_heads


def draw():
    figure, panels = subplots(2, 2, size=(7.4, 4.4), sharey=True)
    for row, name in zip(panels, ("toy:gpt2", "toy:llama"), strict=True):
        found = score_heads(lens.load(name))
        for axes, kind, colour in zip(row, ("previous", "induction"), (ORANGE, BLUE), strict=True):
            index = found.kinds.index(kind)
            scores = found.scores[index].flatten().tolist()
            control = found.control[:, index].mean(0).flatten().tolist()
            places = range(len(scores))
            axes.bar([x - 0.2 for x in places], scores, 0.4, color=colour, label="score")
            axes.bar([x + 0.2 for x in places], control, 0.4, color=GREY, alpha=0.6, label="control")
            axes.axhline(float(found.chance[index]), color="black", lw=0.8, ls="--", label="chance")
            n_heads = found.scores.shape[2]
            axes.set_xticks(places, [f"L{found.layers[x // n_heads]}H{x % n_heads}" for x in places])
            axes.set_ylim(0, 1.05)
            axes.set_title(f"{name}: {kind}", loc="left")
        row[0].set_ylabel("share of attention")
    panels[0, 0].legend(frameon=False, loc="upper center", fontsize=8)
    panels[0, 1].legend(frameon=False, loc="upper left", fontsize=8)
    return {"heads-scores": figure}
