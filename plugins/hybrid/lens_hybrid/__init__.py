"""Hybrids of attention and mixers for lens: the descriptor, which imports neither torch nor transformers."""

from lens_core.plugin import Architecture, Capability, Support, hookimpl

__version__ = "0.1.0"

__all__ = ["__version__", "lens_architectures"]

_CAPABILITIES = dict.fromkeys(Capability, Support.FULL) | {
    Capability.POSITION_EMBEDDING: (
        Support.ABSENT,
        "queries and keys are rotated, or nothing is; nothing is added to the residual stream",
    ),
    Capability.GENERATE: (
        Support.PARTIAL,
        "refused with a cache where the step size has a limit, which HF ignores in decoding",
    ),
    Capability.LEFT_PADDING: (
        Support.PARTIAL,
        "refused where in_proj has a bias, which HF lets into the convolution at padding",
    ),
    Capability.GRADIENT_CHECKPOINTING: (Support.PARTIAL, "in training, hooks inside a checkpointed block refuse"),
    Capability.TORCH_COMPILE: (Support.PARTIAL, "a compiled model runs eagerly while it is hooked"),
}
_EXPERT_WEIGHTS = {
    Capability.WEIGHT_VIEWS: (Support.PARTIAL, "an expert that every position visits, where there is one, has no views")
}
_NO_LIMIT = {Capability.GENERATE: Support.FULL}
_LEAST_STEP = {
    Capability.GENERATE: (
        Support.PARTIAL,
        "HF ignores time_step_min in decoding; what is inside a scan that it would have changed refuses",
    )
}

_HANDLED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "attention_dropout", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "num_logits_to_keep"),
)
_MIXER = (
    *("hidden_act", "rms_norm_eps", "mamba_d_state", "mamba_d_conv", "mamba_expand"),
    *("mamba_conv_bias", "mamba_proj_bias"),
)
_MIXER2 = (
    *(*_MIXER, "mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_chunk_size", "time_step_limit"),
    *("attention_bias", "rope_parameters"),
)
_BAMBA = (*_MIXER2, "attn_layer_indices", "mlp_bias", "partial_rotary_factor")
_JAMBA = (
    *(*_MIXER, "mamba_dt_rank", "use_mambapy", "use_associative_scan", "attn_layer_period", "attn_layer_offset"),
    *("num_experts", "num_experts_per_tok", "expert_layer_period", "expert_layer_offset"),
)
_GRANITE = (
    *(*_MIXER2, "layer_types", "position_embedding_type", "shared_intermediate_size", "num_local_experts"),
    *("num_experts_per_tok", "embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"),
)
_NEMOTRON = (
    *("layers_block_type", "head_dim", "attention_bias", "mlp_hidden_act", "mlp_bias", "layer_norm_epsilon"),
    *("ssm_state_size", "mamba_num_heads", "mamba_head_dim", "mamba_hidden_act", "n_groups", "conv_kernel", "expand"),
    *("time_step_min", "use_conv_bias", "chunk_size", "use_bias", "n_routed_experts", "moe_intermediate_size"),
    *("moe_shared_expert_intermediate_size", "moe_latent_size", "num_experts_per_tok", "routed_scaling_factor"),
    *("n_group", "topk_group", "norm_topk_prob", "n_shared_experts"),
)
_FALCON = (
    *(*_MIXER2, "mamba_d_ssm", "mamba_norm_before_gate", "mamba_rms_norm", "projectors_bias", "mlp_bias"),
    *("lm_head_multiplier", "embedding_multiplier", "mlp_multipliers", "key_multiplier", "attention_out_multiplier"),
    *("attention_in_multiplier", "ssm_multipliers", "ssm_in_multiplier", "ssm_out_multiplier"),
)
_IGNORED = (
    *("initializer_range", "output_router_logits", "router_aux_loss_coef", "z_loss_coefficient", "use_mamba_kernels"),
    # HF's NemotronHForCausalLM reads none of these
    *("time_step_max", "time_step_floor", "time_step_limit", "rescale_prenorm_residual", "residual_in_fp32"),
    *("hidden_dropout", "sliding_window", "mamba_proj_bias", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap"),
    *("num_nextn_predict_layers", "mtp_layers_block_type"),
)


@hookimpl
def lens_architectures() -> list[Architecture]:
    """Describe the hybrids, one record for each model type."""
    return [
        Architecture(
            name=name,
            model_types=(model_type,),
            api_version=1,
            transformers=">=5.23,<6",
            implementation="lens_hybrid._architecture:Hybrid",
            capabilities=_CAPABILITIES | more,
            config_handled=(*_HANDLED, *fields),
            config_ignored=tuple(field for field in _IGNORED if field not in fields),
        )
        for name, model_type, more, fields in (
            ("Bamba", "bamba", {}, _BAMBA),
            ("Jamba", "jamba", _EXPERT_WEIGHTS | _NO_LIMIT, _JAMBA),
            ("Granite-MoE hybrid", "granitemoehybrid", _EXPERT_WEIGHTS, _GRANITE),
            ("Nemotron-H", "nemotron_h", _EXPERT_WEIGHTS | _LEAST_STEP, _NEMOTRON),
            ("Falcon-H1", "falcon_h1", {}, _FALCON),
        )
    ]
