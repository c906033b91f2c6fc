"""Which plugin serves which HF model type, and what to say when none does."""

import difflib
import importlib
import importlib.resources
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from lens_core import _discovery
from lens_core._descriptor import Architecture
from lens_core._discovery import PluginRecord, PluginStatus
from lens_core.errors import (
    AmbiguousArchitectureError,
    IncompatiblePluginError,
    ModelNotFoundError,
    PluginError,
    PluginLoadError,
    UnknownModelTypeError,
)

_LLAMA_KIN = (
    "apertus", "arcee", "cohere", "cohere2", "cwm", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe",
    "flex_olmo", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt_oss", "granite",
    "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax",
    "internlm3", "iquestcoder", "jais2", "llama", "mellum", "minimax_m2", "ministral", "ministral3", "mistral",
    "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma",
)  # fmt: skip

# Only to name what to install; a plugin serves whatever its own descriptor says.
_KNOWN_PACKAGES = {
    "falcon_mamba": "lens-mamba",
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "jamba", "nemotron_h"), "lens-hybrid"),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), "lens-gpt2"),
    "mamba": "lens-mamba",
    "mamba2": "lens-mamba2",
    **dict.fromkeys(("biogpt", "opt"), "lens-opt"),
    **dict.fromkeys(_LLAMA_KIN, "lens-llama"),
}


class Registry:
    """The plugins that are there, and the architectures they provide.

    Discovery happens once, when something is first asked. Then all descriptors are loaded: they are light, and only so
    is it known that two plugins claim one model type.
    """

    def __init__(self, plugins: Iterable[object] = (), *, discover: bool = True) -> None:
        self._plugins = tuple(plugins)
        self._discover = discover
        self._records: tuple[PluginRecord, ...] | None = None
        self._lock = threading.RLock()

    @property
    def records(self) -> tuple[PluginRecord, ...]:
        """One record for every plugin, whether it serves or not."""
        with self._lock:
            if self._records is None:
                found = _discovery.discover() if self._discover else []
                by_hand = [_discovery.examine(_discovery.source_of_object(plugin)) for plugin in self._plugins]
                self._records = _mark_ambiguous([*found, *by_hand])
            return self._records

    def resolve(self, model_type: str) -> Architecture:
        """Return the architecture that serves an HF model type.

        Raises:
            UnknownModelTypeError: No plugin provides it, or the one that does is disabled; says what to install.
            AmbiguousArchitectureError: Two distributions provide it; names both.
            PluginLoadError: The plugin that is named for it is broken.
            IncompatiblePluginError: The plugin that is named for it does not fit the versions installed.
        """
        claimants = _claimants(self.records).get(model_type, [])
        if not claimants:
            raise self._absence_of(model_type)
        rivals = _rivals_of(claimants[0], claimants)
        if rivals:
            raise AmbiguousArchitectureError(
                f"The model type {model_type!r} is claimed by {' and by '.join([claimants[0].label, *rivals])}."
                " Uninstall all but one of them, or name the others in LENS_DISABLE_PLUGINS."
            )
        return next(found for found in claimants[0].architectures if model_type in found.model_types)

    def _absence_of(self, model_type: str) -> PluginError:
        for record in self.records:
            if model_type != record.entry_name and model_type not in record.model_types:
                continue
            message = (
                f"The plugin for the model type {model_type!r}, {record.label}, is {record.status}: {record.reason}."
            )
            if record.status is PluginStatus.BROKEN:
                return PluginLoadError(message)
            if record.status is PluginStatus.INCOMPATIBLE:
                return IncompatiblePluginError(message)
            return UnknownModelTypeError(message)
        return UnknownModelTypeError(
            f"No installed plugin provides the model type {model_type!r}. {self._remedy(model_type)}"
        )

    def _remedy(self, model_type: str) -> str:
        claimants = _claimants(self.records)
        here = ", ".join(f"{name} ({found[0].label})" for name, found in sorted(claimants.items())) or "none"
        near = difflib.get_close_matches(model_type, {**claimants, **_KNOWN_PACKAGES})
        if model_type in _KNOWN_PACKAGES:
            remedy = f"pip install {_KNOWN_PACKAGES[model_type]} brings it."
        elif near:
            remedy = f"Did you mean {' or '.join(map(repr, near))}?"
        else:
            remedy = f"Look for a distribution named lens-{model_type.replace('_', '-')}, or write one."
        return f"{remedy} Installed: {here}."


def _claimants(records: Iterable[PluginRecord]) -> dict[str, list[PluginRecord]]:
    """Map each model type to the plugins that may serve it."""
    claimants: dict[str, list[PluginRecord]] = {}
    for record in records:
        if record.status in {PluginStatus.OK, PluginStatus.AMBIGUOUS}:
            for model_type in record.model_types:
                claimants.setdefault(model_type, []).append(record)
    return claimants


def _rivals_of(record: PluginRecord, claimants: Iterable[PluginRecord]) -> list[str]:
    """Name the other owners among the claimants; one distribution that claims a type twice is no rival of itself."""
    rivals = [
        other.label
        for other in claimants
        if other is not record and (other.distribution is None or other.distribution != record.distribution)
    ]
    return list(dict.fromkeys(rivals))


def _mark_ambiguous(records: list[PluginRecord]) -> tuple[PluginRecord, ...]:
    claimants = _claimants(records)

    def mark(record: PluginRecord) -> PluginRecord:
        if record.status is not PluginStatus.OK:
            return record
        rivals = {name: _rivals_of(record, claimants[name]) for name in record.model_types}
        conflicts = [
            f"{name} is also claimed by {' and by '.join(others)}" for name, others in rivals.items() if others
        ]
        if not conflicts:
            return record
        return attrs.evolve(record, status=PluginStatus.AMBIGUOUS, reason="; ".join(conflicts))

    return tuple(map(mark, records))


_active = Registry()
_swap = threading.RLock()


def active_registry() -> Registry:
    """Return the registry that `lens.load` asks."""
    return _active


@contextmanager
def swapped(registry: Registry) -> Generator[Registry, None, None]:
    """Make another registry the active one, for every thread, until the block ends.

    Blocks in different threads wait for each other; blocks in one thread nest.
    """
    global _active  # noqa: PLW0603 - the registry is the one thing that is global
    with _swap:
        previous = _active
        _active = registry
        try:
            yield registry
        finally:
            _active = previous


def resolve_architecture(model_type: str) -> Architecture:
    """Return the architecture that serves an HF model type; raises as `Registry.resolve` does."""
    return active_registry().resolve(model_type)


def load_implementation(architecture: Architecture) -> Any:
    """Import the object that an architecture names as its implementation.

    Raises:
        PluginLoadError: The module does not import, or has no such attribute.
    """
    module_name, _, attribute = architecture.implementation.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise PluginLoadError(
            f"The implementation {architecture.implementation!r} of {architecture.name} does not import:"
            f" {type(error).__name__}: {error}. Reinstall or upgrade the plugin."
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        near = difflib.get_close_matches(attribute, dir(module))
        hint = f" Did you mean {near[0]}?" if near else ""
        raise PluginLoadError(
            f"The implementation {architecture.implementation!r} of {architecture.name} is not there: the module"
            f" {module_name} has no {attribute}.{hint} Upgrade the plugin."
        ) from error


def toy_folder(architecture: Architecture) -> Path:
    """Return the folder of the toy checkpoint that ships inside the plugin.

    Raises:
        ModelNotFoundError: The architecture has no toy.
        PluginLoadError: It names one that is not among its files.
    """
    if architecture.toy is None:
        raise ModelNotFoundError(f"{architecture.name} ships no toy; load a checkpoint's id or folder instead.")
    package = architecture.implementation.replace(":", ".").partition(".")[0]
    try:
        folder = Path(str(importlib.resources.files(package))) / architecture.toy
    except ImportError as error:
        raise PluginLoadError(f"The package {package} of {architecture.name} does not import: {error}.") from error
    if not folder.is_dir():
        raise PluginLoadError(f"The toy of {architecture.name} is not at {folder}; reinstall the plugin.")
    return folder
