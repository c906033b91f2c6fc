"""Tiny models of every family for the tests of lenses and attributions, and HF's own model cut off after a block."""

import functools
from typing import Any

import torch
from golden.tiny import random_tokens, tiny_gpt2, tiny_tokenizer
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from lens_conformance.float64 import true_float64
from torch import Tensor, nn

import lens_core as lens

TOKENS = random_tokens(2, 6)
FAMILIES = ("gpt2", "llama", "mamba", "mamba2")
SPECIAL = ("gemma2", "granite", "cohere", "stablelm-parallel")
"""A soft cap with post-norms; a factor on branches and logits; a factor and a norm without bias; a parallel block."""


def hf_model(kind: str) -> Any:
    """Build one in float64."""
    with true_float64():
        if kind == "gpt2":
            return tiny_gpt2(dtype=torch.float64)
        if kind in ("mamba", "mamba2"):
            return tiny_ssm(kind, dtype=torch.float64)
        return tiny_llama(kind, attn="eager")


def loaded(kind: str) -> Any:
    """Give lens' model of one, with a tokenizer."""
    return lens.load(hf_model(kind), tokenizer=tiny_tokenizer())


@functools.cache
def cut_logits(kind: str, n_blocks: int) -> Tensor:
    """Run HF's model without its blocks from one on: what it says if the stream ends there, by HF's own code."""
    hf = hf_model(kind)
    for name in ("transformer.h", "model.layers", "backbone.layers"):
        base, _, last = name.partition(".")
        if hasattr(hf, base):
            inner = getattr(hf, base)
            setattr(inner, last, nn.ModuleList(list(getattr(inner, last))[:n_blocks]))
            if base != "backbone":
                hf.config.num_hidden_layers = n_blocks
    with true_float64(), torch.no_grad():
        return hf(TOKENS, use_cache=False).logits
