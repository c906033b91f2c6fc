"""A module that HF calls more than once in a block: one of its turns."""

from collections.abc import Hashable, Iterator, Sequence

import attrs

from lens_core.plugin import ModuleCall, ModuleStep, Run, Watch

__all__ = ["Turn"]


@attrs.frozen(kw_only=True)
class Turn:
    """The output of one call of a module that a forward calls `of` times."""

    path: str
    turn: int
    of: int

    @property
    def group(self) -> Hashable:
        """Each stands alone."""
        return self

    def steps(self, watches: Sequence[Watch], run: Run) -> Iterator[ModuleStep]:
        """Fire after the module's forward, in its turn."""
        for watch in watches:
            yield ModuleStep(path=self.path, when="post", act=lambda call, w=watch: self._fire(w, call))

    def _fire(self, watch: Watch, call: ModuleCall) -> None:
        scratch = call.run.now.scratch
        turn = scratch.pop(self, 0) + 1
        if turn < self.of:
            scratch[self] = turn
        if turn == self.turn:
            value = watch.fire(call.result)
            if value is not call.result:
                call.result = value
