"""Linear probes: fitting one, and predicting examples that it was not fitted on."""

from collections.abc import Sequence
from typing import Any, cast

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lens_core._extras import need
from lens_core.errors import ArgumentError

__all__ = ["LinearProbe", "Recipe", "fit_probe", "folds_of", "held_out", "wilson"]

_Z = 1.959964  # 95% of a normal distribution lie this many standard deviations around its mean


@attrs.frozen(kw_only=True)
class Recipe:
    """How a probe is fitted.

    Attributes:
        kind: `"logistic"` or `"difference"`.
        C: Inverse strength of the logistic probe's penalty, on standardised values.
        k: How many neurons it may use; None for all.
    """

    kind: str = "logistic"
    C: float = 1.0
    k: int | None = None


@attrs.frozen(kw_only=True, eq=False)
class LinearProbe:
    """A linear classifier of activations: the class of the largest of `x @ weights.T + bias`.

    With two classes there is one row, and the second class is where it is positive.

    Attributes:
        classes: The labels, sorted.
        weights: In units of the activations: nothing has to be standardised before.
        bias: One for each row.
        gaps: For each class, how far the mean of its examples lies from that of the others, along the direction
            towards it; in units of the activations.
        norm: Mean norm of the activations that it was fitted on.
    """

    classes: tuple[Any, ...]
    weights: Float[Tensor, "row width"] = attrs.field(repr=False)
    bias: Float[Tensor, " row"] = attrs.field(repr=False)
    gaps: tuple[float, ...] = attrs.field(repr=False)
    norm: float = attrs.field(repr=False)

    @property
    def neurons(self) -> tuple[int, ...]:
        """The places along the width that the probe uses."""
        return tuple(_listed(self.weights.abs().amax(0).nonzero().flatten()))

    def scores(self, x: Float[Tensor, "*example width"]) -> Float[Tensor, "*example row"]:
        """Give the rows' values, logits of a logistic probe; computed in float64."""
        return x.double() @ self.weights.double().to(x.device).T + self.bias.double().to(x.device)

    def predict(self, x: Float[Tensor, "*example width"]) -> Int[Tensor, "*example"]:
        """Give the class of each example, as an index into `classes`."""
        scores = self.scores(x)
        return (scores[..., 0] > 0).long() if len(self.classes) == 2 else scores.argmax(-1)

    def direction(self, label: Any = None) -> Float[Tensor, " width"]:
        """Give the unit direction towards a class, for `lens.edits` or a steering vector.

        Args:
            label: One of `classes`; None for the second of two.

        Raises:
            ArgumentError: No such class, or None where there are more than two.
        """
        row = self._index(label)
        if len(self.classes) > 2:
            return F.normalize(self.weights[row], dim=0)
        return (1.0 if row == 1 else -1.0) * F.normalize(self.weights[0], dim=0)

    def gap(self, label: Any = None) -> float:
        """Give how far a class' mean lies from that of the other examples along `direction(label)`.

        Raises:
            ArgumentError: As for `direction`.
        """
        return self.gaps[self._index(label)]

    def _index(self, label: Any) -> int:
        if label is None and len(self.classes) != 2:
            raise ArgumentError(
                f"the probe has {len(self.classes)} classes; say which: {', '.join(map(str, self.classes))}"
            )
        label = self.classes[1] if label is None else label
        if label not in self.classes:
            raise ArgumentError(f"no class {label!r}; there are {', '.join(map(repr, self.classes))}")
        return self.classes.index(label)


def fit_probe(
    x: Float[Tensor, "example width"], y: Int[Tensor, " example"], classes: Sequence[Any], recipe: Recipe
) -> LinearProbe:
    """Fit a probe on examples; `y` are indices into `classes`.

    Raises:
        MissingPackageError: scikit-learn is not installed, and the probe is logistic.
    """
    x = x.double()
    chosen = torch.arange(x.shape[1]) if recipe.k is None else _neurons(x, y, len(classes), recipe.k)
    own = x[:, chosen]
    found = _difference(own, y) if recipe.kind == "difference" else _logistic(own, y, recipe.C)
    weights = torch.zeros(len(found[0]), x.shape[1], dtype=torch.float64)
    weights[:, chosen] = found[0]
    probe = LinearProbe(
        classes=tuple(classes), weights=weights, bias=found[1], gaps=(), norm=float(x.square().sum(1).sqrt().mean())
    )
    return attrs.evolve(probe, gaps=tuple(_gap(x @ probe.direction(one), y == i) for i, one in enumerate(classes)))


def _gap(along: Tensor, own: Tensor) -> float:
    return float(along[own].mean() - along[~own].mean())


def _logistic(x: Tensor, y: Tensor, C: float) -> tuple[Tensor, Tensor]:
    model: Any = need("sklearn.linear_model", "a logistic probe").LogisticRegression(C=C, max_iter=2000)
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    fitted = model.fit(((x - mean) / scale).numpy(), y.numpy())
    weights = torch.as_tensor(fitted.coef_) / scale
    return weights, torch.as_tensor(fitted.intercept_) - weights @ mean


def _difference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Put the boundary half way between the means of two classes, across the line through them."""
    low, high = x[y == 0].mean(0), x[y == 1].mean(0)
    weights = high - low
    return weights[None], -(weights @ (low + high) / 2)[None]


def _neurons(x: Tensor, y: Tensor, n_classes: int, k: int) -> Tensor:
    """Choose the k columns that tell the classes best by themselves (F statistic), in order of the columns."""
    best = separation(x, y, n_classes).argsort(descending=True, stable=True)
    return best[:k].sort().values


def separation(
    x: Float[Tensor, "example width"], y: Int[Tensor, " example"], n_classes: int
) -> Float[Tensor, " width"]:
    """Give each column's variance between classes over that within them; 0 where it does not vary."""
    between, within = torch.zeros(x.shape[1], dtype=x.dtype), torch.zeros(x.shape[1], dtype=x.dtype)
    for index in range(n_classes):
        own = x[y == index]
        if len(own):
            between += len(own) * (own.mean(0) - x.mean(0)) ** 2
            within += ((own - own.mean(0)) ** 2).sum(0)
    return torch.where(between > 0, between / within, torch.zeros_like(between))


def _listed(numbers: Tensor) -> list[int]:
    return cast("Any", numbers).tolist()


def folds_of(y: Tensor, groups: Tensor, n_folds: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Split examples into folds, classes spread evenly and groups kept together; gives train and test indices.

    Raises:
        MissingPackageError: scikit-learn is not installed.
        ArgumentError: A class has fewer groups than there are folds.
    """
    selection = need("sklearn.model_selection", "cross-validation")
    for label in set(_listed(y)):
        count = len(set(_listed(groups[y == label])))
        if count < n_folds:
            raise ArgumentError(
                f"{n_folds} folds need each class in {n_folds} texts or more, and one is in {count}; "
                "give more examples, or fewer folds"
            )
    grouped = len(set(_listed(groups))) < len(groups)
    kind = selection.StratifiedGroupKFold if grouped else selection.StratifiedKFold
    splits = kind(n_folds, shuffle=True, random_state=seed).split(
        y.numpy(), y.numpy(), groups.numpy() if grouped else None
    )
    return [(torch.as_tensor(train), torch.as_tensor(test)) for train, test in splits]


def held_out(
    x: Tensor, y: Tensor, classes: Sequence[Any], folds: Sequence[tuple[Tensor, Tensor]], recipe: Recipe
) -> Int[Tensor, " example"]:
    """Predict each example by the probe of the folds that it is not in."""
    found = torch.zeros_like(y)
    for train, test in folds:
        seen = torch.tensor(sorted(set(_listed(y[train]))))
        if len(seen) == 1:  # groups may leave a training set with one class
            found[test] = seen
            continue
        dense = torch.searchsorted(seen, y[train])
        probe = fit_probe(x[train], dense, [classes[i] for i in _listed(seen)], recipe)
        found[test] = seen[probe.predict(x[test])]
    return found


def wilson(accuracy: float, n: int) -> tuple[float, float]:
    """Give Wilson's 95% interval of a share among n.

    Example:
        >>> low, high = wilson(0.9, 10)
        >>> round(low, 3), round(high, 3)
        (0.596, 0.982)
    """
    middle = accuracy + _Z**2 / (2 * n)
    spread = _Z * (accuracy * (1 - accuracy) / n + _Z**2 / (4 * n**2)) ** 0.5
    return max(0.0, (middle - spread) / (1 + _Z**2 / n)), min(1.0, (middle + spread) / (1 + _Z**2 / n))
