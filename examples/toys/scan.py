"""Mamba's selective scan with a backward pass of its own, for training on a CPU.

transformers' function leaves some ten tensors [batch, d_inner, pos, d_state] to autograd. Here one pass over the
positions writes states and decays, and one pass back reads them; what else is needed fits in the processor's cache.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _Scan(torch.autograd.Function):
    """h_t = exp(delta_t A) h_(t-1) + B_t outer w_t and y_t = C_t h_t, where w = delta x.

    Positions come first: delta, w and y are [pos, batch, d_inner], B and C [pos, batch, d_state], A [d_state, d_inner].
    """

    @staticmethod
    def forward(ctx: Any, delta: Tensor, written: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """Go through the positions."""
        decays = delta.new_empty(len(delta), delta.shape[1], *A.shape)
        states, read = torch.empty_like(decays), torch.empty_like(delta)
        for at in range(len(delta)):
            torch.mul(delta[at, :, None], A, out=decays[at]).exp_()
            torch.mul(B[at, :, :, None], written[at, :, None], out=states[at])
            if at:
                states[at].addcmul_(decays[at], states[at - 1])
            read[at] = (C[at, :, None] @ states[at])[:, 0]
        ctx.save_for_backward(delta, written, A, B, C, decays, states)
        return read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Carry the gradient of the state from the last position to the first."""
        delta, written, A, B, C, decays, states = ctx.saved_tensors
        grad_delta, grad_written, grad_B, grad_C = map(torch.zeros_like, (delta, written, B, C))
        carried, grad_A = torch.zeros_like(states[0]), torch.zeros_like(states[0])
        for at in reversed(range(len(delta))):
            grad_C[at] = (states[at] * grad[at, :, None]).sum(-1)
            carried.addcmul_(C[at, :, :, None], grad[at, :, None])
            grad_written[at] = (B[at, :, None] @ carried)[:, 0]
            grad_B[at] = (carried * written[at, :, None]).sum(-1)
            if at:
                carried *= decays[at]
                change = carried * states[at - 1]  # the gradient of delta_t A
                grad_A.addcmul_(change, delta[at, :, None])
                grad_delta[at] = change.mul_(A).sum(1)
        return grad_delta, grad_written, grad_A.sum(0), grad_B, grad_C


def selective_scan(
    hidden_states: Float[Tensor, "batch d_inner pos"],
    dt: Float[Tensor, "batch d_inner pos"],
    A: Float[Tensor, "d_inner d_state"],
    B: Float[Tensor, "batch d_state pos"],
    C: Float[Tensor, "batch d_state pos"],
    *,
    D: Float[Tensor, " d_inner"],
    z: Float[Tensor, "batch d_inner pos"],
    delta_bias: Float[Tensor, " d_inner"],
    **_: object,
) -> Float[Tensor, "batch d_inner pos"]:
    """Stand in for `transformers.models.mamba.modeling_mamba.mamba_selective_scan` in training."""
    delta = F.softplus(dt + delta_bias[:, None])
    delta_first, written, B_first, C_first = (
        value.permute(2, 0, 1).contiguous() for value in (delta, delta * hidden_states, B, C)
    )
    scanned = _Scan.apply(delta_first, written, A.mT.contiguous(), B_first, C_first)
    return (scanned.permute(1, 2, 0) + hidden_states * D[:, None]) * F.silu(z)
