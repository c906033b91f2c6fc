"""Hooks on one model: adding, scoping and removing them, and the runs that serve them."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, Self, cast

import attrs
import torch
from torch import Tensor, nn

from lens_core._arguments import checks_arguments
from lens_core._choice import Choice, read_choice
from lens_core._compiled import is_compiled
from lens_core._context import active_run
from lens_core._declaration import Declaration
from lens_core._hf_cache import cache_argument
from lens_core._hf_point import hf_point
from lens_core._plan import Run
from lens_core._positions import read_positions
from lens_core._state import config_facts
from lens_core._watch import HookEntry, HookFunction, Sink
from lens_core._wrappers import bare, layers_around
from lens_core.cache import ActivationCache, CacheSink
from lens_core.errors import ArgumentError
from lens_core.hook_points import HookPoint, HookTable, NameFilter, Selection

__all__ = ["BoundHookPoint", "Hooked"]


class Hooked:
    """What a model with hook points can do about hooks."""

    def __init__(self, hf_model: nn.Module, declaration: Declaration) -> None:
        self.hf_model: Any = hf_model
        self.declaration = declaration
        self.bare_model: Any = bare(hf_model)
        """HF's own model, inside of what `torch.compile` or PEFT put around it."""
        self.cache_argument = cache_argument(self.bare_model)
        self.config_facts = config_facts(self.bare_model)
        # The table does not know this object: without a cycle, a model that nobody refers to is freed at once.
        self._table = HookTable(
            declaration.points, aliases=declaration.aliases, hf_point=partial(hf_point, self.bare_model)
        )
        self.added_hooks: list[HookEntry] = []
        self.hook_contexts: dict[str, dict[str, Any]] = {}
        self.notices: set[str] = set()

    @property
    def input_device(self) -> torch.device:
        """Where token ids go: the device that the embedding computes on, wherever accelerate keeps its weight."""
        embed: Any = self.bare_model.get_submodule(self.declaration.embed)
        device = getattr(getattr(embed, "_hf_hook", None), "execution_device", None)
        return embed.weight.device if device is None else torch.device(device)

    # ------------------------------------------------------------------ what there is

    @property
    def table(self) -> HookTable:
        """The hook points by name, those of enclosing blocks included; resolves aliases, short forms and filters."""
        run = active_run(self.bare_model)
        return self._table if run is None else run.table

    def hook_points(self) -> list[HookPoint]:
        """List the hook points in the order of computation, `hf.` names aside."""
        table = self.table
        return [table[name] for name in table]

    @property
    def hook_dict(self) -> "HookDict":
        """The hook points by name, each with `add_hook`, `remove_hooks`, `has_hooks` and `ctx`."""
        return HookDict(self)

    # ------------------------------------------------------------------ adding and removing

    @checks_arguments
    def add_hook(
        self,
        name: NameFilter,
        fn: HookFunction,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        *,
        positions: Any = None,
    ) -> None:
        """Put a hook function at one or more hook points until `reset_hooks`.

        It runs in every call made through this object and inside `hooks()` and `caching()` blocks.

        Args:
            name: A name, short form, list of names, or predicate on canonical names.
            fn: Called as `fn(tensor, hook=...)`; returns a replacement, or None.
            dir: `"fwd"` for the value, `"bwd"` for its gradient.
            is_permanent: Whether it survives `reset_hooks()`.
            level: A number that `reset_hooks(level=...)` can remove it by.
            positions: Absolute positions that the function is shown; None for all.

        Raises:
            UnknownHookError: No such hook point.
            EmptyFilterError: The filter matches nothing.
            ArgumentError: Another `dir`, or something that cannot be called.
        """
        entry = self._entry((name, fn) if positions is None else (name, fn, positions), dir)
        self.added_hooks.append(attrs.evolve(entry, is_permanent=is_permanent, level=level))

    @checks_arguments
    def add_perma_hook(self, name: NameFilter, fn: HookFunction, dir: Literal["fwd", "bwd"] = "fwd") -> None:
        """Put a hook function that survives `reset_hooks()`."""
        self.add_hook(name, fn, dir, is_permanent=True)

    @checks_arguments
    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove added hooks; those of enclosing `hooks()` blocks stay.

        Args:
            clear_contexts: Whether every hook point's `ctx` is emptied too.
            direction: Which hooks.
            including_permanent: Whether permanent ones go too.
            level: Only those added with this level.
        """
        if direction not in ("fwd", "bwd", "both"):
            raise ArgumentError(f"direction is 'fwd', 'bwd' or 'both'; got {direction!r}")

        def stays(entry: HookEntry) -> bool:
            other_direction = direction not in (entry.direction, "both")
            other_level = level is not None and entry.level != level
            return other_direction or other_level or (entry.is_permanent and not including_permanent)

        self.added_hooks = [entry for entry in self.added_hooks if stays(entry)]
        if clear_contexts:
            self.clear_contexts()

    def clear_contexts(self) -> None:
        """Empty every hook point's `ctx`."""
        for ctx in self.hook_contexts.values():
            ctx.clear()

    @checks_arguments
    def _entry(self, given: Any, direction: str) -> HookEntry:
        if direction not in ("fwd", "bwd"):
            raise ArgumentError(f"dir is 'fwd' or 'bwd'; got {direction!r}")
        if not (isinstance(given, tuple | list) and _is_hook(cast("Sequence[Any]", given))):
            raise ArgumentError(
                f"a hook is (name or filter, function) or (name or filter, function, positions); got {given!r}"
            )
        name, fn, *positions = cast("tuple[Any, ...]", given)
        if name is None:
            raise ArgumentError("a hook needs a name or a filter; None stands for the default names in caches only")
        selection = self.table.select(name)
        return HookEntry(
            names=selection.names,
            exact=selection.exact,
            fn=fn,
            positions=read_positions(positions[0]) if positions else None,
            direction="fwd" if direction == "fwd" else "bwd",
        )

    # ------------------------------------------------------------------ runs

    @checks_arguments
    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[Any] = (),
        bwd_hooks: Sequence[Any] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Generator[Self, None, None]:
        """Hook every call of the model inside the block, those of `hf_model` included, in this thread.

        Blocks nest: outer hooks run before inner ones, and each block removes only its own.

        Args:
            fwd_hooks: `(name or filter, fn)` or `(name or filter, fn, positions)`.
            bwd_hooks: The same for gradients; they live as long as the graph.
            reset_hooks_end: False keeps the hooks after the block, as if added by `add_hook`.
            clear_contexts: Whether every `ctx` is emptied at the end.

        Raises:
            HookDidNotFireError: The block ended without any call of the model.
        """
        entries = self.entries(fwd_hooks, bwd_hooks)
        with self.hooking(entries, reset_hooks_end=reset_hooks_end, clear_contexts=clear_contexts):
            yield self

    def entries(self, fwd_hooks: Sequence[Any], bwd_hooks: Sequence[Any], *, is_alone: bool = False) -> list[HookEntry]:
        """Read hooks as `hooks` is given them."""
        entries = [self._entry(given, "fwd") for given in _listed("fwd_hooks", fwd_hooks)]
        entries += [self._entry(given, "bwd") for given in _listed("bwd_hooks", bwd_hooks)]
        return [attrs.evolve(entry, is_alone=is_alone) for entry in entries]

    @contextmanager
    def hooking(
        self, entries: Sequence[HookEntry], *, reset_hooks_end: bool, clear_contexts: bool
    ) -> Generator[None, None, None]:
        """Make entries live inside the block."""
        try:
            with self.running(entries):
                yield
        finally:
            if not reset_hooks_end:
                self.added_hooks.extend(attrs.evolve(entry, is_alone=False) for entry in entries)
            if clear_contexts:
                self.clear_contexts()

    @checks_arguments
    @contextmanager
    def caching(
        self,
        names: NameFilter = None,
        *,
        detach: bool = True,
        incl_bwd: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        pos_slice: Any = None,
        heads: Any = None,
    ) -> Generator[ActivationCache, None, None]:
        """Cache activations of every call inside the block.

        A call that starts a sequence replaces what was there; one that continues it (a step of `generate`) appends.

        Args:
            names: What to cache; None for the default names.
            detach: False keeps the values on autograd's graph, and their gradients in `cache.grad` after a backward.
            incl_bwd: Keep gradients of detached values too.
            device: Where to keep them; None for where they are.
            dtype: Kept dtype of floating values.
            pos_slice: Positions to keep (int, slice or ints); the axis stays.
            heads: Heads to keep of scores and patterns, as positions are given.
        """
        cache, chosen = self.new_cache(), self.table.select(names)
        choice = self.choice(chosen, pos_slice, heads)
        sink = CacheSink(cache, chosen, detach=detach, incl_bwd=incl_bwd, device=device, dtype=dtype, choice=choice)
        with self.running((), (sink,)):
            yield cache

    def choice(self, names: Selection, pos_slice: Any, heads: Any) -> Choice:
        """Read which positions and heads of these hook points to keep."""
        return read_choice(pos_slice, heads, map(self.table.point, names.names), n_heads=self.declaration.cfg.n_heads)

    def new_cache(self) -> ActivationCache:
        """Make an empty cache of this model."""
        return ActivationCache(table=self.table)

    def running(
        self,
        entries: Sequence[HookEntry] = (),
        sinks: Sequence[Sink] = (),
        *,
        start_at: int | None = None,
        stop_at: int | None = None,
        residual: Tensor | None = None,
        is_apart: bool = False,
        brings: Mapping[str, Sequence[HookPoint]] | None = None,
    ) -> Any:
        """Make a run live: permanent hooks, added ones, those of enclosing blocks, and these.

        `is_apart` says that the calls may come while another thread calls the model in an enclosing block; `brings` are
        hook points that exist in this block only, by the name that they come after.
        """
        parent = active_run(self.bare_model)
        added = tuple(sorted(self.added_hooks, key=lambda entry: not entry.is_permanent))
        is_plain = not entries and not sinks and brings is None and start_at is None and stop_at is None
        if is_plain and (parent.added == added and not is_apart if parent is not None else not added):
            return nullcontext(parent)
        return Run(
            self.bare_model,
            self.table if brings is None else self.table.extended(brings),
            base=self.declaration.base,
            blocks=self.declaration.blocks,
            block_values=self.declaration.block_values,
            final=self.declaration.norms["ln_final"].path,
            sizes=self.declaration.cfg.sizes,
            contexts=self.hook_contexts,
            is_compiled=any(map(is_compiled, layers_around(self.hf_model))),
            notices=self.notices,
            added=added,
            entries=entries,
            sinks=sinks,
            start_at=start_at,
            stop_at=stop_at,
            residual=residual,
            brought=frozenset(point.name for points in (brings or {}).values() for point in points),
            parent=parent,
        ).installed()


class HookDict(Mapping[str, "BoundHookPoint"]):
    """A model's hook points by canonical name; aliases and short forms are found too."""

    def __init__(self, model: Hooked) -> None:
        self._model = model

    def __getitem__(self, name: Any) -> "BoundHookPoint":
        """Give one hook point.

        Raises:
            UnknownHookError: No such name.
        """
        return BoundHookPoint(self._model, self._model.table[name])

    def __iter__(self) -> Iterator[str]:
        """Iterate over canonical names, in the order of computation."""
        return iter(self._model.table)

    def __len__(self) -> int:
        """Count the hook points."""
        return len(self._model.table)


def _listed(what: str, given: Sequence[Any]) -> Sequence[Any]:
    """See that hooks come in a list, also a single one."""
    if isinstance(given, tuple) and _is_hook(given):
        raise ArgumentError(
            f"{what} is a list of (name or filter, function) or with positions; put {given!r} in a list"
        )
    return given


def _is_hook(given: Sequence[Any]) -> bool:
    return len(given) in (2, 3) and callable(given[1])


@attrs.frozen
class BoundHookPoint:
    """A hook point of one model, with TransformerLens' methods."""

    _model: Hooked
    point: HookPoint

    @property
    def name(self) -> str:
        """Canonical name."""
        return self.point.name

    @property
    def ctx(self) -> dict[str, Any]:
        """The dictionary that hook functions here share."""
        return self._model.hook_contexts.setdefault(self.name, {})

    def layer(self) -> int | None:
        """0-based block, or None outside the blocks."""
        return self.point.layer

    def add_hook(
        self,
        hook: HookFunction,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Put a hook function here until `reset_hooks`."""
        self._model.add_hook(self.name, hook, dir, is_permanent, level)

    def add_perma_hook(self, hook: HookFunction, dir: Literal["fwd", "bwd"] = "fwd") -> None:
        """Put a hook function here that survives `reset_hooks`."""
        self._model.add_hook(self.name, hook, dir, is_permanent=True)

    def has_hooks(self, dir: Literal["fwd", "bwd", "both"] = "both", including_permanent: bool = True) -> bool:
        """Whether any added hook is here."""
        return any(
            self.name in entry.names
            and dir in (entry.direction, "both")
            and (including_permanent or not entry.is_permanent)
            for entry in self._model.added_hooks
        )

    def remove_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove the added hooks here; hooks that a filter put at other points too stay there."""
        kept: list[HookEntry] = []
        for entry in self._model.added_hooks:
            goes = (
                self.name in entry.names
                and dir in (entry.direction, "both")
                and (including_permanent or not entry.is_permanent)
                and (level is None or entry.level == level)
            )
            others = tuple(name for name in entry.names if name != self.name)
            if not goes:
                kept.append(entry)
            elif others:
                kept.append(attrs.evolve(entry, names=others))
        self._model.added_hooks = kept

    def clear_context(self) -> None:
        """Empty `ctx`."""
        self.ctx.clear()
