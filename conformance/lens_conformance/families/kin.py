"""Decoders beside Llama's nearest kin: most are judged by the golden forward of `golden.llama`.

GPT-BigCode, OPT and BioGPT have none: HuggingFace and the contract's equations judge them. Sizes, axes and helpers are
those of `families.llama`.
"""

from typing import Any

from lens_conformance.families.llama import GROUPS, ROPES, SIZES, TIED, WIDTHS, edit_at, judged, rope
from lens_conformance.family import Family
from lens_conformance.golden import llama

__all__ = ["FAMILIES"]

WINDOW = {"sliding_window": 3}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
WIDE_EXPERTS = {**EXPERTS, "intermediate_size": 40}  # where the experts have the MLP's width
GROUPED = {**EXPERTS, "n_routed_experts": 5, "n_shared_experts": 1, "routed_scaling_factor": 1.7}
HALF = {"rope_parameters": rope("default", partial_rotary_factor=0.5)}
FACTORS = {
    "embedding_multiplier": 1.7,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.45,
    "logits_scaling": 1.3,
}
BY_KIND = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    }
}
BIASED = {"attention_bias": (True, False)}
SPARSE_AFTER = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
# model type -> (fields of its config, axes)
TYPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ministral": ({**MIXED, "head_dim": 10}, {**GROUPS}),
    "ministral3": (
        {"rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=4, llama_4_scaling_beta=0.3)},
        {**GROUPS, **WIDTHS, "sliding_window": (3, None)},
    ),
    "internlm3": ({}, {**GROUPS, **TIED, **WIDTHS}),
    "iquestcoder": ({}, {**GROUPS, **TIED, **WIDTHS, **BIASED, "mlp_bias": (False, True)}),
    "cwm": (MIXED, {**GROUPS, **WIDTHS}),
    "ernie4_5": ({}, {**GROUPS, **TIED, **WIDTHS, "use_bias": (True, False)}),
    "seed_oss": ({"residual_dropout": 0.0}, {**GROUPS, **WIDTHS, **BIASED, "attention_out_bias": (True, False)}),
    "helium": ({"head_dim": 8}, {**GROUPS, **TIED, **BIASED}),
    "vaultgemma": (
        {**MIXED, "query_pre_attn_scalar": 7, "head_dim": 10},
        {**GROUPS, "attn_logit_softcapping": (2.0, 50.0), "final_logit_softcapping": (5.0, None)},
    ),
    "hunyuan_v1_dense": ({"head_dim": 10}, {**GROUPS, **TIED, **BIASED}),
    "apertus": ({}, {**GROUPS, **BIASED}),
    "glm": ({**HALF, "head_dim": 8}, {**GROUPS, **BIASED}),
    "glm4": ({**HALF, "head_dim": 8}, {**GROUPS, **BIASED}),
    "exaone4": (MIXED, {**GROUPS}),
    "olmo": ({}, {**GROUPS, **BIASED}),
    "olmo3": (MIXED, {**GROUPS, **BIASED}),
    "phi": (HALF, {**GROUPS, "qk_layernorm": (False, True)}),
    "persimmon": (HALF, {"num_key_value_heads": (4,), "qk_layernorm": (True, False)}),
    "nemotron": ({**HALF, "head_dim": 8}, {**GROUPS, **BIASED, "mlp_bias": (False, True)}),
    "arcee": ({}, {**GROUPS, **WIDTHS, **BIASED, "rope_parameters": ROPES}),
    "jais2": ({"head_dim": 8}, {**GROUPS, **BIASED}),
    "cohere": ({"logit_scale": 0.4}, {**GROUPS, **TIED, "use_qk_norm": (True, False)}),
    "cohere2": ({**MIXED, "logit_scale": 0.4}, {**GROUPS, **TIED}),
    "hyperclovax": (FACTORS, {**GROUPS, "use_post_norm": (True, False)}),
    "qwen2_moe": (
        {**EXPERTS, "shared_expert_intermediate_size": 24},
        {**GROUPS, "mlp_only_layers": ([0], []), "norm_topk_prob": (False, True)},
    ),
    "olmoe": ({**WIDE_EXPERTS}, {**GROUPS, "norm_topk_prob": (False, True)}),
    "flex_olmo": ({**WIDE_EXPERTS}, {**GROUPS, "norm_topk_prob": (False, True)}),
    "granitemoe": ({**WIDE_EXPERTS, **FACTORS}, {**GROUPS}),
    "granitemoeshared": ({**WIDE_EXPERTS, **FACTORS}, {**GROUPS, "shared_intermediate_size": (24, 0)}),
    "gpt_oss": ({**WIDE_EXPERTS, **MIXED, "head_dim": 10, "rope_parameters": rope("default")}, {**GROUPS}),
    "glm4_moe": ({**GROUPED, **HALF, "head_dim": 8}, {**GROUPS, "use_qk_norm": (True, False)}),
    "dots1": ({**GROUPED, "first_k_dense_replace": 1, "norm_topk_prob": True}, {**GROUPS}),
    "solar_open": ({**GROUPED, "head_dim": 10}, {**GROUPS}),
    "exaone_moe": ({**GROUPED, **MIXED, **SPARSE_AFTER, "num_shared_experts": 1}, {**GROUPS}),
    "ernie4_5_moe": (
        {
            "moe_num_experts": 5,
            "moe_k": 3,
            "moe_intermediate_size": 24,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
        },
        {**GROUPS, "use_bias": (True, False), "moe_num_shared_experts": (1, 0)},
    ),
    "hunyuan_v1_moe": ({**WIDE_EXPERTS, "moe_topk": 3, "head_dim": 10}, {**GROUPS}),
    "minimax_m2": ({**WIDE_EXPERTS, "head_dim": 10}, {**GROUPS}),
    "phimoe": ({**WIDE_EXPERTS, "num_experts_per_tok": 2, "router_jitter_noise": 0.01}, {**GROUPS, **BIASED}),
    "hy_v3": ({**EXPERTS, **SPARSE_AFTER, "head_dim": 10}, {**GROUPS}),
    "mellum": ({**EXPERTS, **SPARSE_AFTER, **MIXED, **BY_KIND, "head_dim": 10}, {**GROUPS}),
}
BIGCODE = Family(
    model_type="gpt_bigcode",
    config={
        "vocab_size": 29,
        "n_positions": 32,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 37,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 28,
        "eos_token_id": 28,
        "pad_token_id": 28,
    },
    axes={
        "multi_query": (True, False),
        "scale_attn_weights": (True, False),
        "attention_softmax_in_fp32": (True, False),
        "scale_attention_softmax_in_fp32": (True, False),
        "activation_function": ("gelu_pytorch_tanh", "relu"),
    },
    dropout={"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
)
LEARNED = {"vocab_size": 29, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
ENDS = {"max_position_embeddings": 32, "bos_token_id": 28, "eos_token_id": 28, "pad_token_id": 28}
OPT = Family(
    model_type="opt",
    config={**LEARNED, **ENDS, "ffn_dim": 37, "word_embed_proj_dim": 32, "dropout": 0.0},
    axes={**TIED, "activation_function": ("relu", "gelu"), "enable_bias": (True, False)},
)
BIOGPT = Family(
    model_type="biogpt",
    config={
        **LEARNED,
        **ENDS,
        "intermediate_size": 37,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    axes={**TIED, "hidden_act": ("gelu", "relu"), "scale_embedding": (True, False), "layer_norm_eps": (1e-12, 1e-3)},
)


def _of_text(state_dict: Any, config: Any, *args: Any, **options: Any) -> Any:
    """Run the golden forward on the text stack of a model that also takes images."""
    own = {name.replace("model.language_model.", "model."): weight for name, weight in state_dict.items()}
    return llama.golden(own, config.text_config, *args, **options)


GEMMA3 = Family(
    model_type="gemma3",
    config={
        "text_config": {
            **{name: value for name, value in SIZES.items() if name != "tie_word_embeddings"},
            **MIXED,
            **BY_KIND,
            "query_pre_attn_scalar": 7,
            "head_dim": 10,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        "mm_tokens_per_image": 4,
        "image_token_id": 28,
        "tie_word_embeddings": False,
    },
    golden=_of_text,
    names=lambda config: llama.names(config.text_config),
    edit_at=edit_at,
    apart=lambda name: name.endswith(llama.COPIES),
)
DROPOUT = {"phi": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attention_dropout": 0.2}, "ernie4_5": {}, "ernie4_5_moe": {}}


def _rerouted(name: str, *, causal: bool = False) -> Any:
    """Turn a router's logits around: where it cuts off all experts but the best, a weight is 1 whatever the logit."""
    return (lambda x, hook=None: -x) if name.endswith("router_logits") else edit_at(name, causal=causal)


def family(model_type: str) -> Family:
    """Make the record of a type."""
    edit = {"edit_at": _rerouted} if model_type == "phimoe" else {}
    return judged(model_type, *TYPES[model_type], dropout=DROPOUT.get(model_type, {"attention_dropout": 0.2}), **edit)


FAMILIES = [*(family(model_type) for model_type in TYPES), BIGCODE, OPT, BIOGPT, GEMMA3]
