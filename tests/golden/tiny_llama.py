"""Tiny models of the Llama family for tests: noise in every parameter, sizes that cannot be taken for one another."""

from typing import Any

import torch
from lens_conformance.families import kin
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# 4 query heads, 2 key and value heads, 3 layers, 29 tokens, 37 neurons, window 3. Experts have 24 or 40 neurons: what
# HF's grouped matrix product takes are rows of a multiple of 16 bytes.
SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 28,
    "eos_token_id": 28,
    "pad_token_id": 28,
    "tie_word_embeddings": False,
}
WIDE_HEADS = {"head_dim": 10}  # no longer hidden_size / num_attention_heads
LONG = [1.0 + 0.5 * pair for pair in range(4)]


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **fields}}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDE_HEADS),
    "llama-mha": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 24, **WIDE_HEADS}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_attention_heads": 6, "hidden_size": 36}),
    "llama-linear": ("llama", _rope("linear", factor=3.0)),
    "llama-dynamic": ("llama", _rope("dynamic", factor=3.0) | {"max_position_embeddings": 5}),
    "llama-yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-llama3": (
        "llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "mistral": ("mistral", {"sliding_window": 3, **WIDE_HEADS}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"attention_bias": True, **WIDE_HEADS}),
    "phi3": ("phi3", {**_rope("default", partial_rotary_factor=0.5), "sliding_window": 3}),
    "phi3-longrope": (
        "phi3",
        {
            **_rope("longrope", short_factor=[1.0, 1.1, 1.3, 1.7], long_factor=LONG),
            "original_max_position_embeddings": 6,
        },
    ),
    "gemma": ("gemma", WIDE_HEADS),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 3,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            **WIDE_HEADS,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "sliding_window": 3,
            "query_pre_attn_scalar": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
            **WIDE_HEADS,
        },
    ),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 1.7,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.45,
            "logits_scaling": 1.3,
        },
    ),
    "smollm3": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 3},
    ),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", {"sliding_window": 3}),
    "mixtral": (
        "mixtral",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "intermediate_size": 40,
            "sliding_window": 3,
            **WIDE_HEADS,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [0],
            "norm_topk_prob": False,
            **WIDE_HEADS,
        },
    ),
    "qwen3_moe-sparse": (
        "qwen3_moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            **WIDE_HEADS,
        },
    ),
}
"""Test id to HF's model type and what its config holds beside SIZES."""
GROUPS = {"n_group": 3, "topk_group": 2, "n_routed_experts": 6, "num_local_experts": 6}
BESIDE: dict[str, dict[str, Any]] = {
    "ministral3": WIDE_HEADS,
    "persimmon": {"num_key_value_heads": 4},
    "phi": {"qk_layernorm": True},
    "cohere": {"use_qk_norm": True},
    "hyperclovax": {"use_post_norm": True},
    "hunyuan_v1_dense": _rope("dynamic", alpha=3.0, factor=1.0),
    "glm4_moe": {**GROUPS, "use_qk_norm": True},
    "exaone_moe": {"n_group": 3, "topk_group": 2, "num_experts": 6},
    "phimoe": {"router_jitter_noise": 0.6},
    "granitemoeshared": {"shared_intermediate_size": 24},
}
KIN = {key: (key, {**config, **BESIDE.get(key, {})}) for key, (config, _) in kin.TYPES.items()}
KIN["bitnet"] = ("bitnet", {})
"""The kit's further types, each once."""
VARIANTS |= KIN


def tiny_llama(variant: str = "llama", *, attn: str = "sdpa", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a model in eval mode, in torch's default dtype, whose every parameter has noise.

    Weights are drawn large enough that attention is far from uniform and every edit moves the logits well above
    rounding; gains of norms stay around where their type starts them, corrections of routers are no longer zero.
    Experts of a float64 model run HF's eager way, the only one that takes float64.
    """
    model_type, own = VARIANTS[variant]
    config = AutoConfig.for_model(model_type, **{**SIZES, **own, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn)
        if torch.get_default_dtype() == torch.float64 and hasattr(config, "num_experts_per_tok"):
            model.set_experts_implementation("eager")
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                if parameter.ndim == 1:
                    parameter.add_(noise * 0.2)  # gains and biases
                else:
                    parameter.copy_(noise * 0.3)
            for name, buffer in model.named_buffers():
                if name.endswith("correction_bias"):
                    buffer.copy_(torch.randn_like(buffer) * 0.3)
    return model.eval()
