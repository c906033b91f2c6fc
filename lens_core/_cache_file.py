"""Activation caches on disk: safetensors, with what is needed to read the names without the model.

A file of ours says so in its metadata: `format`, `format_version`, `has_batch_dim`, `has_gaps`, `n_layers`, `points`
(JSON: each name's axes and equation), `aliases`, and `heads` where scores and patterns have some only; and where the
values come from: model id and type, passes over its weights, plugin, versions. Tensors stand under their canonical
names, gradients under `NAME#grad`, and up to seven bytes that align the next tensor under `#fill.N`. Nothing is
pickled, and nothing in a file is trusted.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from torch import Tensor

from lens_core._arguments import is_whole
from lens_core._choice import is_by_head
from lens_core._pass_log import applied_passes
from lens_core._tensor_file import FileKind, origin
from lens_core.errors import CacheFileError, UnknownHookError
from lens_core.hook_points import HookPoint, HookTable

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache

__all__ = ["FILL", "KIND", "SavedCache", "check_fit", "metadata_of", "parts", "read", "read_parts", "write"]

KIND = FileKind(what="activation cache", version=1, error=CacheFileError, writer="cache.save(path)")
GRADIENT = "#grad"
FILL = "#fill."
HF_SHAPE = "HF's own"

_OUR_NAME = re.compile(
    r"(?:blocks\.(0|[1-9][0-9]{0,3})\.)?(?!blocks\.)(?:[A-Za-z0-9_]{1,40}\.){0,8}hook_[A-Za-z0-9_]{1,60}"
)
_HF_NAME = re.compile(r"hf(?:\.[A-Za-z0-9_-]{1,60}){1,30}\.(?:input|output)")
_AXES = re.compile(r"[A-Za-z0-9_*+() -]{0,200}")
_MAX_LAYERS = 10_000


@attrs.frozen(kw_only=True, eq=False)
class SavedCache:
    """What a file holds."""

    tensors: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    table: HookTable
    """The points that are in the file."""
    has_batch_dim: bool
    has_gaps: bool
    heads: tuple[int, ...] | None
    metadata: Mapping[str, str]

    def to(self, device: torch.device) -> "SavedCache":
        """Give the same with its tensors on a device."""
        tensors = {name: value.to(device) for name, value in self.tensors.items()}
        return attrs.evolve(
            self, tensors=tensors, gradients={name: value.to(device) for name, value in self.gradients.items()}
        )


# ---------------------------------------------------------------------- writing


def write(cache: "ActivationCache", path: Any) -> None:
    """Write a cache: to a file beside the target, which then takes its place.

    Raises:
        CacheFileError: The file cannot be written there, or an entry cannot be stored.
        ArgumentError: Not a path.
    """
    target = KIND.target(path)
    KIND.write(target, *parts(cache))


def parts(cache: "ActivationCache") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Take a cache apart into a file's tensors and metadata.

    Raises:
        CacheFileError: An entry that is not the name of a hook point.
    """
    tensors = {name: cache[name] for name in cache} | {f"{name}{GRADIENT}": cache.grad[name] for name in cache.grad}
    return tensors, metadata_of(cache, list(cache))


def metadata_of(cache: "ActivationCache", names: Sequence[str]) -> dict[str, str]:
    """Give a file's metadata, were these the entries of the cache.

    Raises:
        CacheFileError: Something that is not the name of a hook point.
    """
    for name in names:
        _layer_of(name, _MAX_LAYERS)
    points = {name: cache.table[name] for name in names}
    model = cache.model
    aliases: Mapping[str, str] = {} if model is None else model.declaration.aliases
    described = {name: {"axes": point.shape, "equation": point.equation} for name, point in points.items()}
    return {
        **(cache.metadata if model is None else origin(model)),
        "has_batch_dim": json.dumps(cache.has_batch_dim),
        "has_gaps": json.dumps(cache.has_gaps),
        **({} if cache.heads is None else {"heads": json.dumps(cache.heads)}),
        "n_layers": str(cache.table.n_layers),
        "points": json.dumps(described),
        "aliases": json.dumps({alias: name for alias, name in aliases.items() if name in points}),
    }


# ---------------------------------------------------------------------- reading


def read(path: Any, device: torch.device | None = None) -> SavedCache:
    """Read a file; without a device the tensors are mapped from it.

    Raises:
        CacheFileError: Not a cache file of ours, damaged, of another format version, or unsafe.
        ArgumentError: Not a path.
    """
    saved = KIND.read(path, read_parts)
    return saved if device is None else saved.to(device)


def read_parts(saved: Mapping[str, Tensor], metadata: Mapping[str, str], shown: str) -> SavedCache:
    """Put together what `parts` took apart, and see that it is sound."""
    n_layers_text, has_batch_dim = metadata.get("n_layers", ""), metadata.get("has_batch_dim")
    if not re.fullmatch(r"[0-9]{1,5}", n_layers_text) or has_batch_dim not in ("true", "false"):
        raise CacheFileError(f"{shown!r} is damaged: its metadata lack n_layers or has_batch_dim")
    points = _read_points(metadata.get("points", ""), n_layers=min(int(n_layers_text), _MAX_LAYERS))
    saved = {name: value for name, value in saved.items() if not name.startswith(FILL)}
    gradients = {name.removesuffix(GRADIENT): value for name, value in saved.items() if name.endswith(GRADIENT)}
    tensors = {name: saved[name] for name in points if name in saved}
    if tensors.keys() != points.keys() or len(tensors) + len(gradients) != len(saved):
        raise CacheFileError(f"{shown!r} is damaged: its tensors are not those that its metadata name")
    for name, value in tensors.items():
        _check_axes(points[name], value, has_batch_dim=has_batch_dim == "true")
    for name, value in gradients.items():
        if name not in tensors or value.shape != tensors[name].shape:
            raise CacheFileError(f"{shown!r} is damaged: the gradient of {name[:80]!r} fits no entry")
    table = HookTable(points.values(), aliases=_read_aliases(metadata.get("aliases", "{}"), points))
    table.n_layers = int(n_layers_text)
    return SavedCache(
        tensors=tensors,
        gradients=gradients,
        table=table,
        has_batch_dim=has_batch_dim == "true",
        has_gaps=metadata.get("has_gaps", "false") == "true",
        heads=_read_heads(metadata.get("heads"), tensors, points, has_batch_dim=has_batch_dim == "true"),
        metadata={key: value for key, value in metadata.items() if key not in ("points", "aliases")},
    )


def _read_points(text: str, *, n_layers: int) -> dict[str, HookPoint]:
    given: Any = json.loads(text)
    if not isinstance(given, dict):
        raise CacheFileError("the metadata's points are not a JSON object")
    points: dict[str, HookPoint] = {}
    for name, fields in cast("dict[str, Any]", given).items():
        axes, equation = fields["axes"], fields["equation"]
        if not (isinstance(axes, str) and isinstance(equation, str) and (axes == HF_SHAPE or _AXES.fullmatch(axes))):
            raise CacheFileError(f"the axes of {name[:80]!r} are not words")
        layer = _layer_of(name, n_layers)
        points[name] = HookPoint(name=name, shape=axes, equation=equation, seam=None, layer=layer)
    return points


def _read_heads(
    text: str | None, tensors: Mapping[str, Tensor], points: Mapping[str, HookPoint], *, has_batch_dim: bool
) -> tuple[int, ...] | None:
    """Read which heads scores and patterns have; as many as these have."""
    if text is None:
        return None
    heads: Any = json.loads(text)
    sizes = {tensors[name].shape[int(has_batch_dim)] for name, point in points.items() if is_by_head(point)}
    if not (isinstance(heads, list) and all(is_whole(head, least=0) for head in cast("list[Any]", heads))):
        raise CacheFileError(f"the metadata's heads are no list of ints, but {text[:80]!r}")
    if sizes - {len(cast("list[Any]", heads))}:
        raise CacheFileError(f"the metadata tell of the heads {text[:80]}, and scores or patterns have {min(sizes)}")
    return tuple(cast("list[int]", heads))


def _read_aliases(text: str, points: Mapping[str, HookPoint]) -> dict[str, str]:
    aliases: Any = json.loads(text)
    if not isinstance(aliases, dict):
        raise CacheFileError("the metadata's aliases are not a JSON object")
    return {alias: name for alias, name in cast("dict[str, Any]", aliases).items() if name in points}


def _layer_of(name: str, n_layers: int) -> int | None:
    """Give the layer in a hook point's name, after a look at the name."""
    found = _OUR_NAME.fullmatch(name)
    if found is None and _HF_NAME.fullmatch(name) is None:
        raise CacheFileError(f"{name[:80]!r} is not the name of a hook point")
    layer = None if found is None or found[1] is None else int(found[1])
    if layer is not None and layer >= n_layers:
        raise CacheFileError(f"{name!r} is beyond the {n_layers} layers that the file tells of")
    return layer


def _check_axes(point: HookPoint, value: Tensor, *, has_batch_dim: bool) -> None:
    axes = point.shape.split()
    if not has_batch_dim and axes[:1] == ["batch"]:
        axes = axes[1:]
    if point.shape != HF_SHAPE and len(axes) != value.ndim:
        raise CacheFileError(f"{point.name!r} has shape {list(value.shape)[:10]}, and its axes are {' '.join(axes)!r}")


def check_fit(saved: SavedCache, model: Any, path: str | os.PathLike[str]) -> None:
    """See that a cache could have come from a model: type, depth, passes over its weights, names and sizes.

    Raises:
        CacheFileError: It could not; says why. That of another model of the same shape cannot be told.
    """
    cfg, shown = model.cfg, os.fspath(path)
    theirs = (saved.metadata.get("model_type"), str(saved.table.n_layers))
    if theirs != (cfg.model_type, str(cfg.n_layers)):
        raise CacheFileError(
            f"{shown!r} is of a model of type {theirs[0]!r} with {theirs[1]} layers, and this model is of type "
            f"{cfg.model_type!r} with {cfg.n_layers}; give the model that was run, or none"
        )
    weights, ours = saved.metadata.get("passes", ""), ", ".join(applied_passes(model.bare_model))
    if weights != ours:
        raise CacheFileError(
            f"{shown!r} is of weights after {weights[:200] or 'no pass'}, and this model's are after "
            f"{ours or 'no pass'}; process the weights alike, or give no model"
        )
    for name, value in saved.tensors.items():
        try:
            shape = model.table[name].shape
        except UnknownHookError as error:
            raise CacheFileError(f"{shown!r} holds {name!r}, which this model does not have; give no model") from error
        axes = [axis for axis in shape.split() if axis != "batch" or saved.has_batch_dim]
        sizes = dict(cfg.sizes)
        if saved.heads is not None and is_by_head(saved.table[name]):
            sizes["n_heads"] = len(saved.heads)
        expected = [sizes.get(axis, size) for axis, size in zip(axes, value.shape, strict=False)]
        if shape != saved.table[name].shape or (shape != HF_SHAPE and expected != list(value.shape)):
            raise CacheFileError(
                f"{name!r} has shape {list(value.shape)} in {shown!r}, where this model has {expected} ({shape}); "
                "give the model that was run, or none"
            )
