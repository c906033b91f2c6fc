"""Counts, means and sums of squares that can be merged, in float64.

Source: Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances": for
two parts with counts n and m, means a and b, and centred sums A and B, that of both is A + B + (b-a)² nm/(n+m).
"""

import attrs
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

__all__ = ["Moments"]


@attrs.frozen(kw_only=True, eq=False)
class Moments:
    """Of values `[entry, feature]`.

    Attributes:
        count: Entries.
        mean: 0 without entries.
        squares: Sums of squared differences from the mean; with products, of products of differences.
    """

    count: int
    mean: Float[Tensor, " feature"]
    squares: Float[Tensor, " feature"] | Float[Tensor, "feature feature"]

    @classmethod
    def none(cls, features: int, *, products: bool) -> "Moments":
        """Give those of no entries."""
        shape = (features, features) if products else (features,)
        return cls(
            count=0,
            mean=torch.zeros(features, dtype=torch.float64),
            squares=torch.zeros(shape, dtype=torch.float64),
        )

    @classmethod
    def of(cls, values: Shaped[Tensor, "entry feature"], *, products: bool) -> "Moments":
        """Give those of values, by two passes."""
        if not len(values):
            return cls.none(values.shape[1], products=products)
        wide = values.to(torch.float64)
        mean = wide.mean(0)
        apart = wide - mean
        squares = apart.T @ apart if products else apart.square().sum(0)
        return cls(count=len(wide), mean=mean, squares=squares)

    def merged(self, other: "Moments") -> "Moments":
        """Give those of both."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        apart = other.mean - self.mean
        squares = torch.outer(apart, apart) if self.squares.ndim == 2 else apart.square()
        return Moments(
            count=count,
            mean=self.mean + apart * (other.count / count),
            squares=self.squares + other.squares + squares * (self.count / count * other.count),
        )
