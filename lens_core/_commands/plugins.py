"""`lens plugins`: what discovery found."""

import argparse
import json
import warnings
from typing import Any

import attrs
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lens_core import __version__
from lens_core._descriptor import API_VERSION, Architecture
from lens_core._discovery import PluginRecord, PluginStatus
from lens_core._registry import active_registry
from lens_core.certificates import Stamp, stamps
from lens_core.errors import PluginWarning

_COLOURS = {PluginStatus.OK: "green", PluginStatus.DISABLED: "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print everything that is known, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print a table of the plugins, or their records as JSON."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # the table says it
        records = active_registry().records
    if arguments.json:
        print(json.dumps(_document(records), indent=2))
    elif records:
        Console().print(_table(records))
        if found := [stamp for record in records for stamp in _stamps(record)]:
            Console().print(_certificates(found))
    else:
        print("No plugin is installed. `pip install lens-gpt2` brings GPT-2.")
    return 0


def _document(records: tuple[PluginRecord, ...]) -> dict[str, Any]:
    return {
        "lens_core": __version__,
        "api_version": API_VERSION,
        "plugins": [
            {
                "name": record.entry_name,
                "distribution": record.distribution,
                "version": record.version,
                "status": record.status,
                "reason": record.reason,
                "model_types": record.model_types,
                "architectures": [_architecture(architecture) for architecture in record.architectures],
                "certificates": [_stamp(stamp) for stamp in _stamps(record)],
            }
            for record in records
        ],
    }


def _architecture(architecture: Architecture) -> dict[str, Any]:
    return {
        "name": architecture.name,
        "model_types": architecture.model_types,
        "api_version": architecture.api_version,
        "transformers": architecture.transformers,
        "implementation": architecture.implementation,
        "toy": architecture.toy,
        "capabilities": {
            capability.value: {"support": given.support.value, "reason": given.reason}
            for capability, given in architecture.capabilities.items()
        },
    }


def _stamps(record: PluginRecord) -> list[Stamp]:
    return [stamp for architecture in record.architectures for stamp in stamps(record, architecture)]


def _stamp(stamp: Stamp) -> dict[str, Any]:
    return {**attrs.asdict(stamp), "path": str(stamp.path), "holds": stamp.holds}


def _certificates(found: list[Stamp]) -> Table:
    table = Table(title="Certificates")
    for heading in ("of", "level", "made", "holds", "remark"):
        table.add_column(heading, overflow="fold")
    for stamp in found:
        told = "[green]yes[/green]" if stamp.holds else f"no: {escape(stamp.problem)}"
        table.add_row(escape(stamp.subject), escape(stamp.level), escape(stamp.made), told, escape(stamp.remark))
    return table


def _table(records: tuple[PluginRecord, ...]) -> Table:
    table = Table(title=f"Architecture plugins (lens-core {__version__}, plugin API {API_VERSION})")
    for heading in ("plugin", "distribution", "status", "model types", "transformers", "reason"):
        table.add_column(heading, overflow="fold")
    for record in records:
        colour = _COLOURS.get(record.status, "red")
        ranges = dict.fromkeys(architecture.transformers for architecture in record.architectures)
        table.add_row(
            escape(record.entry_name),
            escape(record.label),
            f"[{colour}]{record.status}[/{colour}]",
            escape(", ".join(record.model_types)),
            escape(" or ".join(ranges)),
            escape(record.reason),
        )
    return table
