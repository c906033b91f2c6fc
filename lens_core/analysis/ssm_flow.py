"""Time edges of state-space layers: what a metric owes to the state carried from each position to the next.

A state is a sum that is carried on, `h_t = decay_t h_(t-1) + write_t`, and read at once, `y_t = C_t h_t`. So the
attribution of a state (its difference between a clean and a corrupted run, times the metric's gradient) comes apart
exactly, by where it goes and by where it is from:

    state_t = carried_t + read_t                      on to t + 1, and read by C at t
    state_t = carried_(t-1) + faded_t + written_t     from t - 1, by a decay that differs, by a write that differs

`carried_t` is the edge from t to t + 1. With decays of the run whose gradient is taken no step is approximated inside
the layer: the recurrence is linear in the state. What enters a layer's states is what is read of them: written and
faded sum to read. The values are to first order in what follows the layer, as of all attribution patching.

Source: the recurrences of Gu and Dao 2023 (arXiv 2312.00752) and Dao and Gu 2024 (arXiv 2405.21060); positional
attribution patching of states in Ensign and Garriga-Alonso 2024 (arXiv 2407.14008).
"""

from typing import TYPE_CHECKING, Any

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments, is_whole
from lens_core.analysis._attribution_runs import At, Metric, Pair, difference
from lens_core.analysis.ssm_scan import read_layers
from lens_core.errors import ArgumentError
from lens_core.view import Picture

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache
    from lens_core.model import LensModel

__all__ = ["StateAttribution", "attribute_states"]


@attrs.frozen(kw_only=True, eq=False)
class StateAttribution:
    """What the states of SSM layers did for a metric, in its units; a head is a channel in Mamba.

    Attributes:
        carried: Along the edge from a position to the next; 0 at the last.
        read: By what C reads at the position.
        written: By what the position writes.
        faded: By decays that differ between the runs, of what was there; 0 at the first position.
        layers: The layers, along the first axis.
        clean: The metric of the clean run, `[batch]`, or one number for all rows.
        corrupted: The same of the corrupted run.
    """

    carried: Float[Tensor, "layer batch pos head"] = attrs.field(repr=False)
    read: Float[Tensor, "layer batch pos head"] = attrs.field(repr=False)
    written: Float[Tensor, "layer batch pos head"] = attrs.field(repr=False)
    faded: Float[Tensor, "layer batch pos head"] = attrs.field(repr=False)
    layers: tuple[int, ...]
    clean: Float[Tensor, "..."] = attrs.field(repr=False)
    corrupted: Float[Tensor, "..."] = attrs.field(repr=False)

    @property
    def state(self) -> Float[Tensor, "layer batch pos head"]:
        """Give the attribution of each state whole."""
        return self.carried + self.read

    @checks_arguments
    def top_edges(self, k: int = 10) -> list[tuple[str, float]]:
        """Give the k time edges with the largest mean over the batch, heads summed: `L1 @4 -> @5` and the value."""
        if not is_whole(k):
            raise ArgumentError(f"k is how many to give, 1 or more; got {k!r}")
        mean = self.carried.sum(-1).mean(1)[:, :-1]
        order = mean.flatten().abs().topk(min(k, mean.numel())).indices
        found = [divmod(int(index), mean.shape[1]) for index in order]
        return [(f"L{self.layers[row]} @{pos} -> @{pos + 1}", float(mean[row, pos])) for row, pos in found]

    def heatmap(self, *, title: str | None = None) -> Picture:
        """Draw what is carried: layers downwards, edges from a position to the next to the right."""
        mean = self.carried.sum(-1).mean(1)[:, :-1].cpu()
        columns = [f"{pos} -> {pos + 1}" for pos in range(mean.shape[1])]
        return view.grid([f"layer {at}" for at in self.layers], columns, mean, title=title or "What states carry on")


@checks_arguments
def attribute_states(
    model: "LensModel",
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    layers: Any = None,
    at: At = "corrupted",
    **kwargs: Any,
) -> StateAttribution:
    """Attribute a metric to the state that every SSM layer carries from each position to the next.

    Costs one forward of each input and one backward, through the explicit scan, position by position; and memory for
    the states of all positions of these layers, three times (both runs' and the gradients).

    Args:
        model: The model.
        clean: What is attributed, as in `forward`.
        corrupted: The input to compare with, of as many rows and tokens.
        metric: From the logits `[batch, pos, d_vocab]` to one number for each row `[batch]`, or one for all.
        layers: An int or several; None for all that have an SSM mixer.
        at: Which run's gradient, and decays, are taken.
        **kwargs: As in `forward`, for both inputs.

    Raises:
        ArgumentError: No SSM mixer; runs of different shapes; a metric without a gradient or of another shape.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:mamba2")
        >>> clean, corrupted = model.to_tokens("king apple river king"), model.to_tokens("moon apple river king")
        >>> apple = model.to_single_token(" apple")
        >>> found = attribute_states(model, clean, corrupted, lambda logits: logits[:, -1, apple])
        >>> bool(torch.allclose((found.written + found.faded).sum(2), found.read.sum(2), atol=1e-3))
        True
    """
    if at not in ("clean", "corrupted"):
        raise ArgumentError(f"at is 'clean' or 'corrupted'; got {at!r}")
    chosen = read_layers(model.table, layers)
    pair = Pair(model=model, clean=clean, corrupted=corrupted, metric=metric, options=kwargs)
    names = [f"blocks.{layer}.mixer.hook_{part}" for layer in chosen for part in ("ssm_state", "decay")]
    base: At = "corrupted" if at == "clean" else "clean"
    other, measured = pair.measured_values(base, names)
    own, own_measured = pair.gradients(at, names)
    with torch.no_grad():
        parts = [_flow(own, other, layer, sign=1.0 if at == "clean" else -1.0) for layer in chosen]
    found = {part: torch.stack([each[part] for each in parts]) for part in parts[0]}
    ends = (own_measured, measured) if at == "clean" else (measured, own_measured)
    return StateAttribution(**found, layers=tuple(chosen), clean=ends[0], corrupted=ends[1])


def _flow(own: "ActivationCache", other: "ActivationCache", layer: int, *, sign: float) -> dict[str, Tensor]:
    """Take one layer's states apart; `sign` turns own less other into clean less corrupted."""
    name, decays = f"blocks.{layer}.mixer.hook_ssm_state", f"blocks.{layer}.mixer.hook_decay"
    change = sign * difference(own[name], other[name], name)
    gradient = own.grad[name].to(change.device, change.dtype)

    def products(*factors: Tensor) -> Tensor:
        """Multiply, and sum over all but batch, position and head."""
        product = factors[0]
        for factor in factors[1:]:
            product = product * factor.to(product.device, product.dtype)
        return product.flatten(3).sum(3)

    def spread(decay: Tensor) -> Tensor:
        return decay[(...,) + (None,) * (change.ndim - decay.ndim)]

    rate = spread(own[decays])[:, 1:]
    faster = sign * difference(own[decays], other[decays], decays)
    state = products(change, gradient)
    carried, faded = torch.zeros_like(state), torch.zeros_like(state)
    carried[:, :-1] = products(change[:, :-1], rate, gradient[:, 1:])
    faded[:, 1:] = products(spread(faster)[:, 1:], other[name][:, :-1], gradient[:, 1:])
    arrived = carried.roll(1, 1)  # the last is 0
    return {"carried": carried, "faded": faded, "read": state - carried, "written": state - arrived - faded}
