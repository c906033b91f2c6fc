"""Where a call begins and ends: counting, starting and stopping at a layer, and the price of what was asked for."""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from lens_core._call import Call, ModuleCall
from lens_core._functions import function_slot
from lens_core._hf_cache import cache_in, cached_length, note_length
from lens_core._plan import ModuleStep, SlotStep, StopForward
from lens_core.errors import CostWarning
from lens_core.shapes import element_count

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["boundary_steps", "closing_steps", "frames_to_the_user", "warn_of_cost"]

INNER_PACKAGES = ("lens_core", "torch", "transformers", "contextlib")


def boundary_steps(run: "Run") -> Iterator[ModuleStep | SlotStep]:
    """Yield the steps that every run has, before those of its seams."""
    yield ModuleStep(path=run.base, when="pre", act=_begin)
    if run.start_at is not None:
        yield from _start_steps(run, run.start_at)
    if run.stop_at is not None:
        yield ModuleStep(path=_block_path(run, run.stop_at), when="pre", act=_stop)
    yield ModuleStep(path="", when="pre", act=_enter_model)


def closing_steps(run: "Run") -> Iterator[ModuleStep]:
    """Yield the steps that every run has, after those of its seams."""
    yield ModuleStep(path=run.base, when="post", act=_leave_base)
    yield ModuleStep(path="", when="post", act=_leave_model)


def _enter_model(call: ModuleCall) -> None:
    call.run.enter_model()


def _leave_base(call: ModuleCall) -> None:
    output: Any = call.output
    if isinstance(output, Mapping):
        note_length(cache_in(cast("Mapping[str, Any]", output)), call.run.now.total)
    if not call.run.inside_model:  # the base model was called by itself: there is no head to wait for
        call.run.end_call()


def _leave_model(call: ModuleCall) -> None:
    call.run.end_call()


def _begin(call: ModuleCall) -> None:
    tokens: Any = call.args[0] if call.args and isinstance(call.args[0], Tensor) else call.kwargs.get("input_ids")
    source: Tensor = tokens if tokens is not None else call.kwargs["inputs_embeds"]
    batch, n_pos = source.shape[:2]
    past = cached_length(cache_in(call.kwargs))
    call.run.begin_call(Call(batch=batch, n_pos=n_pos, past=past, device=source.device))


def _block_path(run: "Run", layer: int) -> str:
    return run.final if layer == run.table.n_layers else f"{run.blocks}.{layer}"


def _stop(call: ModuleCall) -> None:
    raise StopForward(call.input)


def _start_steps(run: "Run", layer: int) -> Iterator[ModuleStep | SlotStep]:
    """Skip the blocks below `layer` by giving each an instance forward that hands its input on."""
    for skipped in range(layer):
        path = f"{run.blocks}.{skipped}"
        module = run.module(path)
        slot = function_slot(vars(module), "forward", original=module.forward)
        yield SlotStep(path="", slot=slot, key=slot.key, handler=partial(_hand_on, run.block_values))

    def feed(call: ModuleCall) -> None:
        if run.residual is not None:
            call.input = run.residual.clone()  # a cache may keep it, and the user may write to theirs

    yield ModuleStep(path=_block_path(run, layer), when="pre", act=feed)


def _hand_on(values: int | None, original: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    return hidden_states if values is None else (hidden_states, *[None] * (values - 1))


def warn_of_cost(run: "Run", call: Call) -> None:
    """Warn of the bytes that a filter's starred names will cost in this run."""
    starred = [w for w in run.watches if (w.sinks or w.entries) and not w.by_name and not w.point.default]
    sizes = {**run.sizes, "batch": call.batch, "pos": call.n_pos, "query": call.n_pos, "key": call.total}
    itemsize = run.hf_model.dtype.itemsize
    total = sum(element_count(w.point.shape, sizes) for w in starred) * itemsize
    if starred:
        warnings.warn(
            f"a filter asked for {len(starred)} hook points that are not cached by default, such as "
            f"{starred[0].name!r}: {total} bytes ({total / 2**20:.1f} MiB) in this call; "
            "name them one by one, or narrow the filter",
            CostWarning,
            stacklevel=frames_to_the_user(),
        )


def frames_to_the_user() -> int:
    """Count the frames between a warning's caller and the code that is neither ours, torch's nor HF's."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in INNER_PACKAGES:
        frame, level = frame.f_back, level + 1
    return level
