"""Hybrids of attention and state-space mixers, without golden forwards: HuggingFace and the equations judge them."""

from typing import Any

import torch
from torch import Tensor

from lens_conformance.families.llama import SIZES, edit_at, rope
from lens_conformance.family import Family, noisy

__all__ = ["FAMILIES"]

# d_model 32, 4 heads of 8, 37 neurons; mixers of 6 heads of 16 in 3 groups, 7 states: 180 rows of in_proj and more.
MIXER = {"mamba_d_state": 7, "mamba_d_conv": 4, "mamba_expand": 3}
DUAL = {**SIZES, **MIXER, "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 3, "mamba_chunk_size": 4}
GROUPS = {"num_key_value_heads": (1, 2, 4)}
MIXER_AXES = {"mamba_d_conv": (4, 2), "mamba_conv_bias": (True, False)}
DUAL_AXES = {**GROUPS, **MIXER_AXES, "mamba_n_groups": (1, 3), "mamba_chunk_size": (1, 4, 7)}
ATTENTION, LINEAR = "full_attention", "linear_attention"
# Mamba's width: 32 * 3 channels, dt_rank 11.
# model type -> (fields of its config, axes, fields of the family)
TYPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "bamba": (
        {**DUAL, "attn_layer_indices": [1], "rope_parameters": rope("default", partial_rotary_factor=0.5)},
        {**DUAL_AXES, "attn_layer_indices": ([1], [0, 2]), "attention_bias": (False, True), "mlp_bias": (False, True)},
        {},
    ),
    "jamba": (
        {
            **SIZES,
            **MIXER,
            "num_hidden_layers": 4,
            "intermediate_size": 40,  # of the experts, too
            "mamba_dt_rank": 11,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "expert_layer_period": 3,
            "expert_layer_offset": 2,
            "rms_norm_eps": 1e-2,
        },
        {**GROUPS, **MIXER_AXES, "attn_layer_offset": (1, 0), "expert_layer_offset": (2, 0)},
        {"chunks": False},  # HF's scan starts from zero in every call of several positions
    ),
    "granitemoehybrid": (
        {
            **DUAL,
            "layer_types": [LINEAR, ATTENTION, LINEAR],
            "intermediate_size": 40,
            "shared_intermediate_size": 24,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "position_embedding_type": "rope",
            "rope_parameters": rope("default"),
            "embedding_multiplier": 1.7,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.45,
            "logits_scaling": 1.3,
        },
        {
            **DUAL_AXES,
            "num_local_experts": (5, 0),
            "position_embedding_type": ("rope", None),
            "layer_types": ([LINEAR, ATTENTION, LINEAR], [ATTENTION, LINEAR, ATTENTION]),
        },
        {},
    ),
    "nemotron_h": (
        {
            **{name: value for name, value in SIZES.items() if name != "num_hidden_layers"},
            "layers_block_type": [LINEAR, "mlp", ATTENTION, "moe"],
            "head_dim": 10,
            "mamba_num_heads": 6,
            "mamba_head_dim": 16,
            "n_groups": 3,
            "ssm_state_size": 7,
            "conv_kernel": 4,
            "chunk_size": 4,
            "time_step_min": 1e-6,  # a limit of the step size that HF's decoding ignores, so that none may reach it
            "n_routed_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40,
            "routed_scaling_factor": 1.7,
        },
        {
            **GROUPS,
            "conv_kernel": (4, 2),
            "use_conv_bias": (True, False),
            "n_groups": (1, 3),
            "chunk_size": (1, 4, 7),
            "moe_latent_size": (None, 16),
            "layers_block_type": ([LINEAR, "mlp", ATTENTION, "moe"], [ATTENTION, "moe", LINEAR, "mlp"]),
        },
        {},
    ),
    "falcon_h1": (
        {
            **DUAL,
            "mamba_d_ssm": 96,
            "mamba_rms_norm": True,
            "rope_parameters": rope("default"),
            "lm_head_multiplier": 0.7,
            "embedding_multiplier": 1.7,
            "mlp_multipliers": [1.3, 0.8],
            "key_multiplier": 0.6,
            "attention_out_multiplier": 1.4,
            "attention_in_multiplier": 0.9,
            "ssm_multipliers": [0.8, 1.2, 0.7, 1.5, 0.9],
            "ssm_in_multiplier": 1.1,
            "ssm_out_multiplier": 0.65,
        },
        {
            **DUAL_AXES,
            "mamba_rms_norm": (True, False),
            "mamba_norm_before_gate": (True, False),
            "projectors_bias": (False, True),
            "attention_bias": (False, True),
            "mlp_bias": (False, True),
        },
        {},
    ),
}


def noise(name: str, parameter: Tensor) -> Tensor:
    """Draw a parameter as `families.mamba` does inside mixers, and as other decoders do elsewhere."""
    if name.endswith(".D"):
        return torch.randn_like(parameter) * 0.25 + 1
    if name.endswith(("A_log", "conv1d.weight", "dt_proj.bias", "dt_bias")):
        return torch.randn_like(parameter) * 0.4
    return noisy(name, parameter)


def family(model_type: str) -> Family:
    """Make the record of a type."""
    config, axes, options = TYPES[model_type]
    return Family(
        model_type=model_type,
        config=config,
        axes=axes,
        noise=noise,
        edit_at=edit_at,
        per_position=lambda name: name.endswith("hook_ssm_state"),
        dropout={"attention_dropout": 0.2},
        **options,
    )


FAMILIES = [family(model_type) for model_type in TYPES]
