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
_EXPERT_WEIGHTS = (Support.PARTIAL, "W_in, W_gate and W_out are given for dense MLPs, not for experts")

_HANDLED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "max_position_embeddings"),
    *("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "rope_parameters", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "attention_dropout"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
)
_IGNORED = ("initializer_range", "pretraining_tp")

# model type -> what people call it, the fields of its own that are handled, and those that change nothing here
_TYPES = {
    "llama": ("Llama", (), ()),
    "mistral": ("Mistral", (), ()),
    "qwen2": ("Qwen2", (), ()),
    "qwen3": ("Qwen3", (), ()),
    "phi3": ("Phi-3", ("resid_pdrop", "embd_pdrop", "original_max_position_embeddings"), ()),
    "gemma": ("Gemma", (), ()),
    "gemma2": ("Gemma 2", ("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping"), ()),
    "gemma3_text": (
        "Gemma 3",
        ("query_pre_attn_scalar", "final_logit_softcapping", "_sliding_window_pattern"),
        ("attn_logit_softcapping",),
    ),
    "olmo2": ("OLMo 2", (), ()),
    "granite": (
        "Granite",
        ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"),
        (),
    ),
    "smollm3": ("SmolLM3", ("no_rope_layers", "no_rope_layer_interval"), ()),
    "stablelm": ("StableLM", ("use_parallel_residual", "qk_layernorm", "hidden_dropout"), ()),
    "starcoder2": ("StarCoder2", ("residual_dropout", "embedding_dropout"), ()),
    # `router_jitter_noise` is in neither: in training it writes into what the MLP received.
    "mixtral": (
        "Mixtral",
        ("num_local_experts", "num_experts_per_tok"),
        ("output_router_logits", "router_aux_loss_coef"),
    ),
    "qwen3_moe": (
        "Qwen3-MoE",
        (
            *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
            *("decoder_sparse_step", "mlp_only_layers"),
        ),
        ("output_router_logits", "router_aux_loss_coef"),
    ),
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
            capabilities=_CAPABILITIES
            | ({Capability.WEIGHT_VIEWS: _EXPERT_WEIGHTS} if model_type in ("mixtral", "qwen3_moe") else {}),
            config_handled=(*_HANDLED, *handled),
            config_ignored=(*_IGNORED, *ignored),
            toy="toy" if model_type == "llama" else None,
        )
        for model_type, (name, handled, ignored) in _TYPES.items()
    ]
