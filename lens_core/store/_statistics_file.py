"""Statistics on disk: a safetensors file, whose metadata say what was counted and which shards."""

import json
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor

from lens_core._tensor_file import FileKind
from lens_core.errors import StoreError
from lens_core.store._layout import StoredPoint
from lens_core.store._moments import Moments
from lens_core.store._picked import Sample, Top

if TYPE_CHECKING:
    from lens_core.store._statistics import Kind, Statistics, Tally

__all__ = ["KIND", "read", "write"]

KIND = FileKind(what="store statistics", version=1, error=StoreError, writer="statistics.save(path)")


def write(statistics: "Statistics", path: Any) -> None:
    """Write statistics.

    Raises:
        StoreError: They cannot be written there.
    """
    tally = statistics.tally
    tensors = {
        "mean": tally.moments.mean,
        "squares": tally.moments.squares,
        "sample_keys": tally.sample.keys,
        "sample_values": tally.sample.values,
        "top_values": tally.top.values,
        "top_shards": tally.top.shards,
        "top_entries": tally.top.entries,
        "probe": statistics.probe,
    }
    metadata = {
        "kind": json.dumps(attrs.asdict(statistics.kind)),
        "point": json.dumps(attrs.asdict(statistics.point)),
        "count": str(tally.moments.count),
        "seen": json.dumps(dict(tally.seen)),
    }
    KIND.write(KIND.target(path), tensors, metadata)


def read(path: Any) -> "tuple[Kind, Tally, Tensor, StoredPoint]":
    """Read what `write` wrote; values are in memory.

    Raises:
        StoreError: Not such a file, or damaged.
    """
    return KIND.read(path, _parts)


def _parts(
    tensors: dict[str, Tensor], metadata: dict[str, str], shown: str
) -> "tuple[Kind, Tally, Tensor, StoredPoint]":
    from lens_core.store._statistics import Kind, Tally

    kept = {name: value.clone() for name, value in tensors.items()}  # the file may be written anew
    kind = Kind(**json.loads(metadata["kind"]))
    tally = Tally(
        moments=Moments(count=int(metadata["count"]), mean=kept["mean"], squares=kept["squares"]),
        sample=Sample(size=kind.sample, keys=kept["sample_keys"], values=kept["sample_values"]),
        top=Top(size=kind.top, values=kept["top_values"], shards=kept["top_shards"], entries=kept["top_entries"]),
        seen=json.loads(metadata["seen"]),
    )
    return kind, tally, kept["probe"], StoredPoint(**json.loads(metadata["point"]))
