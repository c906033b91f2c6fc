"""A Mamba-2 forward written from the formulas, with every hook point of the contract as a cut point.

It is the oracle of the law tests: it shares no code with lens and calls nothing of transformers. Source: Dao and Gu
2024 (arXiv 2405.21060, section 7), as a recurrence, one position after the other, no chunks.

Glossary: z the gate, x what the scan reads, A_h = -exp(A_log_h) one number a head, S the state of a head:
S_t = exp(delta_t A_h) S_(t-1) + (delta_t x_t) outer B_t, y_t = S_t C_t. Head h reads group h // (n_heads / n_groups).

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
    "mixer.hook_B",
    "mixer.hook_C",
    "mixer.hook_delta_pre",
    "mixer.hook_delta",
    "mixer.hook_decay",
    "mixer.hook_ssm_write",
    "mixer.hook_ssm_state",
    "mixer.hook_y",
    "mixer.hook_ssm_output",
    "mixer.inner_norm.hook_scale",
    "mixer.hook_gated",
    "hook_mixer_out",
    "hook_resid_post",
)
STARRED = ("hook_mixer_in", "mixer.hook_ssm_write", "mixer.hook_ssm_state")
ALIASES = {"mixer.hook_inner_norm": "mixer.hook_gated"}


def names(config: Any) -> list[str]:
    """List every hook point that the contract gives a Mamba-2 of this config, in no promised order."""
    return names_of(config, BLOCK)


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
    """Run Mamba-2 in float64 from the formulas.

    Args:
        state_dict: of HF's Mamba2ForCausalLM, any floating dtype.
        config: HF's Mamba2Config, or anything with its fields.
        tokens: ids `[batch, pos]`, or floating embeddings `[batch, pos, d_model]`.
        attention_mask: 1 for real tokens, `[batch, pos]`.
        position_ids: nothing in a Mamba-2 reads them.
        edits: name to function, called as `fn(value, hook=hook)` with `hook.name`, `hook.layer()` and
            `hook.positions`. What it returns, or wrote into its argument, stands for everything downstream. The one
            at `mixer.hook_ssm_state` is called once per position, in order, with
            `[batch, 1, n_heads, head_dim, d_state]`.
        record: whether to keep the value at each cut (after its edit) with its gradient.
        through: names whose gradient is wanted; every cut of a Mamba-2 is on the way of the others anyway.

    Returns:
        The logits and the values by name. The logits are the value at `hook_logits`.

    Raises:
        KeyError: an edit or a name in `through` that no hook point has.
    """
    edits = dict(edits or {})
    check_known(edits.keys() | set(through), names(config))
    return run(state_dict, config, tokens, attention_mask, edits, record, _mixer)


def _mixer(weights: Mapping[str, Tensor], config: Any, at: str, normed: Tensor, cut: Cuts) -> Tensor:
    heads, states, groups = config.num_heads, config.state_size, config.n_groups
    width, shared = heads * config.head_dim, groups * states
    projected = cut(at + "hook_in_proj", linear(weights, "in_proj", normed))
    gate, conv_in, step = projected.split([width, width + 2 * shared, heads], dim=-1)
    gate = cut(at + "hook_gate", gate)
    conv = cut(at + "hook_conv", convolution(weights, cut(at + "hook_conv_in", conv_in)))
    x, B, C = keep_real(activation(config.hidden_act, conv), cut).split([width, shared, shared], dim=-1)
    x = cut(at + "hook_ssm_input", x.unflatten(-1, (heads, config.head_dim)))
    B, C = (cut(at + which, part.unflatten(-1, (groups, states))) for which, part in (("hook_B", B), ("hook_C", C)))
    delta = softplus(cut(at + "hook_delta_pre", step + weights["dt_bias"])).clamp(*config.time_step_limit)
    output = _scan(weights, at, x, B, C, cut(at + "hook_delta", delta), cut)
    return linear(weights, "out_proj", _gated_norm(weights, config, at, output.flatten(2), gate, cut))


def _scan(weights: Mapping[str, Tensor], at: str, x: Tensor, B: Tensor, C: Tensor, delta: Tensor, cut: Cuts) -> Tensor:
    """Run the recurrence of every head; return y + D x, `[batch, pos, n_heads, head_dim]`."""
    heads = x.shape[2]
    group = torch.arange(heads) // (heads // B.shape[2])  # of each head
    decay = cut(at + "hook_decay", (delta * -weights["A_log"].exp()).exp())
    write = torch.einsum("bth,bthp,bthn->bthpn", delta, x, B[:, :, group])
    state = cut.scan(at + "hook_ssm_state", decay[..., None, None], cut(at + "hook_ssm_write", write))
    y = cut(at + "hook_y", torch.einsum("bthpn,bthn->bthp", state, C[:, :, group]))
    return cut(at + "hook_ssm_output", y + weights["D"][:, None] * x)


def _gated_norm(weights: Mapping[str, Tensor], config: Any, at: str, x: Tensor, gate: Tensor, cut: Cuts) -> Tensor:
    """Gate, then RMSNorm over each group's channels apart, then the gain."""
    grouped = (x * silu(gate)).unflatten(-1, (config.n_groups, -1))
    scale = root_mean_square(grouped, config.layer_norm_epsilon)[..., 0]  # batch pos n_groups
    scale = cut(at + "inner_norm.hook_scale", scale)
    return cut(at + "hook_gated", (grouped / scale[..., None]).flatten(2) * weights["norm.weight"])
