"""A forward of the Llama family written from the formulas, with every hook point of the contract as a cut point.

It is the oracle of the law tests: it shares no code with lens and calls nothing of transformers. What each type
computes stands in `golden.kinds`; attention in `golden.attention`, rotary embeddings in `golden.rotary`, MLPs and
experts in `golden.moe`, routers in `golden.routing`. Sources: Touvron et al. 2023 (Llama), Zhang and Sennrich 2019
(RMSNorm), Ainslie et al. 2023 (grouped queries), Jiang et al. 2023 (sliding windows), Gemma Team 2024 (soft caps, norms
after the branches), OLMo Team 2024 (norms after only), OpenAI 2025 (sinks).

Glossary: x the residual stream; q k v the projections; S = scale * q k^T the scores, soft-capped, then masked with
-inf; A = softmax(S) the pattern; z = A v; query head h reads kv head h // (n_heads / n_kv_heads).

At a cut point the value is (1) handed to the edit of that name, if there is one, (2) cloned, so that the clone's
gradient is the gradient at the hook point. Everything is float64.

Copies (`hook_q_input` and kin, `hook_mlp_in` of parallel blocks): a head whose copy was edited, or that `through`
names, is computed from its copy through a norm of its own; all others hear the shared one.

Does not: dropout, clipped projections (`clip_qkv`), key-value caches (a decode step is compared with the whole run),
half precision.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from lens_conformance.golden import moe
from lens_conformance.golden.attention import Attention, capped, heads_of, hidden_cells
from lens_conformance.golden.gpt2 import Edit, cutter, positions_from
from lens_conformance.golden.kind import Kind
from lens_conformance.golden.kinds import KINDS
from lens_conformance.golden.place import Place

NORM = ("hook_scale", "hook_normalized", "hook_out")
ENDS = ("unembed.hook_in", "unembed.hook_out", "hook_logits")
COPIES = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_k_input_rep", "hook_v_input_rep")
STARRED = (*COPIES, "attn.hook_k_rep", "attn.hook_v_rep", "attn.hook_result", "hook_mlp_in", "mlp.hook_expert_out")


def names(config: Any) -> list[str]:
    """List every hook point that the contract gives a model of this config, in no promised order."""
    found = ["hook_tokens", "hook_embed", *(f"ln_final.{part}" for part in NORM), *ENDS]
    for layer in range(config.num_hidden_layers):
        found += [f"blocks.{layer}.{name}" for name in _block_names(config, layer)]
    return found


def _block_names(config: Any, layer: int) -> Iterator[str]:
    kind = KINDS[config.model_type]
    heads, kv_heads, _ = heads_of(config, kind)
    grouped, parallel = kv_heads < heads, kind.parallel(config)
    yield from ("hook_resid_pre", *(COPIES[1:] if grouped else COPIES[:4]), "hook_mlp_in", "hook_resid_post")
    yield from ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_attn_scores", "attn.hook_pattern")
    yield from ("attn.hook_z", "attn.hook_result", "attn.hook_out", "hook_attn_out")
    yield from ("mlp.hook_in", "hook_mlp_out")
    norms = ["ln1"] if kind.before else []
    norms += ["ln2"] if kind.before and not parallel else []
    norms += ["ln1_post", "ln2_post"] if kind.after(config) else []
    yield from (f"{norm}.{part}" for norm in norms for part in NORM)
    if not parallel:
        yield "hook_resid_mid"
    if kind.qk_norm(config):
        yield from ("attn.hook_q_normed", "attn.hook_k_normed")
    if kind.rotary(config, layer):
        yield from ("attn.hook_rot_q", "attn.hook_rot_k")
    if grouped:
        yield from ("attn.hook_k_rep", "attn.hook_v_rep")
    if not (kind.experts(config, layer) and kind.splits_mlp(config)):
        yield "mlp.hook_out"
    if kind.experts(config, layer):
        yield from ("mlp.hook_router_logits", "mlp.hook_expert_weights", "mlp.hook_expert_indices")
        yield "mlp.hook_expert_out"
    else:
        yield from ("mlp.hook_pre", "mlp.hook_post")
        if kind.mlp != "plain":
            yield "mlp.hook_pre_linear"


def is_starred(name: str) -> bool:
    """Tell whether the contract keeps a name out of the default cache."""
    return name.endswith(STARRED)


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
    """Run a model of the family in float64 from the formulas.

    Args:
        state_dict: of HF's `<Type>ForCausalLM`, any floating dtype.
        config: HF's, or anything with its fields; `model_type` chooses the equations.
        tokens: ids `[batch, pos]`, or floating embeddings `[batch, pos, d_model]`.
        attention_mask: 1 for real tokens, `[batch, pos]`.
        position_ids: `[batch, pos]` or `[1, pos]`; by default counted from the mask.
        edits: name to function, called as `fn(value, hook=hook)` with `hook.name`, `hook.layer()` and
            `hook.positions`. What it returns, or wrote into its argument, stands for everything downstream.
        record: whether to keep the value at each cut (after its edit) with `retain_grad`.
        through: names of copies whose gradient is wanted: the run then goes through them.

    Returns:
        The logits and the values by name. The logits are the value at `hook_logits`.

    Raises:
        KeyError: an edit or a name in `through` that no hook point has.
    """
    edits = dict(edits or {})
    if unknown := (set(edits) | set(through)) - set(names(config)):
        raise KeyError(sorted(unknown))
    kind = KINDS[config.model_type]
    values: dict[str, Tensor] = {}
    cut = cutter(edits, values, record, torch.arange(tokens.shape[1]))
    weights = _weights(state_dict, kind)
    given = tokens.is_floating_point()
    x = tokens.to(torch.float64) if given else weights["embed_tokens.weight"][cut("hook_tokens", tokens)]
    if kind.scales_given_embeddings or not given:
        x = x * kind.embed_scale(config)
    if attention_mask is None:
        attention_mask = torch.ones(x.shape[:2], dtype=torch.long)
    if position_ids is None:
        position_ids = positions_from(attention_mask)
    x = cut("hook_embed", x)
    for layer in range(config.num_hidden_layers):
        own = {key.removeprefix(f"layers.{layer}."): weight for key, weight in weights.items()}
        block = _Block(
            weights=own,
            config=config,
            kind=kind,
            layer=layer,
            cut=cut,
            touched=frozenset(edits) | frozenset(through),
            through=frozenset(through),
            positions=position_ids,
            hidden=hidden_cells(attention_mask, kind.window(config, layer)),
        )
        x = block.run(x)
    ends = Place(weights=weights, config=config, kind=kind, layer=-1, cut=cut)
    x = cut("unembed.hook_in", ends.norm("norm", "ln_final", x))
    w_u = weights.get("lm_head.weight", weights["embed_tokens.weight"])  # d_vocab d_model
    logits = cut("unembed.hook_out", x @ w_u.T + weights.get("lm_head.bias", 0.0)) * kind.logit_scale(config)
    return cut("hook_logits", capped(logits, getattr(config, kind.logit_cap) if kind.logit_cap else None)), values


def _weights(state_dict: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """Give the weights in float64, by the paths that they have here."""
    found = {}
    for path, tensor in state_dict.items():
        layer, own = "", path.removeprefix("model.")
        if own.startswith("layers."):
            at = own.index(".", len("layers.")) + 1
            layer, own = own[:at], own[at:]
        for old, new in kind.renamed.items():
            if own == old or own.startswith(f"{old}."):
                own = new + own[len(old) :]
                break
        if tensor.is_floating_point():
            found[layer + own] = tensor.to(torch.float64)
    return found


@attrs.frozen(kw_only=True, eq=False)
class _Block(Attention):
    """One block of one run."""

    def run(self, x: Tensor) -> Tensor:
        """Run the block: both branches, and the sums."""
        x = self.at("hook_resid_pre", x)
        factor = self.kind.branch_scale(self.config)
        normed = self.norm("input_layernorm", self.name("ln1"), x) if self.kind.before else x
        attn = self._after(0, "ln1_post", self.attention(x, normed))
        attn = self.at("hook_attn_out", attn * factor)
        if self.kind.parallel(self.config):
            return self.at("hook_resid_post", x + attn + self.mlp(self._parallel_mlp_in(x, normed)))
        mid = self.at("hook_resid_mid", x + attn)
        into = self.at("hook_mlp_in", mid)
        if self.kind.before:
            into = self.norm(self.kind.ln2, self.name("ln2"), into)
        return self.at("hook_resid_post", mid + self.mlp(into))

    def mlp(self, x: Tensor) -> Tensor:
        """Run the MLP or the experts, and what follows before the sum."""
        x = self.at("mlp.hook_in", x)
        out = moe.experts(self, x) if self.kind.experts(self.config, self.layer) else moe.dense(self, x)
        out = self._after(1, "ln2_post", out)
        return self.at("hook_mlp_out", out * self.kind.branch_scale(self.config))

    def _parallel_mlp_in(self, x: Tensor, normed: Tensor) -> Tensor:
        """Give the shared norm, or that of the MLP's own copy where it was edited."""
        own = self.at("hook_mlp_in", x)
        if self.is_touched("hook_mlp_in") and (not torch.equal(own, x) or self.name("hook_mlp_in") in self.through):
            return self.plain_norm("input_layernorm", own)
        return normed

    def _after(self, which: int, name: str, x: Tensor) -> Tensor:
        after = self.kind.after(self.config)
        return self.norm(after[which], self.name(name), x) if after else x
