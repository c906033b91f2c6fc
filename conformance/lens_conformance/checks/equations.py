"""What the names mean, among the values themselves: every equation that needs no other forward pass."""

from collections.abc import Iterable, Iterator
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
            places = [_Block(one, cache, layer) for layer in range(one.model.cfg.n_layers)]
            for place in (*places, _Outside(one, cache)):
                for name, how, expected in place.equations():
                    is_set = place.at + name in edited or (name.endswith("scale") and place.normed(name) in edited)
                    if not is_set:
                        case.same(f"{place.at}{name}, which is {how},", cache[place.at + name], expected)
        _copies_are_read(case, one, ids)


_READ_BY = {
    "ln1": ("hook_resid_pre",),
    "ln2": ("hook_mlp_in", "hook_resid_mid"),
    "ln1_post": ("attn.hook_out",),
    "ln2_post": ("mlp.hook_out",),
    "norm": ("hook_mixer_in", "hook_resid_pre"),
}


class _Place:
    """The values at the names with one prefix, by what follows it."""

    def __init__(self, one: Pair, cache: Any, at: str, layer: int | None) -> None:
        self.one, self.cache, self.at, self.layer = one, cache, at, layer

    def normed(self, name: str) -> str:
        """Give the whole name of what a scale divides to."""
        return f"{self.at}{name.rpartition('.')[0]}.hook_normalized"

    def has(self, *names: str) -> bool:
        """Whether these names are in the cache."""
        return all(self.at + name in self.cache for name in names)

    def declares(self, name: str) -> bool:
        """Whether this block has such a place at all."""
        return self.at + name in self.one.model.table

    def __getitem__(self, name: str) -> Tensor:
        return self.cache[self.at + name]

    def _norms(self) -> Iterator[Equation]:
        for name, place in self.one.model.declaration.norms.items():
            scale, normalized, out = (f"{name}.hook_{part}" for part in ("scale", "normalized", "out"))
            if ("{layer}" in place.path) != (self.layer is not None) or not self.has(scale, normalized, out):
                continue
            module = self.one.hf.get_submodule(place.path.format(layer=self.layer))
            yield out, place.kind.equation, place.kind.affine(module, self[normalized])
            read = next((read for read in self._reads(name) if read in self.cache), None)
            told = "its input" if read is None else read.removeprefix(self.at)
            own, expected = place.kind.split(
                module, self[normalized] * self[scale] if read is None else self.cache[read]
            )
            yield scale, f"the root of the mean square of {told} and eps", expected
            yield normalized, f"{told}, centred if it is a LayerNorm, / scale", own / self[scale]

    def _reads(self, norm: str) -> list[str]:
        """List the names of what a norm of the contract reads; of those that are there, it is the first."""
        if norm == "ln_final":
            return [f"blocks.{self.one.model.cfg.n_layers - 1}.hook_resid_post"]
        # Where attention reads the same norm, the mixer's copy of the stream passes it by.
        kin = "norm" if norm == "ln1" and not self.declares("hook_attn_out") else norm
        return [f"{self.at}{name}" for name in _READ_BY.get(kin, ())]


class _Outside(_Place):
    """The names outside of the blocks."""

    def __init__(self, one: Pair, cache: Any) -> None:
        super().__init__(one, cache, "", None)

    def equations(self) -> Iterator[Equation]:
        """Give what can be said of the embeddings, the last norm and the unembedding."""
        embeddings = self.one.model.declaration.embeddings
        if self.has("blocks.0.hook_resid_pre", *embeddings):
            yield "blocks.0.hook_resid_pre", " + ".join(embeddings), sum(self[name] for name in embeddings)
        yield from self._norms()
        if self.has("unembed.hook_in", "ln_final.hook_out"):
            yield "unembed.hook_in", "ln_final.hook_out", self["ln_final.hook_out"]
        model = self.one.model
        if self.has("unembed.hook_in", "unembed.hook_out") and {"W_U", "b_U"} <= set(model.weight_names):
            expected = self["unembed.hook_in"] @ model.weight("W_U") + model.weight("b_U")
            yield "unembed.hook_out", "unembed.in W_U + b_U", expected


class _Block(_Place):
    """The values of one block, by the contract's names in it."""

    def __init__(self, one: Pair, cache: Any, layer: int) -> None:
        super().__init__(one, cache, f"blocks.{layer}.", layer)

    def equations(self) -> Iterator[Equation]:
        """Give what can be said of the names that this block has."""
        yield from self._between()
        yield from self._stream()
        yield from self._attention()
        yield from self._heads()
        yield from self._mlp()
        yield from self._selection()
        yield from self._scan()
        yield from self._norms()

    def _between(self) -> Iterator[Equation]:
        before = f"blocks.{(self.layer or 0) - 1}.hook_resid_post"
        if self.layer and before in self.cache and self.has("hook_resid_pre"):
            yield "hook_resid_pre", f"{before}", self.cache[before]

    def _stream(self) -> Iterator[Equation]:
        before, name = self["hook_resid_pre"] if self.has("hook_resid_pre") else None, "resid_pre"
        if before is None:
            return
        if self.has("hook_mixer_in"):
            yield "hook_mixer_in", f"a copy of {name}", before
        table = list(self.one.model.table)  # in the order of computation
        writers = [writer for writer in self.one.model.declaration.writers if self.declares(writer)]
        if self.has("hook_resid_mid"):
            middle = table.index(f"{self.at}hook_resid_mid")
            first = [writer for writer in writers if table.index(self.at + writer) < middle]
            writers = [writer for writer in writers if writer not in first]
            if self.has(*first):
                yield "hook_resid_mid", self._told(name, first), before + sum(self[writer] for writer in first)
        for copy in ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"):
            if self.has(copy) and not self._is_after(copy):
                yield copy, "resid_pre for each head", before[:, :, None].expand_as(self[copy])
        if self.has("hook_resid_mid"):
            before, name = self["hook_resid_mid"], "resid_mid"
        if self.has("hook_mlp_in"):
            yield "hook_mlp_in", f"a copy of {name}", before
        if self.has("hook_resid_post", *writers):
            yield "hook_resid_post", self._told(name, writers), before + sum(self[writer] for writer in writers)

    @staticmethod
    def _told(name: str, writers: Iterable[str]) -> str:
        return " + ".join((name, *(writer.removeprefix("hook_") for writer in writers)))

    def _is_after(self, copy: str) -> bool:
        """Whether an edit of `attn_in` comes before this copy of it."""
        return copy != "hook_attn_in" and self.has("hook_attn_in") and not self._is_stream(self["hook_attn_in"])

    def _is_stream(self, copies: Tensor) -> bool:
        return torch.equal(copies, self["hook_resid_pre"][:, :, None].expand_as(copies))

    def _attention(self) -> Iterator[Equation]:
        if self.has("attn.hook_attn_scores", "attn.hook_pattern"):
            yield (
                "attn.hook_pattern",
                "softmax(attn_scores), sinks included",
                self._shares(self["attn.hook_attn_scores"]),
            )
        if self.has("attn.hook_z", "attn.hook_pattern", "attn.hook_v"):
            values = self["attn.hook_v_rep"] if self.has("attn.hook_v_rep") else self["attn.hook_v"]
            expected = torch.einsum("bhqk,bkhe->bqhe", self["attn.hook_pattern"], values)
            yield "attn.hook_z", "pattern v", expected
        if self.has("attn.hook_result", "attn.hook_out"):
            expected = self["attn.hook_result"].sum(2)
            if "b_O" in self.one.model.weight_names:
                expected = expected + self.one.model.weight("b_O", self.layer)
            yield "attn.hook_out", "the sum of the heads' results + b_O", expected

    def _shares(self, scores: Tensor) -> Tensor:
        """Give each key's share; a sink of the head (`module.sinks`, a logit each) takes one, too, that is no key's."""
        module = self.one.hf.get_submodule(self.one.model.table[f"{self.at}attn.hook_pattern"].seam.path)
        sinks = getattr(module, "sinks", None)
        if sinks is None:
            return scores.softmax(-1)
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]

    def _mlp(self) -> Iterator[Equation]:
        if self.has("mlp.hook_pre", "mlp.hook_post") and self.one.model.cfg.act_fn is not None:
            expected = self._activation()(self["mlp.hook_pre"])
            if self.has("mlp.hook_pre_linear"):
                yield "mlp.hook_post", "act(pre) * pre_linear", expected * self["mlp.hook_pre_linear"]
            else:
                yield "mlp.hook_post", "act(pre)", expected

    def _activation(self) -> Any:
        """Give the declared activation; one with parameters of its own is the model's."""
        module = self.one.hf.get_submodule(self.one.model.table[f"{self.at}mlp.hook_post"].seam.path.rpartition(".")[0])
        own = getattr(module, "act_fn", None)
        learned = isinstance(own, torch.nn.Module) and any(True for _ in own.parameters())
        return own.forward if learned else ACT2FN[self.one.model.cfg.act_fn]

    def _heads(self) -> Iterator[Equation]:
        """Keys and values as the query heads see them: of a longer window, the last ones."""
        for part in "kv":
            seen, repeated = f"attn.hook_{part}_rep", f"hook_{part}_input_rep"
            made = [f"attn.hook_{name}" for name in (("rot_k", "k_normed", "k") if part == "k" else ("v",))]
            order = list(self.one.model.table)  # heads see the last that is computed: norms stand on either side
            own = max(filter(self.has, made), key=lambda name: order.index(self.at + name), default=None)
            if own is None or not self.has(seen, own) or not self._starts_from_group(part, repeated):
                continue
            heads = self[own].repeat_interleave(self[seen].shape[2] // self[own].shape[2], dim=2)
            if heads.shape == self[seen].shape:  # elsewhere a window has cut them
                yield seen, f"{own} of the group of each query head", heads

    def _starts_from_group(self, part: str, repeated: str) -> bool:
        """Whether no query head has a copy of its own that was edited."""
        source = f"hook_{part}_input"
        if not self.has(source, repeated):
            return True
        groups = self[repeated].shape[2] // self[source].shape[2]
        return torch.equal(self[repeated], self[source].repeat_interleave(groups, dim=2))

    def _selection(self) -> Iterator[Equation]:
        """What a mixer projects, and hands to the scan."""
        if self.has("mixer.hook_in_proj", "mixer.hook_gate", "mixer.hook_conv_in"):
            whole, gate, read = (self[f"mixer.hook_{name}"] for name in ("in_proj", "gate", "conv_in"))
            width, conv = gate.shape[-1], read.shape[-1]
            starts = (conv, 0) if self.declares("mixer.hook_x_proj") else (0, width)
            yield "mixer.hook_gate", "its part of in_proj", whole[..., starts[0] :][..., :width]
            yield "mixer.hook_conv_in", "its part of in_proj", whole[..., starts[1] :][..., :conv]
        if self.has("mixer.hook_delta_pre", "mixer.hook_delta"):
            expected = torch.nn.functional.softplus(self["mixer.hook_delta_pre"])
            module = self.one.hf.get_submodule(self.one.model.table[f"{self.at}mixer.hook_delta"].seam.path)
            least, most = getattr(module, "time_step_limit", None) or (0.0, torch.inf)
            yield "mixer.hook_delta", "softplus(delta_pre), within its limits", expected.clamp(least, most)

    def _scan(self) -> Iterator[Equation]:
        """The recurrence and what is read of it."""
        delta, x, B, C, decay, write, states, y = (
            self[f"mixer.hook_{name}"] if self.has(f"mixer.hook_{name}") else None
            for name in ("delta", "ssm_input", "B", "C", "decay", "ssm_write", "ssm_state", "y")
        )
        if x is None or B is None or C is None or delta is None:
            return
        if B.ndim > 3:  # each head has its group's
            B, C = (part.repeat_interleave(x.shape[2] // part.shape[2], dim=2) for part in (B, C))
        else:
            B, C = B[:, :, None], C[:, :, None]
        if write is not None:
            step = delta.reshape(*delta.shape, *[1] * (x.ndim - delta.ndim)) * x
            B_of_channels = B if x.ndim == 3 else B[:, :, :, None]
            yield "mixer.hook_ssm_write", "(delta ssm_input) outer B", step[..., None] * B_of_channels
        if states is not None and decay is not None and write is not None:
            before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
            kept = decay.reshape(*decay.shape, *[1] * (states.ndim - decay.ndim))
            yield "mixer.hook_ssm_state", "decay * the state before + ssm_write", kept * before + write
        if states is not None and y is not None:
            C_of_channels = C if x.ndim == 3 else C[:, :, :, None]
            yield "mixer.hook_y", "ssm_state C", (states * C_of_channels).sum(-1)
        is_plain = not self.declares("mixer.inner_norm.hook_scale")
        if is_plain and self.has("mixer.hook_ssm_output", "mixer.hook_gate", "mixer.hook_gated"):
            gate = torch.nn.functional.silu(self["mixer.hook_gate"])
            yield "mixer.hook_gated", "ssm_output SiLU(gate)", self["mixer.hook_ssm_output"].reshape(gate.shape) * gate


def _copies_are_read(case: Case, one: Pair, ids: Tensor) -> None:
    """Edit the copies that a projection reads, and see that it read them: through its norm, and to each query head."""
    names = set(one.names())
    layers = [at for at in range(one.model.cfg.n_layers) if f"blocks.{at}.hook_resid_pre" in names]
    if not layers:
        return
    layer, part = case.choice(layers, "layer of the copies"), case.choice("qkv", "copies of")
    at, model = f"blocks.{layer}.", one.model
    norm = model.declaration.norms.get("ln1")
    copy, made = f"{at}hook_{part}_input", f"{at}attn.hook_{part}"
    if not {copy, made} <= names:
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
    if {repeated, seen} <= names and not _norm_spans_heads(one, at, part):
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
