"""Two seams around others: for tensors whose batch and positions are one axis, and before a dropout of no module."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import attrs
from torch import Tensor

from lens_core.errors import UnsupportedHookError
from lens_core.plugin import ModuleCall, ModuleStep, Run, Seam, SlotStep, Watch

__all__ = ["Flat", "Undropped"]


@attrs.frozen
class Flat:
    """A seam whose modules take and return `[batch * pos, ...]`: it is shown `[batch, pos, ...]`."""

    seam: Any

    @property
    def group(self) -> Hashable:
        """As the seam's."""
        return type(self.seam), self.seam.group

    def __getattr__(self, name: str) -> Any:
        """Give the seam's own fields."""
        return getattr(self.seam, name)

    def steps(self, watches: Sequence[Watch], run: Run) -> Iterator[ModuleStep | SlotStep]:
        """Give the seam's steps, each with another view of the call."""
        for step in self.seam.steps(watches, run):
            assert isinstance(step, ModuleStep)
            yield attrs.evolve(step, act=lambda call, act=step.act: act(_Unflattened(call)))


class _Unflattened(ModuleCall):
    """One forward of a module, with its first tensors as `[batch, pos, ...]`; all else is the call's own."""

    __slots__ = ("_call",)

    def __init__(self, call: ModuleCall) -> None:
        object.__setattr__(self, "_call", call)

    def __getattr__(self, name: str) -> Any:  # no slot but one is filled
        return getattr(self._call, name)

    def __setattr__(self, name: str, value: Any) -> None:
        owner = self if name in ("input", "result") else self._call
        object.__setattr__(owner, name, value)

    def _shown(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (self._call.run.now.batch, -1))

    @property
    def stream(self) -> Tensor:
        """The input, but for copies that this module alone is given."""
        return self._shown(self._call.stream)

    @property
    def input(self) -> Tensor:
        """The first argument."""
        return self._shown(self._call.input)

    @input.setter
    def input(self, new: Tensor) -> None:
        self._call.input = new.flatten(0, 1)

    @property
    def result(self) -> Tensor:
        """What the module returned."""
        return self._shown(self._call.result)

    @result.setter
    def result(self, new: Tensor) -> None:
        self._call.result = new.flatten(0, 1)

    def give_copy(self, new: Tensor) -> None:
        """Replace the input for this module alone."""
        self._call.give_copy(new.flatten(0, 1))


@attrs.frozen(kw_only=True)
class Undropped:
    """What a module returns, where HF's block drops some of it before the sum: in training that is not what it adds."""

    seam: Seam
    p: float

    @property
    def group(self) -> Hashable:
        """Each stands alone."""
        return self

    def steps(self, watches: Sequence[Watch], run: Run) -> Iterator[ModuleStep | SlotStep]:
        """Give the seam's steps, which refuse in training."""
        for step in self.seam.steps(watches, run):
            assert isinstance(step, ModuleStep)
            yield attrs.evolve(step, act=lambda call, act=step.act: self._act(act, call, watches[0].name))

    def _act(self, act: Any, call: ModuleCall, name: str) -> None:
        if call.module.training and self.p:
            raise UnsupportedHookError(
                f"{name} is what the block adds after a dropout of {self.p} that is no module; call model.eval(), or "
                "set the config's dropout to 0"
            )
        act(call)
