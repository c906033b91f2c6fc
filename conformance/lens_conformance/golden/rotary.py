"""Rotary position embeddings from their papers, in float64: plain, linear, dynamic, YaRN, LongRoPE and Llama 3.

Glossary: pair j of the rotated width D turns by position * w_j, with w_j = base ** (-2j / D); pair j is the channels
(j, j + D/2) of a head, or, interleaved, (2j, 2j + 1). Sources: Su et al. 2021 (RoFormer), Chen et al. 2023
(linear interpolation), Peng et al. 2023 (YaRN, NTK by parts), the dynamic NTK rule, Ding et al. 2024 (LongRoPE), Meta
2024 (Llama 3.1's smoothing).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rotate(
    x: Tensor, positions: Tensor, rope: Mapping[str, Any], max_positions: int, interleaved: bool = False
) -> Tensor:
    """Turn the first channels of each head by its position.

    Args:
        x: queries or keys, `[batch, pos, head, d_head]`.
        positions: `[batch or 1, pos]`.
        rope: HF's `rope_parameters` of this kind of layer.
        max_positions: the context that the dynamic rule starts from (HF's `max_position_embeddings`).
        interleaved: whether a pair is two neighbours.
    """
    width = int(x.shape[-1] * rope.get("partial_rotary_factor", 1.0))
    frequencies, factor = turns(rope, width, int(positions.max()) + 1, max_positions)
    angles = positions.to(torch.float64)[..., None] * frequencies  # batch pos pair
    cos, sin = (factor * f(angles)[:, :, None] for f in (torch.cos, torch.sin))
    pairs = x[..., :width].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    axis = -1 if interleaved else -2
    first, second = pairs.unbind(axis)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=axis)
    return torch.cat([turned.flatten(-2), x[..., width:]], dim=-1)


def query_factor(positions: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Give what Ministral 3 multiplies queries by, `[batch or 1, pos, 1, 1]`: it grows with each original context."""
    past = torch.floor(positions.to(torch.float64) / rope["original_max_position_embeddings"])
    return (1 + rope["llama_4_scaling_beta"] * torch.log1p(past))[..., None, None]


def turns(rope: Mapping[str, Any], width: int, length: int, max_positions: int) -> tuple[Tensor, float]:
    """Give the angle per position of each pair, and the factor on cos and sin."""
    kind, base, factor = rope.get("rope_type", "default"), rope["rope_theta"], rope.get("factor")
    steps = torch.arange(0, width, 2, dtype=torch.float64) / width
    if kind == "default":
        return base**-steps, 1.0
    if kind == "linear":
        return base**-steps / factor, 1.0
    if kind == "dynamic" and rope.get("alpha"):  # Hunyuan's: a fixed length
        return (base * rope["alpha"] ** (width / (width - 2))) ** -steps, 1.0
    if kind == "dynamic":
        longer = max(length, max_positions) / max_positions
        return (base * (factor * longer - (factor - 1)) ** (width / (width - 2))) ** -steps, 1.0
    if kind == "yarn":
        return _yarn(rope, width, base**-steps)
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        stretch = rope["long_factor"] if length > original else rope["short_factor"]
        ratio = factor or max_positions / original
        scale = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        return base**-steps / torch.tensor(stretch, dtype=torch.float64), rope.get("attention_factor") or scale
    if kind == "llama3":
        return _llama3(rope, base**-steps), 1.0
    raise ValueError(f"no formula for rotary embeddings of type {kind!r}")


def _yarn(rope: Mapping[str, Any], width: int, plain: Tensor) -> tuple[Tensor, float]:
    """Interpolate slow pairs, keep fast ones, and go over linearly between `beta_slow` and `beta_fast` rotations."""
    original, base, factor = rope["original_max_position_embeddings"], rope["rope_theta"], rope["factor"]

    def pair_with(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_with(rope.get("beta_slow") or 1)), width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)
    slow = ramp.clamp(0, 1)
    return plain / factor * slow + plain * (1 - slow), rope.get("attention_factor") or 0.1 * math.log(factor) + 1


def _llama3(rope: Mapping[str, Any], plain: Tensor) -> Tensor:
    """Divide pairs slower than the low limit by the factor, keep the fast ones, and go over smoothly between."""
    turned = rope["original_max_position_embeddings"] * plain / (2 * math.pi)  # rotations within the old context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    fast = ((turned - low) / (high - low)).clamp(0, 1)
    return plain * fast + plain / rope["factor"] * (1 - fast)
