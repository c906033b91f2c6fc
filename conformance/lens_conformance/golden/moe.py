"""Feed-forward parts of decoder blocks, in float64: gated, fused, plain, and mixtures of experts.

Sources: Shazeer 2020 (gated linear units), Jiang et al. 2024 (Mixtral: softmax over all experts, the k largest chosen,
their probabilities made to sum to 1; Qwen3-MoE does the last only if `norm_topk_prob`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lens_conformance.golden.gpt2 import activation

Cut = Callable[[str, Tensor], Tensor]


def linear(weights: Mapping[str, Tensor], path: str, x: Tensor) -> Tensor:
    """Apply `x W^T (+ b)` with torch's layout of W."""
    y = x @ weights[f"{path}.weight"].T
    return y + weights[f"{path}.bias"] if f"{path}.bias" in weights else y


def dense(weights: Mapping[str, Tensor], config: Any, layout: str, at: str, x: Tensor, cut: Cut) -> Tensor:
    """Run a gated MLP, `down(act(gate x) * (up x))`, or a plain one, `proj(act(fc x))`."""
    act = getattr(config, "hidden_activation", None) or config.hidden_act
    if layout == "plain":
        pre = cut(at + "mlp.hook_pre", linear(weights, "mlp.c_fc", x))
        post, down = activation(act, pre), "mlp.c_proj"
    else:
        if layout == "fused":
            gate, up = linear(weights, "mlp.gate_up_proj", x).chunk(2, dim=-1)
        else:
            gate, up = linear(weights, "mlp.gate_proj", x), linear(weights, "mlp.up_proj", x)
        gate = cut(at + "mlp.hook_pre", gate)
        post, down = activation(act, gate) * cut(at + "mlp.hook_pre_linear", up), "mlp.down_proj"
    return cut(at + "mlp.hook_out", linear(weights, down, cut(at + "mlp.hook_post", post)))


def experts(weights: Mapping[str, Tensor], config: Any, at: str, x: Tensor, cut: Cut) -> Tensor:
    """Route each position to its k experts and add their outputs by weight; edited logits route anew."""
    logits = cut(at + "mlp.hook_router_logits", linear(weights, "mlp.gate", x))
    top, chosen = logits.softmax(-1).topk(config.num_experts_per_tok, dim=-1)
    if getattr(config, "norm_topk_prob", True):
        top = top / top.sum(-1, keepdim=True)
    top = cut(at + "mlp.hook_expert_weights", top)
    chosen = cut(at + "mlp.hook_expert_indices", chosen)
    gate, up = torch.einsum("bpd,emd->bpem", x, weights["mlp.experts.gate_up_proj"]).chunk(2, dim=-1)
    every = torch.einsum("bpem,edm->bped", activation(config.hidden_act, gate) * up, weights["mlp.experts.down_proj"])
    own = every.gather(2, chosen[..., None].expand(*chosen.shape, every.shape[-1]))  # batch pos k d_model
    own = cut(at + "mlp.hook_expert_out", own)
    return cut(at + "mlp.hook_out", (top[..., None] * own).sum(2))
