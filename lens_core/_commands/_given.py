"""What the commands are given: a model, a text, a file to write. Checked before anything takes time."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_core._registry import active_registry, toy_folder
from lens_core.errors import ArgumentError, EmptyInputError

if TYPE_CHECKING:
    from lens_core.model import LensModel

MODEL_HELP = "an HF id, a local folder, or a toy such as toy:gpt2"
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def add_text(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Declare `--text` and `--file`, one of which may or must be given."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--text", metavar="TEXT", help="the text to run")
    group.add_argument("--file", metavar="FILE", help="a file with the text, in UTF-8")


def read_text(arguments: argparse.Namespace) -> str | None:
    """Return the text of `--text` or `--file`; None where neither was given.

    Raises:
        ArgumentError: The file is missing, a folder, or not text in UTF-8.
        EmptyInputError: There is no text.
    """
    if arguments.file is not None:
        text, source = _contents(arguments.file), f"the file {arguments.file!r}"
    elif arguments.text is not None:
        text, source = str(arguments.text), "--text"
    else:
        return None
    if not text.strip():
        raise EmptyInputError(f"{source} holds no text; give at least a word")
    return text


def _contents(path: str) -> str:
    check_file(path)
    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\n")  # an editor's last newline is not meant
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path!r} is not text in UTF-8 (byte {error.start}); convert it first") from error


def check_file(path: str) -> None:
    """Raise `ArgumentError` unless there is such a file."""
    if not Path(path).is_file():
        what = "is a folder, not a file" if Path(path).is_dir() else "does not exist"
        raise ArgumentError(f"{path!r} {what}; give the path of a file")


def check_target(path: str) -> None:
    """Raise `ArgumentError` where a file cannot be written, before the work is done that would be lost."""
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        raise ArgumentError(f"--out {path!r} is a folder; name a file in it")
    if not folder.is_dir():
        raise ArgumentError(f"--out {path!r}: there is no folder {str(folder)!r}; make it first")
    if not os.access(target if target.exists() else folder, os.W_OK):
        raise ArgumentError(f"--out {path!r} may not be written; choose another place")


def folder_of(source: str) -> str:
    """Return the folder of a toy, or the source as it is.

    Raises:
        PluginError: No such toy.
    """
    if not source.startswith("toy:"):
        return source
    return str(toy_folder(active_registry().resolve(source.removeprefix("toy:"))))


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say how a model is loaded."""
    parser.add_argument(
        "--dtype", metavar="DTYPE", choices=_DTYPES, help="such as bfloat16 (default: the checkpoint's own)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="run there, such as cuda:0 (default: the CPU)")
    parser.add_argument("--revision", metavar="NAME", help="the hub's branch, tag or commit")


def load(source: str, arguments: argparse.Namespace) -> "LensModel":
    """Load a model as the options say.

    Raises:
        ArgumentError: No such device here.
        LensError: Whatever `lens.load` raises.
    """
    import lens_core as lens

    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("dtype", "device", "revision")}
    if options["device"] is not None:
        _check_device(options["device"])
    return lens.load(source, **options)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        reason = str(error).strip().split("\n", 1)[0]
        raise ArgumentError(f"--device {device!r} cannot be used here: {reason}") from error
