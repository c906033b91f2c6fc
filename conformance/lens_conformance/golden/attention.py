"""Attention of decoder blocks in float64, from the copies of its input to `attn.hook_out`."""

import math
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from lens_conformance.golden.kind import Kind
from lens_conformance.golden.place import Place
from lens_conformance.golden.rotary import query_factor, rotate


def heads_of(config: Any, kind: Kind) -> tuple[int, int, int]:
    """Give the query heads, the key and value heads, and the width of one."""
    heads = config.num_attention_heads
    kv_heads = heads if kind.qkv == "per_head" else config.num_key_value_heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def capped(x: Tensor, cap: float | None) -> Tensor:
    """Bend a value smoothly into (-cap, cap)."""
    return x if cap is None else cap * torch.tanh(x / cap)


def hidden_cells(attention_mask: Tensor, window: int | None) -> Tensor:
    """Mark what a query may not see: later positions, padding, and what lies `window` or more positions back."""
    at = torch.arange(attention_mask.shape[1])
    back = at[:, None] - at[None, :]  # query key
    unseen = (back < 0) if window is None else (back < 0) | (back >= window)
    return unseen[None, None] | (attention_mask == 0)[:, None, None, :]


@attrs.frozen(kw_only=True, eq=False)
class Attention(Place):
    """A place with the positions, and the cells that are hidden."""

    positions: Tensor
    hidden: Tensor

    def attention(self, x: Tensor, normed: Tensor) -> Tensor:
        """Run attention, from the copies to `attn.hook_out`."""
        heads, kv_heads, d_head = heads_of(self.config, self.kind)
        q, k, v, rep_in = self._projections(x, normed)
        raw_k = k
        for name, step in self._steps():
            q, k = self.at(name.format("q"), step("q", q)), self.at(name.format("k"), step("k", k))
        if kv_heads < heads:
            k = self.at("attn.hook_k_rep", self._own_keys(k, raw_k, rep_in["k"]))
            v = self.at("attn.hook_v_rep", self._own_values(v, rep_in["v"]))
        pattern = self.at("attn.hook_pattern", self._pattern(q, k))
        z = self.at("attn.hook_z", torch.einsum("bhqk,bkhe->bqhe", pattern, v))
        if "self_attn.sub_norm.weight" in self.weights:
            z = self.plain_norm("self_attn.sub_norm", z.flatten(2)).view(z.shape)
        path = "self_attn.o_proj"
        w_o = self.weights[f"{path}.weight"].view(-1, heads, d_head)  # d_model head d_head
        result = self.at("attn.hook_result", torch.einsum("bphe,dhe->bphd", z, w_o))
        return self.at("attn.hook_out", result.sum(2) + self.weights.get(f"{path}.bias", 0.0))

    def _pattern(self, q: Tensor, k: Tensor) -> Tensor:
        """Give the softmax of the scores; a sink takes its share of each row."""
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * self.kind.scale(self.config, q.shape[-1])
        if self.kind.attn_cap:
            scores = capped(scores, getattr(self.config, self.kind.attn_cap))
        scores = self.at("attn.hook_attn_scores", scores.masked_fill(self.hidden, -math.inf))
        # HF's eager path masks with a finite number: a query that may see nothing then spreads evenly over all keys.
        finite = scores.masked_fill(scores == -math.inf, torch.finfo(scores.dtype).min)
        if not self.kind.sinks:
            return finite.softmax(-1)
        sinks = self.weights["self_attn.sinks"].view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([finite, sinks], dim=-1).softmax(-1)[..., :-1]

    def _steps(self) -> list[tuple[str, Callable[[str, Tensor], Tensor]]]:
        """List what queries and keys go through before the scores, each with its names."""
        norm = [("attn.hook_{}_normed", self._qk_normed)] if self.kind.qk_norm(self.config) else []
        turn = [("attn.hook_rot_{}", self._rotated)] if self.kind.rotary(self.config, self.layer) else []
        return [*turn, *norm] if self.kind.late_qk_norm else [*norm, *turn]

    def _weight_and_bias(self, which: str) -> tuple[Tensor, Tensor]:
        """Give one projection as `[d_model, head, d_head]` and `[head, d_head]`."""
        heads, kv_heads, d_head = heads_of(self.config, self.kind)
        counts = {"q": heads, "k": kv_heads, "v": kv_heads}
        path = f"self_attn.{which}_proj" if self.kind.qkv == "separate" else "self_attn.qkv_proj"
        weight = self.weights[f"{path}.weight"]
        bias = self.weights.get(f"{path}.bias", weight.new_zeros(weight.shape[0]))
        at = "qkv".index(which)
        if self.kind.qkv == "blocks":
            weight, bias = (t.split([n * d_head for n in counts.values()])[at] for t in (weight, bias))
        if self.kind.qkv == "per_head":
            weight, bias = (t.unflatten(0, (heads, 3, d_head))[:, at] for t in (weight, bias))
        count = counts[which]
        return weight.reshape(count, d_head, -1).permute(2, 0, 1), bias.reshape(count, d_head)

    def _projections(self, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Compute q, k and v, and what the query heads' own inputs of k and v hold beside them."""
        heads, kv_heads, _ = heads_of(self.config, self.kind)
        grouped, found, reps = kv_heads < heads, [], {}
        start = x if grouped else self.at("hook_attn_in", x[:, :, None].expand(-1, -1, heads, -1))
        for which in "qkv":
            count = heads if which == "q" else kv_heads
            copies = x[:, :, None].expand(-1, -1, count, -1)  # batch pos head d_model
            own = self.at(f"hook_{which}_input", copies if grouped else start)
            if grouped and which != "q":
                before = own.repeat_interleave(heads // kv_heads, dim=2)
                reps[which] = before, self.at(f"hook_{which}_input_rep", before)
            weight, bias = self._weight_and_bias(which)
            value = torch.einsum("bpd,dhe->bphe", normed, weight) + bias
            sources = [f"hook_{which}_input", *([] if grouped else ["hook_attn_in"])]
            if any(self.is_touched(source) for source in sources):
                forced = any(self.name(source) in self.through for source in sources)
                edited = (own != copies).any(-1, keepdim=True) | forced  # batch pos head 1
                value = torch.where(edited, self._apart(which, own), value)
            found.append(self.at(f"attn.hook_{which}", value))
        return found[0], found[1], found[2], reps

    def _apart(self, which: str, own: Tensor, repeat: int = 1) -> Tensor:
        """Project each head's own input, through a norm of its own where there is one before attention."""
        weight, bias = (
            t.repeat_interleave(repeat, dim=axis) for t, axis in zip(self._weight_and_bias(which), (1, 0), strict=True)
        )
        own = self.plain_norm("input_layernorm", own) if self.kind.before else own
        return torch.einsum("bphd,dhe->bphe", own, weight) + bias

    def _qk_normed(self, which: str, x: Tensor) -> Tensor:
        style = self.kind.qk_norm(self.config)
        if style == "head":
            return self.plain_norm(f"self_attn.{which}_norm", x)
        if style == "all":
            return self.plain_norm(f"self_attn.{which}_norm", x.flatten(2)).view(x.shape)
        path = f"self_attn.{which}_layernorm.norms"
        return torch.stack([self.plain_norm(f"{path}.{head}", x[:, :, head]) for head in range(x.shape[2])], dim=2)

    def _rotated(self, which: str, x: Tensor) -> Tensor:
        rope = self.kind.rope(self.config, self.layer)
        x = rotate(x, self.positions, rope, self.config.max_position_embeddings, self.kind.interleaved)
        return x * query_factor(self.positions, rope) if which == "q" and self.kind.scales_queries else x

    def _own_keys(self, k: Tensor, raw: Tensor, copies: tuple[Tensor, Tensor]) -> Tensor:
        """Repeat the keys for the query heads; where a query head's own input was edited, it has its own."""
        groups, (before, own) = copies[1].shape[2] // k.shape[2], copies
        shared = k.repeat_interleave(groups, dim=2)
        if not self.is_touched("hook_k_input_rep"):
            return shared
        forced = self.name("hook_k_input_rep") in self.through
        edited = (own != before).any(-1, keepdim=True) | forced
        apart = []
        for head, key in enumerate(self._apart("k", own, groups).unbind(2)):
            seen = torch.stack([key if g == head // groups else raw[:, :, g] for g in range(k.shape[2])], dim=2)
            for _, step in self._steps():
                seen = step("k", seen)
            apart.append(seen[:, :, head // groups])
        return torch.where(edited, torch.stack(apart, dim=2), shared)

    def _own_values(self, v: Tensor, copies: tuple[Tensor, Tensor]) -> Tensor:
        groups, (before, own) = copies[1].shape[2] // v.shape[2], copies
        shared = v.repeat_interleave(groups, dim=2)
        if not self.is_touched("hook_v_input_rep"):
            return shared
        forced = self.name("hook_v_input_rep") in self.through
        edited = (own != before).any(-1, keepdim=True) | forced
        return torch.where(edited, self._apart("v", own, groups), shared)
