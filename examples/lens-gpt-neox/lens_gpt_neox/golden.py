"""A GPT-NeoX forward written from the formulas, with every hook point of the contract as a cut point.

The conformance kit judges by it. It shares no code with the plugin and calls nothing of transformers. Sources: Black et
al. 2022 (GPT-NeoX: parallel blocks, rotated share of a head), Ba et al. 2016 (LayerNorm); rotary embeddings are the
kit's, from their papers.

Glossary: x the residual stream, c = x - mean(x), s = sqrt(mean(c^2) + eps), n = c / s; q k v the projections, whose
weight is stored [head][q | k | v]; S = q k^T / sqrt(d_head) the scores, A = softmax(S) the pattern, z = A v.

Parallel blocks: y = x + attention(ln1 x) + mlp(ln2 x). Sequential ones: mid = x + attention(ln1 x),
y = mid + mlp(ln2 mid). Everything is float64; a masked score is -inf.

Does not: dropout, key-value caches (a decode step is compared with the whole run).
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import attrs
import torch
from lens_conformance.golden.gpt2 import Edit, activation, cutter, positions_from
from lens_conformance.golden.rotary import rotate
from torch import Tensor

NORM = ("hook_scale", "hook_normalized", "hook_out")
TOP = ("hook_tokens", "hook_embed", *(f"ln_final.{part}" for part in NORM))
ENDS = ("unembed.hook_in", "unembed.hook_out", "hook_logits")
COPIES = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
BLOCK = (
    *("hook_resid_pre", *COPIES, *(f"ln1.{part}" for part in NORM)),
    *("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k"),
    *("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z", "attn.hook_result", "attn.hook_out"),
    *("hook_attn_out", "hook_mlp_in", *(f"ln2.{part}" for part in NORM)),
    *("mlp.hook_in", "mlp.hook_pre", "mlp.hook_post", "mlp.hook_out", "hook_mlp_out", "hook_resid_post"),
)


def names(config: Any) -> list[str]:
    """List every hook point that the contract gives a model of this config, in no promised order."""
    block = BLOCK if config.use_parallel_residual else (*BLOCK, "hook_resid_mid")
    layers = range(config.num_hidden_layers)
    return [*TOP, *ENDS, *(f"blocks.{layer}.{name}" for layer in layers for name in block)]


def golden(
    state_dict: Mapping[str, Tensor],
    config: Any,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    edits: Mapping[str, Edit] | None = None,
    record: bool = True,
    through: Collection[str] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run GPT-NeoX in float64 from the formulas.

    Args:
        state_dict: of HF's GPTNeoXForCausalLM, any floating dtype.
        config: HF's GPTNeoXConfig, or anything with its fields.
        tokens: ids `[batch, pos]`, or floating embeddings `[batch, pos, d_model]`.
        attention_mask: 1 for real tokens, `[batch, pos]`.
        position_ids: `[batch, pos]` or `[1, pos]`; by default counted from the mask.
        edits: name to function, called as `fn(value, hook=hook)`. What it returns, or wrote into its argument, stands
            for everything downstream.
        record: whether to keep the value at each cut (after its edit) with `retain_grad`.
        through: names of per-head inputs whose gradient is wanted: those layers' projections are then computed from
            the copies even where nothing edited them, so `ln1` is no longer on their way.

    Returns:
        The logits and the values by name. The logits are the value at `hook_logits`.

    Raises:
        KeyError: an edit or a name in `through` that no hook point has.
    """
    edits = dict(edits or {})
    if unknown := (set(edits) | set(through)) - set(names(config)):
        raise KeyError(sorted(unknown))
    values: dict[str, Tensor] = {}
    cut = cutter(edits, values, record, torch.arange(tokens.shape[1]))
    weights = {name: tensor.to(torch.float64) for name, tensor in state_dict.items() if tensor.is_floating_point()}
    if tokens.is_floating_point():
        x = tokens.to(torch.float64)
    else:
        x = weights["gpt_neox.embed_in.weight"][cut("hook_tokens", tokens)]
    mask = torch.ones(x.shape[:2], dtype=torch.long) if attention_mask is None else attention_mask
    x = cut("hook_embed", x)
    for layer in range(config.num_hidden_layers):
        key = f"gpt_neox.layers.{layer}."
        block = _Block(
            weights={name.removeprefix(key): weight for name, weight in weights.items() if name.startswith(key)},
            config=config,
            at=f"blocks.{layer}.",
            cut=cut,
            edited=frozenset(edits),
            through=frozenset(through),
            positions=positions_from(mask) if position_ids is None else position_ids,
            hidden=torch.ones(x.shape[1], x.shape[1]).triu(1).bool() | (mask == 0)[:, None, None, :],
        )
        x = block.run(x)
    gain, bias = weights["gpt_neox.final_layer_norm.weight"], weights["gpt_neox.final_layer_norm.bias"]
    x = cut("unembed.hook_in", _norm(x, gain, bias, config.layer_norm_eps, lambda n, v: cut(f"ln_final.{n}", v)))
    logits = cut("unembed.hook_out", x @ weights["lm_head.weight"].T)
    return cut("hook_logits", logits), values


def _norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float, cut: Callable[[str, Tensor], Tensor]) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = cut("hook_scale", (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt())
    return cut("hook_out", cut("hook_normalized", centred / scale) * gain + bias)


@attrs.frozen(kw_only=True, eq=False)
class _Block:
    """One block of one run: its weights by their path in the block, and what every step of it needs."""

    weights: Mapping[str, Tensor]
    config: Any
    at: str
    cut: Callable[[str, Tensor], Tensor]
    edited: frozenset[str]
    through: frozenset[str]
    positions: Tensor
    hidden: Tensor

    def here(self, name: str, value: Tensor) -> Tensor:
        """Cut at a name of this block."""
        return self.cut(self.at + name, value)

    def run(self, x: Tensor) -> Tensor:
        """Run the block: both branches, and the sums."""
        x = self.here("hook_resid_pre", x)
        attn = self.here("hook_attn_out", self.attention(x))
        before = x if self.config.use_parallel_residual else self.here("hook_resid_mid", x + attn)
        mlp = self.here("hook_mlp_out", self.mlp(self.here("hook_mlp_in", before)))
        return self.here("hook_resid_post", x + attn + mlp if self.config.use_parallel_residual else before + mlp)

    def norm(self, path: str, name: str | None, x: Tensor) -> Tensor:
        """Normalise, with cuts under a name; without one for the norm of a copy."""
        cut = (lambda part, value: value) if name is None else lambda part, value: self.here(f"{name}.{part}", value)
        return _norm(x, self.weights[f"{path}.weight"], self.weights[f"{path}.bias"], self.config.layer_norm_eps, cut)

    def linear(self, path: str, x: Tensor) -> Tensor:
        """Apply a matrix `[out, in]`, and a bias where there is one."""
        return x @ self.weights[f"{path}.weight"].T + self.weights.get(f"{path}.bias", 0.0)

    def mlp(self, x: Tensor) -> Tensor:
        """Run the MLP, norm included."""
        x = self.here("mlp.hook_in", self.norm("post_attention_layernorm", "ln2", x))
        pre = self.here("mlp.hook_pre", self.linear("mlp.dense_h_to_4h", x))
        post = self.here("mlp.hook_post", activation(self.config.hidden_act, pre))
        return self.here("mlp.hook_out", self.linear("mlp.dense_4h_to_h", post))

    def attention(self, x: Tensor) -> Tensor:
        """Run attention, norm included, from the copies to `attn.hook_out`."""
        q, k, v = self.projections(x)
        q, k = self.here("attn.hook_rot_q", self.rotated(q)), self.here("attn.hook_rot_k", self.rotated(k))
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(q.shape[-1])
        scores = self.here("attn.hook_attn_scores", scores.masked_fill(self.hidden, -math.inf))
        # HF's eager path masks with a finite number: a query that may see nothing then spreads evenly over all keys.
        finite = scores.masked_fill(scores == -math.inf, torch.finfo(scores.dtype).min)
        pattern = self.here("attn.hook_pattern", finite.softmax(-1))
        z = self.here("attn.hook_z", torch.einsum("bhqk,bkhe->bqhe", pattern, v))
        w_o = self.weights["attention.dense.weight"].view(-1, *z.shape[2:])  # d_model head d_head
        result = self.here("attn.hook_result", torch.einsum("bphe,dhe->bphd", z, w_o))
        return self.here("attn.hook_out", result.sum(2) + self.weights.get("attention.dense.bias", 0.0))

    def rotated(self, x: Tensor) -> Tensor:
        """Turn the first channels of each head by its position."""
        return rotate(x, self.positions, self.config.rope_parameters, self.config.max_position_embeddings)

    def projections(self, x: Tensor) -> list[Tensor]:
        """Compute q, k and v: a head whose copy was edited from that copy, the others from `ln1`."""
        heads = self.config.num_attention_heads
        copies = x[:, :, None, :].expand(-1, -1, heads, -1)  # batch pos head d_model
        attn_in = self.here("hook_attn_in", copies)
        normed = self.norm("input_layernorm", "ln1", x)
        weight = self.weights["attention.query_key_value.weight"].unflatten(0, (heads, 3, -1))  # head part d_head d
        bias = self.weights.get("attention.query_key_value.bias", weight.new_zeros(weight.shape[:3].numel()))
        bias = bias.view(weight.shape[:3])
        found = []
        for index, part in enumerate("qkv"):
            own = self.here(f"hook_{part}_input", attn_in)
            value = torch.einsum("bpd,hed->bphe", normed, weight[:, index]) + bias[:, index]
            asked = {f"{self.at}hook_{part}_input", f"{self.at}hook_attn_in"}
            if asked & (self.edited | self.through):
                moved = (own != copies).any(-1).any(1).any(0) | bool(asked & self.through)  # head
                apart = torch.einsum("bphd,hed->bphe", self.norm("input_layernorm", None, own), weight[:, index])
                value = torch.where(moved[:, None], apart + bias[:, index], value)
            found.append(self.here(f"attn.hook_{part}", value))
        return found
