"""Which process of several this is, and who may write to a folder."""

import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import attrs
from filelock import FileLock, Timeout

from lens_core.errors import LensError, StoreError

__all__ = ["Ranks", "claimed", "ranks"]

_MANY_DAYS = timedelta(days=60)  # the first to finish waits for the last


@attrs.frozen
class Ranks:
    """This process among those that were launched together."""

    index: int = 0
    count: int = 1
    state: Any = None
    """accelerate's, where there are several."""

    def wait(self) -> None:
        """Wait for the others."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def agree(self, error: Exception | None) -> None:
        """Raise the first process's error in every process; the first calls this once it has prepared the ground."""
        shared: list[Any] = [None if error is None else str(error)]
        if self.state is not None:
            utils: Any = import_module("accelerate.utils")
            utils.broadcast_object_list(shared)
        if error is not None:
            raise error
        if shared[0] is not None:
            raise StoreError(f"process 0 could not begin: {shared[0]}")


def ranks() -> Ranks:
    """Find out by accelerate, where a launcher (`accelerate launch`, `torchrun`) has started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Ranks()
    import torch

    accelerate: Any = import_module("accelerate")
    state = accelerate.PartialState(cpu=not torch.cuda.is_available(), timeout=_MANY_DAYS)
    return Ranks(state.process_index, state.num_processes, state)


@contextmanager
def claimed(folder: Path, mine: Ranks) -> Generator[None, None, None]:
    """Hold a folder while these processes write to it; a lock ends with its process, however that ends.

    The first process sees that nobody else's is held, others of an earlier launch included.

    Raises:
        StoreError: Somebody else is writing there.
    """
    with ExitStack() as held:
        error: Exception | None = None
        if mine.index == 0:
            try:
                with ExitStack() as tried:
                    for path in sorted(folder.glob("lock-*")):
                        tried.enter_context(_lock(path))
                held.enter_context(_lock(folder / "lock-0"))
            except (LensError, OSError) as caught:
                error = caught
        mine.agree(error)
        if mine.index:
            held.enter_context(_lock(folder / f"lock-{mine.index}"))
        yield


def _lock(path: Path) -> Any:
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        return lock.acquire()
    except Timeout as error:
        raise StoreError(
            f"another process is writing to {os.fspath(path.parent)!r} ({path.name} is held): wait until it has ended, "
            "or give another folder"
        ) from error
