"""Compile what was asked for into the fewest taps, install them for one run, and take them out again.

A `Run` is one innermost stretch of hooked calls of one HF model in one context. Its plan holds a `Watch` for each hook
point that was asked for; seams turn groups of watches into steps; all steps at one side of one module share a tap.
"""

import difflib
import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import takewhile
from typing import Any, Literal, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor, nn

from lens_core._call import Call, ModuleCall
from lens_core._compiled import eager, is_compiled, tell_once, with_parents
from lens_core._context import activate, active_run, retire
from lens_core._functions import Slot, give_back, take
from lens_core._shards import check_whole, find_shards
from lens_core._taps import Site, Taps, is_checkpointed, put_tap
from lens_core._watch import HookEntry, Sink, Watch
from lens_core.errors import HookDidNotFireError, UnsupportedHookError
from lens_core.hook_points import HookTable

__all__ = ["ModuleStep", "Run", "SlotStep", "StopForward"]


class StopForward(BaseException):
    """Leave HF's forward at the block where the run stops; carries the residual stream."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__()
        self.residual = residual


@attrs.frozen(kw_only=True)
class ModuleStep:
    """What to do before or after the forward of one module."""

    path: str
    when: Literal["pre", "post"]
    act: Callable[[ModuleCall], None]


@attrs.frozen(kw_only=True)
class SlotStep:
    """A handler for the calls that reach a slot; `key` is what the slot's dispatcher looks handlers up by."""

    path: str
    slot: Slot
    key: Hashable
    handler: Callable[..., Any]


@runtime_checkable
class SeamLike(Protocol):
    """What the plan needs of a seam record."""

    @property
    def group(self) -> Hashable: ...

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterable[ModuleStep | SlotStep]: ...


class Run:
    """One stretch of hooked calls: the watches, the taps that serve them, and the call in progress."""

    def __init__(
        self,
        hf_model: Any,
        table: HookTable,
        *,
        base: str,
        blocks: str,
        block_values: int | None = None,
        final: str,
        sizes: Mapping[str, int],
        contexts: dict[str, dict[str, Any]],
        is_compiled: bool = False,
        notices: set[str] | None = None,
        added: Sequence[HookEntry] = (),
        entries: Sequence[HookEntry] = (),
        sinks: Sequence[Sink] = (),
        start_at: int | None = None,
        stop_at: int | None = None,
        residual: Tensor | None = None,
        brought: frozenset[str] = frozenset(),
        parent: "Run | None" = None,
    ) -> None:
        self.hf_model = hf_model
        self.table = table
        self.base, self.blocks, self.final = base, blocks, final
        self.block_values = block_values
        self.sizes = sizes
        self.contexts = contexts
        self.added = tuple(added)
        self.own = (*entries, *sinks)
        """What this run adds to those of the enclosing blocks."""
        self.scoped: tuple[HookEntry, ...] = (*(parent.scoped if parent else ()), *entries)
        self.sinks: tuple[Sink, ...] = (*(parent.sinks if parent else ()), *sinks)
        self.start_at, self.stop_at, self.residual = start_at, stop_at, residual
        self.brought = brought
        """Hook points of the table that exist in this block only."""
        self.parent = parent
        self.is_compiled = is_compiled
        self.notices: set[str] = set() if notices is None else notices
        """What its model was told once already."""
        self.shards = find_shards(hf_model)
        """How the model is cut over processes; None where it is not."""
        self.is_over = False
        """Whether its block has ended; whoever still knows it passes it by."""
        self.is_gone = False
        """Whether nothing of it is left on the model."""
        self.handlers: dict[Hashable, Callable[..., Any]] = {}
        self._modules: dict[str, nn.Module] = {}
        self._tapped: frozenset[str] = frozenset()
        self._taps: Taps | None = None
        self._slots: list[Slot] = []
        self.call: Call | None = None
        self.inside_model = False
        self.in_function = False
        """Whether one of the user's functions is running."""
        self.calls = 0
        self._steps_since_prefill = 0
        self.watches = self._watches()

    @property
    def now(self) -> Call:
        """The call in progress."""
        if self.call is None:
            raise UnsupportedHookError(
                "a hooked module was called outside a forward of the model that lens sees; call the model or its base "
                "model, and give lens.load a torch.compile wrapper itself rather than what it wraps"
            )
        return self.call

    def module(self, path: str) -> nn.Module:
        """Find a module of the HF model by its path; the empty path is the model."""
        found = self._modules.get(path)
        if found is None:
            try:
                found = self._modules[path] = self.hf_model.get_submodule(path)
            except AttributeError:
                raise UnsupportedHookError(self._absence_of(path)) from None
        return found

    def _absence_of(self, path: str) -> str:
        """Say which declared module is not there, whose place it is, and what is there."""
        parent, at, rest = self.hf_model, "", path.split(".")
        children: dict[str, nn.Module] = dict(parent.named_children())
        while rest[0] in children:
            parent, at = children[rest[0]], f"{at}.{rest[0]}".lstrip(".")
            rest, children = rest[1:], dict(parent.named_children())
        names = [watch.name for watch in self.watches if getattr(watch.point.seam, "path", None) == path]
        there = ", ".join(children) or "no modules"
        near = difflib.get_close_matches(rest[0], list(children), n=1)
        return (
            f"{f'{names[0]!r} is declared at' if names else 'the architecture declares'} the module {path!r}, and "
            f"{type(parent).__name__}{f' at {at!r}' if at else ''} has no {rest[0]!r}"
            f"{f'; did you mean {near[0]!r}?' if near else '.'} It has: {there}"
        )

    def keeps(self, *names: str) -> bool:
        """Whether a cache of this run keeps any of these hook points."""
        return any(name in sink.names for sink in self.sinks for name in names)

    def lineage(self) -> "Iterator[Run]":
        """This run, then those of the enclosing contexts, which count what happens inside as theirs."""
        run: Run | None = self
        while run is not None:
            yield run
            run = run.parent

    # ------------------------------------------------------------------ compiling

    def _watches(self) -> list[Watch]:
        """One watch for each hook point asked for and not left out by start_at or stop_at, in the table's order."""
        found: dict[str, Watch] = {}
        for names, exact, attach in self._requests():
            for name in names:
                depth = self.table.depth(name)
                if depth is not None and self._leaves_out(depth):
                    if exact:
                        raise HookDidNotFireError(
                            f"{name!r} is left out of a run with start_at_layer={self.start_at}, "
                            f"stop_at_layer={self.stop_at}; ask for hook points between these"
                        )
                    continue
                if name not in found:
                    check_whole(self.shards, name)
                    found[name] = Watch(self.table.point(name), self)
                attach(found[name])
        return sorted(found.values(), key=lambda watch: self.table.rank(watch.name))

    def _requests(self) -> Iterator[tuple[Sequence[str], bool, Callable[[Watch], None]]]:
        for entry in self.added:  # they outlast this run, so a run that stops short of them is no mistake
            known = [n for n in entry.names if n in self.table or n.startswith("hf.")]  # not those of others' blocks
            yield known, False, lambda watch, e=entry: watch.add_entry(e, by_name=e.exact)
        for entry in self.scoped:
            must = entry.exact and not entry.is_optional
            yield entry.names, must, lambda watch, e=entry: watch.add_entry(e, by_name=e.exact)
        for sink in self.sinks:
            must = sink.exact and not sink.is_optional
            yield sink.names, must, lambda watch, s=sink: watch.add_sink(s, by_name=s.exact)

    def _leaves_out(self, depth: int) -> bool:
        skipped = self.start_at is not None and depth < self.start_at
        return skipped or (self.stop_at is not None and depth >= self.stop_at)

    def _compile(self) -> list[ModuleStep | SlotStep]:
        groups: dict[Hashable, list[Watch]] = {}
        for watch in self.watches:
            seam: SeamLike = watch.point.seam
            groups.setdefault((type(seam), seam.group), []).append(watch)
        from lens_core._boundary import boundary_steps, closing_steps

        steps: list[ModuleStep | SlotStep] = [*boundary_steps(self)]
        for watches in groups.values():
            steps.extend(watches[0].point.seam.steps(watches, self))
        return [*steps, *closing_steps(self)]

    # ------------------------------------------------------------------ installing

    @contextmanager
    def installed(self) -> Generator["Run", None, None]:
        """Install the taps and make this the live run of its model; leave nothing behind.

        Raises:
            HookDidNotFireError: The block ended without any call of the model.
        """
        try:
            try:
                with self._eagerly() if self._install(self._compile()) else nullcontext():
                    yield self
                self._check_used()
            finally:
                self._uninstall()
        finally:
            self._uninstall()  # an interrupt (Ctrl-C) may have cut the first one short

    def _install(self, steps: Sequence[ModuleStep | SlotStep]) -> bool:
        """Put the taps in, go live, and tell whether anything that the run goes through is compiled.

        What there is to take out again is written down before it is put in.
        """
        self._slots = [step.slot for step in steps if isinstance(step, SlotStep)]
        self._taps = Taps(self, _by_site(steps))
        self._taps.install(self._tap)
        for step in steps:
            if isinstance(step, SlotStep):
                take(step.slot, self)
                self.handlers[step.key] = step.handler
        self._tapped = frozenset(step.path for step in steps)
        activate(self)
        return self.is_compiled or any(map(is_compiled, self._compilable(steps)))

    def _eagerly(self) -> AbstractContextManager[None]:
        tell_once(self.notices)
        return eager()

    def _tap(self, path: str, when: str, acts: Sequence[Callable[[ModuleCall], None]]) -> Any:
        return put_tap(self, path, when, acts)

    def _uninstall(self) -> None:
        """Take everything out again; may be called anew after an interrupt, wherever that came."""
        if self.is_gone:
            return
        self.is_over = True
        retire(self)
        for slot in self._slots:
            give_back(slot, self)
        if self._taps is not None:
            self._taps.remove()
        self._leave_inner_runs()
        self.handlers.clear()
        self.leave_call()
        self.watches.clear()  # they know the run: no cycle is left, nor the tensors in it
        self.residual = None
        self.is_gone = True

    def _leave_inner_runs(self) -> None:
        """Take what this block asked for out of those inside of it that go on: blocks need not end in turn."""
        innermost = active_run(self.hf_model)
        lineage = [] if innermost is None else list(innermost.lineage())
        for run in takewhile(lambda run: run is not self, lineage) if self in lineage else ():
            run.scoped = tuple(entry for entry in run.scoped if entry not in self.own)
            run.sinks = tuple(sink for sink in run.sinks if sink not in self.own)
            run.watches = [watch for watch in run.watches if watch.name not in self.brought]
            run.table = run.table.without(self.brought) if self.brought else run.table
            for watch in run.watches:
                watch.drop(self.own)

    def _compilable(self, steps: Iterable[ModuleStep | SlotStep]) -> Iterator[nn.Module]:
        """The modules that somebody may have compiled: the blocks, those with taps, and what these are in."""
        yield from self.module(self.blocks).children()
        yield from map(self.module, with_parents(step.path for step in steps))

    # ------------------------------------------------------------------ one call

    def enter_model(self) -> None:
        """Note that the model itself is called, not only its base."""
        self._check_free()
        self.leave_call()  # one that did not come to its end
        self.inside_model = True

    def _check_free(self) -> None:
        """Refuse a call in the middle of another one."""
        if self.call is not None and self.call.thread != threading.get_ident():
            raise UnsupportedHookError(
                "another thread is in the middle of a call in this block (or its call failed, and it made no other); "
                "a block serves one call at a time: give each thread a block of its own"
            )
        if self.in_function:
            raise UnsupportedHookError(
                "a hook function called its own model in the block that hooks it; call it by run_with_hooks or "
                "run_with_cache, or in a hooks() block inside the function"
            )

    def begin_call(self, call: Call) -> None:
        """Start one forward of the HF model."""
        if self.call is not None:  # the call before did not come to its end, and now the base is called by itself
            self._check_free()
            self.leave_call()
        if self.hf_model.training and torch.is_grad_enabled() and is_checkpointed(self.hf_model, self._tapped):
            raise UnsupportedHookError(
                "hooks inside a block do not survive gradient checkpointing, which runs the block again in the "
                "backward pass; call model.hf_model.gradient_checkpointing_disable() or model.eval() first, "
                "or hook the blocks' hook_resid_pre and hook_resid_post only"
            )
        for run in self.lineage():
            run.calls += 1
        self._steps_since_prefill = 0 if call.is_prefill else self._steps_since_prefill + 1
        call.step = self._steps_since_prefill
        self.call = call
        for sink in self.sinks:
            sink.begin(call)
        if self.calls == 1:
            from lens_core._boundary import warn_of_cost

            warn_of_cost(self, call)

    def leave_call(self) -> None:
        """Forget the call in progress and what it holds: backward hooks live on, and know it."""
        if self.call is not None:
            self.call.scratch.clear()
        self.call = None
        self.inside_model = False

    def end_call(self) -> None:
        """Check that each place asked for was reached exactly once in the call that ends."""
        call = self.now
        self.leave_call()
        for watch in self.watches:
            count = call.fired.get(watch.name, 0)
            if count != 1 and not watch.name.startswith("hf."):
                raise HookDidNotFireError(self._misfire(watch, count))

    def _misfire(self, watch: Watch, count: int) -> str:
        """Say why a place may have been reached never, or several times."""
        happened = "was not reached" if count == 0 else f"was reached {count} times"
        told = (
            f"the hook point {watch.name!r} {happened} in this forward; the model ran another path than its "
            "architecture declares (attention implementation, config or a patched module)"
        )
        if count > 1:
            return f"{told}, or its module is called several times in a forward and is no place for a hook point"
        same = [other.name for other in self.watches if other is not watch and other.point.seam == watch.point.seam]
        return f"{told}, or it is declared at the place of {same[0]!r} by mistake" if same else told

    def _check_used(self) -> None:
        if self.calls == 0 and self.watches and not self.brought:
            raise HookDidNotFireError(
                f"hooks at {self.watches[0].name!r} were set up and the model was not called in this context; a thread "
                "started inside has a context of its own: run it by contextvars.copy_context().run"
            )


def _by_site(steps: Iterable[ModuleStep | SlotStep]) -> dict[Site, list[Callable[[ModuleCall], None]]]:
    sites: dict[Site, list[Callable[[ModuleCall], None]]] = {}
    for step in steps:
        if isinstance(step, ModuleStep):
            sites.setdefault((step.path, step.when), []).append(step.act)
    return sites
