"""What the golden Mamba and Mamba-2 forwards share: cut points, the residual stack, the norm and the convolution.

It is written from the formulas and shares no code with lens, nor calls anything of transformers. Sources: Gu and Dao
2023 (arXiv 2312.00752, the block), Zhang and Sennrich 2019 (RMSNorm).

At a cut point the value is (1) handed to the edit of that name, if there is one, (2) cloned, so that the clone's
gradient is the gradient at the hook point. Everything is float64.

Padding: HF zeroes what enters a mixer and what leaves its convolution at positions of padding. What an edit writes
*inside* a mixer at a position of padding is dropped: otherwise it would reach real positions through the convolution
and the state, and an edited run would depend on how far its rows were padded.
"""

from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lens_conformance.golden.gpt2 import Edit, activation

TOP = (
    "hook_tokens",
    "hook_embed",
    "ln_final.hook_scale",
    "ln_final.hook_normalized",
    "ln_final.hook_out",
    "unembed.hook_in",
    "unembed.hook_out",
    "hook_logits",
)


class Cuts:
    """The cut points of one run: which edits there are, and what was seen.

    Attributes:
        values: name to the value after its edit; only where the run records.
        edits: name to function.
        real: True at real tokens, `[batch, pos]`, or None where nothing is padded.
    """

    def __init__(self, edits: Mapping[str, Edit], record: bool, real: Tensor | None) -> None:
        self.values: dict[str, Tensor] = {}
        self.edits = edits
        self.real = real
        self.record = record

    def edited(self, name: str, value: Tensor, start: int = 0) -> Tensor:
        """Apply the edit of a name to the positions from `start` on, or give the value back."""
        if name not in self.edits:
            return value
        positions = torch.arange(start, start + value.shape[1])
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        hook = SimpleNamespace(name=name, positions=positions, step=0, is_prefill=True, layer=lambda: layer)
        given = value.clone()
        returned = self.edits[name](given, hook=hook)
        new = given if returned is None else returned.to(value.dtype)
        if self.real is None or ".mixer." not in name:
            return new
        real = self.real[:, positions].view(value.shape[:2] + (1,) * (value.ndim - 2))
        return torch.where(real, new, value)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """Give what everything downstream of a name reads."""
        value = self.edited(name, value).clone()
        if torch.is_grad_enabled() and value.is_floating_point():
            if not value.requires_grad:
                value.requires_grad_()
            value.retain_grad()
        if self.record:
            self.values[name] = value
        return value

    def scan(self, name: str, decay: Tensor, write: Tensor) -> Tensor:
        """Run h_t = decay_t h_(t-1) + write_t with a cut at every h_t; return all of them, `[batch, pos, ...]`.

        The recorded trajectory's `grad` is, position by position, the gradient at h_t: what reads h_t directly and
        what reads it through later states. It is the gradient of zeros that were added to h_t.
        """
        learns = torch.is_grad_enabled()
        added = torch.zeros_like(write, requires_grad=learns)
        state, states = torch.zeros_like(write[:, 0]), []
        for t in range(write.shape[1]):
            state = decay[:, t] * state + write[:, t]
            state = self.edited(name, state[:, None], start=t)[:, 0] + added[:, t]
            states.append(state)
        trajectory = torch.stack(states, dim=1)
        if learns:
            trajectory.retain_grad()
            added.register_post_accumulate_grad_hook(lambda leaf: setattr(trajectory, "grad", leaf.grad))
        if self.record:
            self.values[name] = trajectory
        return trajectory


Mixer = Callable[[Mapping[str, Tensor], Any, str, Tensor, Cuts], Tensor]


def names_of(config: Any, block: Collection[str]) -> list[str]:
    """List the names outside the blocks, and those of every block."""
    return [*TOP, *(f"blocks.{layer}.{name}" for layer in range(config.num_hidden_layers) for name in block)]


def run(
    state_dict: Mapping[str, Tensor],
    config: Any,
    tokens: Tensor,
    attention_mask: Tensor | None,
    edits: Mapping[str, Edit],
    record: bool,
    mixer: Mixer,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the residual stack around a mixer: r <- r + mixer(RMSNorm(r)), then RMSNorm and the unembedding.

    Args:
        state_dict: of HF's MambaForCausalLM or its kin, any floating dtype.
        config: HF's config.
        tokens: ids `[batch, pos]`, or floating embeddings `[batch, pos, d_model]`.
        attention_mask: 1 for real tokens, `[batch, pos]`.
        edits: name to function.
        record: whether to keep the value at each cut.
        mixer: from the weights of its block, the config, the prefix of its names, the normed input with padding
            zeroed, and the cuts.

    Returns:
        The logits and the values by name.
    """
    cut = Cuts(edits, record, None if attention_mask is None else attention_mask.bool())
    weights = {name: tensor.to(torch.float64) for name, tensor in state_dict.items() if tensor.is_floating_point()}
    w_e = weights["backbone.embeddings.weight"]  # d_vocab d_model
    x = cut("hook_embed", tokens.to(torch.float64) if tokens.is_floating_point() else w_e[cut("hook_tokens", tokens)])
    for layer in range(config.num_hidden_layers):
        at, own = f"blocks.{layer}.", within(weights, f"backbone.layers.{layer}.")
        x = cut(at + "hook_resid_pre", x)
        normed = rms_norm(own["norm.weight"], at + "norm", config, cut(at + "hook_mixer_in", x), cut)
        out = mixer(within(own, "mixer."), config, at + "mixer.", keep_real(normed, cut), cut)
        x = cut(at + "hook_resid_post", x + cut(at + "hook_mixer_out", out))
    x = cut("unembed.hook_in", rms_norm(weights["backbone.norm_f.weight"], "ln_final", config, x, cut))
    return cut("hook_logits", cut("unembed.hook_out", x @ weights.get("lm_head.weight", w_e).T)), cut.values


def within(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the weights under a prefix, without it."""
    return {key.removeprefix(prefix): weight for key, weight in weights.items() if key.startswith(prefix)}


def keep_real(x: Tensor, cut: Cuts) -> Tensor:
    """Zero the positions of padding."""
    return x if cut.real is None else x * cut.real[:, :, None]


def rms_norm(gain: Tensor, name: str, config: Any, x: Tensor, cut: Cuts) -> Tensor:
    """RMSNorm: x / sqrt(mean(x^2) + eps) * gain."""
    scale = cut(f"{name}.hook_scale", root_mean_square(x, config.layer_norm_epsilon))
    return cut(f"{name}.hook_out", cut(f"{name}.hook_normalized", x / scale) * gain)


def linear(weights: Mapping[str, Tensor], key: str, x: Tensor) -> Tensor:
    """W x, and + b where there is one."""
    out = x @ weights[f"{key}.weight"].T
    return out + weights[f"{key}.bias"] if f"{key}.bias" in weights else out


def convolution(weights: Mapping[str, Tensor], u: Tensor) -> Tensor:
    """Causal depthwise convolution: v_t = b + sum_k w_k u_(t-K+1+k), with zeros before the first position."""
    kernel = weights["conv1d.weight"][:, 0]  # channel K
    width, n = kernel.shape[1], u.shape[1]
    out = torch.zeros_like(u)
    for k in range(width):
        back = width - 1 - k  # how many positions ago
        out = out + torch.cat([torch.zeros_like(u[:, :back]), u[:, : max(n - back, 0)]], dim=1)[:, :n] * kernel[:, k]
    return out + weights["conv1d.bias"] if "conv1d.bias" in weights else out


def silu(x: Tensor) -> Tensor:
    """Apply x sigmoid(x)."""
    return activation("silu", x)


def softplus(x: Tensor) -> Tensor:
    """Apply log(1 + exp(x)), without overflow."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def root_mean_square(x: Tensor, eps: float) -> Tensor:
    """Give sqrt(mean(x^2) + eps) over the last axis, which stays."""
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def check_known(asked: Collection[str], known: Collection[str]) -> None:
    """Raise KeyError for names that no hook point has."""
    if unknown := set(asked) - set(known):
        raise KeyError(sorted(unknown))
