"""Where hook points live: the seams that an architecture declares them through.

A seam is a record. `group` says which hook points share its steps; `steps` turns the watches of one group into what is
done before and after the forward of some modules. A value is replaced for everything downstream, or left bit for bit.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor

from lens_core._attention import Attention
from lens_core._branches import BranchInput, ScaledBranch
from lens_core._call import ModuleCall
from lens_core._experts import ExpertOutput, Router
from lens_core._graph import gradients, with_gradient_of
from lens_core._heads import HeadInput, HeadResult, Projection
from lens_core._norms import NormKind
from lens_core._plan import ModuleStep, SlotStep
from lens_core._unembedding import Unembedding
from lens_core._views import WHOLE, Columns, HeadsFirst, View, Whole
from lens_core._watch import Watch

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = [
    "Attention",
    "BranchInput",
    "Columns",
    "Embedding",
    "ExpertOutput",
    "HeadInput",
    "HeadResult",
    "HeadsFirst",
    "ModuleInput",
    "ModuleOutput",
    "NormInside",
    "Projection",
    "Router",
    "ScaledBranch",
    "Seam",
    "Tokens",
    "Unembedding",
    "View",
    "Whole",
]


@runtime_checkable
class Seam(Protocol):
    """What a place needs to be reached."""

    @property
    def group(self) -> Hashable:
        """Hook points whose seams are of one type and one group share their steps."""
        ...

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep | SlotStep]:
        """Give the steps that serve these watches, all of this seam's group."""
        ...


# ---------------------------------------------------------------------- modules


@attrs.frozen(kw_only=True)
class ModuleInput:
    """The first tensor that a module receives.

    `reaches` says what an edit is for: `"module"`, this module alone (its input is replaced), or `"all"`, everything
    that holds the tensor: the value is written in place, which reaches HF's local variable for the residual stream.
    That needs a tensor that nothing has read yet, such as a fresh sum, and does not work under `torch.vmap`.
    """

    path: str
    view: View = WHOLE
    reaches: Literal["module", "all"] = "module"
    is_copy: bool = False
    """Whether the module reads a copy, so that gradients of what else reads the tensor stay out."""

    @property
    def group(self) -> Hashable:
        """Each stands alone."""
        return self

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep]:
        """Fire before the module's forward."""
        for watch in watches:
            yield ModuleStep(path=self.path, when="pre", act=lambda call, w=watch: self._fire(w, call))

    def _fire(self, watch: Watch, call: ModuleCall) -> None:
        tensor = call.input
        source = tensor.view_as(tensor) if self.is_copy and torch.is_grad_enabled() else tensor
        shown = self.view.read(source, call.run)
        value = watch.fire(shown, is_written_in_place=self.reaches == "all")
        if self.reaches == "all":
            if value is not shown:
                tensor.copy_(self.view.write(tensor, value))
            return
        # A copy that was only read stays out: gradients of the branches would be added in another order.
        is_read = self.is_copy and not watch.edited and not watch.rerouted
        if not is_read and (value is not shown or (watch.rerouted and shown is not tensor)):
            new = self.view.write(tensor, value)
            if self.is_copy:
                call.give_copy(new)
            else:
                call.input = new


@attrs.frozen(kw_only=True)
class ModuleOutput:
    """The first tensor that a module returns."""

    path: str
    view: View = WHOLE

    @property
    def group(self) -> Hashable:
        """Each stands alone."""
        return self

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep]:
        """Fire after the module's forward."""
        for watch in watches:
            yield ModuleStep(path=self.path, when="post", act=lambda call, w=watch: self._fire(w, call))

    def _fire(self, watch: Watch, call: ModuleCall) -> None:
        tensor = call.result
        shown = self.view.read(tensor, call.run)
        value = watch.fire(shown)
        if value is not shown or (watch.rerouted and shown is not tensor):
            call.result = self.view.write(tensor, value)


@attrs.frozen(kw_only=True)
class Tokens:
    """The token ids that the base model receives; absent when embeddings come in their place."""

    path: str

    @property
    def group(self) -> Hashable:
        """One for each base model."""
        return self

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep]:
        """Fire before the base model's forward."""
        for watch in watches:
            yield ModuleStep(path=self.path, when="pre", act=lambda call, w=watch: self._fire(w, call))

    def _fire(self, watch: Watch, call: ModuleCall) -> None:
        if not (call.args and isinstance(call.args[0], Tensor)) and call.kwargs.get("input_ids") is None:
            if not watch.by_name:  # a filter may choose it; who names it is told that there are no tokens
                call.run.now.fired[watch.name] = 1
            return
        tokens = call.args[0] if call.args and isinstance(call.args[0], Tensor) else call.kwargs["input_ids"]
        value = watch.fire(tokens)
        if value is tokens:
            return
        if call.args and isinstance(call.args[0], Tensor):
            call.args = (value, *call.args[1:])
        else:
            call.kwargs = {**call.kwargs, "input_ids": value}
        call.input_changed = True


@attrs.frozen(kw_only=True)
class Embedding:
    """What the token embedding contributes: the module's output, or the embeddings that the base model was given."""

    base: str
    path: str

    @property
    def group(self) -> Hashable:
        """One for each embedding."""
        return self

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep]:
        """Fire after the embedding's forward, or before the base model's."""
        for watch in watches:
            yield ModuleStep(path=self.base, when="pre", act=lambda call, w=watch: self._fire_given(w, call))
            yield from ModuleOutput(path=self.path).steps([watch], run)

    def _fire_given(self, watch: Watch, call: ModuleCall) -> None:
        given = call.kwargs.get("inputs_embeds")
        if given is not None:
            value = watch.fire(given)
            if value is not given:
                call.kwargs = {**call.kwargs, "inputs_embeds": value}
                call.input_changed = True


# ---------------------------------------------------------------------- inside a norm


@attrs.frozen(kw_only=True)
class NormInside:
    """The scale of a norm, or its input over the scale; computed beside HF's norm, and in its place where edited."""

    path: str
    part: Literal["scale", "normalized"]
    kind: NormKind

    @property
    def group(self) -> Hashable:
        """Scale and normalized input of one norm belong together."""
        return self.path

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep]:
        """Fire after the norm's forward."""
        parts = {watch.point.seam.part: watch for watch in watches}
        yield ModuleStep(
            path=self.path, when="post", act=lambda call: self._fire(parts.get("scale"), parts.get("normalized"), call)
        )

    def _fire(self, scale_watch: Watch | None, normalized_watch: Watch | None, call: ModuleCall) -> None:
        watches = [watch for watch in (scale_watch, normalized_watch) if watch is not None]
        dtype = call.input.dtype
        with gradients(any(watch.needs_graph for watch in watches)):
            # On several devices the input may still be where the module before it is.
            centred, scale = self.kind.split(call.module, call.input.to(call.result.device))
            is_new = torch.zeros((), dtype=torch.bool, device=scale.device)
            if scale_watch is not None:
                shown = scale.to(dtype)
                new = scale_watch.fire(shown, beside=True)
                if torch.is_grad_enabled() and shown.requires_grad and not new.requires_grad:
                    call.run.now.scratch[self.path, "stopped"] = self.kind
                if scale_watch.edited or scale_watch.rerouted:
                    # Where no function changed it, the scale keeps the digits that the model's dtype has not.
                    is_new = new != shown
                    scale = torch.where(is_new, new.to(scale.dtype), with_gradient_of(new.to(scale.dtype), scale))
            normalized = (centred / scale).to(dtype)
            if normalized_watch is not None:
                new = normalized_watch.fire(normalized, beside=True)
                is_new = is_new | (new != normalized).any(-1, keepdim=True) if normalized_watch.edited else is_new
                normalized = new
            if any(watch.edited or watch.rerouted for watch in watches):
                explicit = self.kind.affine(call.module, normalized)
                own = with_gradient_of(explicit, call.result)  # other positions keep HF's rounding
                call.result = torch.where(is_new, explicit, own) if any(w.edited for w in watches) else own
