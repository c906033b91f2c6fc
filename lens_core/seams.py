"""Where hook points live: the seams that an architecture declares them through.

A seam is a record. `group` says which hook points share its steps; `steps` turns the watches of one group into what is
done before and after the forward of some modules. A value is replaced for everything downstream, or left bit for bit.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import attrs
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_core._attention import AttentionSeam as Attention
from lens_core._call import ModuleCall
from lens_core._graph import with_gradient_of
from lens_core._linear import linear_weight
from lens_core._norms import NormKind
from lens_core._plan import ModuleStep, SlotStep
from lens_core._watch import Watch

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = [
    "Attention",
    "Columns",
    "Embedding",
    "HeadInput",
    "HeadResult",
    "ModuleInput",
    "ModuleOutput",
    "NormInside",
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


# ---------------------------------------------------------------------- views


@runtime_checkable
class View(Protocol):
    """How a hook point's value is found in a module's tensor, and put back."""

    def read(self, tensor: Tensor, run: "Run") -> Tensor: ...

    def write(self, tensor: Tensor, value: Tensor) -> Tensor: ...


@attrs.frozen(kw_only=True)
class Whole:
    """The module's tensor itself, with a batch axis of one expanded to the call's batch."""

    def read(self, tensor: Tensor, run: "Run") -> Tensor:
        """Show the tensor."""
        batch = run.now.batch
        return tensor.expand(batch, *tensor.shape[1:]) if tensor.shape[0] == 1 != batch else tensor

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Replace the tensor."""
        return value


@attrs.frozen(kw_only=True)
class Columns:
    """Columns `start` to `stop` of the last axis, cut into heads where `heads` is given: `[batch, pos, heads, width]`."""

    start: int
    stop: int
    heads: int | None = None

    def read(self, tensor: Tensor, run: "Run") -> Tensor:
        """Show the columns, as a view."""
        shown = tensor[..., self.start : self.stop]
        return shown if self.heads is None else shown.unflatten(-1, (self.heads, -1))

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Put new columns beside the old ones, in a new tensor."""
        flat = value if self.heads is None else value.flatten(-2)
        if self.start == 0 and self.stop == tensor.shape[-1]:
            return flat
        return torch.cat([tensor[..., : self.start], flat, tensor[..., self.stop :]], dim=-1)


WHOLE = Whole()

# ---------------------------------------------------------------------- modules


@attrs.frozen(kw_only=True)
class ModuleInput:
    """The first tensor that a module receives.

    `reaches` says what an edit is for: `"module"`, this module alone (its input is replaced), or `"all"`, everything
    that holds the tensor: the value is written in place, which reaches HF's local variable for the residual stream. That
    needs a tensor that nothing has read yet, such as a fresh sum, and does not work under `torch.vmap`.
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
        value = watch.fire(shown)
        if self.reaches == "all":
            if value is not shown:
                tensor.copy_(self.view.write(tensor, value))
        elif value is not shown or (watch.rerouted and shown is not tensor):
            call.input = self.view.write(tensor, value)


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


@attrs.frozen(kw_only=True)
class Unembedding:
    """What the unembedding receives and returns, for all positions of the call.

    HF may compute the last positions only (`logits_to_keep`, as `generate` does with a prompt). The others are then
    computed beside, for the eyes of hooks and caches; what HF goes on with keeps its bits.
    """

    base: str
    path: str
    part: Literal["in", "out"]

    @property
    def group(self) -> Hashable:
        """Input and outputs of one unembedding belong together."""
        return self.path

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep]:
        """Keep the base model's output, fire before the unembedding's forward, and after."""
        before = [watch for watch in watches if watch.point.seam.part == "in"]
        after = [watch for watch in watches if watch.point.seam.part == "out"]
        yield ModuleStep(path=self.base, when="post", act=self._keep)
        yield ModuleStep(path=self.path, when="pre", act=lambda call: self._before(before, call))
        if after:
            yield ModuleStep(path=self.path, when="post", act=lambda call: self._after(after, call))

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

    def _after(self, watches: Sequence[Watch], call: ModuleCall) -> None:
        own = call.result
        n_kept, n_pos = own.shape[1], call.run.now.n_pos
        full = own
        if n_kept != n_pos:
            with torch.set_grad_enabled(any(watch.needs_graph for watch in watches)):
                earlier = call.module.forward(call.run.now.scratch[self.path][:, : n_pos - n_kept])
            full = torch.cat([earlier, own], dim=1)
        value = full
        for watch in watches:
            value = watch.fire(value)
        if value is not full or (full is not own and any(watch.rerouted for watch in watches)):
            call.result = value[:, n_pos - n_kept :]


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
        with torch.set_grad_enabled(any(watch.needs_graph for watch in watches)):
            centred, scale = self.kind.split(call.module, call.input)
            if scale_watch is not None:
                shown = scale.to(dtype)
                new = scale_watch.fire(shown, beside=True)
                scale = new.to(scale.dtype) if new is not shown or scale_watch.rerouted else scale
            normalized = (centred / scale).to(dtype)
            if normalized_watch is not None:
                normalized = normalized_watch.fire(normalized, beside=True)
            if any(watch.edited or watch.rerouted for watch in watches):
                explicit = self.kind.affine(call.module, normalized)
                is_edited = any(watch.edited for watch in watches)
                call.result = explicit if is_edited else with_gradient_of(explicit, call.result)


# ---------------------------------------------------------------------- heads


@attrs.frozen(kw_only=True)
class HeadInput:
    """Copies of the residual stream before the attention's norm, one per head; an edit reaches that head's q, k or v.

    An edited head's copy goes through the norm and its own columns of the projection; other heads stay as HF computed
    them. `part` is `"attn"` (where q, k and v start from), `"q"`, `"k"` or `"v"`.
    """

    part: Literal["attn", "q", "k", "v"]
    norm: str
    projections: tuple[tuple[str, str, Columns], ...] = attrs.field(repr=False)
    """For q, k and v: the part, the projection's path, and its columns there."""

    @property
    def group(self) -> Hashable:
        """All copies of one block belong together."""
        return self.norm

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep]:
        """Copy before the norm's forward, override after each projection's."""
        by_part = {watch.point.seam.part: watch for watch in watches}
        parts = [part for part, _, _ in self.projections if part in by_part or "attn" in by_part]
        yield ModuleStep(path=self.norm, when="pre", act=lambda call: self._copy(by_part, parts, call))
        for part, path, columns in self.projections:
            if part in parts:
                yield ModuleStep(
                    path=path, when="post", act=lambda call, p=part, c=columns: self._override(p, c, call)
                )

    def _copy(self, watches: dict[str, Watch], parts: Sequence[str], call: ModuleCall) -> None:
        residual = call.input
        heads = {part: columns.heads or 1 for part, _, columns in self.projections}
        start = residual.unsqueeze(2).expand(-1, -1, heads["q"], -1)
        is_edited = is_rerouted = False
        if "attn" in watches:
            start = watches["attn"].fire(start, beside=True)
            is_edited, is_rerouted = watches["attn"].edited, watches["attn"].rerouted
        norm = call.module
        for part in parts:
            copies = start if heads[part] == heads["q"] else residual.unsqueeze(2).expand(-1, -1, heads[part], -1)
            part_edited, part_rerouted = is_edited, is_rerouted
            if part in watches:
                copies = watches[part].fire(copies, beside=True)
                part_edited = part_edited or watches[part].edited
                part_rerouted = part_rerouted or watches[part].rerouted
            if part_edited or part_rerouted:
                call.run.now.scratch[self.norm, part] = (norm, residual, copies, part_edited, part_rerouted)

    def _override(self, part: str, columns: Columns, call: ModuleCall) -> None:
        found = call.run.now.scratch.pop((self.norm, part), None)
        if found is None:
            return
        norm, residual, copies, is_edited, is_rerouted = found
        edited = [head for head in range(copies.shape[2]) if is_edited and not torch.equal(copies[:, :, head], residual)]
        heads = list(range(copies.shape[2])) if is_rerouted else edited
        if not heads:
            return
        normed = norm.forward(copies[:, :, heads])  # not __call__: the norm's own hooks have fired
        shown = columns.read(call.result, call.run)
        explicit = shown.clone()
        explicit[:, :, heads] = _project_heads(call.module, normed, columns, heads)
        bits = shown.detach().clone()
        bits[:, :, edited] = explicit.detach()[:, :, edited]
        call.result = columns.write(call.result, with_gradient_of(explicit, bits) if is_rerouted else bits)


def _project_heads(
    module: nn.Module, normed: Float[Tensor, "batch pos some d_model"], columns: Columns, heads: Sequence[int]
) -> Float[Tensor, "batch pos some d_head"]:
    """Apply each head's own columns of a projection to that head's input."""
    with linear_weight(module) as linear:
        if linear is None:  # quantised or adapted: only the module knows its weight, so every head is computed and one kept
            full = [module.forward(normed[:, :, index])[..., columns.start : columns.stop] for index in range(len(heads))]
            width = (columns.stop - columns.start) // (columns.heads or 1)
            return torch.stack([f.unflatten(-1, (-1, width))[:, :, h] for f, h in zip(full, heads, strict=True)], dim=2)
        weight, bias = linear
        columns_of = weight[:, columns.start : columns.stop].unflatten(-1, (columns.heads or 1, -1))[:, heads]
        out = torch.einsum("bphd,dhe->bphe", normed, columns_of)
        if bias is not None:
            out = out + bias[columns.start : columns.stop].unflatten(-1, (columns.heads or 1, -1))[heads]
        return out


@attrs.frozen(kw_only=True)
class HeadResult:
    """What each head writes: z times its own rows of W_O, without the bias; their sum and the bias are the output."""

    path: str
    heads: int

    @property
    def group(self) -> Hashable:
        """Each stands alone."""
        return self

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep]:
        """Fire after the output projection's forward."""
        for watch in watches:
            yield ModuleStep(path=self.path, when="post", act=lambda call, w=watch: self._fire(w, call))

    def _fire(self, watch: Watch, call: ModuleCall) -> None:
        with torch.set_grad_enabled(watch.needs_graph), linear_weight(call.module) as linear:
            z = call.input.unflatten(-1, (self.heads, -1))
            if linear is None:
                results, bias = _results_by_probing(call.module, z)
            else:
                weight, bias = linear
                results = torch.einsum("bphe,hed->bphd", z, weight.unflatten(0, (self.heads, -1)))
            new = watch.fire(results, beside=True)
            if watch.edited or watch.rerouted:
                explicit = new.sum(2) if bias is None else new.sum(2) + bias
                call.result = explicit if watch.edited else with_gradient_of(explicit, call.result)


def _results_by_probing(
    module: nn.Module, z: Float[Tensor, "batch pos n_heads d_head"]
) -> tuple[Float[Tensor, "batch pos n_heads d_model"], Tensor]:
    """Find per-head results without the weight: push one head at a time through the module, less its bias.

    Costs n_heads + 1 forwards of the module, and loses low bits in half precision.
    """
    bias = module.forward(torch.zeros_like(z[:1, :1]).flatten(2))[0, 0]
    alone = torch.eye(z.shape[2], dtype=z.dtype, device=z.device)
    results = [module.forward((z * alone[h][:, None]).flatten(2)) - bias for h in range(z.shape[2])]
    return torch.stack(results, dim=2), bias
