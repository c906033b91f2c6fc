"""`lens cache`: run a text once and keep activations in a file."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_core._commands._given import MODEL_HELP, add_loading, add_text, check_target, load, read_text
from lens_core._commands._terminal import console, progress
from lens_core.errors import EmptyInputError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache
    from lens_core.model import LensModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_text(parser, required=True)
    parser.add_argument(
        "--names",
        metavar="NAMES",
        action="append",
        help="a hook name, short form or glob; may be repeated (default: all that are not starred)",
    )
    parser.add_argument("--out", metavar="FILE", required=True, help="the safetensors file to write")
    parser.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="exactly one BOS, or none (default: what the tokenizer does)",
    )
    add_loading(parser)
    parser.epilog = "`lens hooks MODEL` lists the names. Quote a glob: --names '*hook_pattern'."


def run(arguments: argparse.Namespace) -> int:
    """Write the file and say what is in it."""
    text = read_text(arguments)
    if text is None:  # argparse asks for one of the two
        raise EmptyInputError("there is no text; give --text or --file")
    check_target(arguments.out)
    with progress(3) as begin:
        begin("loading the model")
        model = load(arguments.model, arguments)
        begin("running the text")
        cache = _run(model, text, arguments.names, arguments.prepend_bos)
        begin("writing the file")
        cache.save(arguments.out)
    size = sum(value.nbytes for value in cache.values())
    console().print(f"{len(cache)} entries, {size / 2**20:.1f} MiB, of {cache['hook_tokens'].shape[-1]} tokens")
    print(Path(arguments.out))
    return 0


def _run(model: "LensModel", text: str, names: list[str] | None, prepend_bos: bool | None) -> "ActivationCache":
    import torch

    chosen: Any = None
    if names:
        model.table.select(names)  # a mistake in the names is told before hook_tokens is added to them
        chosen = [*names, "hook_tokens"]  # `lens view` reads the text from there
    with torch.no_grad():
        _, cache = model.run_with_cache(text, names_filter=chosen, prepend_bos=prepend_bos, return_type=None)
    return cache
