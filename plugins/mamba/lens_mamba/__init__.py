"""Mamba and Falcon-Mamba for lens: the descriptor, which imports neither torch nor transformers."""

from lens_core.plugin import Architecture, Capability, Support, hookimpl

__version__ = "0.1.0"

__all__ = ["__version__", "lens_architectures"]

_NO_ATTENTION = (Support.ABSENT, "a state-space mixer has no attention")
_CAPABILITIES = {
    Capability.ATTENTION_PATTERN: _NO_ATTENTION,
    Capability.SSM_STATE: Support.FULL,
    Capability.POSITION_EMBEDDING: (Support.ABSENT, "positions are not embedded"),
    Capability.PER_HEAD: (Support.ABSENT, "a Mamba mixer has channels, not heads"),
    Capability.GENERATE: Support.FULL,
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
    "conv_kernel",
    "eos_token_id",
    "expand",
    "hidden_act",
    "hidden_size",
    "intermediate_size",  # expand * hidden_size, which HF writes itself
    "layer_norm_epsilon",
    "num_hidden_layers",
    "pad_token_id",
    "residual_in_fp32",
    "state_size",
    "tie_word_embeddings",
    "time_step_rank",
    "use_associative_scan",
    "use_bias",
    "use_cache",
    "use_conv_bias",
    "use_mambapy",
    "vocab_size",
)

_CONFIG_IGNORED = (  # all of them about initialisation
    "initializer_range",
    "rescale_prenorm_residual",
    "time_step_floor",
    "time_step_init_scheme",
    "time_step_max",
    "time_step_min",
    "time_step_scale",
)


@hookimpl
def lens_architectures() -> list[Architecture]:
    """Describe Mamba and Falcon-Mamba."""
    return [
        Architecture(
            name=name,
            model_types=(model_type,),
            api_version=1,
            transformers=">=5.20,<6",
            implementation="lens_mamba._architecture:Mamba",
            capabilities=_CAPABILITIES,
            config_handled=(*_CONFIG_HANDLED, *more),
            config_ignored=_CONFIG_IGNORED,
            toy="toy" if model_type == "mamba" else None,
        )
        for name, model_type, more in (
            ("Mamba", "mamba", ()),
            ("Falcon-Mamba", "falcon_mamba", ("mixer_rms_eps",)),
        )
    ]
