"""The inside of a Mamba mixer: HF's functions with every intermediate named, and a transparent scan in their place.

Source: transformers `models/mamba/modeling_mamba.py`; Gu and Dao 2023 (arXiv 2312.00752), section 3 and algorithm 2.

Glossary, paper to code: u (what the convolution reads) `conv_in`; z `gate`; x (what the scan reads) `x`, the hook point
`hook_ssm_input`; Delta `delta`, before bias and softplus `dt`; A `A` = -exp(A_log), `[d_inner, d_state]`; A-bar_t =
exp(Delta_t A) `decay`; B-bar_t x_t = Delta_t B_t x_t `write`; h_t `state`; C_t h_t `y`; D the skip. Here tensors are
`[batch, pos, ...]`; HF's functions take them channel-first, `[batch, ..., pos]`.

Invariants: HF's own call stands wherever no function replaced a value, bit for bit; the casts are HF's (decay, write
and state in float32, the readout in the model's dtype). Does not: know about fused kernels; it calls whatever stands
under HF's names, and asks nothing of it but HF's arguments.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lens_core.errors import UnsupportedHookError
from lens_core.plugin import (
    INSIDE_SCAN,
    Columns,
    MixerCall,
    MixerKernel,
    ModuleCall,
    convolution,
    convolution_step,
    run_scan,
)

SELECTION = ("B", "C", "delta_pre", "delta")
SCAN = (*SELECTION, *INSIDE_SCAN)
FUSED_AWAY = ("conv", "ssm_input", "x_proj", *SCAN, "gated")
"""What HF's fused training kernel computes without calling anything that could be intercepted."""


# ---------------------------------------------------------------------- projections


def in_projection(call: MixerCall, module: ModuleCall) -> None:
    """After in_proj: `[u | z]`, each a half of the columns."""
    width = module.result.shape[-1]
    own = module.result
    views = {
        "in_proj": Columns(start=0, stop=width),
        "gate": Columns(start=width // 2, stop=width),
        "conv_in": Columns(start=0, stop=width // 2),
    }
    result = call.passed_columns(own, views)
    if result is not own:
        module.result = result


def x_projection(call: MixerCall, module: ModuleCall) -> None:
    """After x_proj: `[dt | B | C]`, before the bias of dt, and before Falcon-Mamba's norms."""
    if call.watched("x_proj"):
        own = module.result
        result = call.passed("x_proj", own)
        if result is not own:
            module.result = result


def out_projection(call: MixerCall, module: ModuleCall) -> None:
    """Before out_proj: what it multiplies."""
    if call.watched("gated"):
        own = module.input
        value = call.passed("gated", own)
        if value is not own:
            module.input = value


# ---------------------------------------------------------------------- functions


def padding(call: MixerCall, original: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """apply_mask_to_padding_states: before in_proj, and again after the convolution: then its result is x."""
    masked: Tensor = original(hidden, mask)
    return call.passed("ssm_input", masked) if "convolved" in call.notes and call.watched("ssm_input") else masked


def fused(call: MixerCall, original: Any, *args: Any, **options: Any) -> Any:
    """mamba_inner_fn: None is HF's own way into the functions above, taken where their inside is asked for."""
    return None if call.watched(*FUSED_AWAY) else original(*args, **options)


# ---------------------------------------------------------------------- scan


@attrs.frozen(eq=False)
class Telling:
    """Stands for A in HF's PyTorch scan, which multiplies exp(A delta_t) with the state before each position: tells it.

    A subclass of Tensor would cost torch's dispatch at each step, a tenth of the scan. Whatever else is done with it is
    done with the tensor.
    """

    tensor: Tensor
    take: Callable[[Tensor], None]

    def __getitem__(self, at: Any) -> "Telling":
        return Telling(self.tensor[at], self.take)

    def __mul__(self, other: Tensor) -> Any:
        """Times the step sizes of all positions; or, at one of them, `[batch, d_inner, d_state]`, times a state."""
        if self.tensor.ndim > 3:
            return Telling(self.tensor * other, self.take)
        self.take(other)
        return self.tensor * other

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch's own way of asking whatever is no tensor what its functions shall do with it."""
        plain = [arg.tensor if isinstance(arg, cls) else arg for arg in args]
        named = {name: arg.tensor if isinstance(arg, cls) else arg for name, arg in (kwargs or {}).items()}
        result = func(*plain, **named)
        return cls(result, args[0].take) if func is torch.exp and args else result


@attrs.frozen(kw_only=True, eq=False)
class Selective:
    """One call of the selective scan: decay_t = exp(delta_t A), write_t = (delta_t B_t) x_t, y_t = h_t C_t."""

    x: Float[Tensor, "batch pos d_inner"]
    dt: Float[Tensor, "batch pos d_inner"]
    bias: Float[Tensor, " d_inner"] | None
    A: Float[Tensor, "d_inner d_state"]
    B: Float[Tensor, "batch pos d_state"]
    C: Float[Tensor, "batch pos d_state"]
    D: Float[Tensor, " d_inner"]
    gate: Float[Tensor, "batch pos d_inner"]
    start: Float[Tensor, "batch d_inner d_state"]
    delta: Any = None
    """The step size, once it is known."""
    call_own: Callable[..., tuple[Tensor, Tensor | None]]
    """HF's call; that of a scan takes other arguments by name."""
    scan_from_zero: Callable[..., Any] | None = None
    """HF's scan with its arguments but for dt, B, C, the positions, skip and gate; None for a single step."""
    is_reference: bool = False
    selection: tuple[str, ...] = SELECTION

    @property
    def is_step(self) -> bool:
        """Whether HF calls the function of a single position."""
        return self.scan_from_zero is None

    def own(self) -> tuple[Tensor, Tensor | None]:
        """Make HF's own call."""
        return self.call_own()

    def telling(self, take: Callable[[Tensor], None]) -> "Selective | None":
        """HF's PyTorch scan, given an A that tells."""
        if self.is_step or not self.is_reference or type(self.A) is not Tensor:
            return None
        told = Telling(self.A, take)
        scan = None if self.scan_from_zero is None else partial(self.scan_from_zero, A=told)
        return attrs.evolve(self, call_own=partial(self.call_own, A=told, return_last_state=True), scan_from_zero=scan)

    def select(self, call: MixerCall) -> "Selective":
        """Show B, C and the step size: delta = softplus(dt + bias), in the model's dtype."""
        B, C = call.fire("B", self.B), call.fire("C", self.C)
        pre = self.dt if self.bias is None else self.dt + self.bias.to(self.dt.dtype)
        delta = call.fire("delta", F.softplus(call.fire("delta_pre", pre)))
        return attrs.evolve(self, B=B, C=C, delta=delta)

    def decay(self, at: Any) -> Float[Tensor, "batch *pos d_inner d_state"]:
        """exp(delta A), in float32."""
        return torch.exp(self.A * self.delta[:, at, ..., None])

    def write(self, at: Any) -> Float[Tensor, "batch *pos d_inner d_state"]:
        """(delta B) x, in float32."""
        return self.delta[:, at, ..., None] * self.B[:, at, ..., None, :].float() * self.x[:, at, ..., None].float()

    def advance(self, position: int, state: Tensor, decay: Tensor | None, write: Tensor | None) -> Tensor:
        """decay_t h + write_t."""
        kept = (self.decay(position) if decay is None else decay[:, position]) * state
        return kept + (self.write(position) if write is None else write[:, position])

    def readout(self, position: int, state: Tensor) -> Float[Tensor, "batch d_inner"]:
        """h_t C_t, in the model's dtype."""
        return torch.matmul(state.to(self.C.dtype), self.C[:, position, :, None])[..., 0]

    def fast(self, call: MixerCall, first: int, stop: int, start: Tensor) -> tuple[Tensor, Tensor]:
        """HF's scan starts from zero, and the recurrence is linear: what `start` leaves is added.

        exp(A sum of delta) only shrinks, so nothing overflows. HF's scan would swallow an `initial_states=` silently.
        """
        at, step = slice(first, stop), {}
        if call.changed("delta_pre", "delta"):
            step = {"dt": self.delta.mT[..., at], "delta_bias": None, "delta_softplus": False}
        else:
            step = {"dt": self.dt.mT[..., at]}
        y, last = self.scan_from_zero(self.x.mT[..., at], B=self.B.mT[..., at], C=self.C.mT[..., at], **step)  # type: ignore[misc]
        if first == 0:
            return y.mT, last
        total = self.delta[:, at].float().cumsum(1)
        kept = torch.exp(self.A * total[..., None]) * start[:, None]  # batch some d_inner d_state
        added = torch.einsum("bten,btn->bte", kept, self.C[:, at].to(kept.dtype))
        return y.mT + added.to(y.dtype), last + kept[:, -1]

    def finish(self, call: MixerCall, y: Float[Tensor, "batch pos d_inner"]) -> Float[Tensor, "batch pos d_inner"]:
        """(y + D x) SiLU(z), in HF's layout: channel-first, which decides the bits of the projection that follows."""
        out = call.fire("y", y).mT + self.x.mT * self.D[None, :, None]
        gated = (call.fire("ssm_output", out.mT).mT * F.silu(self.gate.mT)).mT
        return gated.to(self.x.dtype) if self.is_step else gated


def scan(
    call: MixerCall,
    original: Any,
    x: Float[Tensor, "batch d_inner pos"],
    dt: Float[Tensor, "batch d_inner pos"],
    A: Tensor,
    B: Float[Tensor, "batch d_state pos"],
    C: Float[Tensor, "batch d_state pos"],
    *,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor | None,
    return_last_state: bool = False,
    **options: Any,
) -> Any:
    """mamba_selective_scan: whole sequences, from a state of zeros."""
    options = {"delta_bias": delta_bias, **options}

    def own(A: Any = A, *, return_last_state: bool = return_last_state) -> Any:
        return original(x, dt, A, B, C, D=D, z=z, return_last_state=return_last_state, **options)

    if not call.watched(*SCAN):
        return own()
    if call.run.now.past:
        raise UnsupportedHookError(
            f"HF's Mamba starts its scan from zero when {call.n_pos} positions continue a cache, so nothing inside it "
            "is true; give one position at a time"
        )

    def from_zero(x: Tensor, A: Any = A, **given: Any) -> Any:
        dt, B, C = (given.pop(name) for name in ("dt", "B", "C"))
        return original(x, dt, A, B, C, D=None, z=None, return_last_state=True, **{**options, **given})

    def call_own(**told: Any) -> tuple[Tensor, Tensor | None]:
        result = own(**told)
        out, last = result if isinstance(result, tuple) else (result, None)
        return out.mT, last

    start = torch.zeros(x.shape[0], *A.shape, dtype=torch.promote_types(A.dtype, dt.dtype), device=x.device)
    selective = Selective(
        x=x.mT,
        dt=dt.mT,
        bias=delta_bias,
        A=A,
        B=B.mT,
        C=C.mT,
        D=D,
        gate=z.mT,
        start=start,
        call_own=call_own,
        scan_from_zero=from_zero,
        is_reference=call.is_reference(original, x),
    )
    out, last = run_scan(call, selective)
    return (out.mT, last) if return_last_state else out.mT


def scan_step(
    call: MixerCall,
    original: Any,
    state: Float[Tensor, "batch d_inner d_state"],
    x: Float[Tensor, "batch d_inner"],
    dt: Float[Tensor, "batch d_inner"],
    A: Tensor,
    B: Float[Tensor, "batch d_state"],
    C: Float[Tensor, "batch d_state"],
    D: Tensor,
    *,
    z: Tensor,
    dt_bias: Tensor | None,
    **options: Any,
) -> Tensor:
    """mamba_selective_state_update: one position, from the cache's state, which it replaces in place."""
    own = partial(original, state, x, dt, A, B, C, D, z=z, dt_bias=dt_bias, **options)
    if not call.watched(*SCAN):
        return own()
    selective = Selective(
        x=x[:, None],
        dt=dt[:, None],
        bias=dt_bias,
        A=A,
        B=B[:, None],
        C=C[:, None],
        D=D,
        gate=z[:, None],
        start=state.clone(),
        call_own=lambda: (own()[:, None], None),
    )
    out, last = run_scan(call, selective)
    if last is not None:
        state.copy_(last)
    return out[:, 0]


KERNEL = MixerKernel(
    functions={
        "apply_mask_to_padding_states": padding,
        "causal_conv1d_fn": convolution,
        "causal_conv1d_update": convolution_step,
        "mamba_inner_fn": fused,
        "mamba_selective_scan": scan,
        "mamba_selective_state_update": scan_step,
    },
    modules={
        ("in_proj", "post"): in_projection,
        ("x_proj", "post"): x_projection,
        ("out_proj", "pre"): out_projection,
    },
)
