"""`lens harvest`: run a corpus and keep its activations, as `lens_core.store.harvest` does."""

import argparse
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from lens_core._commands._given import MODEL_HELP, add_loading, load
from lens_core._commands._terminal import console, quiet_hf
from lens_core._extras import need
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.store import Progress

_FLOATS = ("float64", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.usage = "lens harvest MODEL DATA --out FOLDER --names NAMES [options]"
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("data", metavar="DATA", help="a file, a folder of save_to_disk, or a hub id")
    add = parser.add_argument
    add("--out", metavar="FOLDER", required=True, help="the store: made, or gone on with")
    add("--names", metavar="NAMES", action="append", required=True, help="a hook name or glob; may be repeated")
    add("--column", metavar="NAME", help="of the text or ids (default: text, input_ids)")
    add("--split", metavar="NAME", help="of a data set with several")
    add("--sample-by", metavar="WHAT", default="line", help="a .txt by line, paragraph or document")
    add("--limit", metavar="N", type=int, help="the first N documents")
    add("--context", metavar="N", type=int, help="the most tokens in a row (default: 512)")
    add("--no-pack", dest="pack", action="store_false", help="a row for each document")
    add("--prepend-bos", action=argparse.BooleanOptionalAction, default=None)
    add("--positions", metavar="WHICH", help="of each row: 1: or -1 or 0,5 or ::4 (default: all)")
    add("--skip-special", action="store_true", help="keep no special tokens, such as BOS")
    add("--batch-size", metavar="N", type=int, default=8, help="rows in a forward (default: 8)")
    add("--store-dtype", metavar="DTYPE", choices=_FLOATS, help="what is stored (default: the model's)")
    for name in ("--unit-documents", "--shard-rows"):  # few need them: the page on stores tells of both
        add(name, metavar="N", type=int, help=argparse.SUPPRESS)
    add_loading(parser)
    parser.epilog = "Interrupted, the same command goes on."


def run(arguments: argparse.Namespace) -> int:
    """Harvest, and say what the store holds."""
    positions = _positions(arguments.positions)
    given = {
        name: getattr(arguments, name)
        for name in (
            *("column", "split", "sample_by", "limit", "context", "pack", "prepend_bos", "skip_special"),
            *("batch_size", "unit_documents", "shard_rows"),
        )
    }
    from lens_core.store._ranks import ranks

    mine = ranks()
    if arguments.device is None and mine.state is not None:
        arguments.device = str(mine.state.device)
    import lens_core as lens

    with quiet_hf(), _quiet_datasets(), _shown(is_first=mine.index == 0) as report:
        model = load(arguments.model, arguments)
        store = lens.store.harvest(
            model,
            arguments.data,
            arguments.out,
            arguments.names,
            positions=positions,
            dtype=arguments.store_dtype,
            report=report,
            **given,
        )
    if mine.index == 0:
        size = sum(record.nbytes for record in store.records)
        console().print(f"{len(store)} entries in {len(store.records)} shards, {size / 2**20:.1f} MiB")
        print(arguments.out)
    return 0


def _positions(text: str | None) -> Any:
    """Read `1:`, `::4`, `-1` or `0,5,9`."""
    if text is None:
        return None
    try:
        if ":" in text:
            return slice(*(int(part) if part.strip() else None for part in text.split(":")))
        return [int(part) for part in text.split(",")]
    except (ValueError, TypeError) as error:
        raise ArgumentError(
            f"--positions {text!r} is neither a slice, such as 1: or ::4, nor ints, such as 0,5,9"
        ) from error


@contextmanager
def _quiet_datasets() -> Generator[None, None, None]:
    datasets = need("datasets", "reading a corpus", extra="store")
    was_on = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()


@contextmanager
def _shown(*, is_first: bool) -> Generator[Callable[["Progress"], None], None, None]:
    """Show documents, tokens per second and what is left, on standard error."""
    error = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} documents"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=error, transient=True, disable=not (error.is_terminal and is_first)) as bar:
        task = bar.add_task("harvesting", total=None, rate=0.0, start=True)

        def report(progress: "Progress") -> None:
            bar.update(task, total=progress.n_documents, completed=progress.documents, rate=progress.rate)

        yield report
