"""The command line: `lens`, or `python -m lens_core`.

Exit codes: 0 when the command did its work; 1 for a mistake of lens' own, and where `lens verify`, `lens doctor` or
`lens store verify` finds one; 2 for a mistake in what was asked, as argparse has it; 130 after Ctrl-C. A traceback is
shown only with `--debug`.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import TextIO

import attrs

from lens_core import __version__
from lens_core.errors import LensError, LensWarning


@attrs.frozen
class _Command:
    name: str
    summary: str
    module: str  # has add_arguments(parser) and run(arguments) -> exit code; imported when the command is called


_COMMANDS = (
    _Command("demo", "find a model's induction heads, ablate them, and write a page", "lens_core._commands._demo"),
    _Command("plugins", "list the architecture plugins and whether they serve", "lens_core._commands.plugins"),
    _Command("hooks", "list the hook points of a model", "lens_core._commands._hooks"),
    _Command("cache", "run a text and keep its activations in a file", "lens_core._commands._cache"),
    _Command("harvest", "run a corpus and keep its activations in a store", "lens_core._commands._harvest"),
    _Command("store", "look into activation stores, check them, merge them", "lens_core._commands._store"),
    _Command("verify", "hold a checkpoint of yours to the conformance kit's checks", "lens_core._commands._verify"),
    _Command("doctor", "describe a model type that no plugin serves, and try it", "lens_core._commands._doctor"),
    _Command("view", "show a file of activations as one HTML page", "lens_core._commands._view"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: What follows the program's name; the process's own when None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(given)
    options = parser.parse_args(given)
    if options.command is None:
        parser.print_help()
        return 0
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(options)


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lens",
        description="Read and edit every activation of HuggingFace's own language models.",
        epilog="`lens COMMAND --help` describes a command.",
    )
    parser.add_argument("--version", action="version", version=f"lens-core {__version__}")
    _add_debug(parser, default=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in _COMMANDS:
        subparser = commands.add_parser(command.name, help=command.summary, description=_sentence(command.summary))
        _add_debug(subparser, default=argparse.SUPPRESS)  # one given before the command stands
        if command.name in given:
            import_module(command.module).add_arguments(subparser)
    return parser


def _add_debug(parser: argparse.ArgumentParser, *, default: bool | str) -> None:
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


def _run(options: argparse.Namespace) -> int:
    module = next(command.module for command in _COMMANDS if command.name == options.command)
    try:
        return import_module(module).run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `lens hooks gpt2 | head`: the reader has left, and there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (LensError, OSError) as error:
        _refuse(error, debug=options.debug, message=str(error))
        return 2
    except Exception as error:
        what = f"unexpected {type(error).__name__}: {error}; this is a mistake in lens (--debug shows where)"
        _refuse(error, debug=options.debug, message=what)
        return 1


def _refuse(error: Exception, *, debug: bool, message: str) -> None:
    if debug:
        raise error
    _say(f"lens: {message}")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, LensWarning):
        _say(f"lens: warning: {message}")
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)


def _say(message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr)  # one line, whatever the message holds
