"""Circuits as JSON files: the edges, their scores, and the graph that they are of."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from lens_core.analysis.graph import Graph, Node
from lens_core.errors import AnalysisFileError, LensError

if TYPE_CHECKING:
    from lens_core.analysis._circuit import Circuit

__all__ = ["Parts", "read_circuit", "write_circuit"]

_FORMAT, _VERSION = "lens-circuit", 1
_NODES = ("writers", "readers", "constants")


@attrs.frozen(kw_only=True, eq=False)
class Parts:
    """What a file holds."""

    graph: Graph
    labels: tuple[str, ...]
    scores: Tensor | None


def write_circuit(circuit: "Circuit", path: str | os.PathLike[str]) -> None:
    """Write a file, which appears complete or not at all."""
    graph = circuit.graph
    scores = [circuit.score(edge) for edge in circuit.edges]
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "edges": [
            [edge.label, score if math.isfinite(score) else None]
            for edge, score in zip(circuit.edges, scores, strict=True)
        ],
        "graph": {
            **{name: [attrs.asdict(node) for node in getattr(graph, name)] for name in _NODES},
            "reach": graph.reach,
            "constant_reach": graph.constant_reach,
            "writer_names": graph.writer_names,
        },
    }
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(target)


def read_circuit(path: str | os.PathLike[str]) -> Parts:
    """Read a file.

    Raises:
        AnalysisFileError: It is not there, or not one that was written by `write_circuit`.
    """
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        if (content["format"], content["version"]) == (_FORMAT, _VERSION):
            return _parts(content)
        problem = f"its form is {content['format']!r} {content['version']!r}, and {_FORMAT!r} {_VERSION} is known"
    except (LensError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise AnalysisFileError(f"{os.fspath(path)!r} is no circuit that was saved: {error!r}") from error
    raise AnalysisFileError(f"{os.fspath(path)!r} is no circuit that can be read: {problem}")


def _parts(content: Mapping[str, Any]) -> Parts:
    fields: dict[str, Any] = {name: tuple(value) for name, value in content["graph"].items()}
    fields |= {name: tuple(Node(**node) for node in fields[name]) for name in _NODES}
    graph = Graph(**fields)
    scored = {str(label): score for label, score in content["edges"]}
    scores = torch.full(graph.mask.shape, torch.nan)
    for label, score in scored.items():
        edge = graph.edge(label)
        if score is not None:
            scores[graph.writers.index(edge.source), graph.readers.index(edge.target)] = float(score)
    return Parts(graph=graph, labels=tuple(scored), scores=None if scores.isnan().all() else scores)
