"""From what was found in a tiny model to the fields of a `Decoder`, each as an expression of the config."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch

from lens_conformance.doctor.attention import Attention, read_attention
from lens_conformance.doctor.block import Block, read_block
from lens_conformance.doctor.ends import Ends, express, read_ends
from lens_conformance.doctor.feedforward import Dense, Sparse, read_feedforward
from lens_conformance.doctor.norms import choose_kind
from lens_conformance.doctor.tiny import Subject, config_fields
from lens_conformance.doctor.trace import Trace, Unfit, dropouts, traced
from lens_core._decoder_weights import _ACT, _D_MLP, _EPS, _first

__all__ = ["Proposal", "propose"]


@attrs.frozen(kw_only=True)
class Proposal:
    """A `Decoder`, written out, or what does not fit one."""

    fields: Mapping[str, str] = attrs.field(factory=dict)
    """Of `Decoder`, to expressions of `config`; those that are not the defaults."""
    norm: str = "RMS_NORM"
    remarks: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()
    in_training: bool = True
    has_experts: bool = False
    implementations: tuple[str, ...] = ("sdpa", "eager")


@attrs.define(kw_only=True, eq=False)
class _Found:
    """What is known so far, and what does not fit."""

    subject: Subject
    wide: Trace
    dropped: Trace
    half: Trace
    unfit: list[str] = attrs.field(factory=list)
    remarks: list[str] = attrs.field(factory=list)
    blocks: list[Block] = attrs.field(factory=list)
    attention: list[Attention] = attrs.field(factory=list)
    feed: list[Dense | Sparse] = attrs.field(factory=list)

    def note(self, unfit: Unfit) -> None:
        """Add a finding, once for all blocks that share it."""
        told = str(unfit)
        general = re.sub(r"\.\d+\b", ".L", told)
        if general not in {re.sub(r"\.\d+\b", ".L", one) for one in self.unfit}:
            self.unfit.append(told)


def propose(subject: Subject, **overrides: Any) -> Proposal:
    """Build the tiny model, run it, and derive a proposal; or say what does not fit."""
    if overrides:
        subject = attrs.evolve(subject, fields={**subject.fields, **overrides})
    with torch.no_grad():
        wide = traced(subject)
        half, dropped = traced(subject, dtype=torch.bfloat16), _in_training(subject, wide)
        found = _Found(subject=subject, wide=wide, dropped=dropped, half=half)
        try:
            ends = read_ends(subject, wide, dropped, half)
        except Unfit as unfit:
            return Proposal(unfit=(str(unfit),))
        _read_blocks(found, ends)
        if found.unfit:
            return Proposal(unfit=tuple(found.unfit), remarks=tuple(_what_holds(found)))
        try:
            return _Writer(found, ends).proposal()
        except Unfit as unfit:
            return Proposal(unfit=(str(unfit),), remarks=tuple(found.remarks))


def _in_training(subject: Subject, wide: Trace) -> Trace:
    """Run with dropouts on, as many as HF takes."""
    for names in (dropouts(subject), {name: p for name, p in dropouts(subject).items() if "att" not in name}):
        try:
            return traced(subject, in_training=True, **names)
        except (ValueError, RuntimeError):
            continue
    return wide


def _read_blocks(found: _Found, ends: Ends) -> None:
    config = found.wide.model.config
    for at in range(config.num_hidden_layers):
        path = f"{ends.blocks}.{at}"
        try:
            block = read_block(path, found.wide, found.dropped)
        except Unfit as unfit:
            found.note(unfit)
            continue
        found.blocks.append(block)
        try:
            if block.dispatches:
                found.attention.append(read_attention(f"{path}.{block.attn}", found.wide))
            else:
                told = "has attention code of its own: it does not call HF's attention interface"
                found.note(Unfit(f"{path}.{block.attn} {told}, through which scores and patterns are reached"))
        except Unfit as unfit:
            found.note(unfit)
        try:
            mlp = f"{path}.{block.mlp}".removesuffix(".")
            found.feed.append(read_feedforward(mlp, found.wide, path, _first(config, _ACT)))
        except Unfit as unfit:
            found.note(unfit)


def _what_holds(found: _Found) -> Iterator[str]:
    """Say of the first block what was found, where something else does not fit."""
    for block in found.blocks[:1]:
        kind = "resid_pre + attn_out + mlp_out" if block.is_parallel else "(resid_pre + attn_out) + mlp_out"
        yield f"what holds: resid_post = {kind}; attention is {block.attn}, the MLP {block.mlp or 'in the block'}"
        norms = {name: getattr(block, name) for name in ("ln1", "ln1_post", "ln2", "ln2_post")}
        told = ", ".join(f"{name} {path}" for name, path in norms.items() if path is not None)
        yield f"norms: {told or 'none'}"


class _Writer:
    """The fields of `Decoder`, from facts about every block."""

    def __init__(self, found: _Found, ends: Ends) -> None:
        self.found, self.ends, self.subject = found, ends, found.subject
        self.config = found.wide.model.config
        self.remarks = found.remarks
        dense = [block for block, feed in zip(found.blocks, found.feed, strict=True) if isinstance(feed, Dense)]
        self.block = _alike(found.blocks, ("mlp", "mlp_added", "beside", "in_training"), ends.blocks)
        self.dense_block = _alike(dense, ("in_training",), ends.blocks) if dense else None
        self.attention = _alike(found.attention, ("has_rotary",), f"{ends.blocks}.L.{self.block.attn}")

    def proposal(self) -> Proposal:
        """Write all fields."""
        norm, told = choose_kind(self._norms(), self.found.wide, self.found.half)
        self.remarks += told
        block, ends, fields = self.block, self.ends, dict[str, str]()
        for name in ("base", "layers", "embed", "pos_embed", "final_norm", "head"):
            _put(fields, name, getattr(ends, name), _DEFAULTS[name])
        _put(fields, "norm", norm, "RMS_NORM", quoted=False)
        for name in ("ln1", "ln1_post", "ln2", "ln2_post"):
            _put(fields, name, getattr(block, name), _DEFAULTS[name])
        if block.is_parallel:
            fields["is_parallel"] = "True"
        _put(fields, "attn", self._attn(), "Attn()", quoted=False)
        _put(fields, "mlp", self._mlp(), "Mlp()", quoted=False)
        if (moe := self._moe()) is not None:
            fields["moe"] = moe
        if ends.embed_scale is not None:
            fields["embed_scale"] = ends.embed_scale
        _put(fields, "embed_at", ends.embed_at, "module")
        if abs(block.scale - 1) > 1e-9:
            fields["branch_scale"] = self._number(block.scale, "branch_scale")
        fields |= ends.logit
        sizes = self._sizes()
        if sizes:
            fields["sizes"] = "{" + ", ".join(f'"{name}": {value}' for name, value in sizes.items()) + "}"
        in_training = all(one.in_training for one in self.found.blocks)
        if not in_training:
            self.remarks.append("in training, a dropout outside of any module stands before the sum: the stream's sums "
                                "hold in evaluation only")  # fmt: skip
        self.remarks += _unseen(self.config)
        is_free = getattr(self.found.wide.model, "_supports_sdpa", True)
        return Proposal(
            fields=fields,
            norm=norm,
            remarks=tuple(self.remarks),
            in_training=in_training,
            has_experts=moe is not None,
            implementations=("sdpa", "eager") if is_free else ("eager",),
        )

    def _norms(self) -> list[str]:
        own = [getattr(self.block, name) for name in ("ln1", "ln1_post", "ln2", "ln2_post")]
        depth = self.config.num_hidden_layers
        inside = [f"{self.ends.blocks}.{at}.{name}" for at in range(depth) for name in own if name is not None]
        return [*inside, f"{self.ends.base}.{self.ends.final_norm}"]

    # ------------------------------------------------------------------ branches

    def _attn(self) -> str:
        one, told = self.attention, dict[str, str]()
        _put(told, "path", self.block.attn, "self_attn")
        _put(told, "layout", one.layout, "separate")
        if one.layout == "separate":
            for part in "qkv":
                _put(told, part, getattr(one, part), f"{part}_proj")
        else:
            _put(told, "fused", one.v, "qkv_proj")
        _put(told, "out", one.out, "o_proj")
        _put(told, "added", self.block.attn_added, None)
        if one.norm is not None:
            inner: dict[str, str] = {}
            for name, value, default in zip(("takes", "q", "k"), one.norm, ("heads", "q_norm", "k_norm"), strict=True):
                _put(inner, name, value, default)
            if one.norm_is_after_rotary:
                inner["is_after_rotary"] = "True"
            told["qk_norm"] = _call("QkNorm", inner)
        rotary = {at for at, each in enumerate(self.found.attention) if each.has_rotary}
        if len(rotary) < len(self.found.attention):
            told["rotary"] = self._where(rotary) if rotary else "()"
        return _call("Attn", told)

    def _mlp(self) -> str:
        dense = [feed for feed in self.found.feed if isinstance(feed, Dense)]
        if not dense or self.dense_block is None:
            return "Mlp()"
        one, told = _alike(dense, ("width",), f"{self.ends.blocks}.L.{self.dense_block.mlp}"), dict[str, str]()
        _put(told, "path", self.dense_block.mlp, "mlp")
        _put(told, "kind", one.kind, "gated")
        if one.kind == "gated":
            _put(told, "gate", one.gate, "gate_proj")
        _put(told, "up", one.up, "up_proj")
        _put(told, "down", one.down, "down_proj")
        _put(told, "added", self.dense_block.mlp_added, None)
        return _call("Mlp", told)

    def _moe(self) -> str | None:
        sparse = [(at, feed) for at, feed in enumerate(self.found.feed) if isinstance(feed, Sparse)]
        if not sparse:
            return None
        one = _alike([feed for _, feed in sparse], (), f"{self.ends.blocks}.L")
        block = _alike([self.found.blocks[at] for at, _ in sparse], ("in_training",), self.ends.blocks)
        told: dict[str, str] = {}
        if len(sparse) < len(self.found.feed):
            told["layers"] = self._where({at for at, _ in sparse})
        _put(told, "path", block.mlp, "mlp")
        _put(told, "router", one.router, "gate")
        _put(told, "router_linear", one.router_linear, None)
        _put(told, "experts", one.experts, "experts")
        _put(told, "expert_layout", one.layout, "gated")
        told["n_experts"] = self._number(one.n_experts, "n_experts", "expert")
        told["per_token"] = self._number(one.per_token, "per_token", "(per_tok|top|moe_k)")
        _put(told, "beside", block.beside, None)
        router = self.found.half.of(f"{self.ends.blocks}.{sparse[0][0]}.{block.mlp}.{one.router}")[0]
        for name, value in (("weights_dtype", router.outputs[1]), ("logits_dtype", router.outputs[0])):
            if value.dtype == torch.float32:
                told[name] = '"float32"'
        return _call("Moe", told)

    # ------------------------------------------------------------------ numbers

    def _number(self, value: float, what: str, names: str = "") -> str:
        found = express(value, self.subject, names)
        if found is None:
            self.remarks.append(f"ADAPT: {what} is {value!r}, which no field of the config gives")
            return repr(value)
        return found

    def _where(self, layers: set[int]) -> str:
        """Write which blocks, by a list or a number of the config."""
        depth = self.config.num_hidden_layers
        for name in config_fields(self.config):
            value = getattr(self.config, name, None)
            if isinstance(value, list | tuple) and len(value) == depth:
                for one in dict.fromkeys(v for v in value if isinstance(v, str | int | bool)):
                    if {at for at, v in enumerate(value) if v == one} == layers:
                        told = f"value == {_text(one)}" if isinstance(one, str) else f"value == {one!r}"
                        return f"tuple(at for at, value in enumerate(config.{name}) if {told})"
            is_number = isinstance(value, int) and not isinstance(value, bool)
            if is_number and value and layers == set(range(value, depth)) and re.search("(dense|first|start)", name):
                return f"tuple(range(config.{name}, config.num_hidden_layers))"
        self.remarks.append(
            f"ADAPT: blocks {sorted(layers)} of {depth} are told by no list of the config; write the rule"
        )
        return repr(tuple(sorted(layers)))

    def _sizes(self) -> dict[str, str]:
        """Give what the config says under names that are not HF's usual ones."""
        config, one, told = self.config, self.attention, dict[str, str]()
        heads = config.num_attention_heads
        if (getattr(config, "num_key_value_heads", None) or heads) != one.kv_heads:
            told["n_key_value_heads"] = self._number(one.kv_heads, "n_key_value_heads", "(kv|key)")
        if (getattr(config, "head_dim", None) or config.hidden_size // heads) != one.width:
            told["d_head"] = self._number(one.width, "d_head", "(head|kv_channels|d_kv)")
        dense = next((feed for feed in self.found.feed if isinstance(feed, Dense)), None)
        if dense is not None and _first(config, _D_MLP) != dense.width:
            told["d_mlp"] = self._width(dense.width)
        if dense is not None and _first(config, _ACT) is None:
            names = [n for n in config_fields(config) if getattr(config, n, None) == dense.act]
            told["act_fn"] = f"config.{names[0]}" if names else _text(dense.act)
        eps = _eps_of(self.found.wide.of(f"{self.ends.base}.{self.ends.final_norm}")[0].module)
        if eps is not None and _first(config, _EPS) != eps:
            told["eps"] = express(eps, self.subject, "(eps|epsilon)") or repr(eps)
        return told

    def _width(self, width: int) -> str:
        unset = next((n for n in (*_D_MLP, "ffn_hidden_size") if getattr(self.config, n, 0) is None), None)
        if width == 4 * self.config.hidden_size:
            return f"config.{unset} or 4 * config.hidden_size" if unset else "4 * config.hidden_size"
        return self._number(width, "d_mlp", "(size|dim|ff|inner)")


def _unseen(config: Any) -> Iterator[str]:
    """Say which lists of kinds of blocks have one kind only, so that no other was looked at."""
    for name in config_fields(config):
        value = getattr(config, name, None)
        is_list = isinstance(value, list) and len(value) == config.num_hidden_layers
        if is_list and isinstance(value[0], str) and len(set(value)) == 1:
            yield f"{name} has only {value[0]!r} here; the config of a checkpoint that mixes kinds may tell more"


_DEFAULTS: dict[str, str | None] = {
    "base": "model",
    "layers": "layers",
    "embed": "embed_tokens",
    "pos_embed": None,
    "final_norm": "norm",
    "head": "lm_head",
    "ln1": "input_layernorm",
    "ln1_post": None,
    "ln2": "post_attention_layernorm",
    "ln2_post": None,
}


def _alike(given: Iterable[Any], but: tuple[str, ...], where: str) -> Any:
    """Give the first of several records that agree, but for some fields.

    Raises:
        Unfit: Blocks differ in another.
    """
    records = list(given)
    first = records[0]
    for at, other in enumerate(records[1:], 1):
        for field in attrs.fields(type(first)):
            a, b = (getattr(one, field.name) for one in (first, other))
            is_equal = math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) else a == b
            if field.name not in but and not is_equal:
                raise Unfit(f"{where}: blocks differ: {field.name} is {a!r} in one and {b!r} in block {at}")
    return first


def _eps_of(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _text(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _put(fields: dict[str, str], name: str, value: Any, default: Any, *, quoted: bool = True) -> None:
    if value != default:
        fields[name] = _text(value) if quoted else value


def _call(name: str, fields: Mapping[str, str]) -> str:
    return f"{name}({', '.join(f'{field}={value}' for field, value in fields.items())})"
