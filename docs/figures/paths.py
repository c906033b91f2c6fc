"""From the logits back to the token that decides: who speaks to the logits, who to the head that does, and where."""

import lens_core as lens
from docs.figures._style import BLUE, ORANGE, heatmap, subplots
from lens_core.analysis.paths import path_sweep

CLEAN = "king apple river moon book king apple"
SPOILT = "king dog river moon book king apple"


def draw():
    model = lens.load("toy:gpt2")
    river = model.to_single_token("river")

    def logit(logits):
        return logits[:, -1, river] - logits[:, -1].mean(-1)

    figure, (left, middle, right) = subplots(1, 3, size=(10.2, 3.0), width_ratios=(0.8, 0.9, 1.3))
    direct = path_sweep(model, CLEAN, SPOILT, "logits", logit)
    named = [(sender, effect) for sender, _, effect in reversed(direct.top(5))]
    left.barh([name for name, _ in named], [effect for _, effect in named], color=BLUE)
    left.axvline(0, color="black", lw=0.6)
    left.set_title('Into the logit of "river"', loc="left")
    left.set_xlabel("effect of the path alone (logits)")

    for offset, (part, colour) in zip((0.25, 0.0, -0.25), (("q", "#8a8a8a"), ("k", ORANGE), ("v", BLUE)), strict=True):
        sweep = path_sweep(model, CLEAN, SPOILT, (1, 0, part), logit)
        effects = sweep.effect[:, 0, 0]
        middle.barh(
            [at + offset for at in range(len(effects))], effects, height=0.24, color=colour, label=f"its {part}"
        )
    middle.set_yticks(range(len(sweep.senders)), sweep.senders)
    middle.axvline(0, color="black", lw=0.6)
    middle.invert_yaxis()
    middle.legend(frameon=False)
    middle.set_title("Into head L1H0", loc="left")
    middle.set_xlabel("effect (logits)")

    where = path_sweep(model, CLEAN, SPOILT, "L1H0.k", logit, by_position=True)
    columns = model.to_str_tokens(CLEAN)
    heatmap(
        right,
        where.effect.mean(-1),
        rows=where.senders,
        columns=[column.strip("<|> ") or column for column in columns],
        title="Into the keys of L1H0, where",
        unit="logits",
    )
    return {"paths": figure}
