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
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "data", metavar="DATA", help="a .jsonl, .json, .txt or .parquet file, a folder of save_to_disk, or a hub id"
    )
    parser.add_argument("--out", metavar="FOLDER", required=True, help="the store: made, or gone on with")
    parser.add_argument(
        "--names", metavar="NAMES", action="append", required=True, help="a hook name or glob; may be repeated"
    )
    _add_rows(parser)
    parser.add_argument("--batch-size", metavar="N", type=int, default=8, help="rows in a forward (default: 8)")
    parser.add_argument(
        "--store-dtype", metavar="DTYPE", choices=_FLOATS, help=f"{', '.join(_FLOATS)} (default: the model's)"
    )
    parser.add_argument("--unit-documents", metavar="N", type=int, help="documents that are packed together")
    parser.add_argument("--shard-rows", metavar="N", type=int, help="rows in a shard (default: some 256 MiB)")
    add_loading(parser)
    parser.epilog = (
        "Interrupted, the same command goes on. Several processes share the work: "
        "accelerate launch --num_processes N -m lens_core harvest ..."
    )


def _add_rows(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("documents and rows")
    group.add_argument("--column", metavar="NAME", help="where the text or ids are (default: text, input_ids, tokens)")
    group.add_argument("--split", metavar="NAME", help="of a data set with several")
    group.add_argument(
        "--sample-by",
        choices=("line", "paragraph", "document"),
        default="line",
        help="what a document of a text file is (default: line)",
    )
    group.add_argument("--limit", metavar="N", type=int, help="the first N documents")
    group.add_argument(
        "--context", metavar="N", type=int, help="the most tokens in a row (default: 512 or the model's)"
    )
    group.add_argument(
        "--pack", action=argparse.BooleanOptionalAction, default=True, help="several documents in a row, or one"
    )
    group.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="exactly one BOS, or none (default: what the tokenizer does)",
    )
    group.add_argument(
        "--positions", metavar="WHICH", help="of each row, such as 1: or -1 or 0,5,9 or ::4 (default: all)"
    )
    group.add_argument("--skip-special", action="store_true", help="keep no special tokens, such as BOS")


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
