"""A sparse autoencoder inside the model: its own hook points, for the length of a block.

A splice is an entry at the hook point NAME, like a user's function: what the hooks of enclosing blocks return is what
the SAE reads, hooks of its own block at NAME see what it gives, and caches take the value after all. So it works
wherever a hook does. Its hook points hang below NAME in the run's table; the entry fires them, and no tap is theirs.

With the error term the value is `recons + error`, `error = x - recons(x)` of what came in, with no hook on that
reconstruction. As long as nothing is edited this is `x`, and `x` itself goes on, bit for bit. Gradients are those of
this formula: a feature gets the gradient of the output through the decoder (the error does not move with it), the error
gets the output's own, and what lies before NAME the output's own too, since both ways through the SAE cancel. These are
the stop-gradient and the pass-through gradient of Marks et al. 2024, "Sparse Feature Circuits".
"""

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs
import torch
from torch import Tensor

from lens_core._call import Call
from lens_core._context import active_run
from lens_core._graph import explicit_where, with_gradient_of
from lens_core.errors import SaeError
from lens_core.hook_points import HookPoint

if TYPE_CHECKING:
    from lens_core._plan import ModuleStep, Run
    from lens_core._watch import Watch

__all__ = ["PARTS", "Capture", "Splice", "SplicePart"]

Part: TypeAlias = Literal["input", "acts_pre", "acts_post", "recons", "error", "output"]
PARTS: Mapping[Part, tuple[str, str]] = {
    "input": ("batch pos d_in", "what the SAE reads, in its dtype, heads flattened"),
    "acts_pre": ("batch pos d_sae", "what the activation function is applied to"),
    "acts_post": ("batch pos d_sae", "the features' activations"),
    "recons": ("batch pos d_out", "decode(acts_post)"),
    "error": ("", "the value less decode(encode(input)) without hooks"),
    "output": ("", "what goes on in the value's place"),
}
"""Each hook point's shape and equation; the shape of the last two is the value's."""


@attrs.frozen(kw_only=True, eq=False)
class SplicePart:
    """The seam of an SAE's hook points: the entry at its place fires them, and no module is tapped."""

    splice: "Splice"
    part: Part

    @property
    def group(self) -> Hashable:
        """One for each splice."""
        return id(self.splice)

    def steps(self, watches: Sequence["Watch"], run: "Run") -> Iterator["ModuleStep"]:
        """Give none."""
        return iter(())


@attrs.frozen(kw_only=True, eq=False)
class Capture:
    """Takes a transcoder's input where it is computed, after all hooks there, for the splice further down."""

    names: tuple[str, ...]
    exact: bool = True
    is_optional: bool = True
    keeps_graph: bool = True
    """The gradient of a transcoder's output reaches its input."""
    wants_gradient: bool = False

    def begin(self, call: Call) -> None:
        """Do nothing."""

    def part(self, call: Call, n_heads: int) -> None:
        """Ask for the whole of a value."""

    def store(
        self,
        point: HookPoint,
        value: Tensor,
        call: Call,
        *,
        is_foreign: bool,
        by_position: bool = False,
        part: object = None,
    ) -> None:
        """Keep the value until the call is over."""
        call.scratch[self] = value.clone() if is_foreign else value

    def store_gradient(self, point: HookPoint, gradient: Tensor, call: Call, *, position: int | None = None) -> None:
        """Do nothing."""


@attrs.frozen(kw_only=True, eq=False, repr=False)
class Splice:
    """One SAE at one hook point, as a hook function there."""

    hf_model: Any
    sae: Any
    place: HookPoint
    """Where its output goes."""
    head: int | None
    use_error_term: bool
    capture: Capture | None = None
    """What a transcoder reads; None where the SAE reads what it replaces."""
    decodes_input: bool = attrs.field(
        init=False, default=attrs.Factory(lambda self: _takes_input(self.sae.decode), takes_self=True)
    )
    """Whether its `decode` asks for the input beside the activations."""

    def __repr__(self) -> str:
        """Show what it is and where, for messages."""
        return f"{type(self.sae).__name__} at {self.place.name}"

    def points(self) -> list[HookPoint]:
        """List the hook points that it brings."""
        axes = self.place.shape.split()
        own = " ".join(axes if self.head is None else [*axes[:2], *axes[3:]])
        left_out = [] if self.use_error_term else ["error"]
        left_out += [] if callable(getattr(self.sae, "pre_acts", None)) else ["acts_pre"]
        dtype = next((str(p.dtype).removeprefix("torch.") for p in _parameters(self.sae)), "model")
        return [
            HookPoint(
                name=f"{self.place.name}.hook_sae_{part}",
                shape=shape or own,
                equation=equation,
                seam=SplicePart(splice=self, part=part),
                layer=self.place.layer,
                dtype=self.place.dtype if part == "output" else dtype,
            )
            for part, (shape, equation) in PARTS.items()
            if part not in left_out
        ]

    # ------------------------------------------------------------------ as a hook function

    def __call__(self, value: Tensor, hook: Any) -> Tensor | None:
        """Put the SAE's output in the value's place, or leave it where that would change nothing."""
        run: Any = active_run(self.hf_model)
        watches: dict[Part, Watch] = {
            watch.point.seam.part: watch
            for watch in run.watches
            if isinstance(watch.point.seam, SplicePart) and watch.point.seam.splice is self
        }
        if self.use_error_term and not watches:
            return None
        own = value if self.head is None else value[:, :, self.head]
        read = own if self.capture is None else self._captured(run)
        pass_ = _Pass(splice=self, watches=watches, own=own)
        new = pass_.run(read if self.head is None or self.capture is None else read[:, :, self.head])
        if new is own:
            return None
        if self.head is None:
            return new
        return value.index_copy(2, torch.tensor([self.head], device=value.device), new[:, :, None])

    def _captured(self, run: "Run") -> Tensor:
        found = run.now.scratch.get(self.capture)
        if found is None:
            names = "" if self.capture is None else self.capture.names[0]
            raise SaeError(
                f"the transcoder to {self.place.name!r} reads {names!r}, which this run did not reach before it; "
                "start_at_layer may have left it out"
            )
        return found


@attrs.define(kw_only=True)
class _Pass:
    """One value's way through the SAE."""

    splice: Splice
    watches: "Mapping[Part, Watch]"
    own: Tensor
    is_replaced: bool = False
    """Whether what a hook point handed on is another tensor than what it was given."""
    changed: Tensor | None = None
    """Where a function changed bits, `[batch, pos]`; None for nowhere."""

    def run(self, read: Tensor) -> Tensor:
        """Give what goes on; `own` itself where nothing is to change."""
        sae = self.splice.sae
        clean = _flat(read).to(next((p.dtype for p in _parameters(sae)), read.dtype))
        if self.splice.use_error_term and torch.is_grad_enabled():
            clean = clean.view_as(clean)  # both ways through the SAE end here, and cancel before anything is added
        x = self.fire("input", clean)
        if callable(getattr(sae, "pre_acts", None)):
            acts = sae.activate(self.fire("acts_pre", sae.pre_acts(x)), x)
        else:
            acts = sae.encode(x)
        made = self.decode(self.fire("acts_post", acts), x)
        is_clean = not self.is_replaced
        recons = self.fire("recons", made)
        if not self.splice.use_error_term:
            return self.fire("output", recons.reshape(self.own.shape).to(self.own.dtype))
        out = self.own
        if self.is_replaced or "error" in self.watches:
            true = made if is_clean else self.decode(sae.encode(clean), clean)
            error = self.fire("error", self.own.to(true.dtype) - true.reshape(self.own.shape))
            out = self.combined(recons.reshape(self.own.shape) + error) if self.is_replaced else out
        return self.fire("output", out)

    def combined(self, explicit: Tensor) -> Tensor:
        """Give reconstruction plus error at the positions that were edited; elsewhere what came in, bit for bit."""
        own, explicit = self.own, explicit.to(self.own.dtype)
        if self.changed is None:
            return with_gradient_of(explicit, own)
        return explicit_where(self.changed.view(*self.changed.shape, *(1,) * (own.ndim - 2)), explicit, own)

    def decode(self, acts: Tensor, x: Tensor) -> Tensor:
        """Decode, and see that the result can stand for the value."""
        sae = self.splice.sae
        made = sae.decode(acts, x) if self.splice.decodes_input else sae.decode(acts)
        if not isinstance(made, Tensor) or made.shape != _flat(self.own).shape:
            got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise SaeError(f"{self.splice} decodes to {got}, and {tuple(_flat(self.own).shape)} is replaced there")
        return made

    def fire(self, part: Part, value: Tensor) -> Tensor:
        """Pass a value through the hooks of one of the SAE's points."""
        watch = self.watches.get(part)
        if watch is None:
            return value
        new = watch.fire(value, beside=True)
        self.is_replaced = self.is_replaced or new is not value
        if watch.edited:
            differs = (new != value).flatten(2).any(-1)
            self.changed = differs if self.changed is None else self.changed | differs
        return new


def _flat(value: Tensor) -> Tensor:
    return value.flatten(2) if value.ndim > 3 else value


def _parameters(sae: Any) -> Iterator[Tensor]:
    """The floating parameters of a module, if it has any."""
    if isinstance(sae, torch.nn.Module):
        yield from (parameter for parameter in sae.parameters() if parameter.is_floating_point())


def _takes_input(decode: Callable[..., Any]) -> bool:
    """Whether `decode(acts, x)` is what it asks for."""
    names = list(inspect.signature(decode).parameters)
    return len(names) > 1 and names[1] == "x"
