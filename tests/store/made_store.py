"""Stores written shard by shard from numbers drawn here, and the same numbers in memory to hold reading to."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lens_core.store._layout import COLUMNS, Manifest, Record, RowRules, Source, StoredPoint
from lens_core.store._shard import Shard

RESID, LAST, Z, COUNT = "blocks.0.hook_resid_post", "blocks.3.hook_resid_post", "blocks.3.attn.hook_z", "hook_count"
POINTS = (
    StoredPoint(name=RESID, axes="d_model", shape=(5,), dtype="float64", equation="resid_post"),
    StoredPoint(name=LAST, axes="d_model", shape=(5,), dtype="bfloat16", equation="resid_post"),
    StoredPoint(name=Z, axes="n_heads d_head", shape=(2, 3), dtype="float32", equation="z"),
    StoredPoint(name=COUNT, axes="", shape=(), dtype="int32", equation="a number"),
)
ORIGIN = {"model": "made", "model_type": "gpt2", "weights": "w", "torch": "1"}
RULES = RowRules(context=7, pack=True, prepend_bos=None, bos=None, separator=None, positions=None, skipped=())


class Made(NamedTuple):
    """What was written: of every entry, and of every row, in order."""

    folder: Path
    values: dict[str, Tensor]
    entries: dict[str, Tensor]
    rows: list[dict[str, Tensor]]


def made(
    folder: Path,
    parts: tuple[tuple[int, ...], ...] = ((5, 4), (0,), (6,), (3, 1, 4)),
    *,
    points: tuple[StoredPoint, ...] = POINTS,
    seed: int = 0,
    label: str = "corpus",
    kept: float = 0.7,
    **rules: Any,
) -> Made:
    """Write a store; `parts` has the number of rows of each part of each unit."""
    draw = torch.Generator().manual_seed(seed)
    manifest = Manifest(
        points=points,
        origin=ORIGIN,
        sources=(
            Source(label=label, n_documents=2 * len(parts), digest=f"{label} {seed}", unit_documents=2, shard_rows=4),
        ),
        rows=RULES,
        **rules,
    )
    folder.mkdir()
    manifest.write(folder)
    values: dict[str, list[Tensor]] = {point.name: [] for point in points}
    columns: dict[str, list[Tensor]] = {name: [] for name in ("tokens", "documents", "offsets", "positions", "rows")}
    rows: list[dict[str, Tensor]] = []
    for unit, sizes in enumerate(parts):
        for part, size in enumerate(sizes):
            shard = _drawn(size, draw, kept)
            row, position = shard["kept"].nonzero(as_tuple=True)
            for name in ("tokens", "documents", "offsets"):
                columns[name].append(shard[name][row, position])
            columns["positions"].append(position)
            columns["rows"].append(row + len(rows))
            rows += [{name: value[index] for name, value in shard.items()} for index in range(size)]
            for point in points:
                drawn = torch.randn(len(row), *point.shape, generator=draw, dtype=torch.float64) * 10
                values[point.name].append(drawn.to(point.torch_dtype))
            tensors = shard | {point.name: values[point.name][-1] for point in points}
            _write(folder, tensors, unit=unit, part=part, is_last=part == len(sizes) - 1)
    joined = {name: torch.cat(found) for name, found in values.items()}
    return Made(folder, joined, {name: torch.cat(found) for name, found in columns.items()}, rows)


def _drawn(size: int, draw: torch.Generator, kept: float) -> dict[str, Tensor]:
    """Draw rows of 1 to 7 tokens."""
    width = 7 if size else 0
    lengths = torch.randint(1, 8, (size,), generator=draw)
    is_there = torch.arange(width) < lengths[:, None]
    columns = {
        name: torch.where(is_there, torch.randint(0, 90, (size, width), generator=draw), -1).to(COLUMNS[name])
        for name in ("tokens", "documents", "offsets")
    }
    return columns | {"kept": is_there & (torch.rand(size, width, generator=draw) < kept)}


def _write(folder: Path, tensors: dict[str, Tensor], *, unit: int, part: int, is_last: bool) -> None:
    record = {
        "source": 0,
        "unit": unit,
        "part": part,
        "is_last": is_last,
        "rows": len(tensors["tokens"]),
        "width": tensors["tokens"].shape[1],
        "tokens": int((tensors["tokens"] >= 0).sum()),
        "entries": int(tensors["kept"].sum()),
        "cut": 0,
    }
    target = folder / f"00-{unit:06d}-{part:04d}.safetensors"
    shard = Shard(target, {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}, {})
    for name, value in tensors.items():
        shard.write(name, value)
    Record(**record, nbytes=shard.nbytes, sha256=shard.commit()).write(folder)
