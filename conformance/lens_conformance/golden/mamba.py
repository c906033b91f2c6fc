"""A Mamba forward, and Falcon-Mamba's, written from the formulas, with every hook point of the contract as a cut point.

It is the oracle of the law tests: it shares no code with lens and calls nothing of transformers. Sources: Gu and Dao
2023 (arXiv 2312.00752, equations 1 to 3 and algorithm 2), Zuo et al. 2024 (arXiv 2410.05355: Falcon-Mamba's RMSNorm of
delta's input, B and C, without gain).

Glossary: u what the convolution reads, z the gate, x what the scan reads, A = -exp(A_log), h the state:
h_t = exp(delta_t A) h_(t-1) + (delta_t x_t) outer B_t, y_t = C_t h_t. One position after the other, no chunks.

Does not: caches (a decode step is compared with the whole run), half precision.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lens_conformance.golden.gpt2 import Edit, activation
from lens_conformance.golden.ssm import (
    Cuts,
    check_known,
    convolution,
    keep_real,
    linear,
    names_of,
    root_mean_square,
    run,
    silu,
    softplus,
)

BLOCK = (
    "hook_resid_pre",
    "hook_mixer_in",
    "norm.hook_scale",
    "norm.hook_normalized",
    "norm.hook_out",
    "mixer.hook_in_proj",
    "mixer.hook_gate",
    "mixer.hook_conv_in",
    "mixer.hook_conv",
    "mixer.hook_ssm_input",
    "mixer.hook_x_proj",
    "mixer.hook_B",
    "mixer.hook_C",
    "mixer.hook_delta_pre",
    "mixer.hook_delta",
    "mixer.hook_decay",
    "mixer.hook_ssm_write",
    "mixer.hook_ssm_state",
    "mixer.hook_y",
    "mixer.hook_ssm_output",
    "mixer.hook_gated",
    "hook_mixer_out",
    "hook_resid_post",
)
NORMED = ("mixer.dt_norm.hook_scale", "mixer.B_norm.hook_scale", "mixer.C_norm.hook_scale")
"""Falcon-Mamba's more: the scales of its norms, `[batch, pos, 1]`."""
STARRED = ("hook_mixer_in", "mixer.hook_decay", "mixer.hook_ssm_write", "mixer.hook_ssm_state")


def names(config: Any) -> list[str]:
    """List every hook point that the contract gives a Mamba of this config, in no promised order."""
    return names_of(config, BLOCK + NORMED if config.model_type == "falcon_mamba" else BLOCK)


def is_starred(name: str) -> bool:
    """Tell whether the contract keeps a name out of the default cache."""
    return name.endswith(STARRED)


def golden(
    state_dict: Mapping[str, Tensor],
    config: Any,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    edits: Mapping[str, Edit] | None = None,
    record: bool = True,
    through: Collection[str] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run Mamba or Falcon-Mamba in float64 from the formulas.

    Args:
        state_dict: of HF's MambaForCausalLM or FalconMambaForCausalLM, any floating dtype.
        config: HF's config, or anything with its fields.
        tokens: ids `[batch, pos]`, or floating embeddings `[batch, pos, d_model]`.
        attention_mask: 1 for real tokens, `[batch, pos]`.
        position_ids: nothing in a Mamba reads them.
        edits: name to function, called as `fn(value, hook=hook)` with `hook.name`, `hook.layer()` and
            `hook.positions`. What it returns, or wrote into its argument, stands for everything downstream. The one
            at `mixer.hook_ssm_state` is called once per position, in order, with `[batch, 1, d_inner, d_state]`.
        record: whether to keep the value at each cut (after its edit) with its gradient.
        through: names whose gradient is wanted; every cut of a Mamba is on the way of the others anyway.

    Returns:
        The logits and the values by name. The logits are the value at `hook_logits`.

    Raises:
        KeyError: an edit or a name in `through` that no hook point has.
    """
    edits = dict(edits or {})
    check_known(edits.keys() | set(through), names(config))
    return run(state_dict, config, tokens, attention_mask, edits, record, _mixer)


def _mixer(weights: Mapping[str, Tensor], config: Any, at: str, normed: Tensor, cut: Cuts) -> Tensor:
    width = config.intermediate_size
    projected = cut(at + "hook_in_proj", linear(weights, "in_proj", normed))
    gate = cut(at + "hook_gate", projected[..., width:])
    conv = cut(at + "hook_conv", convolution(weights, cut(at + "hook_conv_in", projected[..., :width])))
    x = cut(at + "hook_ssm_input", keep_real(activation(config.hidden_act, conv), cut))
    B, C, delta = _selection(weights, config, at, x, cut)
    A = -weights["A_log"].exp()  # d_inner d_state
    decay = cut(at + "hook_decay", (delta[..., None] * A).exp())
    write = cut(at + "hook_ssm_write", (delta * x)[..., None] * B[:, :, None, :])
    y = cut(at + "hook_y", torch.einsum("bten,btn->bte", cut.scan(at + "hook_ssm_state", decay, write), C))
    output = cut(at + "hook_ssm_output", y + weights["D"] * x)
    return linear(weights, "out_proj", cut(at + "hook_gated", output * silu(gate)))


def _own(at: str, name: str) -> str:
    return at.removesuffix("mixer.") + name


def _selection(
    weights: Mapping[str, Tensor], config: Any, at: str, x: Tensor, cut: Cuts
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute B, C and the step size delta from x."""
    rank, states = config.time_step_rank, config.state_size
    low, B, C = cut(at + "hook_x_proj", linear(weights, "x_proj", x)).split([rank, states, states], dim=-1)
    if config.model_type == "falcon_mamba":
        parts = zip(NORMED, (low, B, C), strict=True)
        low, B, C = (part / cut(_own(at, name), root_mean_square(part, config.mixer_rms_eps)) for name, part in parts)
    delta_pre = cut(at + "hook_delta_pre", linear(weights, "dt_proj", low))
    return cut(at + "hook_B", B), cut(at + "hook_C", C), cut(at + "hook_delta", softplus(delta_pre))
