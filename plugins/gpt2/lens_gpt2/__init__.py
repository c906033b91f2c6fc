"""GPT-2 and GPT-BigCode for lens: the descriptor, which imports neither torch nor transformers."""

from lens_core.plugin import Architecture, Capability, Support, hookimpl

__version__ = "0.1.0"

__all__ = ["__version__", "lens_architectures"]

_CAPABILITIES = {
    Capability.ATTENTION_PATTERN: Support.FULL,
    Capability.SSM_STATE: (Support.ABSENT, "no state-space layer"),
    Capability.POSITION_EMBEDDING: Support.FULL,
    Capability.PER_HEAD: Support.FULL,
    Capability.GENERATE: Support.FULL,
    Capability.LEFT_PADDING: Support.FULL,
    Capability.WEIGHT_VIEWS: Support.FULL,
    Capability.DEVICE_MAP: Support.FULL,
    Capability.GRADIENTS: Support.FULL,
    Capability.GRADIENT_CHECKPOINTING: (Support.PARTIAL, "in training, hooks inside a checkpointed block refuse"),
    Capability.TORCH_COMPILE: (Support.PARTIAL, "a compiled model runs eagerly while it is hooked"),
}

# `add_cross_attention` is in neither tuple: a decoder with cross-attention has places that nothing here declares.
_CONFIG_HANDLED = (
    "activation_function",
    "attn_pdrop",
    "bos_token_id",
    "embd_pdrop",
    "eos_token_id",
    "layer_norm_epsilon",
    "n_embd",
    "n_head",
    "n_inner",
    "n_layer",
    "n_positions",
    "pad_token_id",
    "reorder_and_upcast_attn",
    "resid_pdrop",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)

_CONFIG_IGNORED = (
    "initializer_range",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
)


_BIGCODE_HANDLED = (
    "multi_query",
    "num_key_value_heads",
    "attention_softmax_in_fp32",
    "scale_attention_softmax_in_fp32",
)


@hookimpl
def lens_architectures() -> list[Architecture]:
    """Describe GPT-2 and GPT-BigCode."""
    return [
        Architecture(
            name=name,
            model_types=(model_type,),
            api_version=1,
            transformers=">=5.20,<6",
            implementation=f"lens_gpt2._architecture:{implementation}",
            capabilities=_CAPABILITIES,
            config_handled=(*_CONFIG_HANDLED, *handled),
            config_ignored=_CONFIG_IGNORED,
            toy="toy" if model_type == "gpt2" else None,
        )
        for name, model_type, implementation, handled in (
            ("GPT-2", "gpt2", "GPT2", ()),
            ("GPT-BigCode", "gpt_bigcode", "GPTBigCode", _BIGCODE_HANDLED),
        )
    ]
