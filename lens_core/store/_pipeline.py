"""What runs beside the model: documents are read ahead, and activations written, each in a thread of its own."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

__all__ = ["Writer", "ahead"]

T = TypeVar("T")
_POLL = 0.1  # seconds; how long a thread goes on after the other has given up


@contextmanager
def ahead(items: Iterable[T], depth: int = 1) -> Generator[Iterator[T], None, None]:
    """Make the next items in a thread while the present one is used; its error is raised where the item is taken."""
    reader = _Reader(items, depth)
    reader.thread.start()
    try:
        yield reader.taken()
    finally:
        reader.over.set()
        reader.thread.join()


class _Reader:
    def __init__(self, items: Iterable[Any], depth: int) -> None:
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._make, name="lens-reader", daemon=True)
        self._items = items
        self._waiting: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)

    def _make(self) -> None:
        try:
            for item in self._items:
                self._put("item", item)
                if self.over.is_set():
                    return
            self._put("end", None)
        except BaseException as error:
            self._put("error", error)

    def _put(self, kind: str, what: Any) -> None:
        while not self.over.is_set():
            with suppress(queue.Full):
                self._waiting.put((kind, what), timeout=_POLL)
                return

    def taken(self) -> Iterator[Any]:
        """Give what was made until the end."""
        while True:
            kind, what = self._waiting.get()
            if kind == "error":
                raise what
            if kind == "end":
                return
            yield what


class Writer:
    """Does jobs in order in a thread, a bounded number of them waiting; after an error it does none.

    Use it in a `with` block, at the end of which all jobs are done, or its error is raised.
    """

    def __init__(self, depth: int) -> None:
        self._jobs: queue.Queue[Callable[[], Any] | None] = queue.Queue(maxsize=depth)
        self._error: BaseException | None = None
        self._is_cut = False
        self._thread = threading.Thread(target=self._work, name="lens-writer", daemon=True)

    def do(self, job: Callable[[], Any]) -> None:
        """Give a job; waits while too many are waiting, and raises what went wrong with one before."""
        self._check()
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._error is None and not self._is_cut:
                try:
                    job()
                except BaseException as error:
                    self._error = error

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._is_cut = kind is not None
        self._jobs.put(None)
        self._thread.join()
        if kind is None:
            self._check()
