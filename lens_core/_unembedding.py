"""The end of the model: what the unembedding receives and returns, and the logits that are made of it."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from torch import Tensor

from lens_core._call import ModuleCall
from lens_core._graph import gradients
from lens_core._plan import ModuleStep
from lens_core._watch import Watch
from lens_core.errors import UnsupportedHookError

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["Unembedding"]


@attrs.frozen(kw_only=True)
class Unembedding:
    """What the unembedding receives and returns, and the logits, for all positions of the call.

    HF may compute the last positions only (`logits_to_keep`, as `generate` does with a prompt). The others are then
    computed beside, for the eyes of hooks and caches; what HF goes on with keeps its bits. `part` `"logits"` is for
    models that scale or cap what the unembedding returns, by `finish`; elsewhere the logits are `"out"`.
    """

    base: str
    path: str
    part: Literal["in", "out", "logits"]
    finish: Callable[[Tensor], Tensor] | None = None

    @property
    def group(self) -> Hashable:
        """All places of one unembedding belong together."""
        return self.path

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep]:
        """Keep the base model's output, fire before the unembedding's forward, after it, and after the model's."""
        before = [watch for watch in watches if watch.point.seam.part == "in"]
        after = [watch for watch in watches if watch.point.seam.part == "out"]
        last = [watch for watch in watches if watch.point.seam.part == "logits"]
        yield ModuleStep(path="", when="pre", act=_check_kept)
        yield ModuleStep(path=self.base, when="post", act=self._keep)
        yield ModuleStep(path=self.path, when="pre", act=lambda call: self._before(before, call))
        if after or last:
            needs_graph = any(watch.needs_graph for watch in (*after, *last))
            yield ModuleStep(path=self.path, when="post", act=lambda call: self._after(after, call, needs_graph))
        if last:
            yield ModuleStep(path="", when="post", act=lambda call: self._logits(last, call))

    def _keep(self, call: ModuleCall) -> None:
        call.run.now.scratch[self.path] = call.result

    def _before(self, watches: Sequence[Watch], call: ModuleCall) -> None:
        kept, scratch = call.input, call.run.now.scratch
        n_kept, n_pos = kept.shape[1], call.run.now.n_pos
        full = kept if n_kept == n_pos else scratch[self.path]
        value = full
        for watch in watches:
            value = watch.fire(value)
        scratch[self.path] = value
        if value is not full or (watches and watches[0].rerouted):
            call.input = value[:, n_pos - n_kept :]

    def _after(self, watches: Sequence[Watch], call: ModuleCall, needs_graph: bool) -> None:
        own = call.result
        n_kept, n_pos = own.shape[1], call.run.now.n_pos
        full = own
        if n_kept != n_pos:
            with gradients(needs_graph):
                earlier = call.module.forward(call.run.now.scratch[self.path][:, : n_pos - n_kept])
            full = torch.cat([earlier, own], dim=1)
        value = full
        for watch in watches:
            value = watch.fire(value)
        call.run.now.scratch[self.path, "out"] = value
        if value is not full or (full is not own and any(watch.rerouted for watch in watches)):
            call.result = value[:, n_pos - n_kept :]

    def _logits(self, watches: Sequence[Watch], call: ModuleCall) -> None:
        key = _logits_key(call.output)
        own = call.output[key]
        n_kept, n_pos = own.shape[1], call.run.now.n_pos
        full = own
        if n_kept != n_pos and self.finish is not None:
            with gradients(any(watch.needs_graph for watch in watches)):
                earlier = self.finish(call.run.now.scratch[self.path, "out"][:, : n_pos - n_kept])
            full = torch.cat([earlier, own], dim=1)
        value = full
        for watch in watches:
            value = watch.fire(value)
        if value is full and not (full is not own and any(watch.rerouted for watch in watches)):
            return
        has_loss = key == 1 or (key == "logits" and call.output[0].ndim == 0)
        if has_loss and any(watch.edited or watch.rerouted for watch in watches):
            raise UnsupportedHookError(
                "HF has computed its loss before hook_logits, where logits are scaled or capped: an edit or a gradient "
                "there would miss it; call the model without labels, and take the loss from lens: return_type='loss'"
            )
        call.output = _with(call.output, key, value[:, n_pos - n_kept :])
        call.output_changed = True


def _check_kept(call: ModuleCall) -> None:
    if isinstance(call.kwargs.get("logits_to_keep"), Tensor):
        raise UnsupportedHookError(
            "logits_to_keep as a tensor of indices picks positions that the hook points at the end of a model cannot "
            "tell; give a number, or leave it out and pick from the logits"
        )


def _logits_key(output: Any) -> Any:
    """Find the logits in HF's output: a record, or a tuple that a loss may come first in."""
    return "logits" if hasattr(output, "logits") else int(output[0].ndim == 0)


def _with(output: Any, key: Any, value: Tensor) -> Any:
    if isinstance(output, tuple):
        return (*output[:key], value, *output[key + 1 :])
    return type(output)(**{**output, key: value})
