"""Pictures of the study, from its numbers alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw"]

INK, GRID = "#222222", "#dddddd"
PALETTE = "RdBu_r"  # red for, blue against; white is 0


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw all pictures into a folder and give their paths."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 10, "axes.titlesize": 11, "axes.edgecolor": INK, "figure.dpi": 110})
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "ioi-attribution.png": _attribution(results),
        "ioi-stream.png": _stream(results["patching"]),
        "ioi-heads.png": _heads(results),
        "ioi-attention.png": _attention(results),
    }
    for name, figure in drawn.items():
        figure.savefig(folder / name, bbox_inches="tight", pil_kwargs={"optimize": True})
    return [folder / name for name in drawn]


def _figure(columns: int, size: tuple[float, float], **options: Any) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, columns, **options)


def _map(axes: Any, values: Any, limit: float, *, rows: str, columns: str, title: str) -> Any:
    """Draw a heat map whose white is 0."""
    values = np.asarray(values)
    image = axes.imshow(values, cmap=PALETTE, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set(xlabel=columns, ylabel=rows, title=title)
    axes.set_yticks(range(0, len(values), 5))
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(values) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    return image


def _note(axes: Any, values: Any, count: int) -> None:
    """Write the largest values into their cells."""
    values = np.asarray(values)
    limit = np.abs(values).max()
    for index in np.argsort(-np.abs(values), axis=None)[:count]:
        row, column = divmod(int(index), values.shape[1])
        colour = "white" if abs(values[row, column]) > 0.6 * limit else INK
        axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", size=7, color=colour)


def _attribution(results: dict[str, Any]) -> Any:
    heads, mlps = np.array(results["heads"]), np.array(results["mlps"])
    figure, (left, right) = _figure(2, (9, 6.2), width_ratios=(2.2, 1))
    limit = np.abs(heads).max()
    image = _map(left, heads, limit, rows="layer", columns="head", title="by attention head")
    left.set_xticks(range(heads.shape[1]))
    _note(left, heads, 12)
    figure.colorbar(image, ax=left, label="logits for IO − S", shrink=0.8)
    layers = np.arange(len(mlps))
    right.barh(layers, mlps, color=np.where(mlps > 0, "#b2182b", "#2166ac"), label="MLP")
    right.plot(heads.sum(1), layers, color=INK, marker="o", markersize=3, linewidth=1, label="all heads")
    right.axvline(0, color=INK, linewidth=0.8)
    right.set(ylim=(len(mlps) - 0.5, -0.5), xlabel="logits for IO − S", title="by layer")
    right.set_yticks(range(0, len(mlps), 5))
    right.legend(frameon=False, loc="upper right")
    figure.suptitle(
        f"What each part writes at the last token: together {results['total']:.2f} logits for the indirect object"
    )
    return figure


def _stream(patching: dict[str, Any]) -> Any:
    figure, both = _figure(2, (10, 6), sharey=True)
    titles = {"stream_swapped": "the other name repeated", "stream_unrelated": "three unrelated names"}
    image = None
    for axes, (kind, title) in zip(both, titles.items(), strict=True):
        run = patching[kind]
        heading = f"from a run with {title}\n({run['clean']:.2f} → {run['corrupted']:.2f} logits)"
        image = _map(axes, run["share"], 1, rows="layer", columns="", title=heading)
        axes.set_xticks(range(len(patching["tokens"])), patching["tokens"], rotation=60, ha="right")
    both[1].set_ylabel("")
    figure.colorbar(image, ax=list(both), label="share of the effect (1: as in the corrupted run)", shrink=0.8)
    figure.suptitle("The residual stream entering each layer, patched at one position")
    return figure


def _heads(results: dict[str, Any]) -> Any:
    run = results["patching"]["heads_swapped"]
    share = np.array(run["share"])
    figure, axes = _figure(1, (6.4, 6.4))
    image = _map(axes, share, np.abs(share).max(), rows="layer", columns="head", title="")
    axes.set_xticks(range(share.shape[1]))
    _note(axes, share, 12)
    figure.colorbar(image, ax=axes, label="share of the effect", shrink=0.8)
    figure.suptitle(
        f"Each head's output patched from a run with the other name repeated\n"
        f"({run['clean']:.2f} → {run['corrupted']:.2f} logits)"
    )
    return figure


def _attention(results: dict[str, Any]) -> Any:
    """Draw where the two groups of heads look, as stacked bars."""
    places, found, groups = results["attention"]["places"], results["attention"], results["circuit"]["groups"]
    rows = [(kind, head) for kind in ("writers", "senders") for head in groups[kind]]
    values = np.array([found["last token"][layer][head] for _, (layer, head) in rows])
    figure, axes = _figure(1, (8.5, 4))
    colours = ("#bbbbbb", "#b2182b", "#67a9cf", "#2166ac", "#eeeeee")
    left = np.zeros(len(rows))
    for place, colour, part in zip(places, colours, values.T, strict=True):
        axes.barh(range(len(rows)), part, left=left, color=colour, label=place, edgecolor="white", height=0.75)
        left = left + part
    axes.set_yticks(range(len(rows)), _labels(rows))
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1), xlabel="attention from the last token (the rest: other tokens)")
    axes.axhline(len(groups["writers"]) - 0.5, color=INK, linewidth=0.8)
    axes.legend(ncols=len(places), frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _labels(rows: Sequence[tuple[str, Sequence[int]]]) -> list[str]:
    return [f"{kind.removesuffix('s')} L{layer}H{head}" for kind, (layer, head) in rows]
