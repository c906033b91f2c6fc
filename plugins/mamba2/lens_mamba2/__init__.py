"""Mamba-2 for lens: the descriptor, which imports neither torch nor transformers."""

from lens_core.plugin import Architecture, Capability, Support, hookimpl

__version__ = "0.1.0"

__all__ = ["__version__", "lens_architectures"]

_NO_ATTENTION = (Support.ABSENT, "a state-space mixer has no attention")
_CAPABILITIES = {
    Capability.ATTENTION_PATTERN: _NO_ATTENTION,
    Capability.SSM_STATE: Support.FULL,
    Capability.POSITION_EMBEDDING: (Support.ABSENT, "positions are not embedded"),
    Capability.PER_HEAD: (
        Support.ABSENT,
        "SSM heads share their input; each head's own values are at the mixer's hook points",
    ),
    Capability.GENERATE: (
        Support.PARTIAL,
        "refused with a cache where time_step_limit is set, which HF ignores in decoding",
    ),
    Capability.LEFT_PADDING: (
        Support.PARTIAL,
        "refused where in_proj has a bias (use_bias), which HF lets into the convolution at padding",
    ),
    Capability.WEIGHT_VIEWS: Support.FULL,
    Capability.DEVICE_MAP: Support.FULL,
    Capability.GRADIENTS: Support.FULL,
    Capability.GRADIENT_CHECKPOINTING: (Support.PARTIAL, "in training, hooks inside a checkpointed block refuse"),
    Capability.TORCH_COMPILE: (Support.PARTIAL, "a compiled model runs eagerly while it is hooked"),
}

_CONFIG_HANDLED = (
    "bos_token_id",
    "chunk_size",
    "conv_kernel",
    "eos_token_id",
    "expand",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "layer_norm_epsilon",
    "n_groups",
    "num_heads",
    "num_hidden_layers",
    "pad_token_id",
    "residual_in_fp32",
    "state_size",
    "tie_word_embeddings",
    "time_step_limit",
    "use_bias",
    "use_cache",
    "use_conv_bias",
    "vocab_size",
)

_CONFIG_IGNORED = (  # all of them about initialisation
    "initializer_range",
    "rescale_prenorm_residual",
    "time_step_floor",
    "time_step_max",
    "time_step_min",
    "time_step_rank",  # HF computes it and never reads it
)


@hookimpl
def lens_architectures() -> list[Architecture]:
    """Describe Mamba-2."""
    return [
        Architecture(
            name="Mamba-2",
            model_types=("mamba2",),
            api_version=1,
            transformers=">=5.23,<6",
            implementation="lens_mamba2._architecture:Mamba2",
            capabilities=_CAPABILITIES,
            config_handled=_CONFIG_HANDLED,
            config_ignored=_CONFIG_IGNORED,
            toy="toy",
        )
    ]
