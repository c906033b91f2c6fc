"""Branches of a block that the module tree does not show as such: scaled ones, and ones that share a norm."""

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

import attrs

from lens_core._call import ModuleCall
from lens_core._norms import norm_of_copy
from lens_core._plan import ModuleStep
from lens_core._watch import Watch

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["BranchInput", "ScaledBranch"]


@attrs.frozen(kw_only=True)
class BranchInput:
    """A copy of the residual stream for one module of a block whose branches share a norm.

    An edited copy goes through the norm to this module only.
    """

    norm: str
    path: str

    @property
    def group(self) -> Hashable:
        """Each stands alone."""
        return self

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep]:
        """Copy before the norm's forward, and hand the module what the norm makes of the copy."""
        for watch in watches:
            yield ModuleStep(path=self.norm, when="pre", act=lambda call, w=watch: self._copy(w, call))
            yield ModuleStep(path=self.path, when="pre", act=self._replace)

    def _copy(self, watch: Watch, call: ModuleCall) -> None:
        value = watch.fire(call.input, beside=True)
        if watch.edited or watch.rerouted:
            call.run.now.scratch[self] = value

    def _replace(self, call: ModuleCall) -> None:
        value = call.run.now.scratch.pop(self, None)
        if value is not None:
            call.input = norm_of_copy(call.run, self.norm, value)


@attrs.frozen(kw_only=True)
class ScaledBranch:
    """What a branch adds to the residual stream where HF scales its output, or sums two, outside of any module.

    An edited value is not divided by the factor again, which would lose bits: the sum itself is written. `base` is the
    module whose input is the stream that the branch is added to; `sum_at` the module whose input is the sum, which is
    written in place, or None where the sum is the block's output.
    """

    path: str
    factor: float
    block: str
    base: str
    sum_at: str | None = None
    beside: str | None = None
    """A module that is run before `path`, and whose output is added to that one's."""

    @property
    def group(self) -> Hashable:
        """Each stands alone."""
        return self

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep]:
        """Keep the stream, fire after the branch's forward, and write the sum."""
        for watch in watches:
            yield ModuleStep(path=self.base, when="pre", act=self._keep)
            if self.beside is not None:
                yield ModuleStep(path=self.beside, when="post", act=self._keep_beside)
            yield ModuleStep(path=self.path, when="post", act=lambda call, w=watch: self._fire(w, call))
            if self.sum_at is None:
                yield ModuleStep(path=self.block, when="post", act=self._replace)
            else:
                yield ModuleStep(path=self.sum_at, when="pre", act=self._write)

    def _keep(self, call: ModuleCall) -> None:
        call.run.now.scratch[self, "stream"] = call.stream

    def _keep_beside(self, call: ModuleCall) -> None:
        call.run.now.scratch[self, "beside"] = call.result

    def _fire(self, watch: Watch, call: ModuleCall) -> None:
        out = call.result
        if self.beside is not None:
            out = call.run.now.scratch.pop((self, "beside")) + out
        value = watch.fire(out if self.factor == 1 else out * self.factor, beside=True)
        if watch.edited or watch.rerouted:
            call.run.now.scratch[self] = value

    def _write(self, call: ModuleCall) -> None:
        scratch = call.run.now.scratch
        stream, value = scratch.pop((self, "stream")), scratch.pop(self, None)
        if value is not None:
            call.input.copy_(stream + value)

    def _replace(self, call: ModuleCall) -> None:
        scratch = call.run.now.scratch
        stream, value = scratch.pop((self, "stream")), scratch.pop(self, None)
        if value is not None:
            call.result = stream + value
