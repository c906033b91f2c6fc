"""Feed-forward parts of decoder blocks, in float64: gated, fused, plain, and mixtures of experts.

Sources: Shazeer 2020 (gated linear units), So et al. 2021 (squared ReLU), Huang and Schlag 2024 (xIELU), Wang et al.
2024 (BitNet: a norm before the second matrix), Rajbhandari et al. 2022 (shared experts), OpenAI 2025 (gpt-oss: clamped
gates). How experts are chosen is in `golden.routing`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lens_conformance.golden import gpt2
from lens_conformance.golden.place import Place
from lens_conformance.golden.routing import RULES

Weights = Mapping[str, Tensor]


def linear(weights: Weights, path: str, x: Tensor) -> Tensor:
    """Apply `x W^T (+ b)` with torch's layout of W."""
    y = x @ weights[f"{path}.weight"].T
    return y + weights[f"{path}.bias"] if f"{path}.bias" in weights else y


def activation(weights: Weights, config: Any, x: Tensor) -> Tensor:
    """Apply the config's activation function; xIELU has parameters."""
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    if name == "relu2":
        return x.clamp(min=0) ** 2
    if name != "xielu":
        return gpt2.activation(name, x)
    rise, fall, beta, eps = (weights[f"mlp.act_fn.{part}"] for part in ("alpha_p", "alpha_n", "beta", "eps"))
    below = (beta + softplus(fall)) * (torch.expm1(torch.minimum(x, eps)) - x)
    return beta * x + torch.where(x > 0, softplus(rise) * x**2, below)


def gate_and_up(weights: Weights, path: str, x: Tensor) -> tuple[Tensor, ...]:
    """Apply the two first matrices of a gated MLP, which may be one."""
    if f"{path}.gate_up_proj.weight" in weights:
        return linear(weights, f"{path}.gate_up_proj", x).chunk(2, dim=-1)
    return linear(weights, f"{path}.gate_proj", x), linear(weights, f"{path}.up_proj", x)


def dense(place: Place, x: Tensor) -> Tensor:
    """Run a gated MLP, `down(act(gate x) * (up x))`, or a plain one, `down(act(up x))`.

    What `down` multiplies is normed where there are weights for it.
    """
    weights, config, at = place.weights, place.config, place.at
    if place.kind.mlp == "plain":
        pre = at("mlp.hook_pre", linear(weights, "mlp.up_proj", x))
        post = activation(weights, config, pre)
    else:
        gate, up = gate_and_up(weights, "mlp", x)
        pre = at("mlp.hook_pre", gate)
        post = activation(weights, config, pre) * at("mlp.hook_pre_linear", up)
    post = at("mlp.hook_post", post)
    post = place.plain_norm("mlp.sub_norm", post) if "mlp.sub_norm.weight" in weights else post
    return at("mlp.hook_out", linear(weights, "mlp.down_proj", post))


def experts(place: Place, x: Tensor) -> Tensor:
    """Route each position to its k experts and add their outputs by weight, and what all positions share.

    Edited logits route anew.
    """
    weights, config, kind, at = place.weights, place.config, place.kind, place.at
    logits = at("mlp.hook_router_logits", linear(weights, "mlp.gate", x))
    top, chosen = RULES[kind.routing](logits, weights, config)
    top, chosen = at("mlp.hook_expert_weights", top), at("mlp.hook_expert_indices", chosen)
    every = _clamped(weights, config, x) if kind.clamped else _gated(weights, config, x)
    own = every.gather(2, chosen[..., None].expand(*chosen.shape, every.shape[-1]))  # batch pos k d_model
    own = at("mlp.hook_expert_out", own)
    out = (top[..., None] * own).sum(2) + _shared(weights, config, x)
    return out if kind.splits_mlp(config) else at("mlp.hook_out", out)


def _gated(weights: Weights, config: Any, x: Tensor) -> Tensor:
    """Run every expert at every position: `[batch, pos, expert, d_model]`."""
    gate, up = torch.einsum("bpd,emd->bpem", x, weights["mlp.experts.gate_up_proj"]).chunk(2, dim=-1)
    post = activation(weights, config, gate) * up
    return torch.einsum("bpem,edm->bped", post, weights["mlp.experts.down_proj"])


def _clamped(weights: Weights, config: Any, x: Tensor) -> Tensor:
    """Run every expert of gpt-oss: its matrices are transposed, gate and up alternate."""
    path, limit = "mlp.experts.", config.swiglu_limit
    both = torch.einsum("bpd,edm->bpem", x, weights[path + "gate_up_proj"]) + weights[path + "gate_up_proj_bias"]
    gate, up = both.unflatten(-1, (-1, 2)).unbind(-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    post = (up + 1) * gate * torch.sigmoid(config.swiglu_alpha * gate)
    return torch.einsum("bpem,emd->bped", post, weights[path + "down_proj"]) + weights[path + "down_proj_bias"]


def _shared(weights: Weights, config: Any, x: Tensor) -> Tensor | float:
    """Run the experts that all positions share, where there are weights for them; they may have a gate of their own."""
    if "mlp.shared_experts.down_proj.weight" not in weights:
        return 0.0
    gate, up = gate_and_up(weights, "mlp.shared_experts", x)
    out = linear(weights, "mlp.shared_experts.down_proj", activation(weights, config, gate) * up)
    if "mlp.shared_expert_gate.weight" in weights:
        return torch.sigmoid(linear(weights, "mlp.shared_expert_gate", x)) * out
    return out
