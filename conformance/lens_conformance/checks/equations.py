"""What the names mean, among the values themselves: every equation that needs no other forward pass."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from lens_conformance.case import Case
from lens_conformance.checks import check
from lens_conformance.oracle import Pair
from lens_core.errors import LensError

Equation = tuple[str, str, Tensor]
"""The name that is computed, how, and what it should be."""


@check(3, "names of a block are what the others give by the contract's equations, also under an edit", judge="law")
def equations(case: Case) -> None:
    """Of the stream, attention, MLP and norms, with an edit at any name or none; copies, when edited, are read."""
    with case.exact():
        one, ids = case.pair(torch.float64), case.tokens()
        edited = case.deal(one.names(), case.integer(0, 1, "edits"))
        entries = [(name, case.family.edit_at(name)) for name in edited]
        with torch.no_grad(), one.model.hooks(fwd_hooks=entries):
            _, cache = one.model.run_with_cache(ids, names_filter=one.names())
            for layer in range(one.model.cfg.n_layers):
                block = _Block(one, cache, layer)
                for name, how, expected in block.equations():
                    if block.at + name not in edited and not (name.endswith("scale") and block.normed(name) in edited):
                        case.same(f"{block.at}{name}, which is {how},", cache[block.at + name], expected)
        _copies_are_read(case, one, ids)


class _Block:
    """The values of one block, by the contract's names in it."""

    def __init__(self, one: Pair, cache: Any, layer: int) -> None:
        self.one, self.cache, self.layer = one, cache, layer
        self.at = f"blocks.{layer}."

    def normed(self, name: str) -> str:
        """Give the whole name of what a scale divides to."""
        return f"{self.at}{name.rpartition('.')[0]}.hook_normalized"

    def has(self, *names: str) -> bool:
        """Whether these names are in this block's cache."""
        return all(self.at + name in self.cache for name in names)

    def __getitem__(self, name: str) -> Tensor:
        return self.cache[self.at + name]

    def equations(self) -> Iterator[Equation]:
        """Give what can be said of the names that this block has."""
        yield from self._stream()
        yield from self._attention()
        yield from self._mlp()
        yield from self._norms()

    def _stream(self) -> Iterator[Equation]:
        before, name = self["hook_resid_pre"] if self.has("hook_resid_pre") else None, "resid_pre"
        if before is None:
            return
        if self.has("hook_resid_mid", "hook_attn_out"):
            yield "hook_resid_mid", "resid_pre + attn_out", before + self["hook_attn_out"]
        for copy in ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"):
            if self.has(copy) and not self._is_after(copy):
                yield copy, "resid_pre for each head", before[:, :, None].expand_as(self[copy])
        writers = self.one.model.declaration.writers
        if self.has("hook_resid_mid"):
            before, name, writers = self["hook_resid_mid"], "resid_mid", writers[1:]
        if self.has("hook_mlp_in"):
            yield "hook_mlp_in", f"a copy of {name}", before
        if self.has("hook_mixer_in"):
            yield "hook_mixer_in", f"a copy of {name}", before
        if self.has("hook_resid_post", *writers):
            told = " + ".join((name, *(writer.removeprefix("hook_") for writer in writers)))
            yield "hook_resid_post", told, before + sum(self[writer] for writer in writers)

    def _is_after(self, copy: str) -> bool:
        """Whether an edit of `attn_in` comes before this copy of it."""
        return copy != "hook_attn_in" and self.has("hook_attn_in") and not self._is_stream(self["hook_attn_in"])

    def _is_stream(self, copies: Tensor) -> bool:
        return torch.equal(copies, self["hook_resid_pre"][:, :, None].expand_as(copies))

    def _attention(self) -> Iterator[Equation]:
        if self.has("attn.hook_attn_scores", "attn.hook_pattern"):
            yield "attn.hook_pattern", "softmax(attn_scores)", self["attn.hook_attn_scores"].softmax(-1)
        if self.has("attn.hook_z", "attn.hook_pattern", "attn.hook_v"):
            values = self["attn.hook_v_rep"] if self.has("attn.hook_v_rep") else self["attn.hook_v"]
            expected = torch.einsum("bhqk,bkhe->bqhe", self["attn.hook_pattern"], values)
            yield "attn.hook_z", "pattern v", expected
        if self.has("attn.hook_result", "attn.hook_out"):
            expected = self["attn.hook_result"].sum(2)
            if "b_O" in self.one.model.weight_names:
                expected = expected + self.one.model.weight("b_O", self.layer)
            yield "attn.hook_out", "the sum of the heads' results + b_O", expected

    def _mlp(self) -> Iterator[Equation]:
        if self.has("mlp.hook_pre", "mlp.hook_post") and self.one.model.cfg.act_fn is not None:
            expected = ACT2FN[self.one.model.cfg.act_fn](self["mlp.hook_pre"])
            if self.has("mlp.hook_pre_linear"):
                yield "mlp.hook_post", "act(pre) * pre_linear", expected * self["mlp.hook_pre_linear"]
            else:
                yield "mlp.hook_post", "act(pre)", expected

    def _norms(self) -> Iterator[Equation]:
        for name, place in self.one.model.declaration.norms.items():
            scale, normalized, out = (f"{name}.hook_{part}" for part in ("scale", "normalized", "out"))
            if "{layer}" not in place.path or not self.has(scale, normalized, out):
                continue
            module = self.one.hf.get_submodule(place.path.format(layer=self.layer))
            yield out, place.kind.equation, place.kind.affine(module, self[normalized])
            centred = self[normalized] * self[scale]
            own, expected = place.kind.split(module, centred)
            yield scale, "the root of the mean square of its input and eps", expected
            yield normalized, "its centred input / scale", own / self[scale]


def _copies_are_read(case: Case, one: Pair, ids: Tensor) -> None:
    """Edit the copies that a projection reads, and see that it read them: through its norm, and to each query head."""
    layer, part = case.integer(0, one.model.cfg.n_layers - 1, "layer of the copies"), case.choice("qkv", "copies of")
    at, model = f"blocks.{layer}.", one.model
    norm = model.declaration.norms.get("ln1")
    copy, made = f"{at}hook_{part}_input", f"{at}attn.hook_{part}"
    if not {copy, made} <= set(one.names()):
        return
    with torch.no_grad(), model.hooks(fwd_hooks=[(copy, case.family.edit_at(copy))]):
        _, cache = model.run_with_cache(ids, names_filter=one.names())
    read = cache[copy]
    if norm is not None:
        read = one.hf.get_submodule(norm.path.format(layer=layer)).forward(read)
    try:
        weight, bias = model.weight(f"W_{part.upper()}", layer), model.weight(f"b_{part.upper()}", layer)
    except LensError:
        return
    expected = torch.einsum("bphd,hde->bphe", read, weight) + bias
    case.same(f"{made}, which is the edited {copy} through its norm and W_{part.upper()},", cache[made], expected)
    seen, repeated = f"{at}attn.hook_{part}_rep", f"{copy}_rep"
    if repeated in one.names() and seen in one.names() and not _norm_spans_heads(one, at, part):
        with torch.no_grad(), model.hooks(fwd_hooks=[(repeated, case.family.edit_at(repeated))]):
            _, other = model.run_with_cache(ids, names_filter=[seen])
        case.same(f"{seen}, the same whether {repeated} or {copy} is edited,", other[seen], cache[seen])


def _norm_spans_heads(one: Pair, at: str, part: str) -> bool:
    """Whether heads are normed together, so that one head's copy changes with what the others hold."""
    normed = f"{at}attn.hook_{part}_normed"
    if normed not in one.model.table:
        return False
    weight = getattr(one.hf.get_submodule(one.model.table[normed].seam.path), "weight", None)
    return weight is not None and weight.numel() != one.model.cfg.d_head
