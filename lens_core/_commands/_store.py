"""`lens store`: what an activation store holds, whether it is whole, and several made one."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from rich import box
from rich.table import Table
from rich.text import Text

from lens_core._commands._terminal import console, transfer

if TYPE_CHECKING:
    from lens_core.store import ActivationStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands and their options."""
    commands = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    info = commands.add_parser("info", help="say what a store holds", description="Say what a store holds.")
    info.add_argument("folder", metavar="FOLDER", help="the store")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    verify = commands.add_parser(
        "verify",
        help="read all of a store and hold it to its checksums",
        description="Read all of a store and hold it to its checksums.",
        epilog="The exit code is 1 where something is wrong or missing, each named on a line of its own.",
    )
    verify.add_argument("folder", metavar="FOLDER", help="the store")
    verify.add_argument(
        "--repair", action="store_true", help="take damaged shards out; `lens harvest` then makes these anew"
    )
    merge = commands.add_parser(
        "merge",
        help="make one store of several",
        description="Make one store of several: of one model, the same hook points, dtypes and rules for rows.",
    )
    merge.add_argument("folders", metavar="FOLDER", nargs="+", help="the stores, in order")
    merge.add_argument("--out", metavar="FOLDER", required=True, help="the new store")
    merge.add_argument("--link", action="store_true", help="hard links, which take no room, instead of copies")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked."""
    return {"info": _info, "verify": _verify, "merge": _merge}[arguments.action](arguments)


def _info(arguments: argparse.Namespace) -> int:
    from lens_core.store import ActivationStore

    store = ActivationStore(arguments.folder)
    if arguments.json:
        print(json.dumps(_document(store), indent=1))
        return 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("hook point", "axes of an entry", "sizes", "dtype"):
        table.add_column(column, no_wrap=column == "hook point")
    for point in store.manifest.points:
        table.add_row(*map(Text, (point.name, point.axes, " × ".join(map(str, point.shape)), point.dtype)))
    console().print(table)
    print()
    origin = store.manifest.origin
    lines = {
        "entries": f"{len(store)}, of {store.n_tokens} tokens in {store.n_rows} rows",
        "model": f"{origin.get('model', '')} ({origin.get('model_type', '')}), {origin.get('passes') or 'no pass'}",
        "shards": f"{len(store.records)}, {store.nbytes / 2**20:.1f} MiB",
        "units": f"{store.n_units}, {f'{len(store.missing)} missing' if store.missing else 'complete'}",
    }
    for source in store.manifest.sources:
        lines[f"source {len(lines) - 4}"] = f"{source.label}, {source.n_documents} documents"
    for name, what in lines.items():
        print(f"{name:<10}{what}")
    return 0


def _document(store: "ActivationStore") -> dict[str, Any]:
    return {
        "entries": len(store),
        "tokens": store.n_tokens,
        "rows": store.n_rows,
        "shards": len(store.records),
        "nbytes": store.nbytes,
        "is_complete": store.is_complete,
        "missing": [list(unit) for unit in store.missing],
        "manifest": attrs.asdict(store.manifest),
    }


def _verify(arguments: argparse.Namespace) -> int:
    from lens_core.store import verify

    with transfer("reading") as report:
        faults = verify(arguments.folder, repair=arguments.repair, report=report)
    for fault in faults:
        print(fault)
    if not faults:
        print("every shard is what it was when it was written, and none is missing")
    elif any(fault.kind == "damaged" for fault in faults):
        todo = "they were taken out:" if arguments.repair else "`lens store verify --repair` takes them out; then"
        print(f"Of what is damaged: {todo} harvesting with the same call makes them anew.")
    return 1 if faults else 0


def _merge(arguments: argparse.Namespace) -> int:
    from lens_core.store import merge

    with transfer("copying") as report:
        store = merge(arguments.folders, arguments.out, link=arguments.link, report=report)
    print(f"{len(store)} entries, {store.nbytes / 2**20:.1f} MiB, of {len(store.manifest.sources)} sources")
    print(Path(arguments.out))
    return 0
