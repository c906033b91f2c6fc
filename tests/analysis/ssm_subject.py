"""Tiny SSMs for the tests of their analysis, the golden forwards beside them, and sums written out in float64."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden.tiny import random_tokens
from golden.tiny_ssm import tiny_ssm
from lens_conformance.float64 import true_float64
from lens_conformance.golden import mamba, mamba2
from torch import Tensor

import lens_core as lens

LAYERS = range(3)
TOKENS = random_tokens(2, 8)


class Subject:
    """One tiny model in float64, in lens and as formulas.

    Attributes:
        model: lens' model.
        tokens: `[2, 8]`.
        values: Everything that the golden forward has, by hook name.
        logits: Its logits.
    """

    def __init__(self, kind: str, **overrides: Any) -> None:
        with true_float64():
            self.hf = tiny_ssm(kind, dtype=torch.float64, **overrides)
        self.kind, self.tokens = kind, TOKENS
        self.model = lens.load(self.hf)
        self.logits, self.values = self.golden()

    def golden(self, edits: Mapping[str, Callable[..., Any]] | None = None, tokens: Tensor = TOKENS) -> Any:
        """Run the formulas with edits; give the logits and the values."""
        module = mamba2 if self.kind == "mamba2" else mamba
        return module.golden(self.hf.state_dict(), self.hf.config, tokens, edits=edits)

    def run(self, tokens: Tensor = TOKENS, **options: Any) -> Any:
        """Run lens with a cache, float32 taken for float64."""
        with true_float64():
            return self.model.run_with_cache(tokens, **options)

    def hooked(self, entries: Any, tokens: Tensor = TOKENS, **options: Any) -> Tensor:
        """Run lens with hooks, likewise."""
        with true_float64():
            return self.model.run_with_hooks(tokens, fwd_hooks=entries, **options)

    def own(self, layer: int, name: str) -> Tensor:
        """Give a weight of a mixer."""
        return self.hf.state_dict()[f"backbone.layers.{layer}.mixer.{name}"]


def attention_of(values: Mapping[str, Tensor], A_log: Tensor, layer: int, kind: str) -> Tensor:
    """Write the effective attention out, `[batch, head, target, source]`, from the golden forward's values."""
    delta, B, C = (values[f"blocks.{layer}.mixer.hook_{name}"].detach() for name in ("delta", "B", "C"))
    batch, pos, heads = delta.shape
    A = -A_log.double().exp().reshape(heads, -1)
    found = torch.zeros(batch, heads, pos, pos, dtype=torch.float64)
    for t in range(pos):
        for s in range(t + 1):
            kept = (delta[:, s + 1 : t + 1].sum(1)[..., None] * A).exp()
            if kind == "mamba2":
                groups = torch.arange(heads) // (heads // B.shape[2])
                matched = C[:, t, groups] * B[:, s, groups]
            else:
                matched = (C[:, t] * B[:, s])[:, None]
            found[:, :, t, s] = (kept * matched).sum(-1) * delta[:, s]
    return found
