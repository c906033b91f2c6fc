"""Tiny models of each family, and of a hybrid, for the analyses that run on all of them."""

from functools import cache

import torch
from golden.tiny import tiny_gpt2, tiny_tokenizer
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from lens_conformance.families import known_families
from transformers import AutoConfig, AutoModelForCausalLM

import lens_core as lens

FAMILIES = ("gpt2", "llama", "mamba", "mamba2")


@cache
def tiny(family):
    """Load a tiny model with noise in every parameter and a tokenizer of one-word tokens w0 to w27; one for all."""
    if family == "gpt2":
        return lens.load(tiny_gpt2(), tokenizer=tiny_tokenizer())
    hf = tiny_llama() if family == "llama" else tiny_ssm(family)
    return lens.load(hf, tokenizer=tiny_tokenizer())


@cache
def tiny_hybrid(model_type="bamba"):
    """Load a hybrid: a Mamba-2 block, an attention block, a Mamba-2 block."""
    family = known_families()[model_type]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **family.config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(family.noise(name, parameter))
    return lens.load(model.eval())
