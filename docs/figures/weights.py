"""Composition scores of toy:gpt2: what feeds the induction head's keys."""

import torch

import lens_core as lens
from docs.figures._style import BLUE, GREY, ORANGE, SEQUENTIAL, subplots
from lens_core.analysis.heads import head_scores, previous_places

INDUCTION = (1, 0)


def draw():
    """Give the K-composition of every pair of heads, and all three kinds beside what the writers attend to."""
    model = lens.load("toy:gpt2")
    n_heads = model.cfg.n_heads
    tokens = torch.randint(5, model.cfg.d_vocab, (16, 24), generator=torch.Generator().manual_seed(0))
    _, cache = model.run_with_cache(tokens, names_filter="pattern")
    previous = head_scores(cache, previous_places(tokens))
    found = {mode: model.all_composition_scores(mode) for mode in "QKV"}

    figure, (left, right) = subplots(1, 2, size=(7.4, 3.1), width_ratios=(1, 1.15))
    table = found["K"].scores[0, :, 1] / found["K"].baseline
    left.imshow(table, cmap=SEQUENTIAL, vmin=0, vmax=3.2)
    for row in range(n_heads):
        for column in range(n_heads):
            value = float(table[row, column])
            left.text(column, row, f"{value:.1f}", ha="center", va="center", color="white" if value > 1.9 else "black")
    left.set_xticks(range(n_heads), [f"L1H{head}" for head in range(n_heads)])
    left.set_yticks(range(n_heads), [f"L0H{head}" for head in range(n_heads)])
    left.set_xlabel("head that reads (L1H0 does induction)")
    left.set_ylabel("head that writes")
    left.set_title("K-composition, in units of chance", loc="left")

    shares = [previous[0, head] for head in range(n_heads)]
    for mode, colour, marker in (("K", ORANGE, "o"), ("Q", BLUE, "s"), ("V", GREY, "^")):
        layer, head = INDUCTION
        values = found[mode].scores[0, :, layer, head] / found[mode].baseline
        right.scatter(shares, values, color=colour, marker=marker, s=38, label=f"{mode}-composition", zorder=3)
        if mode == "K":
            for writer, (x, y) in enumerate(zip(shares, values.tolist(), strict=True)):
                side = (-30, -3) if writer == 0 else (7, 2)
                right.annotate(f"L0H{writer}", (x, y), xytext=side, textcoords="offset points", fontsize=8)
    right.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    right.annotate("chance", (0.5, 1), xytext=(0, 3), textcoords="offset points", color=GREY, ha="center", fontsize=8)
    right.set_xlabel("attention of the writer to the token before (0 to 1)")
    right.set_ylim(0, 3.2)
    right.set_xlim(-0.05, 1.18)
    right.set_title("with the induction head L1H0", loc="left")
    right.legend(frameon=False, loc="upper left", fontsize=8)
    return {"composition": figure}
