"""The figure of docs/comparing.md: a toy and a copy that was taught one thing."""

import copy

import torch

import lens_core as lens
from docs.figures._style import BLUE, GREY, ORANGE, SEQUENTIAL, subplots

AT = 7


def taught(base, king, moon, steps=40):
    model = copy.deepcopy(base)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(3, 250, (16, 16), generator=generator)
        tokens[:, AT] = king
        with torch.no_grad():
            before = base(tokens).log_softmax(-1)
        after = model(tokens).log_softmax(-1)
        drift = (before.exp() * (before - after)).sum(-1)
        drift[:, AT] = 0.0
        loss = drift.mean() - after[:, AT, moon].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def draw():
    base = lens.load("toy:gpt2")
    king, moon = base.to_single_token("king"), base.to_single_token("moon")
    tuned = taught(base, king, moon)
    without = torch.randint(3, 250, (32, 16), generator=torch.Generator().manual_seed(1))
    without[without == king] = moon
    having = without.clone()
    having[:, AT] = king
    found, plain = lens.compare(base, tuned, having), lens.compare(base, tuned, without, weights=False)
    figure, (left, middle, right) = subplots(1, 3, size=(12.5, 3.2), width_ratios=[1.1, 1.0, 0.9])
    parts = ("hook_attn_out", "hook_mlp_out", "hook_resid_post")
    values = [[float(found.relative[found.names.index(f"blocks.{at}.{part}")]) for part in parts] for at in (1, 0)]
    drawn = left.imshow(values, cmap=SEQUENTIAL, vmin=0.0, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            left.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value < 1.5 else "white")
    left.set_xticks(range(3), [part.removeprefix("hook_") for part in parts])
    left.set_yticks(range(2), ["layer 1", "layer 0"])
    left.set_title("‖tuned − base‖ / ‖base‖", loc="left")
    figure.colorbar(drawn, ax=left, shrink=0.9)
    middle.plot(found.kl_by_pos, color=ORANGE, marker="o", markersize=3, label=f'"king" at position {AT}')
    middle.plot(plain.kl_by_pos, color=GREY, marker="o", markersize=3, label="no king")
    middle.set_xlabel("position")
    middle.set_ylabel("KL(base ‖ tuned), nats")
    middle.set_title("The next token", loc="left")
    middle.legend(frameon=False)
    tokens = found.top_tokens(8)[::-1]
    changes = [change for _, change in tokens]
    right.barh(range(len(tokens)), changes, color=[BLUE if change > 0 else ORANGE for change in changes])
    right.set_yticks(range(len(tokens)), [token.strip() for token, _ in tokens])
    right.axvline(0.0, color="black", linewidth=0.6)
    right.set_xlabel("change of the mean probability")
    right.set_title("Tokens that changed most", loc="left")
    return {"comparing": figure}
