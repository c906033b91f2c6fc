"""GPT-NeoX (Pythia) for lens: the descriptor, which imports neither torch nor transformers."""

from lens_core.plugin import Architecture, Capability, Support, hookimpl

__version__ = "0.1.0"

__all__ = ["__version__", "lens_architectures"]

_CAPABILITIES = dict.fromkeys(Capability, Support.FULL) | {
    Capability.SSM_STATE: (Support.ABSENT, "GPT-NeoX has no state-space layer"),
    Capability.POSITION_EMBEDDING: (Support.ABSENT, "queries and keys are rotated; nothing is added to the stream"),
    Capability.GRADIENT_CHECKPOINTING: (Support.PARTIAL, "in training, hooks inside a checkpointed block refuse"),
    Capability.TORCH_COMPILE: (Support.PARTIAL, "a compiled model runs eagerly while it is hooked"),
}

_CONFIG_HANDLED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "layer_norm_eps", "max_position_embeddings", "rope_parameters", "tie_word_embeddings"),
    *("use_parallel_residual", "attention_bias", "attention_dropout", "hidden_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
)
# `is_decoder` is read by nothing in HF's GPT-NeoX, `classifier_dropout` by its classifiers only.
_CONFIG_IGNORED = ("initializer_range", "classifier_dropout", "is_decoder")


@hookimpl
def lens_architectures() -> list[Architecture]:
    """Describe GPT-NeoX."""
    return [
        Architecture(
            name="GPT-NeoX",
            model_types=("gpt_neox",),
            api_version=1,
            transformers=">=5.20,<6",
            implementation="lens_gpt_neox._architecture:GPTNeoX",
            capabilities=_CAPABILITIES,
            config_handled=_CONFIG_HANDLED,
            config_ignored=_CONFIG_IGNORED,
        )
    ]
