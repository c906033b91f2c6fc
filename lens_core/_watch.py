"""One hook point during one run: its hook functions, the caches that want its value, and what they did to it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor

from lens_core._call import Call
from lens_core._choice import Part, together
from lens_core._graph import gradients
from lens_core._positions import Positions, local_positions, outside_positions
from lens_core.errors import ArgumentError, HookFunctionError, HookValueError, LensError, UnsupportedHookError
from lens_core.hook_points import HookPoint

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["Hook", "HookEntry", "HookFunction", "Sink", "Watch", "same_bits"]

HookFunction = Callable[..., Any]
"""`fn(tensor, hook)`, the second argument by keyword; returns a replacement or None."""


class Hook:
    """What a hook function is told about the place and the moment.

    Attributes:
        name: Canonical name of the hook point.
        ctx: A dictionary of this hook point that is kept until `reset_hooks(clear_contexts=True)`.
        step: 0 for the prompt, then one more for every call that continues it.
        is_prefill: Whether this call starts the sequence.
        total: Positions of the sequence so far, all of this call's included: what a negative position counts from.
    """

    __slots__ = ("_device", "_layer", "_positions", "ctx", "is_prefill", "name", "step", "total")

    def __init__(
        self, point: HookPoint, ctx: dict[str, Any], call: Call, positions: Sequence[int], device: torch.device
    ) -> None:
        self.name = point.name
        self.ctx = ctx
        self.step = call.step
        self.is_prefill = call.is_prefill
        self.total = call.total
        self._layer = point.layer
        self._positions = positions
        self._device = device

    def layer(self) -> int:
        """Give the 0-based block of this hook point.

        Raises:
            UnsupportedHookError: The place is outside the blocks.
        """
        if self._layer is None:
            raise UnsupportedHookError(f"{self.name!r} is not inside a block and has no layer")
        return self._layer

    @property
    def positions(self) -> Tensor:
        """Absolute 0-based positions on the tensor's position axis: columns of the whole sequence, padding counted."""
        return torch.tensor(self._positions, dtype=torch.long, device=self._device)

    def __repr__(self) -> str:
        """Show name and step."""
        return f"Hook({self.name!r}, step={self.step})"


@attrs.frozen(kw_only=True, eq=False)
class HookEntry:
    """A hook function and where it was put."""

    names: tuple[str, ...]
    exact: bool
    fn: HookFunction
    positions: Positions = None
    is_alone: bool = False
    """Whether it is for one call that nothing continues, so that a position outside of it is a mistake."""
    is_optional: bool = False
    """Whether a run that leaves its places out is no mistake, though they were named."""
    direction: Literal["fwd", "bwd"] = "fwd"
    is_permanent: bool = False
    level: int | None = None


@runtime_checkable
class Sink(Protocol):
    """Somewhere that values go: an activation cache being filled."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def exact(self) -> bool: ...
    @property
    def is_optional(self) -> bool: ...
    @property
    def keeps_graph(self) -> bool: ...
    @property
    def wants_gradient(self) -> bool: ...

    def begin(self, call: Call) -> None: ...
    def part(self, call: Call, n_heads: int) -> Part | None: ...
    def store(
        self,
        point: HookPoint,
        value: Tensor,
        call: Call,
        *,
        is_foreign: bool,
        by_position: bool = False,
        part: Part | None = None,
    ) -> None: ...
    def store_gradient(
        self, point: HookPoint, gradient: Tensor, call: Call, *, position: int | None = None
    ) -> None: ...


class Watch:
    """A hook point that a run serves."""

    def __init__(self, point: HookPoint, run: "Run") -> None:
        self.point = point
        self.name = point.name
        self.run = run
        self.entries: list[HookEntry] = []
        self.backward: list[HookEntry] = []
        self.sinks: list[Sink] = []
        self.by_name = False
        """Whether somebody asked for this very name, not through a filter."""
        self.edited = False
        """Whether the last value was replaced by other bits."""
        self.rerouted = False
        """Whether the last value's place in autograd's graph matters: replaced, detached, kept or hooked backward."""
        self._axis = point.position_axis

    def add_entry(self, entry: HookEntry, *, by_name: bool) -> None:
        """Attach a hook function."""
        (self.entries if entry.direction == "fwd" else self.backward).append(entry)
        self.by_name = self.by_name or by_name

    def add_sink(self, sink: Sink, *, by_name: bool) -> None:
        """Attach a cache."""
        self.sinks.append(sink)
        self.by_name = self.by_name or by_name

    def drop(self, given: Sequence[object]) -> None:
        """Detach functions and caches; the place stays watched."""
        self.entries = [entry for entry in self.entries if entry not in given]
        self.backward = [entry for entry in self.backward if entry not in given]
        self.sinks = [sink for sink in self.sinks if sink not in given]

    @property
    def keeps_graph(self) -> bool:
        """Whether the value must stay on autograd's path: for a backward hook, a gradient, or an undetached cache."""
        return bool(self.backward) or any(sink.keeps_graph or sink.wants_gradient for sink in self.sinks)

    @property
    def needs_graph(self) -> bool:
        """Whether a value that is computed beside the model must be computed with gradients."""
        return torch.is_grad_enabled() and (bool(self.entries) or self.keeps_graph)

    def part_asked(self, n_heads: int) -> Part | None:
        """Say which cells of scores or a pattern are wanted; None for all.

        A function, or a gradient, has them all; and where heads are cut over processes, each computes all of its own.
        """
        if self.entries or self.keeps_graph or self.run.shards is not None:
            return None
        return together([sink.part(self.run.now, n_heads) for sink in self.sinks])

    def fire(
        self,
        value: Tensor,
        *,
        beside: bool = False,
        is_written_in_place: bool = False,
        real: Tensor | None = None,
        part: Part | None = None,
    ) -> Tensor:
        """Pass a value through the hooks and into the caches; `edited` and `rerouted` tell what became of it.

        What is returned goes downstream. With nothing changed and nothing kept on the graph it is `value` itself.
        `beside` says that the value was computed beside the model, which needs `edited` to compare bits: an identity
        edit then leaves the model's own computation in place. `is_written_in_place` says that what changes is written
        into the tensor itself, which must then not be given another name in the graph. `real` `[batch, pos]` is
        False at padding, where the value stays as it was whatever a function returns. `part` says which cells the
        value holds, where `part_asked` told so.

        Of a value that is cut over processes, functions and caches see the whole, and this process' part goes on.
        """
        shards = self.run.shards
        axis = None if shards is None else shards.cut_axis(self.point, value, self.run.sizes)
        if shards is None or axis is None:
            return self._fire(value, beside=beside, is_written_in_place=is_written_in_place, real=real, part=part)
        whole = shards.whole(value, axis=axis, length=self.run.sizes[self.point.shape.split()[axis]])
        new = self._fire(whole, beside=beside, real=real)
        return value if new is whole else shards.part(new, axis=axis)

    def _fire(
        self,
        value: Tensor,
        *,
        beside: bool,
        is_written_in_place: bool = False,
        real: Tensor | None,
        part: Part | None = None,
    ) -> Tensor:
        call = self.run.now
        call.fired[self.name] = call.fired.get(self.name, 0) + 1
        self.edited = self.rerouted = False
        original = value
        for entry in self.entries:
            value = self._apply(entry, value, call, beside=beside, real=real)
        if self.keeps_graph and torch.is_grad_enabled() and value.is_floating_point():
            value = self._on_graph(value if is_written_in_place else value.view_as(value), call)
        for sink in self.sinks:
            sink.store(self.point, value, call, is_foreign=value is not original, part=part)
        return value

    # ------------------------------------------------------------------ one position after the other

    def positions_asked(self) -> list[int]:
        """List the positions of this call, 0-based in it, that some function is to be shown, in order."""
        call = self.run.now
        named = [self._named(entry, call, first=call.past) for entry in self.entries]
        return sorted({position for positions in named for position in positions})

    @property
    def wants_all(self) -> bool:
        """Whether the value of every position is wanted: by a cache, a backward hook, or a function for all of them."""
        return bool(self.sinks or self.backward) or any(entry.positions is None for entry in self.entries)

    def begin_positions(self) -> None:
        """Start a call in which the value comes one position after the other."""
        self.edited = self.rerouted = False

    def fire_position(self, position: int, value: Tensor, *, real: Tensor | None = None) -> Tensor:
        """Pass the value at one position, `[batch, 1, ...]`, through the functions that ask for it.

        `position` is 0-based in this call, `real` as in `fire`. What is returned is where the next position starts
        from; `edited` and `rerouted` add up from `begin_positions` on. Caches are served by `end_positions`.
        """
        call = self.run.now
        for entry in self.entries:
            value = self._apply(entry, value, call, beside=True, real=real, position=position)
        if self.keeps_graph and torch.is_grad_enabled():
            value = self._on_graph(value.view_as(value), call, position=position)
        return value

    def end_positions(self, trajectory: Tensor | None) -> None:
        """Hand the values of all positions, `[batch, pos, ...]`, to the caches (None: there is none), and count."""
        call = self.run.now
        call.fired[self.name] = call.fired.get(self.name, 0) + 1
        for sink in self.sinks:
            if trajectory is not None:
                sink.store(self.point, trajectory, call, is_foreign=False, by_position=True)

    # ------------------------------------------------------------------ one function

    def _apply(
        self,
        entry: HookEntry,
        value: Tensor,
        call: Call,
        *,
        beside: bool = False,
        real: Tensor | None = None,
        position: int | None = None,
    ) -> Tensor:
        """Call one function on its own clone of the value (or of its positions), and put back what it returns."""
        if position is None:
            index, hook = self._locate(entry, value, call)
        elif entry.positions is None or position in self._named(entry, call, first=call.past):
            index, hook = None, self._hook(call, [call.past + position], value)
        else:
            return value
        if index is not None and not len(index):
            return value
        shown = value if index is None else value.index_select(self._axis or 0, index)
        handed = shown.clone()
        version = None if handed.is_inference() else handed._version
        new = self._call(entry, handed, hook)
        if new is None:
            new = handed
        written = not same_bits(handed, shown) if version is None else handed._version != version
        if new is handed and not written:
            # With gradients the function's tensor is the one that flows, so that its .grad can be had.
            return handed if index is None and torch.is_grad_enabled() and value.requires_grad else value
        new = self._checked(new, shown, entry)
        if real is not None:
            kept = real if index is None else real.index_select(1, index)
            new = torch.where(kept.view(*kept.shape, *(1,) * (new.ndim - 2)), new, shown)
        self.edited = self.edited or not beside or not same_bits(new, shown)
        self.rerouted = self.rerouted or (torch.is_grad_enabled() and (new.requires_grad or shown.requires_grad))
        return new if index is None else value.index_copy(self._axis or 0, index, new)

    def _locate(self, entry: HookEntry, value: Tensor, call: Call) -> tuple[Tensor | None, Hook]:
        length = value.shape[self._axis] if self._axis is not None and value.ndim > self._axis else call.n_pos
        first = call.first_position(length)
        absolute: Sequence[int] = range(first, first + length)
        index: Tensor | None = None
        if entry.positions is not None:
            local = self._named(entry, call, first=first)
            absolute = [first + position for position in local]
            index = torch.tensor(local, dtype=torch.long, device=value.device)
        return index, self._hook(call, absolute, value)

    def _named(self, entry: HookEntry, call: Call, *, first: int) -> list[int]:
        """Find which positions of an axis that begins at `first` a function asks for."""
        outside = outside_positions(entry.positions, total=call.total) if entry.is_alone else ()
        if outside:
            raise ArgumentError(
                f"a function at {self.name!r} is for position {outside[0]}, and the input has {call.total}: "
                f"0 to {call.total - 1}, or -{call.total} to -1 from its end"
            )
        return local_positions(entry.positions, first=first, total=call.total)

    def _hook(self, call: Call, absolute: Sequence[int], value: Tensor) -> Hook:
        ctx = self.run.contexts.setdefault(self.name, {})
        return Hook(self.point, ctx, call, absolute, value.device)

    def _call(self, entry: HookEntry, handed: Tensor, hook: Hook) -> Any:
        was_in_function, self.run.in_function = self.run.in_function, True
        try:
            return entry.fn(handed, hook=hook)
        except LensError:
            raise
        except Exception as error:
            name = getattr(entry.fn, "__name__", repr(entry.fn))
            raise HookFunctionError(
                f"the hook function {name!r} at {self.name!r} raised {type(error).__name__}: {error}; "
                f"it was given a tensor of shape {tuple(handed.shape)}"
            ) from error
        finally:
            self.run.in_function = was_in_function

    def _checked(self, new: Any, shown: Tensor, entry: HookEntry) -> Tensor:
        """Hold a function's result to the place: a tensor of the same shape and device; a floating dtype is cast."""
        name = getattr(entry.fn, "__name__", repr(entry.fn))
        if not isinstance(new, Tensor):
            raise HookValueError(
                f"the hook function {name!r} at {self.name!r} returned {type(new).__name__}; "
                "return a tensor of the same shape, or None to leave the value as it is"
            )
        if new.shape != shown.shape:
            raise HookValueError(
                f"the hook function {name!r} at {self.name!r} returned shape {tuple(new.shape)} where "
                f"{tuple(shown.shape)} ({self.point.shape}) stands"
            )
        if new.device != shown.device:
            raise HookValueError(
                f"the hook function {name!r} at {self.name!r} returned a tensor on {new.device}; the place is on "
                f"{shown.device}: return tensor.to(...) there"
            )
        if new.is_floating_point() != shown.is_floating_point() or new.is_complex() or new.dtype == torch.bool:
            raise HookValueError(
                f"the hook function {name!r} at {self.name!r} returned dtype {new.dtype}, "
                f"which cannot stand for {shown.dtype}"
            )
        return new.to(shown.dtype)

    def _on_graph(self, value: Tensor, call: Call, *, position: int | None = None) -> Tensor:
        """Make sure that gradients reach the value, and hook them.

        The value is a tensor of its own in the graph: a block's output and the next one's input are one tensor in HF,
        and two places here.
        """
        if not value.requires_grad:  # frozen parameters: the graph starts here
            value = value.detach().requires_grad_()
        self.rerouted = True
        tensor: Any = value
        for entry in self.backward:
            tensor.register_hook(partial(self._apply_backward, entry, call, position))
        for sink in self.sinks:
            if sink.wants_gradient or sink.keeps_graph:
                tensor.register_hook(partial(self._store_gradient, sink, call, position))
        return value

    def _apply_backward(self, entry: HookEntry, call: Call, position: int | None, gradient: Tensor) -> Tensor | None:
        with gradients(False):
            new = self._apply(entry, gradient, call, position=position)
        return None if new is gradient else new

    def _store_gradient(self, sink: Sink, call: Call, position: int | None, gradient: Tensor) -> None:
        sink.store_gradient(self.point, gradient, call, position=position)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold equal values."""
    return a is b or torch.equal(a, b)
