"""The terminal: as wide as it is, and a bar while something takes its time."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_ELSEWHERE = 200  # columns, where a table goes to a file or a pipe: no name is cut


def console() -> Console:
    """Return a console on standard output."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(width=_ELSEWHERE, highlight=False)


@contextmanager
def progress(steps: int) -> Generator[Callable[[str], None], None, None]:
    """Show a bar of this many steps on standard error; the function that is given names the one that begins.

    HF's own bars, which would be drawn over it, are off meanwhile.
    """
    error = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=error, transient=True, disable=not error.is_terminal) as bar, quiet_hf():
        task = bar.add_task("starting", total=steps)
        begun = False

        def begin(what: str) -> None:
            nonlocal begun
            bar.update(task, advance=int(begun), description=what)
            begun = True

        yield begin


@contextmanager
def transfer(what: str) -> Generator[Callable[[int, int], None], None, None]:
    """Show how many bytes are done, on standard error; the function that is given takes those, and all there are."""
    error = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=error, transient=True, disable=not error.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def quiet_hf() -> Generator[None, None, None]:
    """Turn the progress bars of transformers off inside the block."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
