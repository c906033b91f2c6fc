"""Certificates: what the conformance kit wrote down about a plugin, and whether that still holds for what is installed.

A certificate is JSON, made by `lens_conformance` or `lens verify`. It says which versions it was made with, and digests
of the code of the core and of the plugin; a stamp is shown only where all of them are what is installed. Certificates
lie in the folder `certificates` of a plugin's package, and in the user's own folder. Nothing here imports torch.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import attrs

from lens_core._descriptor import Architecture
from lens_core._discovery import PluginRecord

__all__ = ["FORMAT", "Stamp", "package_of", "source_digest", "stamp_folder", "stamps", "versions_of"]

FORMAT = 1
"""Of the certificates' JSON."""
NOT_FOUND = "not found"
_KIT = "lens_conformance"
_MOST_BYTES = 10_000_000


@attrs.frozen(kw_only=True)
class Stamp:
    """A certificate, and whether it still holds.

    Attributes:
        subject: What was tried: a model type, or the name of a checkpoint.
        level: How many examples: `fast`, `default`, `thorough`, or `checkpoint`.
        made: The day, as `2026-11-28`.
        path: The file.
        remark: What it does not say: how many checks nothing could judge, and the dtype of a checkpoint.
        problem: Why it does not hold; empty where it does.
    """

    model_type: str
    subject: str
    level: str
    made: str
    path: Path
    remark: str = ""
    problem: str = ""

    @property
    def holds(self) -> bool:
        """Whether it was made with what is installed, and everything passed."""
        return not self.problem


def stamp_folder() -> Path:
    """Give the user's folder of certificates: `$LENS_CERTIFICATES`, or `lens/certificates` where the user's data is.

    Example:
        >>> stamp_folder().name
        'certificates'
    """
    if given := os.environ.get("LENS_CERTIFICATES"):
        return Path(given).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "lens" / "certificates"


def package_of(architecture: Architecture) -> str:
    """Give the top package that implements an architecture."""
    return architecture.implementation.partition(":")[0].partition(".")[0]


@lru_cache(maxsize=32)
def source_digest(package: str) -> str:
    """Digest the code of a package: the relative path and the bytes of every Python file in it, in hexadecimal.

    Read once a process; about 5 ms for the core.
    """
    spec = find_spec(package)
    if spec is None:
        return NOT_FOUND
    folders = [Path(folder) for folder in sorted(spec.submodule_search_locations or ())]
    files = [(path.relative_to(folder), path) for folder in folders for path in folder.rglob("*.py")]
    if not folders and spec.origin is not None:  # a package of one file
        files = [(Path(spec.origin).relative_to(Path(spec.origin).parent), Path(spec.origin))]
    digest = hashlib.sha256()
    for name, path in sorted(files, key=lambda file: file[0].as_posix()):
        code = path.read_bytes()
        digest.update(f"{name.as_posix()} {len(code)}\n".encode() + code)
    return digest.hexdigest()[:16] if files else NOT_FOUND


def versions_of(record: PluginRecord, architecture: Architecture) -> dict[str, str]:
    """Give what a certificate holds for: versions of what computes, and digests of the code of core and plugin.

    The kit's own are among them where it is installed.
    """
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("torch", "transformers", "lens-core"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    package = package_of(architecture)
    found["lens-core code"] = source_digest("lens_core")
    if find_spec(_KIT) is not None:
        found |= {"lens-conformance": version("lens-conformance"), "lens-conformance code": source_digest(_KIT)}
    return {**found, "plugin": record.label, "plugin code": source_digest(package)}


def stamps(record: PluginRecord, architecture: Architecture) -> list[Stamp]:
    """Give the certificates that are there for an architecture, in the order of their files' names.

    A file that is not a certificate is a stamp that does not hold; it says why.
    """
    spec = find_spec(package_of(architecture))
    packages = (spec.submodule_search_locations or ()) if spec is not None else ()
    folders = [Path(folder) / "certificates" for folder in packages]
    found = [path for folder in [*folders, stamp_folder()] if folder.is_dir() for path in sorted(folder.glob("*.json"))]
    here = versions_of(record, architecture)
    return [stamp for path in found for stamp in _read(path, here) if stamp.model_type in architecture.model_types]


def _read(path: Path, here: Mapping[str, str]) -> Iterator[Stamp]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            return
        given: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(given, dict):
        return
    facts = cast("dict[str, Any]", given)
    texts = {name: facts.get(name) for name in ("model_type", "subject", "level", "made")}
    if not all(isinstance(text, str) for text in texts.values()):
        return
    yield Stamp(**cast("dict[str, str]", texts), path=path, remark=_remark(facts), problem=_problem(facts, here))


def _remark(facts: Mapping[str, Any]) -> str:
    outcomes: list[Any] = cast("list[Any]", facts["outcomes"]) if isinstance(facts.get("outcomes"), list) else []
    statuses = [cast("dict[str, Any]", one).get("status") for one in outcomes if isinstance(one, dict)]
    unjudged = statuses.count("not judged")
    told = [f"{unjudged} of {len(statuses)} checks not judged"] if unjudged else []
    return ", ".join([*told, *([f"in {facts.get('dtype')}"] if facts.get("level") == "checkpoint" else [])])


def _problem(facts: Mapping[str, Any], here: Mapping[str, str]) -> str:
    if facts.get("format") != FORMAT:
        return f"its format is {facts.get('format')!r}, and this lens-core reads {FORMAT}"
    if facts.get("passed") is not True or not facts.get("outcomes"):
        return "not everything passed"
    made_with: Any = facts.get("versions")
    if not isinstance(made_with, dict):
        return "it does not say which versions it was made with"
    made_with = cast("dict[str, Any]", made_with)
    other = [name for name, now in here.items() if now == NOT_FOUND or made_with.get(name) != now]
    told = [name if name.endswith("code") else f"{name} {made_with.get(name)}" for name in other]
    return f"made with other {', '.join(told)}" if other else ""
