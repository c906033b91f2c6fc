"""Steering vectors on disk: safetensors, with the model that they are of."""

import json
import math
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from lens_core._state import unlike
from lens_core._tensor_file import FileKind, origin
from lens_core.errors import AnalysisFileError, HookError

if TYPE_CHECKING:
    from lens_core.analysis.steering import SteeringVector
    from lens_core.model import LensModel

__all__ = ["KIND", "identity", "read", "write"]

KIND = FileKind(what="steering vector", version=1, error=AnalysisFileError, writer="vector.save(path)")


def identity(model: "LensModel") -> dict[str, Any]:
    """Say which model vectors are of: where it comes from, and what its config says that may change a value."""
    return {"origin": origin(model), "facts": json.loads(json.dumps(model.config_facts))}


def write(vector: "SteeringVector", path: Any) -> None:
    """Write a file; see `SteeringVector.save`."""
    metadata = {
        **vector.origin,
        "method": vector.method,
        "n_examples": str(vector.n_examples),
        "norms": json.dumps(dict(vector.norms)),
        "config": json.dumps(dict(vector.facts)),
        "tensors": json.dumps({name: list(tensor.shape) for name, tensor in vector.vectors.items()}),
    }
    KIND.write(KIND.target(path), vector.vectors, metadata)


def read(path: Any, model: "LensModel", *, strict: bool) -> dict[str, Any]:
    """Read a file's parts for a model; see `SteeringVector.load`."""

    def parse(tensors: dict[str, Tensor], metadata: dict[str, str], shown: str) -> dict[str, Any]:
        return _parsed(tensors, metadata, os.fspath(shown), model, strict=strict)

    return KIND.read(path, parse)


def _parsed(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], shown: str, model: "LensModel", *, strict: bool
) -> dict[str, Any]:
    facts, norms = (json.loads(metadata.get(name, "")) for name in ("config", "norms"))
    shapes, count = json.loads(metadata.get("tensors", "")), metadata.get("n_examples", "")
    sound = isinstance(facts, dict) and isinstance(norms, dict) and re.fullmatch(r"[0-9]{1,12}", count)
    if not sound or shapes != {name: list(tensor.shape) for name, tensor in tensors.items()} or not tensors:
        raise AnalysisFileError(f"{shown!r} is damaged: its tensors are not those that its metadata tell of")
    facts, norms = cast("dict[str, Any]", facts), cast("dict[str, Any]", norms)
    if not all(name in tensors and isinstance(one, float) and math.isfinite(one) for name, one in norms.items()):
        raise AnalysisFileError(f"{shown!r} is damaged: its norms are not numbers by hook name")
    here = identity(model)
    difference = unlike(facts, here["facts"])
    theirs, ours = facts.get("model_type", metadata.get("model_type")), model.cfg.model_type
    if strict and (difference or theirs != ours):
        raise AnalysisFileError(
            f"{shown!r} is of another model: {difference or f'it is of type {theirs!r}, and this is {ours!r}'}; "
            "give the model that it is of, or strict=False if you mean to carry it over"
        )
    for name, tensor in tensors.items():
        _check(name, tensor, model, shown)
    own = {key: metadata[key] for key in here["origin"] if key in metadata}
    return {
        "vectors": {name: tensor.to(model.input_device, copy=True) for name, tensor in tensors.items()},
        "norms": norms,
        "method": metadata.get("method", ""),
        "n_examples": int(count),
        "origin": own,
        "facts": facts,
    }


def _check(name: str, tensor: Tensor, model: "LensModel", shown: str) -> None:
    """See that a model has the hook point, at this width."""
    try:
        point = model.table[name]
    except HookError as error:
        raise AnalysisFileError(f"{shown!r} has a vector for {name[:80]!r}, which this model does not have") from error
    axes = point.shape.split()
    width = math.prod(model.cfg.sizes.get(axis, 0) for axis in axes[2:])
    if axes[:2] != ["batch", "pos"] or tensor.ndim not in (1, 2) or tensor.shape[-1] != width:
        raise AnalysisFileError(
            f"{shown!r} has a vector of shape {list(tensor.shape)[:4]} for {name!r}, which is {width} wide here"
        )
    if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        raise AnalysisFileError(f"{shown!r} is damaged: the vector for {name!r} is not finite numbers")
