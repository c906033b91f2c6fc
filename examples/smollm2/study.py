"""Run the study of indirect objects and give its results as plain numbers, from which page and pictures are made."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from examples.smollm2 import ioi

__all__ = ["study"]

Head = tuple[int, int]


def study(model: Any, *, per_template: int, pairs: int) -> dict[str, Any]:
    """Measure everything that docs/ioi.md shows.

    Args:
        model: A lens model of a Llama with SmolLM2's tokenizer.
        per_template: Random sentences for each template: behaviour, attribution, attention.
        pairs: Pairs of names, each in both orders, of the one sentence that is patched cell by cell.
    """
    batches = ioi.random_batches(model, per_template)
    fixed = ioi.fixed_batch(model, pairs)
    results = {"behaviour": _behaviour(model, batches), **_attributed(model, batches)}
    results["attention"] = _attended(model, batches)
    print("-- behaviour, attribution and attention measured", flush=True)
    results["patching"] = _patched(model, fixed)
    results["circuit"] = _circuit(model, fixed, results)
    return results


@torch.no_grad()
def _behaviour(model: Any, batches: Sequence[ioi.Batch]) -> list[dict[str, Any]]:
    rows = []
    for template, batch in zip(ioi.TEMPLATES, batches, strict=True):
        logits = model(batch.tokens)
        best, clean = logits[:, -1].argmax(-1), ioi.differences(logits, batch)
        places = batch.places()
        is_io_first = places["IO"] < places["S1"]
        rows.append(
            {
                "template": template,
                "sentences": len(batch.prompts),
                "mean": float(clean.mean()),
                "spread": float(clean.std()),
                "accuracy": float((clean > 0).float().mean()),
                "top1": float((best == batch.io).float().mean()),
                "io_first": float(clean[is_io_first].mean()),
                "subject_first": float(clean[~is_io_first].mean()),
                "swapped": float(ioi.differences(model(batch.swapped), batch).mean()),
            }
        )
    return rows


def _attributed(model: Any, batches: Sequence[ioi.Batch]) -> dict[str, Any]:
    found = [ioi.attribution(model, batch) for batch in batches]
    rest = {name: float(torch.stack([one["rest"][name] for one in found]).mean()) for name in found[0]["rest"]}
    return {
        **{name: _mean(found, name).tolist() for name in ("heads", "heads_io", "heads_subject", "mlps")},
        "rest": rest,
        "total": float(torch.cat([one["truth"] for one in found]).mean()),
        "error": max(one["error"] for one in found),
    }


def _mean(found: Sequence[dict[str, Any]], name: str) -> Tensor:
    return torch.stack([one[name] for one in found]).mean(0)


def _attended(model: Any, batches: Sequence[ioi.Batch]) -> dict[str, Any]:
    """Average attention from the last token and from S2 to each place, [layer][head][place]."""
    queries = ("last token", "S2")
    by_query = torch.stack([ioi.attention(model, batch, queries) for batch in batches]).mean(0)
    return {"places": list(batches[0].places()), **dict(zip(queries, by_query.tolist(), strict=True))}


def _patched(model: Any, batch: ioi.Batch) -> dict[str, Any]:
    """Patch the stream from both corrupted runs, and the heads from the one with the other name repeated."""
    n_layers = model.cfg.n_layers
    cells = [(0, -1), (n_layers // 3, -5), (n_layers // 2, -1), (n_layers - 1, -1)]
    runs = {
        "stream_swapped": ioi.stream_patching(model, batch, batch.swapped),
        "stream_unrelated": ioi.stream_patching(model, batch, batch.unrelated),
        "heads_swapped": ioi.head_patching(model, batch, batch.swapped),
    }
    return {
        **{name: _plain(patching) for name, patching in runs.items()},
        "tokens": _columns(model, batch),
        "sentences": len(batch.prompts),
        "gap": ioi.whole_forward_gap(model, batch, batch.swapped, cells),
    }


def _columns(model: Any, batch: ioi.Batch) -> list[str]:
    """Label positions by their token, and the names by their order."""
    labels = [text.strip() for text in model.to_str_tokens(batch.tokens[0])]
    places = {name: int(at[0]) for name, at in batch.places().items()}
    first, second = sorted((places["IO"], places["S1"]))
    labels[first], labels[second], labels[places["S2"]] = "name 1", "name 2", "S2"
    return labels


def _plain(patching: ioi.Patching) -> dict[str, Any]:
    """Give a patching's fields as plain numbers."""
    return {"share": patching.share.tolist(), "clean": patching.clean, "corrupted": patching.corrupted}


@torch.no_grad()
def _circuit(model: Any, batch: ioi.Batch, results: dict[str, Any], count: int = 4, draws: int = 10) -> dict[str, Any]:
    """Test two groups of heads, and others drawn at random.

    The writers are those with most direct attribution. The senders are, of the layers before all writers, those whose
    patching takes the difference furthest to the corrupted run's.
    """
    direct, share = torch.tensor(results["heads"]), torch.tensor(results["patching"]["heads_swapped"]["share"])
    writers = ioi.strongest(direct, count)
    before = share.clone()
    before[max(1, min(layer for layer, _ in writers)) :] = -torch.inf
    senders = [head for head in ioi.strongest(before, 2 * count) if head not in writers][:count]

    def after(*hooks: Any) -> float:
        return float(ioi.differences(model.run_with_hooks(batch.tokens, fwd_hooks=hooks), batch).mean())

    effects: dict[str, Any] = {}
    for kind in ("swapped", "unrelated"):
        run = getattr(batch, kind)
        for name, heads in {"writers": writers, "senders": senders}.items():
            effects[f"{name}, {kind}"] = after(*ioi.heads_replaced(model, batch, run, heads))
        drawn = [
            after(*ioi.heads_replaced(model, batch, run, heads))
            for heads in _others(share.shape, writers, senders, draws)
        ]
        effects[f"others, {kind}"] = drawn
    replaced = ioi.heads_replaced(model, batch, batch.swapped, senders)
    kept = ioi.heads_replaced(model, batch, batch.tokens, writers)
    effects["senders, swapped, writers kept"] = after(*replaced, *kept)
    clean, end = after(), results["patching"]["heads_swapped"]["corrupted"]
    alone = {
        place: [
            (after(*ioi.heads_replaced(model, batch, batch.swapped, [head], place)) - clean) / (end - clean)
            for head in (*writers, *senders)
        ]
        for place in ("S2", "last token")
    }
    looks = {
        "before": ioi.attention(model, batch, ["last token"])[0],
        "after": ioi.attention(model, batch, ["last token"], replaced)[0],
    }
    return {
        "groups": {"writers": writers, "senders": senders},
        "clean": clean,
        "effects": effects,
        "share by place": alone,
        "writers' attention": {when: [found[head].tolist() for head in writers] for when, found in looks.items()},
    }


def _others(shape: Sequence[int], writers: Sequence[Head], senders: Sequence[Head], draws: int) -> list[list[Head]]:
    """Draw as many heads of neither group from the same span of layers, several times."""
    taken = [*writers, *senders]
    first, last = min(layer for layer, _ in taken), max(layer for layer, _ in taken)
    free = [(layer, head) for layer in range(first, last + 1) for head in range(shape[1]) if (layer, head) not in taken]
    rng = random.Random(0)
    return [rng.sample(free, min(len(writers), len(free))) for _ in range(draws)]
