"""What a long sweep has found so far, on disk: safetensors, written whole or not at all, refused by another sweep.

The tensors are the values by metric, the baselines, and which cells are done; the metadata say what the sweep is, as
JSON. Nothing is pickled, and nothing in a file is trusted: shapes and identity are those of the sweep that reads it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_core._tensor_file import FileKind
from lens_core.errors import AnalysisFileError

__all__ = ["KIND", "Saved", "digest"]

KIND = FileKind(what="patching sweep", version=1, error=AnalysisFileError, writer="patch_sweep(..., resume=path)")
CLOSE = 1e-4
"""How near, in relation to their size, the baselines of two runs of one sweep must be: kernels differ, models more."""


@attrs.frozen(kw_only=True, eq=False)
class Saved:
    """The file of one sweep."""

    path: Path
    identity: str
    baselines: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, given: Any, identity: Mapping[str, Any], baselines: Mapping[str, Tensor]) -> "Saved":
        """Read the file if there is one.

        Raises:
            AnalysisFileError: A file of another sweep, or none of a sweep.
        """
        path = KIND.target(given)
        told = json.dumps(identity)
        tensors: Mapping[str, Tensor] = {}
        if path.exists():
            tensors = KIND.read(path, lambda found, metadata, shown: _checked(found, metadata, shown, told, baselines))
        return cls(path=path, identity=told, baselines=baselines, tensors=tensors)

    def fill(self, values: Mapping[str, Float[Tensor, "cell batch"]], done: Bool[Tensor, " cell"]) -> None:
        """Put in what the file has."""
        if not self.tensors:
            return
        had = self.tensors["done"]
        if had.shape != done.shape or had.dtype != torch.bool:
            raise AnalysisFileError(f"{str(self.path)!r} holds {list(had.shape)} cells, and this sweep has {len(done)}")
        for name, value in values.items():
            value[had] = self.tensors[f"values.{name}"][had].to(value)
        done |= had

    def write(self, values: Mapping[str, Float[Tensor, "cell batch"]], done: Bool[Tensor, " cell"]) -> None:
        """Write what is known; a file that was there is replaced at once."""
        tensors = {f"values.{name}": value for name, value in values.items()}
        tensors |= {f"baselines.{name}": value for name, value in self.baselines.items()}
        KIND.write(self.path, {**tensors, "done": done}, {"sweep": self.identity})


def _checked(
    tensors: dict[str, Tensor], metadata: Mapping[str, str], shown: str, identity: str, baselines: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    theirs, ours = json.loads(metadata["sweep"]), json.loads(identity)
    for name in ours:
        if theirs.get(name) != ours[name]:
            raise AnalysisFileError(
                f"{shown!r} is of another sweep: its {name} is {_short(theirs.get(name))}, and here it is "
                f"{_short(ours[name])}; give another path, or remove the file"
            )
    for name, value in baselines.items():
        had = tensors[f"baselines.{name}"].to(value)
        if had.shape != value.shape or not torch.allclose(had, value, rtol=CLOSE, atol=CLOSE, equal_nan=True):
            raise AnalysisFileError(
                f"{shown!r} is of another sweep: the unpatched run has another {name!r} here, so the weights or the "
                "metric are others; give another path, or remove the file"
            )
    return tensors


def _short(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def digest(*tensors: Tensor) -> str:
    """Sum tensors up in a few digits, the same for the same values on every machine.

    Example:
        >>> import torch
        >>> digest(torch.arange(4)) == digest(torch.arange(4.0)), digest(torch.arange(4)) == digest(torch.arange(5))
        (True, False)
    """
    sums: list[str] = []
    for tensor in tensors:
        flat = tensor.detach().to("cpu", torch.float64).flatten().nan_to_num(posinf=1.0, neginf=-1.0)
        norm = (flat * flat).sum().sqrt()
        weight = torch.linspace(1.0, 2.0, max(len(flat), 1), dtype=torch.float64)[: len(flat)]
        sums.append(f"{len(flat)}:{float((flat * weight).sum()):.4e}:{float(norm):.4e}")
    return " ".join(sums)
