"""The tables of docs/ioi.md, from the numbers in results.json alone."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from scripts.generated import update

__all__ = ["BLOCKS", "write"]


def write(results: dict[str, Any], page: Path, *, check: bool = False) -> int:
    """Put every table between its markers; with `check`, only say whether they are there. Gives an exit code."""
    return max(update(page, f"real {name}", make(results), check=check) for name, make in BLOCKS.items())


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _facts(results: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in results["facts"].items())


def _checks(results: dict[str, Any]) -> str:
    rows = [(one["name"].replace("\n", " "), one["figures"], _verdict(one["holds"])) for one in results["checks"]]
    return _table(("compared", "result", ""), rows)


def _points(results: dict[str, Any]) -> str:
    header = ("hook point", "elements that differ from HF's own", "error", "float32's error", "bound", "")
    rows = []
    for one in results["points"]:
        own = one["unequal"] is not None
        bound = "equal" if own else f"{one['bound']:.1e}"
        unequal = one["unequal"] if own else ""
        name = f"`{one['name']}`"
        rows.append((name, unequal, f"{one['error']:.1e}", f"{one['rounding']:.1e}", bound, _verdict(one["holds"])))
    return _table(header, rows)


def _verdict(holds: bool) -> str:
    return "holds" if holds else "**fails**"


def _behaviour(results: dict[str, Any]) -> str:
    header = (
        "sentence", "n", "logit difference", "spread", "IO above S", "IO is the top token", "IO first", "S first",
        "other name repeated",
    )  # fmt: skip
    rows = [
        (
            one["template"].replace("{", "").replace("}", ""), one["sentences"], f"{one['mean']:.2f}",
            f"{one['spread']:.2f}", f"{one['accuracy']:.0%}", f"{one['top1']:.0%}", f"{one['io_first']:.2f}",
            f"{one['subject_first']:.2f}", f"{one['swapped']:.2f}",
        )
        for one in results["study"]["behaviour"]
    ]  # fmt: skip
    return _table(header, rows)


def _attribution(results: dict[str, Any]) -> str:
    study = results["study"]
    heads, mlps = study["heads"], study["mlps"]
    ranked = sorted(((value, f"L{i}H{j}") for i, row in enumerate(heads) for j, value in enumerate(row)), reverse=True)
    all_heads, all_mlps, rest = sum(map(sum, heads)), sum(mlps), sum(study["rest"].values())
    best_mlp = max(range(len(mlps)), key=lambda layer: abs(mlps[layer]))
    rows = [
        ("logit difference, mean", f"{study['total']:.3f}"),
        ("all heads", f"{all_heads:.3f}"),
        ("all MLPs", f"{all_mlps:.3f}"),
        ("embedding, and biases (there are none)", f"{rest:.3f}"),
        ("what the sum leaves: the largest difference of a sentence", f"{study['error']:.1e}"),
        ("heads above 0", f"{sum(value for value, _ in ranked if value > 0):.3f}"),
        ("heads below 0", f"{sum(value for value, _ in ranked if value < 0):.3f}"),
        ("the five heads most for IO", _listed(ranked[:5])),
        ("the five heads most for S", _listed(ranked[:-6:-1])),
        ("the MLP that writes most, either way", f"layer {best_mlp} ({mlps[best_mlp]:+.2f})"),
    ]
    return _table(("part", "logits for IO − S"), rows)


def _listed(ranked: Iterable[tuple[float, str]]) -> str:
    return ", ".join(f"{name} ({value:+.2f})" for value, name in ranked)


def _patching(results: dict[str, Any]) -> str:
    run = results["study"]["patching"]
    rows = []
    for kind, title in (("stream_swapped", "other name repeated"), ("stream_unrelated", "three unrelated names")):
        share, tokens = run[kind]["share"], run["tokens"]
        for place in ("name 1", "name 2", "S2", tokens[-1]):
            column = len(tokens) - 1 if place == tokens[-1] else tokens.index(place)
            values = [row[column] for row in share]
            peak = max(range(len(values)), key=lambda layer: abs(values[layer]))
            label = "last token" if place == tokens[-1] else place
            last_half = max((layer for layer, value in enumerate(values) if abs(value) >= 0.5), default=None)
            first_half = min((layer for layer, value in enumerate(values) if abs(value) >= 0.5), default=None)
            span = "none" if last_half is None else f"{first_half} to {last_half}"
            rows.append((title, label, f"{values[peak]:+.2f} (layer {peak})", span))
    return _table(("patched from", "at", "largest share", "layers with half or more"), rows)


def _circuit(results: dict[str, Any]) -> str:
    study = results["study"]
    circuit, attention = study["circuit"], study["attention"]
    places = attention["places"]
    share = study["patching"]["heads_swapped"]["share"]
    rows = []
    for kind in ("writers", "senders"):
        for layer, head in circuit["groups"][kind]:
            looks = [f"{value:.2f}" for value in attention["last token"][layer][head]]
            writes = [f"{study[name][layer][head]:+.2f}" for name in ("heads", "heads_io", "heads_subject")]
            shares = [share[layer][head], *(values[len(rows)] for values in circuit["share by place"].values())]
            rows.append((kind, f"L{layer}H{head}", *writes, *(f"{value:+.2f}" for value in shares), *looks))
    written = ("IO − S", "IO − other names", "S − other names")
    heads = _table(
        ("group", "head", *written, "share", "at S2", "at the last token", *(f"to {p}" for p in places)), rows
    )
    effects = circuit["effects"]
    titles = {"swapped": "other name repeated", "unrelated": "three unrelated names"}
    outcome = [
        (f"the {name}", title, f"{effects[f'{name}, {kind}']:.2f}")
        for name in ("writers", "senders")
        for kind, title in titles.items()
    ]
    outcome.append(
        ("the senders, the writers' own kept", titles["swapped"], f"{effects['senders, swapped, writers kept']:.2f}")
    )
    for kind, title in titles.items():
        drawn = effects[f"others, {kind}"]
        middle = f"{sum(drawn) / len(drawn):.2f} ({min(drawn):.2f} to {max(drawn):.2f})"
        outcome.append((f"as many others of those layers, drawn {len(drawn)} times", title, middle))
    replaced = _table(
        ("z replaced", "from a run with", f"logit difference ({circuit['clean']:.2f} before)"),
        outcome,
    )
    moved = [
        (f"L{layer}H{head}", *(f"{a:.2f} → {b:.2f}" for a, b in zip(before, after, strict=True)))
        for (layer, head), before, after in zip(
            circuit["groups"]["writers"],
            circuit["writers' attention"]["before"],
            circuit["writers' attention"]["after"],
            strict=True,
        )
    ]
    looks = _table(("writer, senders replaced", *(f"to {place}" for place in places)), moved)
    return f"{heads}\n\n{replaced}\n\n{looks}"


def _copying(results: dict[str, Any]) -> str:
    """List the heads that look from S2 back at S1."""
    attention = results["study"]["attention"]
    column = attention["places"].index("S1")
    found = sorted(
        ((row[column], f"L{i}H{j}") for i, layer in enumerate(attention["S2"]) for j, row in enumerate(layer)),
        reverse=True,
    )
    return _table(("head", "attention from S2 to S1"), [(name, f"{value:.2f}") for value, name in found[:6]])


BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "facts": _facts,
    "checks": _checks,
    "points": _points,
    "behaviour": _behaviour,
    "attribution": _attribution,
    "patching": _patching,
    "copying": _copying,
    "circuit": _circuit,
}
