"""Mamba, Falcon-Mamba and Mamba-2."""

from typing import Any

import torch
from torch import Tensor

from lens_conformance.family import Family
from lens_conformance.golden import mamba, mamba2

COMMON: dict[str, Any] = {
    "vocab_size": 29,
    "num_hidden_layers": 3,
    "state_size": 7,
    "conv_kernel": 4,
    "bos_token_id": 28,
    "eos_token_id": 28,
    "pad_token_id": 28,
}
# d_model 13, d_inner 39, dt_rank 11: x_proj has 25 rows, in_proj 78.
SELECTIVE = {**COMMON, "hidden_size": 13, "expand": 3, "time_step_rank": 11}
# d_model 33, 6 heads of 11: with 3 groups the convolution has 108 channels, in_proj 180 rows.
DUAL = {**COMMON, "hidden_size": 33, "expand": 2, "num_heads": 6, "head_dim": 11, "n_groups": 3, "chunk_size": 4}
AXES = {"conv_kernel": (4, 2), "use_conv_bias": (True, False), "residual_in_fp32": (True, False)}


def noise(name: str, parameter: Tensor) -> Tensor:
    """Draw a parameter so that a state keeps about half of itself a position, differently in every channel.

    HF starts with D = 1, the same A in every channel and tiny steps, which hides most mistakes of a scan.
    """
    gain = name.endswith(("norm.weight", "norm_f.weight", ".D"))
    std = 0.4 if name.endswith(("A_log", "conv1d.weight", "dt_proj.bias", "dt_bias")) else 0.25
    return torch.randn_like(parameter) * std + float(gain)


def family(model_type: str, config: dict[str, Any], golden: Any, **options: Any) -> Family:
    """Make the record of a type."""
    return Family(
        model_type=model_type,
        config=config,
        axes={**AXES, **options.pop("axes", {})},
        golden=golden.golden,
        names=golden.names,
        noise=noise,
        implementations=("eager",),
        per_position=lambda name: name.endswith("hook_ssm_state"),
        **options,
    )


FAMILIES = [
    # HF's Mamba starts its scan from zero in every call of several positions: no chunks.
    family("mamba", SELECTIVE, mamba, chunks=False),
    # An eps of its own, large enough that leaving it out shows.
    family("falcon_mamba", {**SELECTIVE, "mixer_rms_eps": 1e-2}, mamba, chunks=False),
    family("mamba2", DUAL, mamba2, axes={"n_groups": (1, 3), "chunk_size": (1, 4, 7)}),
]
