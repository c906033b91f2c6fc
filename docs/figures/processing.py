"""Figures of the page on weight passes: scores read off weights, and attributions, before and after."""

import torch

import lens_core as lens
from docs.figures._style import BLUE, GREY, ORANGE, subplots

TEXT = "king apple river moon book king apple river"
HEAD = (1, 0)


def draw():
    """Scores of one head from its weights alone, and what parts add to one token's logit."""
    raw = lens.load("toy:gpt2")
    processed = raw.process_weights(copy=True)
    figure, axes = subplots(1, 2, size=(8.4, 3.6), width_ratios=(1, 1.25))
    _scores(axes[0], raw, processed)
    _attributions(axes[1], raw, processed)
    return {"processing": figure}


def _scores(axes, raw, processed):
    """Compare a head's scores with `n W_Q W_K^T n^T / sqrt(d_head)` of the normalized input n, gains left out."""
    layer, head = HEAD
    for model, colour, label in ((raw, BLUE, "checkpoint"), (processed, ORANGE, "after folding")):
        _, cache = model.run_with_cache(TEXT, names_filter=["ln1.hook_normalized", "attn_scores"])
        n, scores = cache["ln1.hook_normalized", layer][0], cache["attn_scores", layer][0, head]
        q = n @ model.weight("W_Q", layer)[head] + model.weight("b_Q", layer)[head]
        k = n @ model.weight("W_K", layer)[head] + model.weight("b_K", layer)[head]
        read, seen = (q @ k.T / model.cfg.d_head**0.5).detach(), scores != -torch.inf
        axes.scatter(scores[seen], read[seen], s=14, color=colour, label=label, alpha=0.8, linewidths=0)
    low, high = float(scores[seen].min()), float(scores[seen].max())
    axes.plot([low, high], [low, high], color=GREY, linewidth=0.8, zorder=0)
    axes.set_xlabel("score that the model computed")
    axes.set_ylabel("score from weights, the norm left out")
    axes.set_title(f"Head L{layer}H{head}: do the weights tell its scores?", loc="left")
    axes.legend(frameon=False)


def _attributions(axes, raw, processed, *, token="moon", most=6):
    """What the largest parts add to the logit of the right next token."""
    found = []
    for model in (raw, processed):
        _, cache = model.run_with_cache(TEXT)
        parts, labels = cache.get_full_resid_decomposition(expand_neurons=False, pos_slice=-1, return_labels=True)
        found.append(cache.logit_attrs(parts, token, pos_slice=-1)[:, 0].detach())
    order = found[0].abs().argsort(descending=True)[:most].tolist()[::-1]
    for values, colour, shift, label in zip(found, (BLUE, ORANGE), (0.19, -0.19), ("raw", "processed"), strict=True):
        name = {
            "raw": "checkpoint: with what all tokens get alike",
            "processed": "centred: over the mean of all tokens",
        }
        axes.barh([at + shift for at in range(most)], values[order], height=0.36, color=colour, label=name[label])
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(most), [labels[index] for index in order])
    axes.set_xlabel("logits")
    axes.set_title(f'What adds to the logit of "{token}"', loc="left")
    axes.legend(frameon=False, loc="lower right")
