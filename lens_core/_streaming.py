"""What watches HF's generation loop from outside: an iterator over its tokens, and a progress bar."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial

import attrs
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

__all__ = ["Stream", "progress"]


class Stream(BaseStreamer):
    """Hands new tokens from HF's loop to an iterator; the prompt, which HF puts first, is dropped."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._queue: queue.Queue[Tensor | None] = queue.Queue()
        self._seen_prompt = False

    def put(self, value: Tensor) -> None:
        if self._seen_prompt:
            self._queue.put(value.reshape(-1, 1))
        self._seen_prompt = True

    def end(self) -> None:
        self._queue.put(None)

    def pieces(self, size: int) -> Iterator[Tensor]:
        """Give tokens `[batch, up to size]` until the end."""
        waiting: list[Tensor] = []
        while (step := self._queue.get()) is not None:
            waiting.append(step)
            if len(waiting) == size:
                yield torch.cat(waiting, dim=1)
                waiting = []
        if waiting:
            yield torch.cat(waiting, dim=1)


@attrs.define(eq=False)
class _Bar(BaseStreamer):
    advance: Callable[[], None]

    def put(self, value: Tensor) -> None:
        self.advance()

    def end(self) -> None:
        pass


@contextmanager
def progress(total: int) -> Generator[BaseStreamer | None, None, None]:
    """Show a progress bar while HF generates `total` tokens; none for 0."""
    if not total:
        yield None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("generating", total=total + 1)
        yield _Bar(partial(bar.advance, task))
