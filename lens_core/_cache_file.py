"""Activation caches on disk: safetensors, with what is needed to read the names without the model.

A file of ours says so in its metadata: `format`, `format_version`, `has_batch_dim`, `n_layers`, `points` (JSON: each
name's axes and equation) and `aliases`; and where the values come from: model id and type, plugin, versions. Tensors
stand under their canonical names, gradients under `NAME#grad`. Nothing is pickled, and nothing in a file is trusted.
"""

import importlib.metadata
import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lens_core.errors import ArgumentError, CacheFileError, UnknownHookError
from lens_core.hook_points import HookPoint, HookTable

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache

__all__ = ["FORMAT", "FORMAT_VERSION", "SavedCache", "check_fit", "read", "write"]

FORMAT = "lens activation cache"
FORMAT_VERSION = 1
GRADIENT = "#grad"
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
    target = _path(path)
    if target.is_dir():
        raise CacheFileError(f"{os.fspath(target)!r} is a folder; give the path of a file")
    tensors = {name: cache[name] for name in cache} | {f"{name}{GRADIENT}": cache.grad[name] for name in cache.grad}
    for name in cache:
        _layer_of(name, _MAX_LAYERS)
    metadata = _metadata(cache)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb"):
            mode = part.stat().st_mode  # as the process's umask has it; safetensors makes files for the owner only
        cast("Any", safetensors.torch).save_file(_separate(tensors), part, metadata=metadata)
        part.chmod(mode)
        part.replace(target)
    except Exception as error:
        raise CacheFileError(f"the cache cannot be written to {os.fspath(target)!r}: {_first_line(error)}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors on the CPU that are contiguous and share no storage, as safetensors asks; copies where need be."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        found[name] = plain
    return found


def _metadata(cache: "ActivationCache") -> dict[str, str]:
    points = {name: cache.table[name] for name in cache}
    model = cache.model
    aliases: Mapping[str, str] = {} if model is None else model.declaration.aliases
    described = {name: {"axes": point.shape, "equation": point.equation} for name, point in points.items()}
    return {
        **(cache.metadata if model is None else _origin(model)),
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "has_batch_dim": json.dumps(cache.has_batch_dim),
        "n_layers": str(cache.table.n_layers),
        "points": json.dumps(described),
        "aliases": json.dumps({alias: name for alias, name in aliases.items() if name in points}),
    }


def _origin(model: Any) -> dict[str, str]:
    """Say what model, plugin and versions the values come from."""
    from lens_core._registry import active_registry

    name = str(model.cfg.model_name)
    if Path(name).is_absolute() or Path(name).expanduser().exists():
        name = Path(name).resolve().name  # where somebody keeps the model is nobody else's business
    plugin = next((record for record in active_registry().records if model.architecture in record.architectures), None)
    return {
        "model": name,
        "model_type": model.cfg.model_type,
        "d_model": str(model.cfg.d_model),
        "architecture": model.architecture.name,
        "plugin": "" if plugin is None else plugin.label,
        "lens_core": _version("lens-core"),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


# ---------------------------------------------------------------------- reading


def read(path: Any, device: torch.device | None = None) -> SavedCache:
    """Read a file; without a device the tensors are mapped from it.

    Raises:
        CacheFileError: Not a cache file of ours, damaged, of another format version, or unsafe.
        ArgumentError: Not a path.
    """
    source = _path(path)
    shown = os.fspath(source)
    if not source.is_file():
        raise CacheFileError(f"there is no file {shown!r}" if not source.exists() else f"{shown!r} is not a file")
    try:
        # The header's lengths, types and offsets are checked against the file's size before anything is allocated.
        with cast("Any", safetensors).safe_open(shown, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            _check_version(metadata, shown)
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        saved = _read_entries(tensors, metadata, shown)
    except CacheFileError:
        raise
    except Exception as error:  # a damaged file makes safetensors and torch raise errors of many types
        raise CacheFileError(
            f"{shown!r} is no activation cache, or is damaged: {_first_line(error)}. Write it again"
        ) from error
    return saved if device is None else saved.to(device)


def _check_version(metadata: Mapping[str, str], shown: str) -> None:
    if metadata.get("format") != FORMAT:
        raise CacheFileError(f"{shown!r} is a safetensors file, but no activation cache: cache.save(path) writes one")
    version = metadata.get("format_version", "")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise CacheFileError(f"{shown!r} has no sound format version, but {version[:40]!r}; write it again")
    if int(version) > FORMAT_VERSION:
        writer = re.sub(r"[^0-9A-Za-z.+]", "", metadata.get("lens_core", ""))[:40]
        raise CacheFileError(
            f"{shown!r} has format version {version}, written by lens-core {writer or '(unknown)'}, and this lens-core "
            f"reads version {FORMAT_VERSION}: upgrade it"
        )
    if int(version) < FORMAT_VERSION:
        raise CacheFileError(
            f"{shown!r} has format version {version}, and this lens-core reads {FORMAT_VERSION}: write the file again"
        )


def _read_entries(saved: Mapping[str, Tensor], metadata: Mapping[str, str], shown: str) -> SavedCache:
    n_layers_text, has_batch_dim = metadata.get("n_layers", ""), metadata.get("has_batch_dim")
    if not re.fullmatch(r"[0-9]{1,5}", n_layers_text) or has_batch_dim not in ("true", "false"):
        raise CacheFileError(f"{shown!r} is damaged: its metadata lack n_layers or has_batch_dim")
    points = _read_points(metadata.get("points", ""), n_layers=min(int(n_layers_text), _MAX_LAYERS))
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
    """See that a cache could have come from a model: type, depth, names and sizes.

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
    for name, value in saved.tensors.items():
        try:
            shape = model.table[name].shape
        except UnknownHookError as error:
            raise CacheFileError(f"{shown!r} holds {name!r}, which this model does not have; give no model") from error
        axes = [axis for axis in shape.split() if axis != "batch" or saved.has_batch_dim]
        expected = [cfg.sizes.get(axis, size) for axis, size in zip(axes, value.shape, strict=False)]
        if shape != saved.table[name].shape or (shape != HF_SHAPE and expected != list(value.shape)):
            raise CacheFileError(
                f"{name!r} has shape {list(value.shape)} in {shown!r}, where this model has {expected} ({shape}); "
                "give the model that was run, or none"
            )


def _path(path: Any) -> Path:
    try:
        text = os.fsdecode(path)
    except TypeError:
        text = ""
    if not text or "\0" in text:
        raise ArgumentError(f"a cache file is named by a path; got {path!r}")
    return Path(text)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
