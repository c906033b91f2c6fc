"""How routers choose a position's experts and weigh them, in float64: one function a rule, by name in `RULES`.

A rule takes the router's logits, the block's weights and HF's config, and gives the weights and the indices of the k
chosen experts. Sources: Jiang et al. 2024 (Mixtral), Dai et al. 2024 and DeepSeek-AI 2024 (sigmoid scores, a
correction that only chooses, groups of experts), Liu et al. 2023 (SparseMixer, as it computes without sampling).

An order among the chosen is part of HF's output but of no formula: rules ask `topk` as HF does.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Chosen = tuple[Tensor, Tensor]
CORRECTION = "mlp.gate.e_score_correction_bias"


def softmax(logits: Tensor, weights: Weights, config: Any) -> Chosen:
    """Take the k largest probabilities over all experts, made to sum to 1 unless the config says otherwise."""
    top, chosen = logits.softmax(-1).topk(config.num_experts_per_tok, dim=-1)
    return top / top.sum(-1, keepdim=True) if getattr(config, "norm_topk_prob", True) else top, chosen


def softmax_of_chosen(logits: Tensor, weights: Weights, config: Any) -> Chosen:
    """Take the k largest logits and their softmax among each other."""
    top, chosen = logits.topk(config.num_experts_per_tok, dim=-1)
    return top.softmax(-1), chosen


def softmax_corrected(logits: Tensor, weights: Weights, config: Any) -> Chosen:
    """Choose by probability plus a correction; weigh by probability, made to sum to 1."""
    probabilities = logits.softmax(-1)
    chosen = (probabilities + weights[CORRECTION].squeeze()).topk(config.num_experts_per_tok, dim=-1)[1]
    top = probabilities.gather(-1, chosen)
    return top / top.sum(-1, keepdim=True).clamp(min=config.moe_norm_min), chosen


def sigmoid(logits: Tensor, weights: Weights, config: Any) -> Chosen:
    """Choose by sigmoid plus a correction; weigh by sigmoid, made to sum to the scaling factor, if there is one."""
    scores = logits.sigmoid()
    chosen = (scores + weights[CORRECTION]).topk(config.num_experts_per_tok, dim=-1, sorted=False)[1]
    top = scores.gather(-1, chosen)
    return top / top.sum(-1, keepdim=True) * getattr(config, "router_scaling_factor", 1.0), chosen


def sigmoid_in_groups(logits: Tensor, weights: Weights, config: Any) -> Chosen:
    """Choose as `sigmoid`, among the groups of experts whose two best scores have the largest sum."""
    scores = logits.sigmoid()
    grouped = (scores + weights[CORRECTION]).unflatten(-1, (config.n_group, -1))
    best = grouped.topk(2, dim=-1)[0].sum(-1).topk(config.topk_group, dim=-1)[1]
    kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
    choice = grouped.masked_fill(~kept[..., None], -math.inf).flatten(-2)
    chosen = choice.topk(config.num_experts_per_tok, dim=-1, sorted=False)[1]
    top = scores.gather(-1, chosen)
    top = top / top.sum(-1, keepdim=True) if config.norm_topk_prob else top
    return top * config.routed_scaling_factor, chosen


def sparse_mixer(logits: Tensor, weights: Weights, config: Any) -> Chosen:
    """Take the two largest logits, each weighed by its softmax among those that come close to it.

    Close is within twice the jitter of the larger of their size and the maximum; for the second, the first is left out.
    """
    tops, indices, left = [], [], logits
    for _ in range(2):
        best, index = left.max(-1, keepdim=True)
        size = torch.maximum(logits.abs(), best)
        far = (best - logits) / size > 2 * config.router_jitter_noise
        tops.append(left.masked_fill(far, -math.inf).softmax(-1).gather(-1, index))
        indices.append(index)
        left = left.scatter(-1, index, -math.inf)
    return torch.cat(tops, dim=-1), torch.cat(indices, dim=-1)


RULES: dict[str, Callable[[Tensor, Weights, Any], Chosen]] = {
    rule.__name__: rule
    for rule in (softmax, softmax_of_chosen, softmax_corrected, sigmoid, sigmoid_in_groups, sparse_mixer)
}
