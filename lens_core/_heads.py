"""Seams of single heads: their own copies of the attention's input, and what each writes."""

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lens_core._call import ModuleCall
from lens_core._graph import with_gradient_of
from lens_core._linear import linear_weight
from lens_core._plan import ModuleStep
from lens_core._views import Columns
from lens_core._watch import Watch

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["HeadInput", "HeadResult"]


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
                yield ModuleStep(path=path, when="post", act=lambda call, p=part, c=columns: self._override(p, c, call))

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
        edited = [
            head for head in range(copies.shape[2]) if is_edited and not torch.equal(copies[:, :, head], residual)
        ]
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
    module: Any, normed: Float[Tensor, "batch pos some d_model"], columns: Columns, heads: Sequence[int]
) -> Float[Tensor, "batch pos some d_head"]:
    """Apply each head's own columns of a projection to that head's input."""
    with linear_weight(module) as linear:
        if linear is None:  # quantised or adapted: only the module knows its weight; each head keeps its own columns
            full = [
                module.forward(normed[:, :, index])[..., columns.start : columns.stop] for index in range(len(heads))
            ]
            width = (columns.stop - columns.start) // (columns.heads or 1)
            return torch.stack([f.unflatten(-1, (-1, width))[:, :, h] for f, h in zip(full, heads, strict=True)], dim=2)
        weight, bias = linear
        n_heads = columns.heads or 1
        own = rearrange(weight[:, columns.start : columns.stop], "d (h e) -> d h e", h=n_heads)[:, heads]
        out = torch.einsum("bphd,dhe->bphe", normed, own)
        if bias is not None:
            out = out + rearrange(bias[columns.start : columns.stop], "(h e) -> h e", h=n_heads)[heads]
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
            z = rearrange(call.input, "b p (h e) -> b p h e", h=self.heads)
            if linear is None:
                results, bias = _results_by_probing(call.module, z)
            else:
                weight, bias = linear
                results = torch.einsum("bphe,hed->bphd", z, rearrange(weight, "(h e) d -> h e d", h=self.heads))
            new = watch.fire(results, beside=True)
            if watch.edited or watch.rerouted:
                explicit = new.sum(2) if bias is None else new.sum(2) + bias
                call.result = explicit if watch.edited else with_gradient_of(explicit, call.result)


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
