"""Stopping gradients inside an SSM layer, so that what is left of it is linear.

With the step sizes, B, C, the gate, the norms' scales and the convolution's activation held still, a mixer is a linear
map of its input (plus its biases), and input times gradient is an exact attribution: it adds up to the output. No
stop changes a bit of any value.

- `decay`: exp(delta A), at `mixer.hook_decay`
- `delta`: the step size, which is the decay and the write's strength, at `mixer.hook_delta`
- `B`, `C`: what is written along and what is read along, at `mixer.hook_B` and `mixer.hook_C`
- `gate`: SiLU(z), at `mixer.hook_gate`
- `scale`: the norms' scales, before the mixer, inside it (Mamba-2) and the final one, at `norm.hook_scale` and kin
- `activation`: sigmoid(v) in SiLU(v) = sigmoid(v) v after the convolution, at `mixer.hook_ssm_input`

The gradient of a stopped activation goes from `mixer.hook_ssm_input` to what the convolution read
(`mixer.hook_conv_in`) past `mixer.hook_conv`, whose own gradient lacks it. Where another function replaced a value of
either place, so that one is not the activation of the other, it keeps the gradient of the replacement.

Source: Jafari, Montavon, Müller and Eberle 2024 (MambaLRP, arXiv 2406.07592), who hold still exp(delta A), delta B, C,
the activation and the scale, and at the gate halve the product's two gradients instead of stopping one of them.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.activations import ACT2FN

from lens_core import edits
from lens_core._arguments import checks_arguments
from lens_core._graph import with_gradient_of
from lens_core.analysis.ssm_knockout import Entry
from lens_core.analysis.ssm_scan import read_layers
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["FROZEN_PARTS", "FrozenPart", "activated", "activation_of", "frozen_share", "stop_gradients"]

FrozenPart: TypeAlias = Literal["decay", "delta", "B", "C", "gate", "scale", "activation"]
FROZEN_PARTS: tuple[FrozenPart, ...] = get_args(FrozenPart)
"""All that has to stand still for a mixer to be linear; of these `decay` follows from `delta`."""


@checks_arguments
def stop_gradients(
    model: "LensModel", parts: Sequence[FrozenPart] = FROZEN_PARTS, *, layers: Any = None
) -> list[Entry]:
    """Give hook entries that stop the gradient at some parts of SSM layers and change no value.

    Args:
        model: The model.
        parts: Which; see the module's table. All of them make each mixer linear in its input, and, with the norms'
            scales held still, the logits linear in the embeddings.
        layers: An int or several; None for all that have an SSM mixer: in a hybrid, attention and MLPs stay as they
            are, and the logits are not linear. The final norm's scale is held still with
            `"scale"` whatever the layers.

    Returns:
        Entries for `run_with_hooks` and `hooks`.

    Raises:
        ArgumentError: No such part or layer.

    Example:
        >>> import torch, lens_core as lens
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
        >>> model = lens.load(MambaForCausalLM(config))
        >>> tokens = torch.tensor([[3, 14, 15, 9, 26, 5]])
        >>> with model.hooks(fwd_hooks=stop_gradients(model)):
        ...     _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
        >>> float(cache.grad["delta_pre", 0].abs().max())
        0.0
    """
    unknown = [part for part in parts if part not in FROZEN_PARTS]
    if isinstance(parts, str) or unknown:
        raise ArgumentError(f"parts are some of {', '.join(FROZEN_PARTS)}; got {parts!r}")
    entries: list[Entry] = []
    for layer in read_layers(model.table, layers):
        block, mixer = f"blocks.{layer}.", f"blocks.{layer}.mixer.hook_"
        stopped = [mixer + part for part in parts if part not in ("scale", "activation")]
        if "scale" in parts:
            scales = tuple(f"{block}{norm}.hook_scale" for norm in ("norm", "ln1", "mixer.inner_norm"))
            stopped += [name for name in scales if name in model.table]
        entries += [(name, edits.detach()) for name in stopped]
        if "activation" in parts:
            entries += _linear_activation(mixer, activation_of(model))
    if "scale" in parts:
        entries.append(("ln_final.hook_scale", edits.detach()))
    return entries


def frozen_share(after: Tensor, before: Tensor) -> Tensor:
    """Give what an activation function multiplied its input by, held still: sigmoid(v) for SiLU(v) = sigmoid(v) v.

    It is the quotient of the two, and 0 where the input is 0; so a mask between them, which zeroes padding, is in it.

    Example:
        >>> v = torch.tensor([0.0, 2.0])
        >>> frozen_share(torch.nn.functional.silu(v), v)
        tensor([0.0000, 0.8808])
    """
    after, before = after.detach(), before.detach()
    return torch.where(before == 0, 0.0, after / torch.where(before == 0, 1.0, before))


def activation_of(model: "LensModel") -> Callable[[Tensor], Tensor]:
    """Give the activation function after a mixer's convolution, by HF's name of it."""
    known: Any = ACT2FN
    return known[model.cfg.ssm_act_fn or model.cfg.act_fn]


def activated(after: Tensor, before: Tensor, act: Callable[[Tensor], Tensor]) -> Bool[Tensor, "..."]:
    """Say where a value is the activation of another, or zeroed after it: elsewhere something took its place.

    Example:
        >>> v = torch.tensor([0.0, 2.0, 3.0])
        >>> activated(torch.tensor([0.0, 0.0, 7.0]), v, torch.nn.functional.silu)
        tensor([ True,  True, False])
    """
    own, eps = act(before.detach()).to(after.dtype), torch.finfo(after.dtype).eps
    return (after == 0) | torch.isclose(after.detach(), own, rtol=8 * eps, atol=8 * eps)


def _linear_activation(mixer: str, act: Callable[[Tensor], Tensor]) -> list[Entry]:
    """Let the gradient pass from x = SiLU(v) to v as through a multiplication by the sigmoid(v) of the run."""
    kept: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: Any) -> None:
        kept["conv"] = tensor

    def linear(x: Tensor, hook: Any) -> Tensor | None:
        conv = kept.pop("conv")
        if not x.requires_grad:
            return None
        v = conv[..., : x[0, 0].numel()].reshape(x.shape)
        return with_gradient_of(torch.where(activated(x, v, act), frozen_share(x, v) * v, x), x)

    return [(f"{mixer}conv", keep), (f"{mixer}ssm_input", linear)]
