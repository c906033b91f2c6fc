"""The runs that attribution is made of: values without a graph, and values and gradients with one.

The graph of a run starts at its embeddings, or at what is put in their place, so no gradient of a parameter is computed
and frozen or quantised parameters do not matter.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs
import torch
from torch import Tensor

from lens_core._arguments import is_whole
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache
    from lens_core.model import LensModel

__all__ = ["At", "Baseline", "Method", "Metric", "Pair", "difference", "midpoints", "put"]

Metric: TypeAlias = Callable[[Tensor], Tensor]
"""From the logits `[batch, pos, d_vocab]` to one number for each row `[batch]`, or one for all."""
Method: TypeAlias = Literal["gradient", "ig-inputs", "ig-activations"]
At: TypeAlias = Literal["clean", "corrupted"]
Baseline: TypeAlias = Literal["corrupted", "zero", "mean"]


@attrs.frozen(kw_only=True, eq=False)
class Pair:
    """Two inputs of one model, and what is measured of its logits; `corrupted` may be None."""

    model: "LensModel"
    clean: Any
    corrupted: Any
    metric: Metric
    options: Mapping[str, Any]

    def __attrs_post_init__(self) -> None:
        """Refuse options under which a call gives something else than logits."""
        given = sorted(self.options.keys() & _OTHER_RESULTS)
        if given:
            raise ArgumentError(f"attribution hands the logits to the metric; leave out {', '.join(given)}")
        if self.model.bare_model.training:
            raise ArgumentError(
                "the model is in training mode, where dropout makes no two runs alike; call model.eval()"
            )
        if torch.is_inference_mode_enabled():
            raise ArgumentError("inside torch.inference_mode() nothing has a gradient: call this outside of it")
        if not callable(self.metric):
            got = f"{type(self.metric).__name__}: {self.metric!r}"
            raise ArgumentError(f"the metric is a function from logits [batch, pos, d_vocab] to [batch]; got {got}")

    def values(self, which: At, names: Sequence[str]) -> tuple["ActivationCache", Tensor]:
        """Give values at some hook points, and the logits, without a graph."""
        with torch.no_grad():
            logits, cache = self.model.run_with_cache(self._input(which), names_filter=list(names), **self.options)
        return cache, logits

    def measured_values(self, which: At, names: Sequence[str]) -> tuple["ActivationCache", Tensor]:
        """Give values at some hook points, and the metric, without a graph."""
        cache, logits = self.values(which, names)
        with torch.no_grad():
            return cache, self._measured(logits)

    def gradients(
        self,
        which: At,
        names: Sequence[str] = (),
        *,
        fwd_hooks: Sequence[Any] = (),
        bwd_hooks: Sequence[Any] = (),
        leaves: list[Tensor] | None = None,
        before_backward: Callable[["ActivationCache"], None] | None = None,
    ) -> tuple["ActivationCache", Tensor]:
        """Run one input forward and the metric's sum backward; give what some hook points had, and the metric.

        Args:
            which: The input.
            names: Hook points whose values and gradients are kept, the values on the graph.
            fwd_hooks: Functions that put values in place; they append to `leaves` what gradients may end at.
            bwd_hooks: Functions that are given gradients.
            leaves: See there.
            before_backward: Called with the cache between the passes.
        """
        leaves = [] if leaves is None else leaves

        def leaf(value: Tensor, hook: Any) -> Tensor:
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]

        starts = [(name, leaf) for name in self.model.declaration.embeddings]
        kept = [*names, *(name for name, _ in bwd_hooks)] or list(self.model.declaration.embeddings)
        with (
            torch.enable_grad(),
            self.model.hooks([*fwd_hooks, *starts], bwd_hooks),
            self.model.caching(kept, detach=False) as cache,
        ):
            measured = self._measured(self.model(self._input(which), **self.options))
            if before_backward is not None:
                before_backward(cache)
            # Where a function stopped a gradient, the graph starts anew.
            stopped = [value for name in cache if (value := cache[name]).is_leaf and value.requires_grad]
            self._backward(measured, [*leaves, *stopped])
        return cache, measured.detach()

    def _input(self, which: At) -> Any:
        return self.clean if which == "clean" else self.corrupted

    def _measured(self, logits: Tensor) -> Tensor:
        value: Any = self.metric(logits)
        if not isinstance(value, Tensor) or value.shape not in ((), logits.shape[:1]):
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentError(f"the metric gives one number for each of the {len(logits)} rows, or one; got {got}")
        return value

    def _backward(self, measured: Tensor, leaves: Sequence[Tensor]) -> None:
        if not measured.requires_grad:
            raise ArgumentError(
                "the metric's value has no gradient: it must be a differentiable function of the logits it is given "
                "(no argmax, .item() or .detach())"
            )
        torch.autograd.backward(measured.sum(), inputs=list(leaves))


_OTHER_RESULTS = frozenset(
    {"return_type", "return_state", "loss_per_token", "start_at_layer", "stop_at_layer", "past_key_values"}
)


def difference(clean: Tensor, base: Tensor | float, name: str = "") -> Tensor:
    """Subtract in at least float32; what is not finite in both (masked scores) differs by 0."""
    if isinstance(base, Tensor) and base.shape != clean.shape:
        raise ArgumentError(
            f"the two runs have different shapes at {name!r}: {list(clean.shape)} and {list(base.shape)}. Clean and "
            "corrupted inputs need the same number of rows and tokens"
        )
    dtype = torch.promote_types(clean.dtype, torch.float32)
    base = base.to(clean.device, dtype) if isinstance(base, Tensor) else base
    found = clean.to(dtype) - base
    return torch.where(found.isfinite(), found, 0.0)


def midpoints(steps: int) -> list[float]:
    """Give the middles of equal steps from 0 to 1: the midpoint rule, whose error falls with the square of the steps.

    Example:
        >>> midpoints(2)
        [0.25, 0.75]
    """
    if not is_whole(steps):
        raise ArgumentError(f"steps is a whole number from 1; got {steps!r}")
    return [(step + 0.5) / steps for step in range(steps)]


def put(base: Tensor | float, delta: Tensor, share: float, leaves: list[Tensor], axis: int | None) -> Any:
    """Make a hook function that puts `base + share * delta` in place, as something that gradients end at."""

    def between(value: Tensor, hook: Any) -> Tensor:
        new = base + share * delta
        if axis is not None and new.shape[axis] != value.shape[axis]:  # a state is handed over position by position
            new = new.index_select(axis, hook.positions.to(new.device))
        new = torch.where(value.isfinite(), new.to(value.device, value.dtype), value.detach())
        leaves.append(new.requires_grad_())
        return new

    return between
