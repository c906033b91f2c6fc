"""The inside of a Mamba-2 mixer: HF's functions with every intermediate named, and a transparent scan in their place.

Source: transformers `models/mamba2/modeling_mamba2.py`; Dao and Gu 2024 (arXiv 2405.21060), sections 6 and 7.

Glossary, paper to code: X (what the scan reads) `x`, the hook point `hook_ssm_input`; xBC `conv_in`; z `gate`; Delta
`delta`, before bias and softplus `dt`; A `A` = -exp(A_log), one scalar a head; a_t = exp(Delta_t A) `decay`;
Delta_t X_t B_t^T `write`; H_t (the paper's h_t) `state`, `[batch, n_heads, head_dim, d_state]`; C_t H_t `y`; D the
skip. Head h reads group h // (n_heads / n_groups) of B and C. "Chunk scan" is HF's (the SSD algorithm), "step" its
decoding function.

Invariants: HF's own call stands wherever no function replaced a value, bit for bit; the casts are HF's (a chunk scan
computes in float32, a step in the model's dtype but for the state). A chunk scan and a recurrence round differently:
an edit changes the low bits of its whole layer. Does not: know about fused kernels; it calls whatever stands under
HF's names, and asks nothing of it but HF's arguments.
"""

from collections.abc import Callable, Mapping, Sequence
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
    loaded,
    run_scan,
    with_gradient_of,
)

SELECTION = ("delta_pre", "delta")
SCAN = (*SELECTION, *INSIDE_SCAN)
SPLIT = ("ssm_input", "B", "C")
FUSED_AWAY = ("conv", *SPLIT, *SCAN, "inner_norm", "gated")
"""What HF's fused training kernel computes without calling anything that could be intercepted."""
NO_LIMIT = (0.0, float("inf"))


# ---------------------------------------------------------------------- submodules


def in_projection(call: MixerCall, module: ModuleCall) -> None:
    """After in_proj: `[z | xBC | dt]`."""
    own = module.result
    result = call.passed_columns(own, in_columns(call.module))
    if result is not own:
        module.result = result


def in_columns(mixer: Any) -> Mapping[str, Columns]:
    """Say where the parts of in_proj are."""
    inner, conv = mixer.intermediate_size, mixer.conv_dim
    return {
        "in_proj": Columns(start=0, stop=inner + conv + mixer.num_heads),
        "gate": Columns(start=0, stop=inner),
        "conv_in": Columns(start=inner, stop=inner + conv),
    }


def gated_norm(call: MixerCall, module: ModuleCall) -> None:
    """After the gated group norm: x SiLU(z) over the root mean square of its group, times the gain."""
    if not call.watched("inner_norm"):
        return
    norm: Any = module.module
    x, gate = module.args
    with torch.set_grad_enabled(call.needs_graph("inner_norm")), loaded(norm):
        grouped = (x.float() * F.silu(gate.float())).unflatten(-1, (-1, norm.group_size))
        scale = call.fire("inner_norm", (grouped.pow(2).mean(-1) + norm.variance_epsilon).sqrt())
        if not call.changed("inner_norm"):
            return
        explicit = norm.weight.to(x.device) * (grouped / scale[..., None]).flatten(-2).to(x.dtype)
    module.result = explicit if call.edited("inner_norm") else with_gradient_of(explicit, module.result)


def out_projection(call: MixerCall, module: ModuleCall) -> None:
    """Before out_proj: what it multiplies."""
    if call.watched("gated"):
        own = module.input
        value = call.passed("gated", own)
        if value is not own:
            module.input = value


# ---------------------------------------------------------------------- functions


def padding(call: MixerCall, original: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """apply_mask_to_padding_states: before in_proj, and again after the convolution: then its result is [x | B | C]."""
    masked: Tensor = original(hidden, mask)
    if "convolved" not in call.notes:
        return masked
    mixer = call.module
    inner, shared = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
    views = {
        "ssm_input": Columns(start=0, stop=inner, heads=mixer.num_heads),
        "B": Columns(start=inner, stop=inner + shared, heads=mixer.n_groups),
        "C": Columns(start=inner + shared, stop=inner + 2 * shared, heads=mixer.n_groups),
    }
    return call.passed_columns(masked, views)


def fused(call: MixerCall, original: Any, *args: Any, **options: Any) -> Any:
    """mamba2_split_conv1d_scan_combined: None is HF's own way into the functions, where their inside is asked for."""
    return None if call.watched(*FUSED_AWAY) else original(*args, **options)


# ---------------------------------------------------------------------- scan


@attrs.frozen(kw_only=True, eq=False)
class Dual:
    """One call of the scan: decay_t = exp(delta_t A), write_t = delta_t x_t B_t^T, y_t = H_t C_t."""

    x: Float[Tensor, "batch pos n_heads head_dim"]
    dt: Float[Tensor, "batch pos n_heads"]
    bias: Float[Tensor, " n_heads"] | None
    limit: tuple[float, float] = NO_LIMIT
    A: Float[Tensor, " n_heads"]
    B: Float[Tensor, "batch pos n_groups d_state"]
    C: Float[Tensor, "batch pos n_groups d_state"]
    D: Float[Tensor, " n_heads"]
    start: Float[Tensor, "batch n_heads head_dim d_state"]
    delta: Any = None
    """The step size, once it is known."""
    call_own: Callable[[], tuple[Tensor, Tensor | None]]
    chunk_scan: Callable[..., Any] | None = None
    """HF's chunk scan without its skip, given the positions and where it starts; None for a single step."""
    is_reference: bool = False
    selection: tuple[str, ...] = SELECTION

    @property
    def is_step(self) -> bool:
        """Whether HF calls the function of a single position."""
        return self.chunk_scan is None

    def own(self) -> tuple[Tensor, Tensor | None]:
        """Make HF's own call."""
        return self.call_own()

    def telling(self, take: Callable[[Tensor], None]) -> None:
        """HF's scan goes from chunk to chunk and has no state in between."""

    def select(self, call: MixerCall) -> "Dual":
        """Show the step size: delta = softplus(dt + bias) within the limits, in the model's dtype."""
        pre = self.dt if self.bias is None else self.dt + self.bias.to(self.dt.dtype)
        delta = F.softplus(call.fire("delta_pre", pre))
        if self.limit != NO_LIMIT:
            delta = delta.clamp(*self.limit)
        return attrs.evolve(self, delta=call.fire("delta", delta))

    def decay(self, at: Any) -> Float[Tensor, "batch *pos n_heads"]:
        """exp(delta A), in float32."""
        return torch.exp(self.A * self.delta[:, at].float())

    def write(self, at: Any) -> Float[Tensor, "batch *pos n_heads head_dim d_state"]:
        """What is written: delta x B^T; in float32 but in a step, where it is in the model's dtype."""
        scaled, B = self._factors(at)
        return scaled * B

    def advance(self, position: int, state: Tensor, decay: Tensor | None, write: Tensor | None) -> Tensor:
        """decay_t h + write_t; unless it was shown, what is written is added without being stored."""
        kept = state * (self.decay(position) if decay is None else decay[:, position])[..., None, None]
        if write is not None:
            return kept + write[:, position]
        if self.is_step:
            return kept + self.write(position)
        return torch.addcmul(kept, *self._factors(position))

    def readout(self, position: int, state: Tensor) -> Float[Tensor, "batch n_heads head_dim"]:
        """H_t C_t; in float32 but in a step."""
        C = self.C[:, position] if self.is_step else self.C[:, position].float()
        return torch.matmul(state.to(C.dtype), self._per_head(C)[..., None])[..., 0]

    def fast(self, call: MixerCall, first: int, stop: int, start: Tensor) -> tuple[Tensor, Tensor]:
        """HF's chunk scan from a state."""
        at = slice(first, stop)
        given: dict[str, Any] = {"dt": self.dt[:, at]}
        if call.changed(*SELECTION):
            given = {
                "dt": self.delta[:, at],
                "dt_bias": None,
                "dt_softplus": False,
                "dt_limit": (-NO_LIMIT[1], NO_LIMIT[1]),
            }
        if first:
            given["initial_states"] = start
        return self.chunk_scan(self.x[:, at], B=self.B[:, at], C=self.C[:, at], **given)  # type: ignore[misc]

    def finish(self, call: MixerCall, y: Tensor) -> Float[Tensor, "batch pos n_heads head_dim"]:
        """Y + D x."""
        x = self.x if self.is_step else self.x.float()
        out = call.fire("ssm_output", call.fire("y", y) + self.D[..., None] * x)
        return out.to(self.x.dtype) if self.is_step else out

    def _per_head(self, shared: Tensor) -> Tensor:
        """Repeat the groups of B or C, `[..., n_groups, d_state]`, for their heads."""
        return shared.repeat_interleave(self.x.shape[2] // shared.shape[-2], dim=-2)

    def _factors(self, at: Any) -> tuple[Tensor, Tensor]:
        """The two factors of what is written, in HF's order of rounding: (delta x, B), in a step (delta B, x)."""
        delta, x, B = self.delta[:, at], self.x[:, at], self._per_head(self.B[:, at])
        if self.is_step:
            return delta[..., None, None] * B[..., None, :], x[..., None]
        return (x.float() * delta[..., None].float())[..., None], B.float()[..., None, :]


def scan(
    call: MixerCall,
    original: Any,
    x: Float[Tensor, "batch pos n_heads head_dim"],
    dt: Float[Tensor, "batch pos n_heads"],
    A: Tensor,
    B: Float[Tensor, "batch pos n_groups d_state"],
    C: Float[Tensor, "batch pos n_groups d_state"],
    *,
    D: Tensor,
    dt_bias: Tensor | None,
    dt_limit: Sequence[float] = NO_LIMIT,  # a list, where the config comes from a file
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    **options: Any,
) -> Any:
    """mamba2_chunk_scan: whole sequences, from zeros or from the cache's state."""
    limit = tuple(dt_limit)
    options = {"dt_bias": dt_bias, "dt_limit": dt_limit, "initial_states": initial_states, **options}
    own = partial(original, x, dt, A, B, C, D=D, return_final_states=return_final_states, **options)
    if not call.watched(*SCAN):
        return own()

    def chunk_scan(x: Tensor, **given: Any) -> Any:
        dt, B, C = (given.pop(name) for name in ("dt", "B", "C"))
        return original(x, dt, A, B, C, D=None, return_final_states=True, **{**options, **given})

    def call_own() -> tuple[Tensor, Tensor | None]:
        result = own()
        return result if return_final_states else (result, None)

    shape = (x.shape[0], *x.shape[2:], B.shape[-1])
    zeros = torch.zeros(shape, dtype=torch.promote_types(A.dtype, x.dtype), device=x.device)
    is_reference = call.is_reference(original, x)
    dual = Dual(
        x=x.float() if is_reference else x,  # once, as in HF: the gradients of scan and skip meet in float32
        dt=dt,
        bias=dt_bias,
        limit=(limit[0], limit[1]),
        A=A,
        B=B,
        C=C,
        D=D,
        start=zeros if initial_states is None else initial_states.clone(),
        call_own=call_own,
        chunk_scan=chunk_scan,
        is_reference=is_reference,
    )
    out, last = run_scan(call, dual)
    return (out, last) if return_final_states else out


def scan_step(
    call: MixerCall,
    original: Any,
    state: Float[Tensor, "batch n_heads head_dim d_state"],
    x: Float[Tensor, "batch n_heads head_dim"],
    dt: Float[Tensor, "batch n_heads head_dim"],
    A: Float[Tensor, "n_heads head_dim d_state"],
    B: Float[Tensor, "batch n_groups d_state"],
    C: Float[Tensor, "batch n_groups d_state"],
    D: Float[Tensor, "n_heads head_dim"],
    *,
    dt_bias: Float[Tensor, "n_heads head_dim"] | None,
    **options: Any,
) -> Tensor:
    """mamba2_selective_state_update: one position, from the cache's state, which it replaces in place.

    HF hands it dt, A, D and the bias repeated along head_dim, and no limits of the step size.
    """
    own = partial(original, state, x, dt, A, B, C, D, dt_bias=dt_bias, **options)
    if not call.watched(*SCAN):
        return own()
    low, high = call.module.time_step_limit
    step = F.softplus(dt if dt_bias is None else dt + dt_bias.to(dt.dtype))
    if bool(((step < low) | (step > high)).any()):
        raise UnsupportedHookError(
            f"HF's Mamba-2 ignores the limits {(low, high)} of the step size when it decodes, and here one is beyond "
            "them, so nothing inside this scan is true; run the whole sequence without a cache"
        )
    dual = Dual(
        x=x[:, None],
        dt=dt[:, None, :, 0],
        bias=None if dt_bias is None else dt_bias[:, 0],
        A=A[:, 0, 0],
        B=B[:, None],
        C=C[:, None],
        D=D[:, 0],
        start=state.clone(),
        call_own=lambda: (own()[:, None], None),
    )
    out, last = run_scan(call, dual)
    if last is not None:
        state.copy_(last)
    return out[:, 0]


KERNEL = MixerKernel(
    functions={
        "apply_mask_to_padding_states": padding,
        "causal_conv1d_fn": convolution,
        "causal_conv1d_update": convolution_step,
        "mamba2_split_conv1d_scan_combined": fused,
        "mamba2_chunk_scan": scan,
        "mamba2_selective_state_update": scan_step,
    },
    modules={
        ("in_proj", "post"): in_projection,
        ("norm", "post"): gated_norm,
        ("out_proj", "pre"): out_projection,
    },
)
