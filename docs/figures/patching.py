"""Where a recalled word is kept: the stream of the toy GPT-2 and the states of the toy Mamba, by layer and position."""

import lens_core as lens
from docs.figures._style import heatmap, subplots

CLEAN = "king apple river moon book king apple river"
CORRUPTED = "king apple river door book king apple river"


def draw():
    """Patch both models, and draw the share of the way from door to moon."""
    figure, axes = subplots(1, 2, size=(9.0, 3.0))
    panels = [("toy:gpt2", "resid_pre", "residual stream entering a block"), ("toy:mamba", "ssm_state", "SSM state")]
    for ax, (name, point, what) in zip(axes, panels, strict=True):
        model = lens.load(name)
        moon, door = model.to_single_token("moon"), model.to_single_token("door")

        def difference(logits, moon=moon, door=door):
            return logits[:, -1, moon] - logits[:, -1, door]

        logits, clean = model.run_with_cache(CLEAN, names_filter=point)
        result = lens.patching.patch_sweep(model, CORRUPTED, clean, difference, point, positions=-1)
        share = result.normalized(difference(logits)).mean(-1)
        heatmap(
            ax,
            share.numpy(),
            rows=result.labels[0],
            columns=["BOS" if label.startswith("<") else label.strip() for label in result.labels[1]],
            title=f"{name}: {what}",
            unit="share restored",
            top=1.0,
        )
        ax.set_ylabel("layer")
    return {"patching-recall": figure}
