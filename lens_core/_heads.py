"""Seams of single heads: their own copies of the attention's input, and what each writes."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from lens_core._attention import Override, attention_steps
from lens_core._call import ModuleCall
from lens_core._graph import explicit_where, with_gradient_of
from lens_core._linear import linear_weight
from lens_core._norms import norm_of_copy
from lens_core._plan import ModuleStep, SlotStep
from lens_core._views import Columns
from lens_core._watch import Watch

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["HeadInput", "HeadResult", "Projection"]


@attrs.frozen(kw_only=True)
class Projection:
    """Where one of q, k, v is computed: the module and its columns, and the norm that follows."""

    path: str
    columns: Columns
    """With `heads`."""
    norm: str | None = None
    """A norm between this projection and the kernel."""
    norm_takes: Literal["heads", "heads_first", "whole"] = "heads"
    """What that norm is given: `[batch, pos, heads, d_head]`, `[batch, heads, pos, d_head]`, or all heads flat."""
    norm_is_after_rotary: bool = False
    """Whether that norm follows the rotary embedding; it is then given `[batch, heads, pos, d_head]`."""
    in_scale: float = 1.0
    """A factor on what the projection is given, outside of any module."""
    out_scale: float = 1.0
    """A factor on what it gives, outside of any module."""


@attrs.frozen(kw_only=True)
class HeadInput:
    """Copies of the residual stream before the attention's norm, one per head; an edit reaches that head's q, k or v.

    Where a head's copy was edited it goes through the norm and its own columns of the projection. Other positions, rows
    and heads stay as HF computed them, edits of the shared norm included: no row or call knows of another's. `part` is
    `"attn"` (where q, k and v start from), `"q"`, `"k"` or `"v"`. Under grouped-query attention `"k_rep"` and `"v_rep"`
    are one copy per query head, which start from that group's copy: an edit reaches what that query head sees, in this
    call only.
    """

    part: Literal["attn", "q", "k", "v", "k_rep", "v_rep"]
    attention: str
    norm: str | None = None
    """The norm before attention; None where attention reads the residual stream itself."""
    projections: Mapping[str, Projection] = attrs.field(repr=False, hash=False)
    """By part: q, k and v."""
    has_rotary: bool = False

    @property
    def group(self) -> Hashable:
        """All copies of one block belong together."""
        return self.attention

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep | SlotStep]:
        """Copy before the norm's forward, override after each projection's, and at the kernel for single heads."""
        by_part = {watch.point.seam.part: watch for watch in watches}
        yield ModuleStep(
            path=self.norm or self.attention, when="pre", act=lambda call: self._copy(by_part, call.input, call)
        )
        is_repeated = bool(by_part.keys() & {"k_rep", "v_rep"})
        if is_repeated and self.has_rotary:
            yield ModuleStep(path=self.attention, when="pre", act=self._keep_rotary)
        for part, projection in self.projections.items():
            if by_part.keys() & {part, "attn", f"{part}_rep"}:
                yield ModuleStep(path=projection.path, when="post", act=lambda call, p=part: self._override(p, call))
            if f"{part}_rep" in by_part and projection.norm is not None and projection.norm_takes == "whole":
                yield ModuleStep(path=projection.norm, when="pre", act=lambda call, p=part: self._norm_whole(p, call))
        if is_repeated:
            yield from attention_steps(self.attention, {}, run)

    def _keep_rotary(self, call: ModuleCall) -> None:
        call.run.now.scratch[self.attention, "rotary"] = call.kwargs["position_embeddings"]

    def _copy(self, watches: Mapping[str, Watch], residual: Tensor, call: ModuleCall) -> None:
        heads = {part: projection.columns.heads or 1 for part, projection in self.projections.items()}
        start = _Copies(tensor=residual.unsqueeze(2).expand(-1, -1, heads["q"], -1), source=residual)
        if "attn" in watches:
            start = start.fired(watches["attn"])
        for part in self.projections:
            copies = start if heads[part] == heads["q"] else start.of_heads(heads[part])
            if part in watches:
                copies = copies.fired(watches[part])
            repeated = None
            if f"{part}_rep" in watches:
                repeated = copies.repeated(heads["q"] // heads[part]).fired(watches[f"{part}_rep"])
            call.run.now.scratch[self.attention, f"{part}_input"] = (copies, repeated)

    def _override(self, part: str, call: ModuleCall) -> None:
        found: tuple[_Copies, _Copies | None] | None
        found = call.run.now.scratch.pop((self.attention, f"{part}_input"), None)
        if found is None:
            return
        copies, repeated = found
        if copies.edited_heads or copies.rerouted:
            call.result = self._with_heads(part, copies, call)
        if repeated is not None and (repeated.edited_heads or repeated.rerouted):
            scratch = call.run.now.scratch
            scratch[self.attention, f"{part}_rep"] = self._override_of(part, repeated, call)

    def _with_heads(self, part: str, copies: "_Copies", call: ModuleCall) -> Tensor:
        """Put the edited heads' own projections in place of HF's."""
        columns = self.projections[part].columns
        heads = list(range(copies.tensor.shape[2])) if copies.rerouted else copies.edited_heads
        shown = columns.read(call.result, call.run)
        explicit = shown.clone()
        explicit[:, :, heads] = self._projected(part, copies, heads, heads, call)
        bits = torch.where(copies.changed[..., None], explicit.detach(), shown.detach())
        return columns.write(call.result, with_gradient_of(explicit, bits) if copies.rerouted else bits)

    def _override_of(self, part: str, copies: "_Copies", call: ModuleCall) -> Override:
        """Compute the keys or values that some query heads see, from their own copies."""
        projection = self.projections[part]
        edited = copies.edited_heads
        heads = list(range(copies.tensor.shape[2])) if copies.rerouted else edited
        groups = copies.tensor.shape[2] // (projection.columns.heads or 1)
        own = [head // groups for head in heads]
        values = self._projected(part, copies, heads, own, call)
        values = values if projection.out_scale == 1 else values * projection.out_scale
        after = projection.norm if projection.norm_is_after_rotary else None
        if projection.norm is not None and after is None and projection.norm_takes != "whole":
            module, whole = call.run.module(projection.norm), projection.columns.read(call.result, call.run)
            values = _each_normed(module, whole, values, own, projection.norm_takes)
        rotary = call.run.now.scratch.get((self.attention, "rotary")) if part == "k" else None
        norm = None if after is None else call.run.module(after)
        changed = copies.changed[:, :, heads]
        return Override(heads=heads, values=values, changed=changed, edited=bool(edited), rotary=rotary, norm=norm)

    def _norm_whole(self, part: str, call: ModuleCall) -> None:
        """Norm the override's heads where all heads are normed together: beside what functions made of the others."""
        scratch, key = call.run.now.scratch, (self.attention, f"{part}_rep")
        override: Override | None = scratch.get(key)
        if override is None:
            return
        heads = self.projections[part].columns.heads or 1
        groups = (self.projections["q"].columns.heads or 1) // heads
        whole, own = Columns(heads=heads).pick(call.input), [head // groups for head in override.heads]
        values = _each_normed(call.module, whole, override.values, own, "whole")
        scratch[key] = attrs.evolve(override, values=values)

    def _projected(
        self, part: str, copies: "_Copies", heads: Sequence[int], own: Sequence[int], call: ModuleCall
    ) -> Tensor:
        """Norm the copies of some heads and project each by the columns of `own`."""
        normed = copies.tensor[:, :, heads]
        if self.norm is not None:
            normed = norm_of_copy(call.run, self.norm, normed)
        projection = self.projections[part]
        normed = normed if projection.in_scale == 1 else normed * projection.in_scale
        return _project_heads(call.module, normed, projection.columns, own)


@attrs.frozen(kw_only=True, eq=False)
class _Copies:
    """One copy of the residual stream for each head, and what functions did to them."""

    tensor: Float[Tensor, "batch pos heads d_model"]
    source: Float[Tensor, "batch pos d_model"]
    edited: bool = False
    rerouted: bool = False

    @property
    def changed(self) -> Bool[Tensor, "batch pos heads"]:
        """Where a head's copy holds other bits than the residual stream."""
        return (self.tensor != self.source.unsqueeze(2)).any(-1)

    @property
    def edited_heads(self) -> list[int]:
        """The heads whose copy holds other bits than the residual stream."""
        if not self.edited:
            return []
        return [h for h in range(self.tensor.shape[2]) if not torch.equal(self.tensor[:, :, h], self.source)]

    def fired(self, watch: Watch) -> "_Copies":
        """Pass the copies through a watch."""
        tensor = watch.fire(self.tensor, beside=True)
        return attrs.evolve(
            self, tensor=tensor, edited=self.edited or watch.edited, rerouted=self.rerouted or watch.rerouted
        )

    def of_heads(self, heads: int) -> "_Copies":
        """Start anew with another number of heads."""
        return _Copies(tensor=self.source.unsqueeze(2).expand(-1, -1, heads, -1), source=self.source)

    def repeated(self, groups: int) -> "_Copies":
        """Give each query head of a group that group's copy."""
        return attrs.evolve(self, tensor=self.tensor.repeat_interleave(groups, dim=2), edited=False, rerouted=False)


def _each_normed(module: Any, whole: Tensor, values: Tensor, own: Sequence[int], takes: str) -> Tensor:
    """Norm the heads of `values`, each in the place of its own head among `whole`."""
    each = [_normed(module, whole, values[:, :, index], head, takes) for index, head in enumerate(own)]
    return torch.stack(each, dim=2)


def _normed(module: Any, whole: Tensor, own: Tensor, head: int, takes: str) -> Tensor:
    """Norm all heads with one head's values replaced, and give that head's."""
    replaced = torch.cat([whole[:, :, :head], own[:, :, None], whole[:, :, head + 1 :]], dim=2)
    if takes == "whole":
        return module.forward(replaced.flatten(2)).view_as(replaced)[:, :, head]
    if takes == "heads_first":
        return module.forward(replaced.transpose(1, 2))[:, head]
    return module.forward(replaced)[:, :, head]


def _project_heads(
    module: Any, inputs: Float[Tensor, "batch pos some d_model"], columns: Columns, heads: Sequence[int]
) -> Float[Tensor, "batch pos some d_head"]:
    """Apply one head's columns of a projection to each input."""
    with linear_weight(module) as linear:
        if linear is None:  # quantised or adapted: only the module knows its weight; each keeps its own head's columns
            each = [columns.pick(module.forward(inputs[:, :, i]))[:, :, head] for i, head in enumerate(heads)]
            return torch.stack(each, dim=2)
        weight, bias = linear
        out = torch.einsum("bphd,dhe->bphe", inputs, columns.pick(weight)[:, heads])
        return out if bias is None else out + columns.pick(bias)[heads]


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
            z = rearrange(call.input, "b p (h e) -> b p h e", h=self.heads)
            if linear is None:
                results, bias = _results_by_probing(call.module, z)
            else:
                weight, bias = linear
                results = torch.einsum("bphe,hed->bphd", z, rearrange(weight, "(h e) d -> h e d", h=self.heads))
            new = watch.fire(results, beside=True)
            if watch.edited or watch.rerouted:
                explicit = new.sum(2) if bias is None else new.sum(2) + bias
                changed = (new != results).flatten(2).any(-1, keepdim=True)
                call.result = explicit_where(changed, explicit, call.result)


def _results_by_probing(
    module: Any, z: Float[Tensor, "batch pos n_heads d_head"]
) -> tuple[Float[Tensor, "batch pos n_heads d_model"], Tensor]:
    """Find per-head results without the weight: push one head at a time through the module, less its bias.

    Costs n_heads + 1 forwards of the module, and loses low bits in half precision.
    """
    bias = module.forward(torch.zeros_like(z[:1, :1]).flatten(2))[0, 0]
    alone = torch.eye(z.shape[2], dtype=z.dtype, device=z.device)
    results = [module.forward((z * alone[h][:, None]).flatten(2)) - bias for h in range(z.shape[2])]
    return torch.stack(results, dim=2), bias
