"""Breaks of the core: how functions are called, what is kept, and what is left behind."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_conformance.family import Family
from lens_conformance.mutants import mutant
from lens_core import (
    _attention,
    _cache_sink,
    _context,
    _heads,
    _inputs,
    _loading,
    _pieces,
    _plan,
    _recurrence,
    _tensor_file,
    model,
)
from lens_core._watch import Watch

Patch = pytest.MonkeyPatch


def around(patch: Patch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a function by `change(original, *args, **options)`."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **options: change(original, *args, **options))


@mutant("functions are called and what they return is dropped", killers=("edits", "liveness"))
def edits_are_ignored(patch: Patch, family: Family) -> None:
    around(
        patch,
        Watch,
        "_apply",
        lambda apply, self, entry, value, call, **options: (apply(self, entry, value, call, **options), value)[1],
    )


@mutant("what a function writes into its argument is dropped", killers=("edits",))
def edits_in_place_go_to_a_copy(patch: Patch, family: Family) -> None:
    def call(call: Any, self: Any, entry: Any, handed: Tensor, hook: Any) -> Any:
        return call(self, entry, handed.clone(), hook)

    around(patch, Watch, "_call", call)


@mutant("reading draws a random number", killers=("purity",))
def reading_draws_a_random_number(patch: Patch, family: Family) -> None:
    around(patch, Watch, "fire", lambda fire, *args, **options: (torch.rand(1), fire(*args, **options))[1])


@mutant("what was read is handed on with other low bits", killers=("logits",))
def reading_rounds(patch: Patch, family: Family) -> None:
    def rounded(fire: Any, self: Any, value: Tensor, **options: Any) -> Tensor:
        new = fire(self, value, **options)
        return new * (1 + 2**-20) if new.is_floating_point() else new

    around(patch, Watch, "fire", rounded)


@mutant("a value that was read is cut off autograd's graph", killers=("parameter_gradients",))
def reading_detaches(patch: Patch, family: Family) -> None:
    around(patch, Watch, "fire", lambda fire, *args, **options: fire(*args, **options).detach())


@mutant("in later steps of a sequence, what was read is handed on changed", killers=("split", "generation"))
def reading_disturbs_steps(patch: Patch, family: Family) -> None:
    def disturbed(fire: Any, self: Any, value: Tensor, **options: Any) -> Tensor:
        new = fire(self, value, **options)
        return new * 1.5 if new.is_floating_point() and not self.run.now.is_prefill else new

    around(patch, Watch, "fire", disturbed)


@mutant("functions stop working after the prompt", killers=("split",))
def edits_stop_after_the_prompt(patch: Patch, family: Family) -> None:
    def only_prompt(apply: Any, self: Any, entry: Any, value: Tensor, call: Any, **options: Any) -> Tensor:
        return apply(self, entry, value, call, **options) if call.is_prefill else value

    around(patch, Watch, "_apply", only_prompt)


@mutant("each function is called twice", killers=("fires",))
def a_point_fires_twice(patch: Patch, family: Family) -> None:
    around(patch, Watch, "_call", lambda call, *args: (call(*args), call(*args))[1])


@mutant("a function that returns its argument changes low bits", killers=("identity",))
def an_identity_edit_rounds(patch: Patch, family: Family) -> None:
    def changed(checked: Any, self: Any, new: Any, *rest: Any) -> Tensor:
        new = checked(self, new, *rest)
        return new * (1 + 2**-20) if new.is_floating_point() else new

    around(patch, Watch, "_checked", changed)
    patch.setattr("lens_core._watch.same_bits", lambda a, b: False)


@mutant("a replacement is only half of what comes out", killers=("restoring",))
def a_replacement_is_mixed_in(patch: Patch, family: Family) -> None:
    def mixed(checked: Any, self: Any, new: Any, shown: Tensor, entry: Any) -> Tensor:
        new = checked(self, new, shown, entry)
        return (new + shown) / 2 if new.is_floating_point() else new

    around(patch, Watch, "_checked", mixed)


@mutant(
    "an edit takes the explicit path at positions where it changed nothing",
    killers=("locality",),
    needs=("attn.hook_pattern",),
)
def explicit_everywhere(patch: Patch, family: Family) -> None:
    for module in (_attention, _heads):
        patch.setattr(module, "explicit_where", lambda changed, explicit, own: explicit)


@mutant("a function is told positions one too high", killers=("locality",))
def positions_are_one_too_high(patch: Patch, family: Family) -> None:
    around(
        patch,
        Watch,
        "_hook",
        lambda hook, self, call, absolute, value: hook(self, call, [position + 1 for position in absolute], value),
    )


@mutant("an edit lingers into later runs", killers=("stateless",))
def an_edit_lingers(patch: Patch, family: Family) -> None:
    shifts: list[float] = []

    def remembered(apply: Any, self: Any, entry: Any, value: Tensor, call: Any, **options: Any) -> Tensor:
        new = apply(self, entry, value, call, **options)
        if new is not value and new.is_floating_point():
            shifts.append(1.0)
        return new

    around(patch, Watch, "_apply", remembered)
    around(
        patch,
        Watch,
        "fire",
        lambda fire, self, value, **options: fire(
            self, value + len(shifts) if value.is_floating_point() else value, **options
        ),
    )


@mutant("a hook function is given the model's own tensor", killers=("aliasing",))
def functions_get_the_models_own_tensor(patch: Patch, family: Family) -> None:
    def unguarded(apply: Any, self: Any, entry: Any, value: Tensor, call: Any, **options: Any) -> Tensor:
        if entry.positions is not None or options.get("position") is not None:
            return apply(self, entry, value, call, **options)
        _, hook = self._locate(entry, value, call)
        new = self._call(entry, value, hook)
        return value if new is None else new

    around(patch, Watch, "_apply", unguarded)


@mutant("the cache keeps what an earlier run had", killers=("aliasing",))
def the_cache_is_stale(patch: Patch, family: Family) -> None:
    kept: dict[Any, Tensor] = {}

    def stale(store: Any, self: Any, point: Any, value: Tensor, call: Any, **options: Any) -> None:
        first = kept.setdefault((point.name, value.shape, value.dtype), value.detach().clone())
        return store(self, point, first, call, **options)

    around(patch, _cache_sink.CacheSink, "store", stale)


@mutant("what is cached is of another dtype than declared", killers=("dtypes",))
def the_cache_widens(patch: Patch, family: Family) -> None:
    around(patch, _cache_sink, "moved", lambda moved, tensor, device, dtype: moved(tensor, device, torch.float64))


@mutant("a filter gives every name", killers=("filters",))
def a_filter_gives_all(patch: Patch, family: Family) -> None:
    def everything(run: Any, self: Any, input: Any, *, names_filter: Any = None, **options: Any) -> Any:
        return run(self, input, names_filter=list(self.table) if names_filter is not None else None, **options)

    around(patch, model.LensModel, "run_with_cache", everything)


@mutant("padding is attended to", killers=("padding",))
def padding_is_attended_to(patch: Patch, family: Family) -> None:
    # Not dropped: HF reads position ids that restart, without a mask, as packed sequences, and hides padding that way.
    def seen(read: Any, *args: Any, **options: Any) -> Any:
        mask, ids = read(*args, **options)
        return mask if mask is None else torch.ones_like(mask), ids

    around(patch, _inputs, "_read_mask", seen)


@mutant("a run that stops at a block runs one more", killers=("layers",))
def the_model_stops_a_block_late(patch: Patch, family: Family) -> None:
    def late(layer_range: Any, self: Any, start: Any, stop: Any) -> Any:
        first, last = layer_range(self, start, stop)
        return first, last if last is None else min(last + 1, self.cfg.n_layers)

    around(patch, model.LensModel, "_layer_range", late)


@mutant("weights are read with their first axis backwards", killers=("weights",))
def weights_are_read_backwards(patch: Patch, family: Family) -> None:
    around(patch, _pieces, "read_weight", lambda read, *args, **options: read(*args, **options).flip(0))


@mutant("backward functions are given twice the gradient", killers=("gradients",))
def gradients_are_doubled(patch: Patch, family: Family) -> None:
    around(
        patch,
        Watch,
        "_apply_backward",
        lambda apply, self, entry, call, position, g: apply(self, entry, call, position, 2 * g),
    )


@mutant("a function that detaches does not stop the gradient", killers=("gradients",))
def detaching_stops_nothing(patch: Patch, family: Family) -> None:
    def attached(checked: Any, self: Any, new: Any, shown: Tensor, entry: Any) -> Tensor:
        new = checked(self, new, shown, entry)
        return new if new.requires_grad or not new.is_floating_point() else new + (shown - shown.detach())

    around(patch, Watch, "_checked", attached)


@mutant("an edited state is shown, and the next position starts from the old one", killers=("state",))
def a_state_is_edited_for_show(patch: Patch, family: Family) -> None:
    around(
        patch,
        _recurrence,
        "_shown",
        lambda shown, call, watch, position, state: (shown(call, watch, position, state), state)[1],
    )


@mutant("taps stay on the model after a run", killers=("clean",))
def taps_stay(patch: Patch, family: Family) -> None:
    class Stuck:
        """A handle that does not let go."""

        def remove(self) -> None:
            """Do nothing."""

    around(patch, _plan.Run, "_tap", lambda tap, *args: (tap(*args), Stuck())[1])


@mutant("an error in a function leaves a torch hook behind", killers=("clean",))
def an_error_leaves_a_hook(patch: Patch, family: Family) -> None:
    def leaving(call: Any, self: Any, *args: Any) -> Any:
        try:
            return call(self, *args)
        except Exception:
            self.run.hf_model.register_forward_hook(lambda *given: None)
            raise

    around(patch, Watch, "_call", leaving)


@mutant("a run writes into a weight", killers=("clean",))
def a_run_writes_into_a_weight(patch: Patch, family: Family) -> None:
    def writing(leave: Any, self: Any) -> None:
        with torch.no_grad():
            next(self.hf_model.parameters()).mul_(1.001)
        leave(self)

    around(patch, _plan.Run, "leave_call", writing)


@mutant("files keep half of the digits", killers=("files",))
def files_lose_digits(patch: Patch, family: Family) -> None:
    def halved(write: Any, self: Any, path: Any, tensors: Any, *rest: Any) -> None:
        few = {name: t.to(torch.float16).to(t.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        write(self, path, few, *rest)

    around(patch, _tensor_file.FileKind, "write", halved)


@mutant("a run of one thread is live in all", killers=("threads",))
def runs_are_shared_by_threads(patch: Patch, family: Family) -> None:
    class Shared:
        """A context variable that is the same everywhere."""

        def __init__(self) -> None:
            self.value: Any = {}

        def get(self) -> Any:
            return self.value

        def set(self, value: Any) -> Any:
            self.value, before = value, self.value
            return before

        reset = set

    patch.setattr(_context, "_runs", Shared())


@mutant("edits are lost where accelerate brings the weights", killers=("offload",))
def offloaded_edits_are_lost(patch: Patch, family: Family) -> None:
    def lost(apply: Any, self: Any, entry: Any, value: Tensor, call: Any, **options: Any) -> Tensor:
        placed = any(hasattr(module, "_hf_hook") for module in self.run.hf_model.modules())
        return value if placed else apply(self, entry, value, call, **options)

    around(patch, Watch, "_apply", lost)


@mutant("a config loads whatever it holds", killers=("configuration",))
def configs_are_not_checked(patch: Patch, family: Family) -> None:
    patch.setattr(_loading, "check_config", lambda *args, **options: None)


@mutant("states at the boundaries of chunks are shown smaller", killers=("chunks",), needs=("hook_ssm_state",))
def chunk_boundaries_differ(patch: Patch, family: Family) -> None:
    def smaller(end: Any, self: Any, trajectory: Tensor | None) -> None:
        size = getattr(self.run.hf_model.config, "chunk_size", None)
        if trajectory is not None and size is not None:
            trajectory = trajectory.clone()
            trajectory[:, ::size] *= 0.5
        end(self, trajectory)

    around(patch, Watch, "end_positions", smaller)


@mutant("rows are numbered, and the number is added", killers=("permutation",))
def rows_are_told_apart(patch: Patch, family: Family) -> None:
    counter = itertools.count()

    def numbered(store: Any, self: Any, point: Any, value: Tensor, call: Any, **options: Any) -> None:
        if value.is_floating_point():
            next(counter)
            rows = torch.arange(value.shape[0], dtype=value.dtype).view(-1, *[1] * (value.ndim - 1))
            value = value + rows
        store(self, point, value, call, **options)

    around(patch, _cache_sink.CacheSink, "store", numbered)
