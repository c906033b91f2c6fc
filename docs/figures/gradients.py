"""What value times gradient says of each word, as the model is and with more and more of it held still."""

import torch

import lens_core as lens
from docs.figures._style import BLUE, GREY, ORANGE, subplots
from lens_core.analysis.gradients import linearized

TEXT = "king apple river moon book king apple river"


def attributed(model, metric, hooks):
    """Give value times gradient of the metric for what each position's embeddings add, and the metric."""
    names = list(model.declaration.embeddings)
    with model.hooks(hooks), model.caching(names, detach=False) as cache:
        measured = metric(model(TEXT))
        measured.backward()
    parts = sum((cache[name] * cache.grad[name]).sum(-1)[0] for name in names)
    return parts.detach(), float(measured)


def draw():
    figure, panels = subplots(1, 2, size=(9.2, 3.0), sharey=True)
    for axes, name in zip(panels, ("toy:llama", "toy:mamba"), strict=True):
        model = lens.load(name)
        model.requires_grad_(False)
        moon, king = model.to_single_token("moon"), model.to_single_token("king")

        def metric(logits, moon=moon, king=king):
            return logits[0, -1, moon] - logits[0, -1, king]

        still = {"nothing held": [], "scales": _only(model, norm_scale=True), "everything held": linearized(model)}
        words = [word.strip("<|> ") or word for word in model.to_str_tokens(TEXT)]
        for offset, ((label, hooks), colour) in enumerate(zip(still.items(), (GREY, BLUE, ORANGE), strict=True)):
            with torch.enable_grad():
                parts, measured = attributed(model, metric, hooks)
            told = f"{label}: sum {float(parts.sum()):.1f} of {measured:.1f}"
            axes.bar(
                [at + 0.27 * (offset - 1) for at in range(len(words))], parts, width=0.26, color=colour, label=told
            )
        axes.set_xticks(range(len(words)), words, rotation=45, ha="right")
        axes.axhline(0, color="black", lw=0.6)
        axes.legend(frameon=False, fontsize=8)
        axes.set_title(f'{name}: "moon" over "king"', loc="left")
    panels[0].set_ylim(top=46)
    panels[0].set_ylabel("value × gradient (logits)")
    return {"gradients": figure}


def _only(model, **chosen):
    every = dict.fromkeys(("pattern", "norm_scale", "gate", "ssm_transition", "activation"), False)
    return linearized(model, **(every | chosen))
