"""Tiny GPT-NeoX models: noise in every parameter, sizes that cannot be taken for one another."""

from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

# 3 heads of 8, 2 layers, 29 tokens, 37 neurons, 32 positions: a swapped axis cannot broadcast.
SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "max_position_embeddings": 32,
    "bos_token_id": 28,
    "eos_token_id": 28,
    "pad_token_id": 28,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "parallel": {"rotary_pct": 0.5, "rotary_emb_base": 100},
    "sequential": {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_new"},
    "unbiased": {"attention_bias": False, "rotary_pct": 0.25, "layer_norm_eps": 1e-2},
    "tied": {"tie_word_embeddings": True, "use_parallel_residual": False, "attention_bias": False},
}


def tiny_neox(variant: str = "parallel", *, attn: str = "sdpa", seed: int = 0, **overrides: Any) -> GPTNeoXForCausalLM:
    """Build a model in eval mode, in torch's default dtype, none of whose parameters is constant."""
    config = GPTNeoXConfig(**{**SIZES, **VARIANTS[variant], **overrides}, attn_implementation=attn)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config)
        for name, parameter in model.named_parameters():
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.3) + float(is_gain))
    return model.eval()
