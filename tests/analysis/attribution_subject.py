"""Tiny models in float64 for the tests of graphs and attribution, and patching of one edge after the other."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import VARIANTS, tiny_llama
from golden.tiny_ssm import KINDS, tiny_ssm
from lens_conformance.families import known_families
from lens_conformance.float64 import true_float64
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import lens_core as lens
from lens_core.analysis.graph import Graph, Node, contributions

CLEAN, CORRUPTED = random_tokens(2, 5, vocab=24), random_tokens(2, 5, seed=1, vocab=24)


def of_family(model_type: str) -> Any:
    """Build the kit's tiny model of a type, noise in every parameter."""
    family = known_families()[model_type]
    config = AutoConfig.for_model(model_type, **family.config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        if torch.get_default_dtype() == torch.float64 and hasattr(config, "num_experts_per_tok"):
            model.set_experts_implementation("eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(family.noise(name, parameter))
    return model.eval()


def in_float64(name: str, **options: Any) -> Any:
    """Build the tiny model of a name in float64: `gpt2`, a Llama's variant, a kind of SSM, or a type of the kit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with true_float64():
            if name == "gpt2":
                made: Any = tiny_gpt2(**options)
            elif name in KINDS:
                made = tiny_ssm(name, **options)
            else:
                made = tiny_llama(name, **options) if name in VARIANTS else of_family(name)
            return lens.load(made.double())
    finally:
        torch.set_default_dtype(before)


@cache
def shared(name: str) -> Any:
    """Give the same, once for all tests; nothing may change it."""
    return in_float64(name)


@torch.no_grad()
def change_of(model: Any, graph: Graph) -> Tensor:
    """Give what each writer adds to the clean run beyond what it adds to the corrupted one."""
    _, clean = model.run_with_cache(CLEAN, names_filter=graph.writer_names)
    _, corrupted = model.run_with_cache(CORRUPTED, names_filter=graph.writer_names)
    return contributions(clean, graph.writers) - contributions(corrupted, graph.writers)


def heard(reader: Node, change: Tensor) -> tuple[str, Callable[..., Tensor]]:
    """Give a hook that adds something to what one reader reads, and to nothing else."""

    def add(value: Tensor, hook: Any) -> Tensor:
        if reader.part is None:
            return value + change
        if reader.head is None:
            return value + change[:, :, None]
        new = value.clone()
        new[:, :, reader.head] += change
        return new

    return (reader.hook, add)
