"""Tiny float64 models of every family with the golden forwards beside them: the oracle of paths and circuits."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from lens_conformance.families import known_families
from lens_conformance.float64 import true_float64
from lens_conformance.golden import gpt2, llama, mamba, mamba2
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import lens_core as lens

TOKENS = random_tokens(2, 5)
OTHER = random_tokens(2, 5, seed=1)
SSM = {"mamba": mamba, "mamba2": mamba2}


class Subject:
    """One tiny model in float64, in lens and as formulas.

    Attributes:
        model: lens' model.
        name: `gpt2`, `mamba`, `mamba2`, or a variant of the Llama family.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        with true_float64():
            if name == "gpt2":
                hf = tiny_gpt2(dtype=torch.float64)
            else:
                eager = {"attn": "eager"} if name.startswith("gemma") else {}
                hf = tiny_ssm(name, dtype=torch.float64) if name in SSM else tiny_llama(name, **eager).double()
        self.hf, self.model = hf, lens.load(hf)

    def golden(
        self, tokens: Tensor = TOKENS, edits: Mapping[str, Callable[..., Any]] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the formulas with edits; give the logits and the values."""
        module = SSM.get(self.name, gpt2 if self.name == "gpt2" else llama)
        with torch.no_grad():
            return module.golden(self.hf.state_dict(), self.hf.config, tokens, edits=edits)

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function of lens on the model, float32 taken for float64."""
        with true_float64():
            return function(self.model, *args, **options)


@cache
def subject(name: str) -> Subject:
    """Give a subject, built once."""
    return Subject(name)


def of_kit(model_type: str) -> Any:
    """Give the kit's tiny model of a type in float64, noise in every parameter; it has no golden forward here."""
    family = known_families()[model_type]
    config = AutoConfig.for_model(model_type, **family.config)
    with true_float64(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(family.noise(name, parameter))
        return lens.load(model.double().eval())


def metric(logits: Tensor) -> Tensor:
    """Give one number for each row: a difference of two logits at the last position."""
    return logits[:, -1, 3] - logits[:, -1, 7]


def close(found: Tensor, expected: Tensor) -> None:
    """Compare in float64, to rounding."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-9, atol=1e-10)
