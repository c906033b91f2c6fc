"""Stopping gradients at what a value is multiplied by, so that what is left of the model is linear.

A transformer or state-space block multiplies values by factors that it computes from the same input: attention
patterns, norms' scales, gates, decays. With these factors held still a gradient says what the value does, and not how
it would change the factors; products of values and gradients then add up. With all of them held still, activation
functions too, the logits are a linear function of the embeddings and biases, and value times gradient is an exact
decomposition.

No stop changes a bit of any value. Entries go to `run_with_hooks` or `hooks`; attribution in such a block is of the
linear model.

Sources: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (frozen patterns and norms); Ali et al.
2022 (arXiv 2202.07304), who hold patterns and scales still for conservation; Jafari et al. 2024 (MambaLRP, arXiv
2406.07592) for state-space layers.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lens_core import edits
from lens_core._arguments import checks_arguments
from lens_core._graph import with_gradient_of
from lens_core.analysis.ssm_gradients import FrozenPart, activated, frozen_share, stop_gradients
from lens_core.analysis.ssm_knockout import Entry
from lens_core.errors import ArgumentError, UnsupportedHookError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["linearized"]

_TRANSITION: tuple[FrozenPart, ...] = ("decay", "delta", "B", "C")
_GATE: tuple[FrozenPart, ...] = ("gate",)
_ACTIVATION: tuple[FrozenPart, ...] = ("activation",)


@checks_arguments
def linearized(
    model: "LensModel",
    pattern: bool = True,
    norm_scale: bool = True,
    gate: bool = True,
    ssm_transition: bool = True,
    *,
    activation: bool = True,
    mlp_out: bool = False,
    layers: Any = None,
) -> list[Entry]:
    """Give hook entries that stop gradients at the factors a model computes, and change no value.

    Args:
        model: The model, of any architecture; what it has not is left out.
        pattern: Attention patterns: values move along them, queries and keys get no gradient.
        norm_scale: The scales of all norms, post-norms, inner norms of mixers and the final one.
        gate: What gated MLPs multiply by (the activation of `mlp.hook_pre`) and mixers (SiLU of `mixer.hook_gate`).
        ssm_transition: What a state-space scan selects by: step sizes, decays, B and C.
        activation: The activation functions of MLPs without a gate and of mixers' convolutions: a value passes as if
            multiplied by the function's value over its argument, such as the sigmoid in SiLU(v) = sigmoid(v) v. False
            keeps their slopes.
        mlp_out: What MLPs add to the stream. Then they are sources as the embeddings are, and nothing flows to what
            they read.
        layers: An int or several, negative ones from the end; None for all. The final norm's scale belongs to None.

    Returns:
        Entries for `run_with_hooks` and `hooks`. With the first five true, the logits before a cap of the type's own
        (`unembed.hook_out`) are linear in the embeddings, what MLPs add where that is stopped, and the biases.

    Raises:
        UnsupportedHookError: `activation` where an MLP's activation function is out of reach: inside of experts, or
            with parameters of its own. Give `mlp_out=True`, or `activation=False`.
        ArgumentError: No such layer.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:llama")
        >>> with model.hooks(linearized(model)), model.caching("hook_embed", detach=False) as cache:
        ...     logit = model("king apple river")[0, -1, 5]
        ...     logit.backward()
        >>> total = (cache["hook_embed"] * cache.grad["hook_embed"]).sum()
        >>> bool(torch.allclose(total, logit, rtol=1e-3))  # this model has no biases
        True
    """
    chosen = _read_layers(model, layers)
    entries: list[Entry] = []

    def stop(*names: str) -> None:
        entries.extend((name, edits.detach()) for name in names if name in model.table)

    for layer in chosen:
        block = f"blocks.{layer}."
        if pattern:
            stop(f"{block}attn.hook_pattern")
        if norm_scale:
            stop(*(name for name in model.table if name.startswith(block) and name.endswith(".hook_scale")))
        if mlp_out:
            stop(f"{block}hook_mlp_out")
        else:
            if gate and f"{block}mlp.hook_pre_linear" in model.table:
                stop(f"{block}mlp.hook_pre")
            if gate or activation:
                entries += _mlp(model, layer, gate=gate, activation=activation)
        entries += _mixer(model, layer, gate=gate, transition=ssm_transition, activation=activation)
    if norm_scale and layers is None:
        stop("ln_final.hook_scale")
    return entries


def _read_layers(model: "LensModel", layers: Any) -> list[int]:
    n_layers = model.table.n_layers
    if layers is None:
        return list(range(n_layers))
    listed: list[Any] = [layers] if isinstance(layers, int) else list(layers)
    for layer in listed:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -n_layers <= layer < n_layers:
            raise ArgumentError(f"a layer is an int from {-n_layers} to {n_layers - 1}; got {layer!r}")
    return [layer % n_layers for layer in listed]


def _mlp(model: "LensModel", layer: int, *, gate: bool, activation: bool) -> list[Entry]:
    """Stop inside of an MLP: the weights of experts, or the activation function where there is no gate."""
    mlp = f"blocks.{layer}.mlp.hook_"
    if f"{mlp}expert_weights" in model.table:
        if activation:
            raise UnsupportedHookError(
                f"block {layer} has experts, inside of which no hook point reaches: they cannot be linear. Give "
                "mlp_out=True, and they are sources, or activation=False, and they keep their slopes"
            )
        return [(f"{mlp}expert_weights", edits.detach())] if gate else []
    if not activation or f"{mlp}pre_linear" in model.table or f"{mlp}post" not in model.table:
        return []
    return _linear_activation(f"{mlp}pre", f"{mlp}post", _function_of(model, layer))


def _function_of(model: "LensModel", layer: int) -> Callable[[Tensor], Tensor]:
    known: Any = ACT2FN
    name = model.cfg.act_fn
    function = known[name] if name in known else None  # noqa: SIM401 - only its brackets make functions
    if function is None or (isinstance(function, nn.Module) and any(True for _ in function.parameters())):
        raise UnsupportedHookError(
            f"block {layer}'s activation function {name!r} has parameters of its own, or is unknown: it cannot be held "
            "still. Give mlp_out=True, or activation=False"
        )
    return function


def _mixer(model: "LensModel", layer: int, *, gate: bool, transition: bool, activation: bool) -> list[Entry]:
    if f"blocks.{layer}.mixer.hook_delta" not in model.table:
        return []
    parts: list[FrozenPart] = []
    for is_held, held in ((transition, _TRANSITION), (gate, _GATE), (activation, _ACTIVATION)):
        parts.extend(held if is_held else ())
    return stop_gradients(model, parts, layers=layer)


def _linear_activation(before: str, after: str, act: Callable[[Tensor], Tensor]) -> list[Entry]:
    """Let the gradient pass an activation function as through a multiplication by its value over its argument.

    Where another function replaced a value of either place, so that one is not the activation of the other, it keeps
    the gradient of the replacement.
    """
    kept: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: Any) -> None:
        kept["before"] = tensor

    def linear(post: Tensor, hook: Any) -> Tensor | None:
        pre = kept.pop("before")
        if not post.requires_grad:
            return None
        own = activated(post, pre, act)
        return with_gradient_of(torch.where(own, frozen_share(post, pre) * pre, post), post)

    return [(before, keep), (after, linear)]
