"""`lens doctor`: what a model type that no plugin serves is, as a plugin would say it, or what does not fit."""

import argparse
import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lens_core._commands._terminal import progress
from lens_core.errors import ArgumentError

_LEVELS = ("fast", "default", "thorough")
_STEPS = 40  # what is read and built, and the kit's checks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "model", metavar="MODEL", help="an HF id or a local folder with a config, or HF's name of a type"
    )
    parser.add_argument("--level", choices=_LEVELS, default="fast", help="examples of each check (default: fast)")
    parser.add_argument("--force", action="store_true", help="propose for a type that a plugin serves, too")
    parser.add_argument("--write", metavar="FOLDER", help="write the proposal as an installable package")
    parser.add_argument("--json", action="store_true", help="print proposal and outcomes as JSON")
    parser.epilog = "Needs lens-conformance; no weights are read. The exit code is 1 where no proposal passes."


def run(arguments: argparse.Namespace) -> int:
    """Propose, try the proposal, and print it with what became of it."""
    if find_spec("lens_conformance") is None:
        raise ArgumentError("`lens doctor` needs the conformance kit: pip install lens-conformance")
    kit = import_module("lens_conformance.doctor")  # by name: the core does not depend on the kit
    if arguments.write is not None:
        _check_folder(arguments.write)
    with progress(_STEPS) as begin:
        found = kit.examine(arguments.model, level=arguments.level, force=arguments.force, progress=begin)
    if arguments.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print(*found.lines(), sep="\n")
    if arguments.write is not None and (told := _write(found, arguments.write)) and not arguments.json:
        print(told)
    return 0 if found.passed else 1


def _check_folder(path: str) -> None:
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArgumentError(f"--write {path!r} is there already; name a folder that is empty or not there")


def _write(found: Any, path: str) -> str:
    """Write the package, and say so; nothing where there is no proposal."""
    if found.skeleton is None:
        return "" if found.served_by else "Nothing is written: there is no proposal."
    found.skeleton.write(Path(path))
    told = f"{found.skeleton.distribution} is in {path}: pip install --editable {path}"
    return told if found.passed else f"{told} (a start: it does not pass)"
