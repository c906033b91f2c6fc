"""OPT and BioGPT for lens: the descriptor, which imports neither torch nor transformers."""

from lens_core.plugin import Architecture, Capability, Support, hookimpl

__version__ = "0.1.0"

__all__ = ["__version__", "lens_architectures"]

_CAPABILITIES = dict.fromkeys(Capability, Support.FULL) | {
    Capability.SSM_STATE: (Support.ABSENT, "no state-space layer"),
    Capability.GRADIENT_CHECKPOINTING: (Support.PARTIAL, "in training, hooks inside a checkpointed block refuse"),
    Capability.TORCH_COMPILE: (Support.PARTIAL, "a compiled model runs eagerly while it is hooked"),
}
_HANDLED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
)
# In neither list, since they change equations: norms after the sum, embeddings of another width, dropped layers.
_OPT = ("ffn_dim", "dropout", "attention_dropout", "activation_function", "enable_bias", "word_embed_proj_dim")
_BIOGPT = (
    *("intermediate_size", "hidden_act", "layer_norm_eps", "scale_embedding"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout"),
)


@hookimpl
def lens_architectures() -> list[Architecture]:
    """Describe OPT and BioGPT."""
    return [
        Architecture(
            name=name,
            model_types=(model_type,),
            api_version=1,
            transformers=">=5.20,<6",
            implementation=f"lens_opt._architecture:{name}",
            capabilities=_CAPABILITIES,
            config_handled=(*_HANDLED, *handled),
            config_ignored=("initializer_range", "init_std"),
        )
        for name, model_type, handled in (("OPT", "opt", _OPT), ("BioGPT", "biogpt", _BIOGPT))
    ]
