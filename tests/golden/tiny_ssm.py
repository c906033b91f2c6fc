"""Tiny Mamba, Falcon-Mamba and Mamba-2 models for tests: noise in every parameter, sizes pairwise different."""

from typing import Any

import torch
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

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
# d_model 33, 6 heads of 11 in 3 groups (two heads a group), chunks of 4: the convolution has 108 channels, in_proj 180.
DUAL = {**COMMON, "hidden_size": 33, "expand": 2, "num_heads": 6, "head_dim": 11, "n_groups": 3, "chunk_size": 4}
# Falcon-Mamba's own eps, large enough that leaving it out shows.
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mamba": (MambaConfig, MambaForCausalLM, SELECTIVE),
    "falcon_mamba": (FalconMambaConfig, FalconMambaForCausalLM, {**SELECTIVE, "mixer_rms_eps": 1e-2}),
    "mamba2": (Mamba2Config, Mamba2ForCausalLM, DUAL),
}


def tiny_ssm(kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """Build a model in eval mode whose every parameter has noise.

    HF's initialisation has D = 1, A_log = log 1, log 2, ... in every channel and tiny steps: it hides most mistakes of
    a scan. Here a state keeps about half of itself from one position to the next, differently in every channel.
    """
    config_class, model_class, sizes = KINDS[kind]
    config = config_class(**{**sizes, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gain = name.endswith(("norm.weight", "norm_f.weight", ".D"))
                std = 0.4 if name.endswith(("A_log", "conv1d.weight", "dt_proj.bias", "dt_bias")) else 0.25
                parameter.copy_(torch.randn_like(parameter) * std + float(gain))
    return model.to(dtype).eval()
