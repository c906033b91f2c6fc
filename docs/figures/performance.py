"""What lens and its peers take, plain HF being 1, from the results that `make bench-peers` keeps."""

from pathlib import Path

from benchmarks.peers.report import MODELS, read
from benchmarks.peers.settings import LIBRARIES
from docs.figures._style import BLUE, GREEN, GREY, ORANGE, RED, subplots

RESULTS = Path(__file__).parents[2] / "benchmarks" / "peers" / "results"
COLOURS = dict(zip(LIBRARIES, (BLUE, ORANGE, RED, GREEN), strict=True))
SHORT = {
    "import": "import",
    "ready": "import and load",
    "memory": "memory of loading",
    "forward": "forward",
    "hook": "one hook",
    "cache": "cache, default",
    "residuals": "cache, residuals",
    "generate": "generation, hooked",
    "sweep": "patching sweep",
    "harvest": "harvest",
    "state": "last SSM state",
    "states": "all SSM states",
}


def draw():
    """Points for the medians, lines from the tenth to the ninetieth percentile; a panel for each model."""
    results = read(RESULTS)
    by_model = {model: [key for key in results.keys if key[0] == model] for model in MODELS}
    shown = {model: keys for model, keys in by_model.items() if keys}
    heights = [len(keys) for keys in shown.values()]
    figure, panels = subplots(
        len(shown), 1, size=(8.6, 0.34 * sum(heights) + 0.9 * len(shown)), height_ratios=heights, squeeze=False
    )
    for axes, (model, keys) in zip(panels[:, 0], shown.items(), strict=True):
        _panel(axes, results, model, keys)
    panels[0, 0].legend(
        frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.06 + 0.3 / heights[0])
    )
    panels[-1, 0].set_xlabel("time, or memory, plain HF being 1 (logarithmic; less is better)")
    return {"performance": figure}


def _panel(axes, results, model, keys):
    for number, library in enumerate(results.cells):
        shift = 0.16 * (number - (len(results.cells) - 1) / 2)
        cells = [(at, cell) for at, key in enumerate(keys) if (cell := results.cell(library, key)) and cell.values]
        places = [at + shift for at, _ in cells]
        medians = [cell.median for _, cell in cells]
        axes.hlines(
            places, [c.spread[0] for _, c in cells], [c.spread[1] for _, c in cells], color=COLOURS[library], lw=1.4
        )
        axes.plot(medians, places, "o", ms=4, color=COLOURS[library], label=LIBRARIES[library].title)
    axes.axvline(1, color=GREY, lw=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_yticks(range(len(keys)), [" · ".join(filter(None, (SHORT[row], size))) for _, row, size in keys])
    axes.invert_yaxis()
    axes.set_title(MODELS[model], loc="left")
