"""Llama and its kin: one family a model type; axes are what the type's checkpoints vary."""

from typing import Any

from lens_conformance import edits
from lens_conformance.family import Family
from lens_conformance.golden import llama

# 4 query heads, 3 layers, 29 tokens, 37 neurons, window 3. Experts have 24 or 40 neurons: what HF's grouped matrix
# product takes are rows of a multiple of 16 bytes.
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
GROUPS = {"num_key_value_heads": (1, 2, 4)}
TIED = {"tie_word_embeddings": (False, True)}
WIDTHS = {"head_dim": (10, 6)}  # other than hidden_size / num_attention_heads


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    """Give rotary parameters whose base is small enough that positions differ."""
    return {"rope_type": kind, "rope_theta": 100.0, **fields}


ROPES = (
    rope("default"),
    rope("linear", factor=3.0),
    rope("yarn", factor=4.0, original_max_position_embeddings=16),
    rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
)
# model type -> (fields of its config, axes)
TYPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {},
        {
            **GROUPS,
            **TIED,
            **WIDTHS,
            "rope_parameters": ROPES,
            "attention_bias": (False, True),
            "mlp_bias": (False, True),
        },
    ),
    "mistral": ({}, {**GROUPS, **WIDTHS, "sliding_window": (3, None)}),
    "qwen2": ({"use_sliding_window": True, "sliding_window": 3}, {**GROUPS, **TIED, "max_window_layers": (1, 3)}),
    "qwen3": ({}, {**GROUPS, **WIDTHS, "attention_bias": (True, False)}),
    "phi3": ({"rope_parameters": rope("default", partial_rotary_factor=0.5)}, {**GROUPS, "sliding_window": (3, None)}),
    "gemma": ({}, {**GROUPS, **WIDTHS}),
    "gemma2": (
        {"sliding_window": 3, "query_pre_attn_scalar": 7, "head_dim": 10},
        {**GROUPS, "attn_logit_softcapping": (2.0, 50.0), "final_logit_softcapping": (5.0, None)},
    ),
    "gemma3_text": (
        {
            "sliding_window": 3,
            "query_pre_attn_scalar": 7,
            "head_dim": 10,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
        {**GROUPS},
    ),
    "olmo2": ({}, {**GROUPS, "attention_bias": (True, False)}),
    "granite": (
        {
            "embedding_multiplier": 1.7,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.45,
            "logits_scaling": 1.3,
        },
        {**GROUPS, **TIED},
    ),
    "smollm3": (
        {"use_sliding_window": True, "sliding_window": 3},
        {**GROUPS, "no_rope_layers": ([1, 0, 1], [1, 1, 1])},
    ),
    "stablelm": (
        {},
        {
            **GROUPS,
            "use_parallel_residual": (False, True),
            "qk_layernorm": (False, True),
            "use_qkv_bias": (True, False),
        },
    ),
    "starcoder2": ({}, {**GROUPS, "sliding_window": (3, None), "use_bias": (True, False)}),
    "mixtral": (
        {"num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 40, "head_dim": 10},
        {**GROUPS, "sliding_window": (3, None)},
    ),
    "qwen3_moe": (
        {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 10},
        {**GROUPS, "mlp_only_layers": ([0], []), "norm_topk_prob": (False, True)},
    ),
}
DROPOUT = {
    "stablelm": ("attention_dropout", "hidden_dropout"),
    "phi3": ("attention_dropout", "resid_pdrop"),
    "starcoder2": ("attention_dropout", "residual_dropout", "embedding_dropout"),
}

EAGER = ("gemma2", "vaultgemma", "gpt_oss")  # HF has no SDPA for them
PARALLEL = ("stablelm", "phi", "cohere", "cohere2")


def edit_at(name: str, *, causal: bool = False) -> Any:
    """Choose the edit for a name; of chosen experts, the next one."""
    return (lambda x, hook=None: (x + 1) % 5) if name.endswith("expert_indices") else edits.edit_at(name, causal=causal)


def judged(model_type: str, config: dict[str, Any], axes: dict[str, Any], **given: Any) -> Family:
    """Make the record of a type that has a golden forward of this family."""
    copies = (*llama.COPIES, *(["hook_mlp_in"] if model_type in PARALLEL else []))
    return Family(
        model_type=model_type,
        config={**SIZES, **config},
        axes=axes,
        golden=llama.golden,
        names=llama.names,
        implementations=("eager",) if model_type in EAGER else ("sdpa", "eager"),
        apart=lambda name: name.endswith(copies),
        **{"edit_at": edit_at, **given},
    )


def family(model_type: str) -> Family:
    """Make the record of a type."""
    dropout = dict.fromkeys(DROPOUT.get(model_type, ("attention_dropout",)), 0.2)
    return judged(model_type, *TYPES[model_type], dropout=dropout)


FAMILIES = [family(model_type) for model_type in TYPES]
