"""What steering does to a metric, by its scale, beside random directions of the same norm.

A direction that moves a metric no more than random ones of its length moves it by its length. Where the metric falls
again at large scales, the model is pushed off the activations that it knows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from lens_core import edits, view
from lens_core._arguments import checks_arguments, is_whole
from lens_core._extras import need
from lens_core._inputs import read_input
from lens_core.analysis.steering import SteeringVector, Units, flattened
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["DoseResponse", "dose_response"]


@attrs.frozen(kw_only=True, eq=False)
class DoseResponse:
    """A metric at each scale of a steering vector.

    Attributes:
        values: The metric, steered.
        control: The metric, steered by random directions of the same norms, for each draw.
        baseline: The metric of the plain run.
        scales: What the axis `scale` is.
        units: What the scales are in; see `SteeringVector.hooks`.
    """

    values: Float[Tensor, "scale batch"] = attrs.field(repr=False)
    control: Float[Tensor, "draw scale batch"] = attrs.field(repr=False)
    baseline: Float[Tensor, " batch"]
    scales: tuple[float, ...]
    units: str

    @property
    def effect(self) -> Float[Tensor, "scale batch"]:
        """Give how much the steering moved the metric."""
        return self.values - self.baseline

    @property
    def control_effect(self) -> Float[Tensor, "draw scale batch"]:
        """Give how much random directions moved it."""
        return self.control - self.baseline

    def to_dataframe(self) -> Any:
        """Give one row for each scale.

        `mean` and `stderr` of the metric are over the batch; `effect` is the mean difference from the plain run;
        `control_effect` and `control_std` are the mean and the standard deviation of it over random directions.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return need("pandas", "a data frame").DataFrame(self._rows(), columns=_COLUMNS)

    def _rows(self) -> list[list[float]]:
        draws = self.control_effect.mean(-1)  # draw scale
        n = self.values.shape[1]
        columns = [
            torch.tensor(self.scales, dtype=self.values.dtype),
            self.values.mean(-1),
            self.values.std(-1) / n**0.5 if n > 1 else torch.full((len(self.scales),), float("nan")),
            self.effect.mean(-1),
            draws.mean(0),
            draws.std(0) if len(draws) > 1 else torch.full((len(self.scales),), float("nan")),
        ]
        return cast("Any", torch.stack([column.cpu().double() for column in columns], dim=1)).tolist()

    def _repr_html_(self) -> str:
        title = f"Dose and response (scale in units: {self.units})"
        return view.table(self._rows(), _COLUMNS, title=title)._repr_html_()  # pyright: ignore[reportPrivateUsage]


_COLUMNS = ["scale", "mean", "stderr", "effect", "control_effect", "control_std"]


@checks_arguments
def dose_response(
    model: "LensModel",
    vector: SteeringVector,
    input: Any,
    metric: Callable[[Tensor], Tensor],
    *,
    scales: Sequence[float] = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0),
    layers: Any = None,
    positions: Any = None,
    units: Units = "vector",
    n_random: int = 4,
    seed: int = 0,
    max_rows: int = 64,
    **kwargs: Any,
) -> DoseResponse:
    """Steer at several scales, with a vector and with random directions of its norm, and measure each time.

    It costs `scales x (1 + n_random) + 1` runs of the input, several of them in one forward.

    Args:
        model: The model.
        vector: What steers.
        input: As in `forward`.
        metric: From the logits of the input's rows `[batch, pos, d_vocab]` to one number for each row `[batch]`.
        scales: How much, in `units`.
        layers: As for `SteeringVector.hooks`.
        positions: As for `SteeringVector.hooks`.
        units: As for `SteeringVector.hooks`.
        n_random: Random directions.
        seed: Of the first random direction.
        max_rows: Rows of one forward, at least the input's.
        **kwargs: Of the input, as in `forward`: `prepend_bos`, `padding_side`, `attention_mask`.

    Raises:
        ArgumentError: No scales; a metric that does not give one number for each row; as for `SteeringVector.hooks`.

    Example:
        >>> import lens_core as lens
        >>> from lens_core.analysis.steering import steering_vector
        >>> model = lens.load("toy:gpt2")
        >>> animals, things = ["the cat saw", "a bird saw"], ["the sun saw", "a star saw"]
        >>> vector = steering_vector(model, animals, things, ("resid_post", 0))
        >>> cat = model.to_single_token(" cat")
        >>> def metric(logits):
        ...     return logits[:, -1, cat]
        >>> table = dose_response(model, vector, "the king and the", metric, scales=(0.0, 1.0))
        >>> table.effect.shape, table.control.shape, abs(table.effect[0].item()) < 1e-4
        (torch.Size([2, 1]), torch.Size([4, 2, 1]), True)
    """
    doses = [float(scale) for scale in scales]
    for what, number, least in (("n_random", n_random, 0), ("max_rows", max_rows, 1)):
        if not is_whole(number, least):
            raise ArgumentError(f"{what} is a number from {least}; got {number!r}")
    if not doses:
        raise ArgumentError("scales is empty; give at least one")
    chosen = vector.hooks(layers=layers, positions=positions)  # names and positions; the coefficients come by row
    names = [name for name, *_ in chosen]
    others = [vector.random_like(seed + draw) for draw in range(n_random)]
    inputs = read_input(model, input, **kwargs)
    given: Any = inputs.tokens if inputs.tokens is not None else inputs.embeddings
    cells = [
        {name: own.coefficient(name, dose, units) * own.vectors[name] for name in names}
        for own in (vector, *others)
        for dose in doses
    ]
    step = max(1, max_rows // len(given))
    found: list[Tensor] = []
    with torch.no_grad():
        baseline = _measured(metric, _run(model, given, inputs.attention_mask, 1, []), len(given))
        for first in range(0, len(cells), step):
            some = cells[first : first + step]
            hooks = [
                (name, flattened(edits.add(_by_row([cell[name] for cell in some], len(given)))), *where)
                for name, _, *where in chosen
            ]
            logits = _run(model, given, inputs.attention_mask, len(some), hooks)
            found.extend(_measured(metric, own, len(given)) for own in logits.chunk(len(some)))
    values = torch.stack(found).reshape(1 + n_random, len(doses), len(given))
    return DoseResponse(values=values[0], control=values[1:], baseline=baseline, scales=tuple(doses), units=units)


def _run(model: "LensModel", given: Tensor, mask: Tensor | None, times: int, hooks: Sequence[Any]) -> Tensor:
    """Run the input's rows several times over in one forward."""

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat(times, *[1] * (tensor.ndim - 1))

    masked: Mapping[str, Any] = {} if mask is None else {"attention_mask": repeated(mask)}
    return model.run_with_hooks(repeated(given), fwd_hooks=hooks, **masked)


def _by_row(vectors: Sequence[Tensor], rows: int) -> Float[Tensor, "row pos width"]:
    """Give each cell's vector to the rows of the input."""
    stacked = torch.stack(list(vectors)).repeat_interleave(rows, dim=0)
    return stacked[:, None] if stacked.ndim == 2 else stacked


def _measured(metric: Callable[[Tensor], Tensor], logits: Tensor, rows: int) -> Float[Tensor, " batch"]:
    value: Any = metric(logits)
    if not isinstance(value, Tensor) or value.shape != (rows,):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(f"the metric gives one number for each of the {rows} rows; got {got}")
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))
