"""Places inside a module's forward, between the functions of its file and the submodules that it calls.

A mixer of a state space layer hands raw weights to functions of its own file (convolution, scan, their single steps).
For a run, these names in the globals of the class' file are context-local dispatchers. They get no module, so the
module's own tap notes which one is running. What the functions mean is the architecture's to say: its `MixerKernel`
gives a handler for each, which computes the values beside HF's function, shows them, and decides afterwards whether
HF's result stands.
"""

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from jaxtyping import Bool
from torch import Tensor

from lens_core._call import ModuleCall
from lens_core._functions import function_slot
from lens_core._graph import with_gradient_of
from lens_core._hf_cache import cache_in
from lens_core._plan import ModuleStep, SlotStep
from lens_core._views import View
from lens_core._watch import Watch
from lens_core.errors import UnsupportedHookError

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["InsideMixer", "MixerCall", "MixerKernel"]

RUNNING = "the mixer that is running"


class MixerCall:
    """One forward of a mixer: what is watched in it, and what its handlers leave for each other.

    Attributes:
        module: The mixer.
        watches: By part.
        real: False at padding `[batch, pos]`, where functions change nothing; None where nothing is padded.
        cache: HF's cache that the forward was given, or None.
        notes: What one handler leaves for a later one.
    """

    def __init__(self, call: ModuleCall, watches: Mapping[str, Watch]) -> None:
        self.module: Any = call.module
        self.watches = watches
        self.run = call.run
        self.n_pos = call.run.now.n_pos
        mask = call.kwargs.get("attention_mask")
        self.real: Bool[Tensor, "batch pos"] | None = None if mask is None else mask[:, -self.n_pos :].bool()
        self.cache: Any = cache_in(call.kwargs)
        self.notes: dict[str, Any] = {}

    def watched(self, *parts: str) -> bool:
        """Whether any of these parts is asked for."""
        return any(part in self.watches for part in parts)

    def edited(self, *parts: str) -> bool:
        """Whether a function replaced any of these values."""
        return any(self.watches[part].edited for part in parts if part in self.watches)

    def changed(self, *parts: str) -> bool:
        """Whether any of these values was replaced, or has a place of its own in autograd's graph."""
        return any(self.watches[part].edited or self.watches[part].rerouted for part in parts if part in self.watches)

    def needs_graph(self, *parts: str) -> bool:
        """Whether what is computed beside HF for these parts must have gradients."""
        return any(self.watches[part].needs_graph for part in parts if part in self.watches)

    def fire(self, part: str, value: Tensor, *, beside: bool = True) -> Tensor:
        """Show a value in the dtype that its place declares, and give what stands for it: itself where nothing changed.

        A value that nobody asked for is handed on.
        """
        watch = self.watches.get(part)
        if watch is None:
            return value
        dtype = watch.point.dtype
        shown = value if dtype == "model" else value.to(getattr(torch, dtype))
        new = watch.fire(shown, beside=beside, real=self.real)
        return value if new is shown and not watch.rerouted else new

    def passed(self, part: str, own: Tensor) -> Tensor:
        """Show HF's own tensor and give what takes its place: its very bits, unless a function replaced them."""
        new = self.fire(part, own)
        if self.edited(part):
            return new.to(own.dtype)
        return with_gradient_of(new, own) if self.changed(part) else own

    def passed_columns(self, tensor: Tensor, views: Mapping[str, View]) -> Tensor:
        """Show parts of one of HF's tensors, each by its view; give the tensor with what was replaced in it."""
        for part, view in views.items():
            if self.watched(part):
                new = self.fire(part, view.read(tensor, self.run))
                if self.changed(part):
                    whole = view.write(tensor, new.to(tensor.dtype))
                    tensor = whole if self.edited(part) else with_gradient_of(whole, tensor)
        return tensor

    def is_reference(self, function: Any, tensor: Tensor) -> bool:
        """Whether a function is the PyTorch one of the mixer's own file, and no kernel that stands in its place."""
        own_file = isinstance(function, FunctionType) and function.__module__ == type(self.module).__module__
        return own_file and tensor.device.type == "cpu"


@attrs.frozen(kw_only=True, eq=False)
class MixerKernel:
    """How one kind of mixer is served; handlers fire the parts that they know.

    A function's handler is called as `handler(call, original, *args, **kwargs)` in place of `original`, a submodule's
    as `handler(call, module_call)`.
    """

    functions: Mapping[str, Callable[..., Any]]
    """By the function's name in the file of the mixer's class."""
    modules: Mapping[tuple[str, Literal["pre", "post"]], Callable[[MixerCall, ModuleCall], None]]
    """By the submodule's name, and before or after its forward."""


@attrs.frozen(kw_only=True)
class InsideMixer:
    """A place inside a mixer; `part` is what its kernel calls it."""

    path: str
    part: str
    kernel: MixerKernel = attrs.field(repr=False)

    @property
    def group(self) -> Hashable:
        """All places of one mixer belong together."""
        return self.path

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep | SlotStep]:
        """Note the mixer while it runs, and handle the functions and submodules that it calls."""
        by_part = {watch.point.seam.part: watch for watch in watches}
        yield ModuleStep(path=self.path, when="pre", act=partial(_enter, by_part))
        for (child, when), handle in self.kernel.modules.items():
            yield ModuleStep(path=f"{self.path}.{child}", when=when, act=partial(_at_child, handle))
        yield ModuleStep(path=self.path, when="post", act=_leave)
        yield from self._slots(run)

    def _slots(self, run: "Run") -> Iterator[SlotStep]:
        module = run.module(self.path)
        namespace = inspect.unwrap(type(module).forward).__globals__
        for name, handle in self.kernel.functions.items():
            if name not in namespace:
                raise UnsupportedHookError(
                    f"{type(module).__name__} calls no function {name!r} of its file in the installed transformers; "
                    "the inside of this mixer cannot be reached"
                )
            slot = function_slot(namespace, name)
            yield SlotStep(path=self.path, slot=slot, key=slot.key, handler=partial(_serve, run, handle))


# Functions of the module, not inner ones: a type checker that watches the tests compiles each inner one anew.


def _enter(by_part: dict[str, Watch], call: ModuleCall) -> None:
    call.run.now.scratch[RUNNING] = MixerCall(call, by_part)


def _at_child(handle: Callable[[MixerCall, ModuleCall], None], call: ModuleCall) -> None:
    handle(call.run.now.scratch[RUNNING], call)


def _leave(call: ModuleCall) -> None:
    call.run.now.scratch.pop(RUNNING, None)


def _serve(run: "Run", handle: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Serve a call of one function by whichever watched mixer is running; the others get the original."""
    running = None if run.call is None else run.call.scratch.get(RUNNING)
    return original(*args, **kwargs) if running is None else handle(running, original, *args, **kwargs)
