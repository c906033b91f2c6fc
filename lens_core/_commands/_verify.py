"""`lens verify`: the conformance kit's checks on a checkpoint of the user's own, and the certificate."""

import argparse
import json
from importlib import import_module
from importlib.util import find_spec

from lens_core._commands._given import MODEL_HELP, add_loading, add_text, check_target, load, read_text
from lens_core._commands._terminal import console, progress
from lens_core.errors import ArgumentError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_text(parser, required=False)
    parser.add_argument("--examples", metavar="N", type=int, default=3, help="of each check (default: 3)")
    parser.add_argument("--layers", metavar="N", type=int, default=3, help="blocks whose names are tried (default: 3)")
    told = "for the weights in float64 (default: 2)"
    parser.add_argument("--memory", metavar="GIB", type=float, default=2.0, help=told)
    parser.add_argument("--only", metavar="CHECK", action="append", default=[], help="this check; may be repeated")
    parser.add_argument("--out", metavar="FILE", help="where to write the certificate")
    parser.add_argument("--json", action="store_true", help="print the certificate instead of a table")
    add_loading(parser)
    parser.epilog = "Needs lens-conformance. The exit code is 1 where something does not hold."


def run(arguments: argparse.Namespace) -> int:
    """Try the checks, print what became of them, and write the certificate."""
    if find_spec("lens_conformance") is None:
        raise ArgumentError("`lens verify` needs the conformance kit: pip install lens-conformance")
    kit = import_module("lens_conformance.checkpoint")  # by name: the core does not depend on the kit
    text = read_text(arguments)
    if arguments.out is not None:
        check_target(arguments.out)
    with progress(1 + len(arguments.only or kit.CHECKPOINT_CHECKS)) as begin:
        begin("loading the model")
        model = load(arguments.model, arguments)
        report = kit.verify(
            model,
            text=text,
            examples=arguments.examples,
            layers=arguments.layers,
            memory=arguments.memory,
            only=arguments.only,
            progress=begin,
        )
    if arguments.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        console().print(report.table())
    if arguments.out is not None:
        report.save(arguments.out)
    where = arguments.out if arguments.out is not None else report.stamp() if report.is_whole else None
    if where is not None and not arguments.json:
        print(where)
    return 0 if not report.failures else 1
