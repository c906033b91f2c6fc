"""Llama and its kin for lens: the descriptor, which imports neither torch nor transformers."""

from lens_core.plugin import Architecture, Capability, Support, hookimpl

__version__ = "0.1.0"

__all__ = ["__version__", "lens_architectures"]

_CAPABILITIES = {
    Capability.ATTENTION_PATTERN: Support.FULL,
    Capability.SSM_STATE: (Support.ABSENT, "no state-space layer"),
    Capability.POSITION_EMBEDDING: (
        Support.ABSENT,
        "queries and keys are rotated; nothing is added to the residual stream",
    ),
    Capability.PER_HEAD: Support.FULL,
    Capability.GENERATE: Support.FULL,
    Capability.LEFT_PADDING: Support.FULL,
    Capability.WEIGHT_VIEWS: Support.FULL,
    Capability.DEVICE_MAP: Support.FULL,
    Capability.GRADIENTS: Support.FULL,
    Capability.GRADIENT_CHECKPOINTING: (Support.PARTIAL, "in training, hooks inside a checkpointed block refuse"),
    Capability.TORCH_COMPILE: (Support.PARTIAL, "a compiled model runs eagerly while it is hooked"),
}
_EXPERT_WEIGHTS = (
    Support.PARTIAL,
    "an expert that every position visits, where there is one, has no views",
)

_HANDLED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "max_position_embeddings"),
    *("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps", "rope_parameters", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "qkv_bias", "attention_out_bias", "lm_head_bias"),
    *("attention_dropout", "residual_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "embedding_dropout"),
    *("sliding_window", "sliding_window_pattern", "_sliding_window_pattern", "use_sliding_window"),
    *("max_window_layers", "layer_types", "query_pre_attn_scalar", "attn_logit_softcapping"),
    *("final_logit_softcapping", "qk_layernorm", "use_qk_norm", "original_max_position_embeddings"),
    *("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier", "logit_scale"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "eod_token_id", "sep_token_id", "use_cache"),
)
_SPARSE = (
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "mlp_layer_types"),
    *("first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers", "n_shared_experts", "num_shared_experts"),
    *("shared_expert_intermediate_size", "shared_intermediate_size"),
)
_IGNORED = (
    *("initializer_range", "pretraining_tp", "output_router_logits", "router_aux_loss_coef"),
    *("num_mtp_layers", "num_nextn_predict_layers", "mtp_layer_types", "mtp_mlp_layer_types"),  # HF builds none
)

_IMAGES = ("mm_tokens_per_image", "image_token_index", "boi_token_index", "eoi_token_index")

# model type -> what people call it, and the fields of its own that are handled
_DENSE: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("Llama", ()),
    "mistral": ("Mistral", ()),
    "ministral": ("Ministral", ()),
    "ministral3": ("Ministral 3", ()),
    "internlm3": ("InternLM3", ()),
    "iquestcoder": ("IQuest-Coder", ()),
    "cwm": ("Code World Model", ()),
    "ernie4_5": ("ERNIE 4.5", ()),
    "seed_oss": ("Seed-OSS", ()),
    "qwen2": ("Qwen2", ()),
    "qwen3": ("Qwen3", ()),
    "smollm3": ("SmolLM3", ("no_rope_layers", "no_rope_layer_interval")),
    "helium": ("Helium", ()),
    "hunyuan_v1_dense": ("HunYuan", ()),
    "apertus": ("Apertus", ()),
    "gemma": ("Gemma", ()),
    "gemma2": ("Gemma 2", ()),
    "gemma3_text": ("Gemma 3", ()),
    "gemma3": ("Gemma 3, with images", ("text_config", "vision_config", *_IMAGES)),
    "vaultgemma": ("VaultGemma", ()),
    "glm": ("GLM-4", ()),
    "glm4": ("GLM-4-0414", ()),
    "exaone4": ("EXAONE 4", ()),
    "olmo": ("OLMo", ()),  # not `clip_qkv`, which writes into what the projections returned
    "olmo2": ("OLMo 2", ()),
    "olmo3": ("OLMo 3", ()),
    "phi": ("Phi", ()),
    "phi3": ("Phi-3", ()),
    "persimmon": ("Persimmon", ()),
    "stablelm": ("StableLM", ("use_parallel_residual",)),
    "starcoder2": ("StarCoder2", ()),
    "nemotron": ("Nemotron", ()),
    "arcee": ("Arcee", ()),
    "jais2": ("Jais 2", ()),
    "cohere": ("Command R", ()),
    "cohere2": ("Command R7B", ()),
    "granite": ("Granite", ()),
    "hyperclovax": ("HyperCLOVA X", ("use_post_norm",)),
}
_MIXTURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "mixtral": ("Mixtral", ("router_jitter_noise",)),
    "qwen2_moe": ("Qwen2-MoE", ()),
    "qwen3_moe": ("Qwen3-MoE", ()),
    "olmoe": ("OLMoE", ()),
    "flex_olmo": ("FlexOlmo", ()),
    "granitemoe": ("Granite-MoE", ()),
    "granitemoeshared": ("Granite-MoE, shared", ()),
    "gpt_oss": ("gpt-oss", ("swiglu_alpha", "swiglu_limit")),
    "glm4_moe": ("GLM-4.5", ()),
    "dots1": ("dots.llm1", ()),
    "solar_open": ("Solar Open", ()),
    "exaone_moe": ("EXAONE MoE", ()),
    "ernie4_5_moe": (
        "ERNIE 4.5 MoE",
        (
            *("moe_k", "moe_num_experts", "moe_num_shared_experts", "moe_norm_min"),
            *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
        ),
    ),
    "hunyuan_v1_moe": ("HunYuan-MoE", ("moe_topk",)),
    "minimax_m2": ("MiniMax-M2", ("router_jitter_noise",)),
    "phimoe": ("Phi-MoE", ("input_jitter_noise", "router_jitter_noise")),
    "hy_v3": ("HY 3", ("router_scaling_factor", "enable_moe_fp32_combine")),
    "mellum": ("Mellum", ()),
}


@hookimpl
def lens_architectures() -> list[Architecture]:
    """Describe Llama and its kin, one record for each model type."""
    return [
        Architecture(
            name=name,
            model_types=(model_type,),
            api_version=1,
            transformers=">=5.20,<6",
            implementation="lens_llama._architecture:Llama",
            capabilities=_CAPABILITIES | more,
            config_handled=(*_HANDLED, *fields, *own),
            config_ignored=_IGNORED,
            toy="toy" if model_type == "llama" else None,
        )
        for types, more, fields in (
            (_DENSE, {}, ()),
            (_MIXTURES, {Capability.WEIGHT_VIEWS: _EXPERT_WEIGHTS}, _SPARSE),
        )
        for model_type, (name, own) in types.items()
    ]
