"""Comparison of a value with golden's, in units of the value's own scale."""

import torch
from torch import Tensor


def error(ours: Tensor, expected: Tensor) -> float:
    """Give the largest difference over the scale (at least 1); infinite where shapes or masked cells differ."""
    if ours.shape != expected.shape or ours.is_floating_point() != expected.is_floating_point():
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(ours, expected) else float("inf")
    hidden = expected == -torch.inf
    if not torch.equal(ours == -torch.inf, hidden):
        return float("inf")
    ours, expected = ours.detach().double().masked_fill(hidden, 0), expected.detach().double().masked_fill(hidden, 0)
    return float((ours - expected).abs().max()) / max(1.0, float(expected.abs().max())) if ours.numel() else 0.0


def same(name: str, ours: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert that a value is golden's, and say what is off."""
    assert tuple(ours.shape) == tuple(expected.shape), f"{name}: shape {tuple(ours.shape)}, not {tuple(expected.shape)}"
    off = error(ours, expected)
    assert off <= tolerance, f"{name}: off by {off:.2e}"
