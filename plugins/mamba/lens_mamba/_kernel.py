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

from lens_core.plugin import (
    Columns,
    MixerCall,
    MixerKernel,
    ModuleCall,
    walk,
    walk_segments,
    with_gradient_of,
)

SELECTION = ("B", "C", "delta_pre", "delta")
RECURRENCE = ("decay", "ssm_write", "ssm_state")
OUTPUT = ("y", "ssm_output")
SCAN = (*SELECTION, *RECURRENCE, *OUTPUT)
FUSED_AWAY = ("conv", "ssm_input", "x_proj", *SCAN, "gated")
"""What HF's fused training kernel computes without calling anything that could be intercepted."""


@attrs.frozen(kw_only=True, eq=False)
class Selective:
    """One call of the selective scan, HF's arguments position-first."""

    x: Float[Tensor, "batch pos d_inner"]
    dt: Float[Tensor, "batch pos d_inner"]
    bias: Float[Tensor, " d_inner"] | None
    A: Float[Tensor, "d_inner d_state"]
    B: Float[Tensor, "batch pos d_state"]
    C: Float[Tensor, "batch pos d_state"]
    D: Float[Tensor, " d_inner"]
    gate: Float[Tensor, "batch pos d_inner"]
    start: Float[Tensor, "batch d_inner d_state"]
    delta: Tensor | None = None
    """The step size once it is known."""
    own: Callable[[], tuple[Tensor, Tensor | None]]
    """HF's own call: its gated output `[batch, pos, d_inner]`, and the last state where HF hands it on."""
    fast: "Callable[[Selective, MixerCall, int, int], tuple[Tensor, Tensor]] | None"
    """HF's scan from zero over some positions, without skip and gate: y and the last state; None for a single step."""
    is_reference: bool
    """Whether HF's scan is the PyTorch one, of which skip and gate can be split off without changing a bit."""


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


# ---------------------------------------------------------------------- convolution


def convolution(call: MixerCall, original: Any, hidden: Tensor, *args: Any, activation: Any, **options: Any) -> Tensor:
    """causal_conv1d_fn: whole sequences `[batch, d_inner, pos]`, a cache's window in front where there is one."""
    own = partial(original, hidden, *args, activation=activation, **options)
    plain = partial(original, hidden, *args, activation=None, **options)
    return _convolved(call, own, plain, hidden.dtype)


def convolution_step(
    call: MixerCall, original: Any, hidden: Tensor, window: Tensor, *args: Any, activation: Any, **options: Any
) -> Tensor:
    """causal_conv1d_update: one position; it shifts the cache's window in place, so the beside call has a copy."""
    before = window.clone() if call.watched("conv") else window
    own = partial(original, hidden, window, *args, activation=activation, **options)
    plain = partial(original, hidden, before, *args, activation=None, **options)
    return _convolved(call, own, plain, hidden.dtype)


def _convolved(
    call: MixerCall, own: Callable[[], Tensor], plain: Callable[[], Tensor], dtype: torch.dtype
) -> Float[Tensor, "batch d_inner any"]:
    """Show the convolution before its activation, trimmed to this call's positions."""
    call.notes["convolved"] = True
    if not call.watched("conv"):
        return own()
    with torch.set_grad_enabled(call.needs_graph("conv")):
        conv = plain()[..., -call.n_pos :].mT
        new = call.fire("conv", conv)
        explicit = call.module.act(new.mT).to(dtype) if call.changed("conv") else None
    result = own()  # also where edited: it moves the window of the cache
    if explicit is None:
        return result
    return explicit if call.edited("conv") else with_gradient_of(explicit, result[..., -call.n_pos :])


def padding(call: MixerCall, original: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """apply_mask_to_padding_states: before in_proj, and again after the convolution: then its result is x."""
    masked: Tensor = original(hidden, mask)
    return call.passed("ssm_input", masked) if "convolved" in call.notes and call.watched("ssm_input") else masked


def fused(call: MixerCall, original: Any, *args: Any, **options: Any) -> Any:
    """mamba_inner_fn: None is HF's own way into the functions above, taken where their inside is asked for."""
    return None if call.watched(*FUSED_AWAY) else original(*args, **options)


# ---------------------------------------------------------------------- scan


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
    given = {"delta_bias": delta_bias, **options}
    own = partial(original, x, dt, A, B, C, D=D, z=z, return_last_state=return_last_state, **given)
    if not call.watched(*SCAN):
        return own()

    def fast(s: Selective, call: MixerCall, first: int, stop: int) -> tuple[Tensor, Tensor]:
        at = slice(first, stop)
        step = {"dt": dt, **given}
        if call.changed("delta_pre", "delta") and s.delta is not None:
            step = {"dt": s.delta.mT, **given, "delta_bias": None, "delta_softplus": False}
        b, c = (s.B.mT if call.changed("B") else B), (s.C.mT if call.changed("C") else C)
        y, last = original(
            x[..., at],
            step.pop("dt")[..., at],
            A,
            b[..., at],
            c[..., at],
            D=None,
            z=None,
            return_last_state=True,
            **step,
        )
        return y.mT, last

    def own_pair() -> tuple[Tensor, Tensor | None]:
        result = own()
        return (result[0].mT, result[1]) if return_last_state else (result.mT, None)

    start = torch.zeros(x.shape[0], *A.shape, dtype=torch.promote_types(A.dtype, dt.dtype), device=x.device)
    out, last = _scanned(
        call,
        Selective(
            x=x.mT,
            dt=dt.mT,
            bias=delta_bias,
            A=A,
            B=B.mT,
            C=C.mT,
            D=D,
            gate=z.mT,
            start=start,
            own=own_pair,
            fast=fast,
            is_reference=call.is_reference(original, x),
        ),
    )
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
        own=lambda: (own()[:, None], None),
        fast=None,
        is_reference=False,
    )
    out, last = _scanned(call, selective)
    if last is not None:
        state.copy_(last)
    return out[:, 0]


def _scanned(call: MixerCall, s: Selective) -> tuple[Tensor, Tensor | None]:
    """Show everything inside the scan; give its gated output, and the last state unless HF's call has seen to it."""
    with torch.set_grad_enabled(call.needs_graph(*SCAN)):
        s = _selected(call, s)
        found = _recurred(call, s)
    if found is None and s.fast is not None and s.is_reference and call.watched(*OUTPUT):
        y, last = s.fast(s, call, 0, call.n_pos)  # HF's own scan, only cut open: the same bits in one run
        return _gated(call, s, y), last
    with torch.set_grad_enabled(call.needs_graph(*SCAN)):
        if found is None and call.watched(*OUTPUT):
            found = _plain(call, s)
        explicit = None if found is None else _gated(call, s, found[0])
    if found is not None and explicit is not None and call.edited(*SCAN):
        return explicit.to(s.x.dtype) if s.fast is None else explicit, found[1]
    out, last = s.own()
    if found is not None and explicit is not None and call.changed(*SCAN):
        out = with_gradient_of(explicit.to(out.dtype), out)
        last = None if last is None else with_gradient_of(found[1].to(last.dtype), last)
    return out, last


def _selected(call: MixerCall, s: Selective) -> Selective:
    """Show B, C and the step size: delta = softplus(dt + bias), in the model's dtype."""
    B, C = call.fire("B", s.B), call.fire("C", s.C)
    pre = s.dt if s.bias is None else s.dt + s.bias.to(s.dt.dtype)
    delta = call.fire("delta", F.softplus(call.fire("delta_pre", pre)))
    return attrs.evolve(s, B=B, C=C, delta=delta)


def _recurred(call: MixerCall, s: Selective) -> tuple[Tensor, Tensor] | None:
    """Show decay, write and state; give y and the last state where anything so far was changed.

    decay_t = exp(delta_t A), write_t = (delta_t B_t) x_t, h_t = decay_t h_(t-1) + write_t, in float32; y_t = h_t C_t.
    """
    decay = call.fire("decay", _decay(s, slice(None))) if call.watched("decay") else None
    write = call.fire("ssm_write", _write(s, slice(None))) if call.watched("ssm_write") else None
    is_open = call.changed("decay", "ssm_write")

    def advance(position: int, state: Tensor) -> Tensor:
        d = _decay(s, position) if decay is None else decay[:, position]
        return d * state + (_write(s, position) if write is None else write[:, position])

    readout = partial(_readout, s)
    watch = call.watches.get("ssm_state")
    if watch is None:
        if is_open:
            y, last = walk(call, "ssm_state", s.start, advance, readout)
            return None if y is None else (y, last)
        return _plain(call, s) if call.changed(*SELECTION) else None
    if s.fast is not None and not watch.wants_all and not is_open:
        found = walk_segments(call, "ssm_state", s.start, partial(_fast_from, call, s), readout)
    else:
        needs_y = call.changed(*SELECTION) or is_open or bool(watch.entries) or watch.needs_graph
        y, last = walk(call, "ssm_state", s.start, advance, readout if needs_y else None)
        found = None if y is None else (y, last)
    return found if call.changed(*SELECTION, *RECURRENCE) else None


def _decay(s: Selective, at: Any) -> Float[Tensor, "batch *pos d_inner d_state"]:
    return torch.exp(s.A * s.delta[:, at, ..., None])  # type: ignore[index]


def _write(s: Selective, at: Any) -> Float[Tensor, "batch *pos d_inner d_state"]:
    scaled = s.delta[:, at, ..., None] * s.B[:, at, ..., None, :].float()  # type: ignore[index]
    return scaled * s.x[:, at, ..., None].float()


def _readout(
    s: Selective, position: int, state: Float[Tensor, "batch d_inner d_state"]
) -> Float[Tensor, "batch d_inner"]:
    return torch.matmul(state.to(s.C.dtype), s.C[:, position, :, None])[..., 0]


def _plain(call: MixerCall, s: Selective) -> tuple[Tensor, Tensor]:
    """Give y and the last state without looking inside the recurrence."""
    if s.fast is not None:
        return s.fast(s, call, 0, call.n_pos)
    state = _decay(s, 0) * s.start + _write(s, 0)
    return _readout(s, 0, state)[:, None], state


def _fast_from(
    call: MixerCall, s: Selective, first: int, stop: int, start: Float[Tensor, "batch d_inner d_state"]
) -> tuple[Float[Tensor, "batch some d_inner"], Float[Tensor, "batch d_inner d_state"]]:
    """HF's scan starts from zero, and the recurrence is linear: what `start` leaves is added.

    exp(A sum of delta) only shrinks, so nothing overflows. HF's scan would swallow an `initial_states=` silently.
    """
    y, last = s.fast(s, call, first, stop)  # type: ignore[misc]
    if first == 0:
        return y, last
    total = s.delta[:, first:stop].float().cumsum(1)  # type: ignore[index]
    kept = torch.exp(s.A * total[..., None]) * start[:, None]  # batch some d_inner d_state
    y = y + torch.einsum("bten,btn->bte", kept, s.C[:, first:stop].to(kept.dtype)).to(y.dtype)
    return y, last + kept[:, -1]


def _gated(call: MixerCall, s: Selective, y: Float[Tensor, "batch pos d_inner"]) -> Float[Tensor, "batch pos d_inner"]:
    """(y + D x) SiLU(z), in HF's layout: channel-first, which decides the bits of the projection that follows."""
    y = call.fire("y", y)
    out = y.mT + s.x.mT * s.D[None, :, None]
    return (call.fire("ssm_output", out.mT).mT * F.silu(s.gate.mT)).mT


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
