"""Safetensors files of ours: written whole or not at all, and read without trust.

Each kind of file says in its metadata what it is: `format`, `format_version`, and where the values come from (model id
and type, plugin, versions). Nothing is pickled.
"""

import importlib.metadata
import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import attrs
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lens_core._pass_log import applied_passes
from lens_core.errors import ArgumentError, LensError

__all__ = ["DTYPE_NAMES", "FileKind", "origin"]

T = TypeVar("T")

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in safetensors."""


@attrs.frozen(kw_only=True)
class FileKind:
    """One kind of file: what it is called, which version is written and read, and which error tells of a bad one."""

    what: str
    """`activation cache`, `state`."""
    version: int
    error: type[LensError]
    writer: str
    """The call that writes one, for messages."""

    @property
    def format(self) -> str:
        """What the metadata call it."""
        return f"lens {self.what}"

    def path(self, given: Any) -> Path:
        """Read a path.

        Raises:
            ArgumentError: Not a path.
        """
        try:
            text = os.fsdecode(given)
        except TypeError:
            text = ""
        if not text or "\0" in text:
            raise ArgumentError(f"a {self.what.split()[-1]} file is named by a path; got {given!r}")
        return Path(text)

    def target(self, given: Any) -> Path:
        """Read the path of a file to write.

        Raises:
            ArgumentError: Not a path.
            LensError: `error`; a folder.
        """
        target = self.path(given)
        if target.is_dir():
            raise self.error(f"{os.fspath(target)!r} is a folder; give the path of a file")
        return target

    def marked(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """Give metadata that also say which kind of file it is, and of which version."""
        return {**metadata, "format": self.format, "format_version": str(self.version)}

    def write(self, target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write tensors to a file beside the target, which then takes its place.

        Raises:
            LensError: `error`; the file cannot be written there, or a tensor cannot be stored.
        """
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            with part.open("xb"):
                mode = part.stat().st_mode  # as the process's umask has it; safetensors makes files for the owner only
            cast("Any", safetensors.torch).save_file(_separate(tensors), part, metadata=self.marked(metadata))
            part.chmod(mode)
            part.replace(target)
        except Exception as error:
            raise self.error(
                f"the {self.what.split()[-1]} cannot be written to {os.fspath(target)!r}: {_first_line(error)}"
            ) from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def read(self, given: Any, parse: Callable[[dict[str, Tensor], dict[str, str], str], T]) -> T:
        """Read a file by `parse(tensors, metadata, path)`; the tensors are mapped from the file.

        Raises:
            ArgumentError: Not a path.
            LensError: `error`; not a file of this kind, damaged, of another format version, or whatever went wrong in
                `parse`.
        """
        source = self.path(given)
        shown = os.fspath(source)
        if not source.is_file():
            raise self.error(f"there is no file {shown!r}" if not source.exists() else f"{shown!r} is not a file")
        try:
            # The header's lengths, types and offsets are checked against the file's size before anything is allocated.
            with cast("Any", safetensors).safe_open(shown, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                self._check_version(metadata, shown)
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return parse(tensors, metadata, shown)
        except self.error:
            raise
        except Exception as error:  # a damaged file makes safetensors and torch raise errors of many types
            raise self.error(
                f"{shown!r} is no {self.what}, or is damaged: {_first_line(error)}. Write it again"
            ) from error

    def _check_version(self, metadata: Mapping[str, str], shown: str) -> None:
        if metadata.get("format") != self.format:
            raise self.error(f"{shown!r} is a safetensors file, but no {self.what}: {self.writer} writes one")
        version = metadata.get("format_version", "")
        if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
            raise self.error(f"{shown!r} has no sound format version, but {version[:40]!r}; write it again")
        if int(version) > self.version:
            writer = re.sub(r"[^0-9A-Za-z.+]", "", metadata.get("lens_core", ""))[:40]
            raise self.error(
                f"{shown!r} has format version {version}, written by lens-core {writer or '(unknown)'}, and this "
                f"lens-core reads version {self.version}: upgrade it"
            )
        if int(version) < self.version:
            raise self.error(
                f"{shown!r} has format version {version}, and this lens-core reads {self.version}: write the file again"
            )


def origin(model: Any) -> dict[str, str]:
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
        "passes": ", ".join(applied_passes(model.bare_model)),
        "architecture": model.architecture.name,
        "plugin": "" if plugin is None else plugin.label,
        "lens_core": _version("lens-core"),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
    }


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


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
