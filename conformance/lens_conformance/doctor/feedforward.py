"""The inside of one MLP: gated, fused or plain, tried as equations; or a router and experts."""

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from lens_conformance.doctor.attention import linear_calls
from lens_conformance.doctor.trace import Call, Trace, Unfit, same

__all__ = ["Dense", "Sparse", "read_feedforward"]


_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "gelu_fast", "quick_gelu", "tanh")


@attrs.frozen(kw_only=True)
class Dense:
    """Names below the MLP."""

    kind: str
    gate: str
    up: str
    down: str
    act: str
    width: int


@attrs.frozen(kw_only=True)
class Sparse:
    """Names below the MLP."""

    router: str
    router_linear: str | None
    experts: str
    layout: str | None
    """As `Moe.expert_layout`."""
    n_experts: int
    per_token: int


def read_feedforward(path: str, trace: Trace, block: str, act: str | None) -> Dense | Sparse:
    """Read one MLP, at the path of its module or of the block itself.

    Args:
        path: The module; the block's own where its projections are.
        trace: In float64, in evaluation.
        block: The block.
        act: The activation that the config names, which is tried first.

    Raises:
        Unfit: It is neither.
    """
    inside = trace.below(path)
    if path == block:
        inside = [call for call in inside if call.path.count(".") == path.count(".") + 1]
    stacked = [call for call in inside if any(p.ndim == 3 for p in call.module.parameters(recurse=False))]
    if stacked:
        return _sparse(path, inside, stacked[0])
    lists = [call for call in inside if "expert" in call.path.removeprefix(path).lower()]
    if lists:
        raise Unfit(f"{path} holds experts as modules of their own ({lists[0].path}); Moe has stacked ones")
    return _dense(path, inside, act)


def _dense(path: str, inside: list[Call], act: str | None) -> Dense:
    linear = list(linear_calls(inside))
    names = {call.path: call.path.removeprefix(f"{path}.") for call in linear}
    if len(linear) < 2:
        raise Unfit(f"{path} has {len(linear)} linear maps, and an MLP has two or three")
    for down in reversed(linear):
        read = down.inputs[0]
        for kind, gate, up, value in _forms([call for call in linear if call is not down], read):
            for name, made in _applied(inside, act, *value):
                if same(made, read):
                    return Dense(
                        kind=kind,
                        gate=names[gate.path],
                        up=names[up.path],
                        down=names[down.path],
                        act=name,
                        width=read.shape[-1],
                    )
    told = ", ".join(names.values())
    raise Unfit(f"{path} ({told}) is neither down(act(gate) * up), nor that with [gate | up] in one, nor down(act(up))")


def _forms(linear: list[Call], read: Tensor) -> Iterator[tuple[str, Call, Call, tuple[Tensor, Tensor | None]]]:
    width = read.shape[-1]
    for up in linear:
        y = up.outputs[0]
        if y.shape == read.shape:
            yield "plain", up, up, (y, None)
            for gate in linear:
                if gate is not up and gate.outputs[0].shape == read.shape:
                    yield "gated", gate, up, (gate.outputs[0], y)
        elif y.shape[:-1] == read.shape[:-1] and y.shape[-1] == 2 * width:
            yield "fused", up, up, (y[..., :width], y[..., width:])


def _applied(inside: list[Call], known: str | None, gate: Tensor, up: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Give the activations of a value, and their names: the config's, one of HF's, or what a module made of it."""
    for name in (known, *_ACTIVATIONS):
        if name in ACT2FN:
            try:
                made = ACT2FN[name](gate)
            except (RuntimeError, TypeError):  # of parameters of its own, in another dtype
                continue
            yield name, made if up is None else made * up
    for call in inside:
        if call.inputs and call.outputs and same(call.inputs[0], gate):
            yield (
                known or "",
                call.outputs[0] if up is None or call.outputs[0].shape != up.shape else (call.outputs[0] * up),
            )


def _sparse(path: str, inside: list[Call], experts: Call) -> Sparse:
    indices = next((x for x in experts.inputs if not x.is_floating_point()), None)
    routers = [call for call in inside if len(call.outputs) == 3 and call.end < experts.start]
    routers = [call for call in routers if not call.outputs[2].is_floating_point()]
    if not routers:
        raise Unfit(f"{path}: no router returns (logits, weights, indices) before {experts.path}")
    if indices is None:
        raise Unfit(f"{experts.path} is not called with (hidden, indices, weights)")
    router = routers[-1]
    stacked = next(p for p in experts.module.parameters(recurse=False) if p.ndim == 3)
    linear = [name for name, module in router.module.named_modules() if isinstance(module, torch.nn.Linear)]
    return Sparse(
        router=router.path.removeprefix(f"{path}."),
        router_linear=linear[0] if linear else None,
        experts=experts.path.removeprefix(f"{path}."),
        layout=_layout(experts.module),
        n_experts=stacked.shape[0],
        per_token=router.outputs[2].shape[-1],
    )


def _layout(experts: Any) -> str | None:
    """Say how the experts' weights lie, by their names and HF's own flags; None where `Moe` knows no such layout."""
    kinds = {
        ("down_proj", "gate_up_proj"): ("gated", False, True),
        ("down_proj", "down_proj_bias", "gate_up_proj", "gate_up_proj_bias"): ("interleaved", True, False),
        ("down_proj", "up_proj"): ("plain", False, True),
    }
    found = tuple(sorted(name for name, _ in experts.named_parameters(recurse=False)))
    layout, *flags = kinds.get(found, (None,))
    own = [getattr(experts, flag, None) for flag in ("is_transposed", "is_concatenated")]
    return layout if own == flags else None
