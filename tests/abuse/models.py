"""The models that are abused: one of each architecture, and whether anything is left of what was done to it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from lens_conformance.fingerprint import differences, fingerprint
from torch import Tensor

import lens_core as lens

BUILDERS: dict[str, Callable[..., Any]] = {
    "gpt2": tiny_gpt2,
    "llama": partial(tiny_llama, "llama"),
    "mamba": partial(tiny_ssm, "mamba"),
    "mamba2": partial(tiny_ssm, "mamba2"),
}
KINDS = tuple(BUILDERS)
TOKENS = random_tokens(1, 3)
GREEDY = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens"}


@attrs.frozen(kw_only=True, eq=False)
class Victim:
    """A model, and what it was like before anything was done to it."""

    model: Any
    logits: Tensor
    generated: Tensor
    before: dict[str, Any]

    @property
    def hf(self) -> Any:
        """The HF model inside."""
        return self.model.hf_model

    @property
    def names(self) -> list[str]:
        """All hook points."""
        return list(self.model.table)

    def left(self) -> list[str]:
        """Name what is not as it was: the model's state, what it computes, and hooks in the list of added ones."""
        found = differences(self.before, fingerprint(self.hf))
        found += [f"added hook at {entry.names[0]}" for entry in self.model.added_hooks]
        return found + self.computes_otherwise()

    def computes_otherwise(self) -> list[str]:
        """Name what the model computes otherwise than before: bit for bit, by itself and through lens."""
        with torch.no_grad():
            runs = {
                "logits of the HF model": torch.equal(self.hf(TOKENS, use_cache=False).logits, self.logits),
                "logits of the lens model": torch.equal(self.model(TOKENS), self.logits),
            }
        return [name for name, same in runs.items() if not same]

    def generates_otherwise(self) -> list[str]:
        """The same for generation."""
        tokens = self.model.generate(TOKENS, 2, **GREEDY)
        return [] if torch.equal(tokens, self.generated) else ["generated tokens"]


def victim(kind: str, **options: Any) -> Victim:
    """Build a model of a kind, run it once each way, and take its fingerprint."""
    model = lens.load(BUILDERS[kind](**options), tokenizer=False)
    with torch.no_grad():
        logits = model.hf_model(TOKENS, use_cache=False).logits
        generated = model.generate(TOKENS, 2, **GREEDY)
    return Victim(model=model, logits=logits, generated=generated, before=fingerprint(model.hf_model))
