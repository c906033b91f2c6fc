"""The figure of docs/lenses.md: the logit lens of a toy, and both lenses' divergences by layer."""

import torch

import lens_core as lens
from docs.figures._style import BLUE, ORANGE, SEQUENTIAL, subplots
from lens_core.analysis.logit_lens import logit_lens
from lens_core.analysis.tuned_lens import fit_tuned_lens

TEXT = "king apple river moon book king apple river"
TOYS = ("gpt2", "llama", "mamba", "mamba2")


def draw():
    figure, (left, right) = subplots(1, 2, size=(11.0, 3.2), width_ratios=[1.7, 1.0])
    model = lens.load("toy:gpt2")
    found = logit_lens(model, TEXT, incl_mid=True, top=1)
    probs = found.top_log_probs[:, 0, :, 0].exp().flip(0)
    drawn = left.imshow(probs, cmap=SEQUENTIAL, vmin=0.0, vmax=1.0, aspect="auto")
    for row, entry in enumerate(found.top_tokens[:, 0, :, 0].flip(0).tolist()):
        for column, token in enumerate(entry):
            dark = float(probs[row, column]) > 0.5
            word = model.to_single_str_token(token).strip().replace("<|endoftext|>", "eot")
            left.text(column, row, word, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    words = [word.strip().replace("<|endoftext|>", "eot") for word in model.to_str_tokens(TEXT)]
    left.set_xticks(range(len(words)), words, rotation=30, ha="right")
    left.set_yticks(range(len(found.labels)), found.labels[::-1])
    left.set_title("The most likely next token, toy:gpt2", loc="left")
    figure.colorbar(drawn, ax=left, label="its probability", shrink=0.9)
    _divergences(right)
    return {"lenses": figure}


def _divergences(axes):
    data = torch.randint(3, 250, (240, 10), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    for index, toy in enumerate(TOYS):
        tuned = fit_tuned_lens(lens.load(f"toy:{toy}"), data, lr=3e-3, epochs=3)
        for layer, (plain, better) in enumerate(zip(tuned.logit_lens_kl, tuned.kl, strict=True)):
            at = index + 0.36 * layer - 0.18
            labels = ("logit lens", "tuned lens") if index == layer == 0 else (None, None)
            axes.bar(at - 0.08, float(plain), 0.15, color=ORANGE, label=labels[0])
            axes.bar(at + 0.08, float(better), 0.15, color=BLUE, label=labels[1])
            axes.text(at, -0.35, f"L{layer}", ha="center", va="top", fontsize=7)
    axes.set_xticks(range(len(TOYS)), [f"\n{toy}" for toy in TOYS], fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("KL(final ‖ lens), nats")
    axes.set_title("What enters each block, held-out texts", loc="left")
    axes.legend(frameon=False)
