"""What each feature did for a metric: activation times gradient, with what the SAE leaves out beside."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments, is_whole
from lens_core._extras import need
from lens_core.errors import ArgumentError
from lens_core.saes._reading import beside, plain

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["FeatureAttribution", "feature_attribution"]


@attrs.frozen(kw_only=True, eq=False)
class FeatureAttribution:
    """What each feature did for a metric, in the metric's units.

    Attributes:
        features: For each feature at each position: about how much the metric would fall if it were off.
        error: The same for what the SAE does not reconstruct; heads together.
        metric: The metric's value.
    """

    features: Float[Tensor, "batch pos d_sae"] = attrs.field(repr=False)
    error: Float[Tensor, "batch pos"] = attrs.field(repr=False)
    metric: float

    def top(self, k: int = 10) -> list[tuple[int, int, int, float]]:
        """List the largest in size: row, position, feature, attribution."""
        flat = self.features.flatten()
        best = flat.abs().argsort(descending=True, stable=True)[:k]
        n_pos, d_sae = self.features.shape[1:]
        return [(i // (n_pos * d_sae), i // d_sae % n_pos, i % d_sae, float(flat[i])) for i in plain(best)]

    def top_features(self, k: int = 10) -> list[tuple[int, float]]:
        """List the largest in size, summed over rows and positions: feature, attribution."""
        summed = self.features.sum((0, 1))
        best = summed.abs().argsort(descending=True, stable=True)[:k]
        return [(i, float(summed[i])) for i in plain(best)]

    def to_dataframe(self) -> Any:
        """Give one row for each place where an attribution is not 0: `row`, `position`, `feature`, `attribution`.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        places = plain(self.features.nonzero())
        rows = [
            {"row": r, "position": p, "feature": f, "attribution": float(self.features[r, p, f])} for r, p, f in places
        ]
        return need("pandas", "a data frame").DataFrame(rows)

    def _repr_html_(self) -> str:
        best = self.top(20)
        labels = [f"row {row}, position {position}: feature {feature}" for row, position, feature, _ in best]
        picture = view.bars(labels, [value for *_, value in best], title="Feature attribution: the 20 largest")
        return picture._repr_html_()  # pyright: ignore[reportPrivateUsage]


@checks_arguments
def feature_attribution(
    model: "LensModel",
    sae: Any,
    input: Any,
    metric: Callable[[Tensor], Tensor],
    *,
    hook_name: Any = None,
    steps: int = 1,
    strict: bool = True,
    **kwargs: Any,
) -> FeatureAttribution:
    """Attribute a metric to an SAE's features: activation times gradient, with the error term in place.

    With one step it is the linear estimate of what zeroing each feature alone would take away. With more it is
    integrated gradients from all features off to all on, the error term as it is: then the attributions of the features
    sum to the metric's change between the two, up to the number of steps. Costs one forward and backward for each step.

    Args:
        model: The model; its own value goes on behind the SAE, so that the metric is that of the model as it is.
        sae: The SAE or transcoder.
        input: As in `forward`.
        metric: A scalar of the logits `[batch, pos, d_vocab]`; a sum over rows keeps rows apart.
        hook_name: Where the SAE belongs, if it does not say so itself.
        steps: How many points of the path, each in the middle of its part; 1 takes the gradient at the features as
            they are.
        strict: As in `model.saes`.
        **kwargs: As in `forward`.

    Raises:
        ArgumentError: A metric that is no scalar with gradients, or `steps` below 1.
        SaeError: The SAE does not fit the model.

    Source: Marks et al. 2024, "Sparse Feature Circuits" (their stop-gradient at the error, and integrated gradients);
    Sundararajan et al. 2017.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> sae = lens.saes.SparseAutoencoder(lens.saes.SaeConfig(d_in=model.cfg.d_model, d_sae=64))
        >>> mat = model.to_single_token("mat")
        >>> found = feature_attribution(
        ...     model, sae, "the cat sat on the", lambda logits: logits[0, -1, mat], hook_name="blocks.1.hook_resid_pre"
        ... )
        >>> found.features.shape
        torch.Size([1, 6, 64])
    """
    if not is_whole(steps):
        raise ArgumentError(f"steps is a positive number; got {steps!r}")
    with torch.enable_grad(), beside(model, sae, hook_name, strict=strict) as place:

        def run(share: float | None = None) -> _Step:
            return _step(model, place.part, share, lambda: metric(model(input, **kwargs)))

        whole = run()
        if steps == 1:
            gradient = whole.at_acts
        else:
            parts = (run((step + 0.5) / steps).at_acts for step in range(steps))
            gradient = sum(parts, start=torch.zeros_like(whole.acts)) / steps
    error = (whole.error * whole.at_error).flatten(2).sum(-1)
    return FeatureAttribution(features=whole.acts * gradient, error=error, metric=whole.metric)


@attrs.frozen(kw_only=True, eq=False)
class _Step:
    """Activations, error, and the metric's gradient at both."""

    acts: Tensor
    error: Tensor
    at_acts: Tensor
    at_error: Tensor
    metric: float


def _step(model: "LensModel", part: Callable[[str], str], share: float | None, run: Callable[[], Any]) -> _Step:
    """Run with a share of every activation in place."""
    names = [part("acts_post"), part("error")]

    def scale(acts: Tensor, hook: Any) -> Tensor | None:
        return None if share is None else acts * share

    with model.caching(names, detach=False) as cache, model.hooks([(names[0], scale)]):
        value = _scalar(run())
    kept = [cache[name] for name in names]
    at_acts, at_error = torch.autograd.grad(value, kept)
    return _Step(
        acts=kept[0].detach(), error=kept[1].detach(), at_acts=at_acts, at_error=at_error, metric=float(value.detach())
    )


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(f"the metric is one number of the logits, with gradients; got {got}")
    return value.reshape(())
