"""What steering towards animals does to the next word, by scale, beside random directions of equal norm."""

import random

import torch

import lens_core as lens
from docs.figures._style import BLUE, GREY, subplots
from lens_core.analysis.dose_response import dose_response
from lens_core.analysis.steering import steering_vector

ANIMALS = ["cat", "dog", "bird", "fish", "horse", "cow", "mouse", "bear"]
NATURE = ["sun", "moon", "star", "sky", "sea", "river", "hill", "tree"]
NEUTRAL = ["house", "door", "room", "bed", "table", "chair", "mat", "hat", "coat", "book", "box", "cup"]
SCALES = (-3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3)


def draw():
    figure, panels = subplots(1, 4, size=(8.6, 2.7), sharey=True)
    for axes, name in zip(panels, ("toy:gpt2", "toy:llama", "toy:mamba", "toy:mamba2"), strict=True):
        model, rng = lens.load(name), random.Random(0)
        positive, negative, prompts = (
            [" ".join(rng.sample(words, 4)) for _ in range(16)] for words in (ANIMALS, NATURE, NEUTRAL)
        )
        vector = steering_vector(model, positive, negative, ("resid_post", 0))
        to, away = (torch.tensor([model.to_single_token(f" {word}") for word in words]) for words in (ANIMALS, NATURE))

        def odds(logits, to=to, away=away):
            last = logits[:, -1].log_softmax(-1)
            return last[:, to].logsumexp(-1) - last[:, away].logsumexp(-1)

        table = dose_response(model, vector, prompts, odds, scales=SCALES, positions=-1, n_random=16, max_rows=256)
        draws = table.control.mean(-1)
        for draw_of in draws:
            axes.plot(SCALES, draw_of, color=GREY, lw=0.6, alpha=0.5)
        axes.plot([], [], color=GREY, lw=0.8, label="random directions")
        axes.plot(SCALES, table.values.mean(-1), color=BLUE, marker="o", ms=3, label="animals less nature")
        axes.axhline(float(table.baseline.mean()), color="black", lw=0.6, ls=":")
        axes.set_title(f"{name}, after block 0", loc="left")
        axes.set_xlabel("scale (mean differences)")
    panels[0].set_ylabel("log odds of an animal (nats)")
    panels[0].legend(frameon=False, fontsize=7, loc="upper left")
    return {"steering-dose": figure}
