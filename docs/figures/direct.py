"""The figure of docs/direct.md: parts of the toys by what they wrote, and where they read it."""

import lens_core as lens
from docs.figures._style import BLUE, ORANGE, heatmap, subplots
from lens_core.analysis.direct import direct_logit_attribution

TEXT = "king apple river moon book king apple river"


def draw():
    figure, (left, middle, right) = subplots(1, 3, size=(12.5, 3.3), width_ratios=[0.8, 1.2, 1.2])
    model = lens.load("toy:gpt2")
    found = direct_logit_attribution(model, TEXT, "moon", "king", unit="head")
    order = found.values[:, 0].abs().argsort(descending=True)[:10].tolist()[::-1]
    values = [float(found.values[at, 0]) for at in order]
    left.barh(range(len(order)), values, color=[BLUE if value > 0 else ORANGE for value in values])
    left.set_yticks(range(len(order)), [found.labels[at] for at in order])
    left.axvline(0.0, color="black", linewidth=0.6)
    left.set_xlabel("logits")
    left.set_title("toy:gpt2, by head", loc="left")
    _sources(middle, model, "toy:gpt2, by source")
    _sources(right, lens.load("toy:mamba2"), "toy:mamba2, by source")
    return {"direct": figure}


def _sources(axes, model, title):
    found = direct_logit_attribution(model, TEXT, "moon", "king", unit="source")
    mixing = [at for at, label in enumerate(found.labels) if label.startswith("L")]
    words = [word.strip().replace("<|endoftext|>", "eot") for word in model.to_str_tokens(TEXT)]
    heatmap(
        axes,
        found.values[mixing, 0],
        rows=[found.labels[at] for at in mixing],
        columns=words,
        title=title,
        unit="logits",
    )
    axes.set_xlabel("read from")
