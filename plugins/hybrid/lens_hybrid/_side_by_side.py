"""Branches of one block that HF scales and adds to each other, and then to the residual stream."""

from collections.abc import Hashable, Iterator, Sequence
from functools import partial, reduce
from operator import add

import attrs

from lens_core.plugin import ModuleCall, ModuleStep, Run, Watch

__all__ = ["SideBySide"]


@attrs.frozen(kw_only=True)
class SideBySide:
    """What one of several branches adds to the stream, times its factor, where HF adds them before the stream.

    Where a function replaced a value, the sum of all branches and the stream is written into the input of the module
    that reads it.
    """

    parts: tuple[tuple[str, float], ...]
    """The branches' modules and factors, in HF's order."""
    index: int
    """Which of them this is."""
    block: str
    sum_at: str
    """The module whose input is the sum."""

    @property
    def group(self) -> Hashable:
        """All branches of one block belong together."""
        return self.block

    def steps(self, watches: Sequence[Watch], run: Run) -> Iterator[ModuleStep]:
        """Keep the stream, fire after each branch's forward, and write the sum."""
        by_index = {watch.point.seam.index: watch for watch in watches}
        yield ModuleStep(path=self.block, when="pre", act=self._keep)
        for index, (path, factor) in enumerate(self.parts):
            yield ModuleStep(path=path, when="post", act=partial(self._fire, by_index.get(index), factor))
        yield ModuleStep(path=self.sum_at, when="pre", act=self._write)

    def _keep(self, call: ModuleCall) -> None:
        call.run.now.scratch[self.group, "stream"] = call.stream
        call.run.now.scratch[self.group, "added"] = []
        call.run.now.scratch[self.group, "is changed"] = False

    def _fire(self, watch: Watch | None, factor: float, call: ModuleCall) -> None:
        scratch, value = call.run.now.scratch, call.result * factor
        if watch is not None:
            value = watch.fire(value, beside=True)
            scratch[self.group, "is changed"] |= watch.edited or watch.rerouted
        scratch[self.group, "added"].append(value)

    def _write(self, call: ModuleCall) -> None:
        scratch = call.run.now.scratch
        stream, added, is_changed = (scratch.pop((self.group, name)) for name in ("stream", "added", "is changed"))
        if is_changed:
            call.input.copy_(stream + reduce(add, added))
