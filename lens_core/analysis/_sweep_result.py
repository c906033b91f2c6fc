"""What a sweep found: a metric for every cell and row, and what statistics make of it."""

from collections.abc import Mapping
from typing import Any, Literal

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments, is_whole
from lens_core._extras import need
from lens_core.errors import ArgumentError

__all__ = ["PatchingResult"]


@attrs.frozen(kw_only=True, eq=False)
class PatchingResult:
    """A metric of every patched run.

    Attributes:
        values: The metric of each cell's run, for each row; of a metric that gives one number for all rows, the last
            axis has one entry. In the metric's unit.
        baseline: The metric of the run that is patched, with nothing patched.
        axes: What the axes of `values` but the last are: `layer`, `position`, `head`, ...
        indices: For each axis, the number in the model that each entry stands for; where positions differ by row,
            their count.
        labels: For each axis, what a picture calls the entries.
        name: What was patched, below its block: `hook_resid_pre`, `attn.hook_z`.
        metric: The metric's name.
        engine: `packed`, where only the positions that can change were run, or `exact`, where whole rows were.
        n_run: How many cells were run; the others cannot differ from the baseline (the patch puts in what is there, or
            comes after the metric's positions), or were read from the file of an interrupted sweep.
    """

    values: Float[Tensor, "*axes batch"] = attrs.field(repr=False)
    baseline: Float[Tensor, " batch"] = attrs.field(repr=False)
    axes: tuple[str, ...]
    indices: tuple[tuple[int, ...], ...] = attrs.field(repr=False)
    labels: tuple[tuple[str, ...], ...] = attrs.field(repr=False)
    name: str
    metric: str = "metric"
    engine: Literal["exact", "packed"] = "exact"
    n_run: int = 0

    @property
    def mean(self) -> Float[Tensor, " *axes"]:
        """The metric's mean over the rows."""
        return self.values.mean(-1)

    @property
    def stderr(self) -> Float[Tensor, " *axes"]:
        """The standard error of `effect`'s mean over the rows (rows differ before any patch); NaN of one row."""
        rows = self.effect.shape[-1]
        return self.effect.std(-1) / rows**0.5 if rows > 1 else torch.full_like(self.mean, torch.nan)

    @property
    def effect(self) -> Float[Tensor, "*axes batch"]:
        """How much each patch moved the metric."""
        return self.values - self.baseline

    @checks_arguments
    def normalized(self, clean_baseline: Any, *, by_row: bool = False) -> Float[Tensor, "*axes batch"] | Tensor:
        """Give the share of the way from the corrupted to the clean metric that each patch goes: 0 not at all, 1 all.

        Args:
            clean_baseline: The metric of the clean run: a number, or one for each row.
            by_row: Whether each row is divided by its own distance, which may be near 0; else all by the mean distance,
                so that the mean of the result is the effect's mean over the mean distance.

        Raises:
            ArgumentError: Clean and corrupted have the same metric, so that there is no way to go, or the baseline is
                not of this many rows.
        """
        clean = torch.as_tensor(clean_baseline, dtype=self.values.dtype, device=self.values.device).detach()
        if clean.numel() not in (1, len(self.baseline)):
            raise ArgumentError(
                f"clean_baseline is one number, or one for each of the {len(self.baseline)} rows; got "
                f"{list(clean.shape)}"
            )
        distance = clean.reshape(-1) - self.baseline
        distance = distance if by_row else distance.mean()
        if bool((distance == 0).any()):
            raise ArgumentError("the clean and the corrupted run have the same metric: there is nothing to restore")
        return self.effect / distance

    # ------------------------------------------------------------------ statistics

    @checks_arguments
    def bootstrap_ci(
        self, confidence: float = 0.95, *, n_resamples: int = 2000, seed: int = 0
    ) -> tuple[Float[Tensor, " *axes"], Float[Tensor, " *axes"]]:
        """Give a bootstrap interval of the mean effect, over the rows of the batch.

        The percentile method of `scipy.stats.bootstrap`; rows are drawn with replacement, the same for every cell.

        Args:
            confidence: How often such intervals hold the true mean, 0 to 1.
            n_resamples: Draws.
            seed: Of the draws.

        Raises:
            ArgumentError: Fewer than two rows, or a metric that gives one number for all of them.
            MissingPackageError: scipy is not installed.
        """
        effect, numpy, stats = self._sampled("a bootstrap interval")
        if not 0 < confidence < 1:
            raise ArgumentError(f"confidence is between 0 and 1; got {confidence!r}")
        flat = effect.reshape(-1, effect.shape[-1])
        found = stats.bootstrap(
            (flat,),
            numpy.mean,
            axis=-1,
            confidence_level=confidence,
            n_resamples=n_resamples,
            batch=max(2**22 // flat.size, 1),
            method="percentile",
            **_random(stats.bootstrap, seed, numpy),
        ).confidence_interval
        return self._as_cells(found.low), self._as_cells(found.high)

    @checks_arguments
    def permutation_pvalue(
        self,
        alternative: Literal["two-sided", "greater", "less"] = "two-sided",
        *,
        n_resamples: int = 2000,
        seed: int = 0,
    ) -> Float[Tensor, " *axes"]:
        """Test whether each mean effect is 0, by turning the signs of rows' effects around.

        The paired permutation test of `scipy.stats.permutation_test`: if a patch did nothing, patched and unpatched
        could change places in each row. With few rows all 2^rows ways are tried, so p is at least 2 / 2^rows
        (two-sided). Cells are not corrected for being many.

        Args:
            alternative: What else than 0 the mean effect may be.
            n_resamples: Ways that are tried, where there are more.
            seed: Of the draws.

        Raises:
            ArgumentError: Fewer than two rows, or a metric that gives one number for all of them.
            MissingPackageError: scipy is not installed.
        """
        effect, numpy, stats = self._sampled("a permutation test")
        flat = effect.reshape(-1, effect.shape[-1])

        def mean_difference(patched: Any, unpatched: Any, axis: int) -> Any:
            return (patched - unpatched).mean(axis=axis)

        found = stats.permutation_test(
            (flat, numpy.zeros_like(flat)),
            mean_difference,
            permutation_type="samples",
            vectorized=True,
            axis=-1,
            alternative=alternative,
            n_resamples=n_resamples,
            batch=max(2**22 // flat.size, 1),
            **_random(stats.permutation_test, seed, numpy),
        )
        return self._as_cells(found.pvalue)

    def _sampled(self, what: str) -> tuple[Any, Any, Any]:
        """Give the effects as an array, and what makes statistics of it."""
        stats: Any = need("scipy.stats", what)
        if self.values.shape[-1] < 2:
            raise ArgumentError(f"{what} is over rows, and there is {self.values.shape[-1]}; patch several prompts")
        return self.effect.detach().cpu().double().numpy(), need("numpy", what), stats

    def _as_cells(self, array: Any) -> Tensor:
        return torch.as_tensor(array, dtype=self.values.dtype).reshape(self.values.shape[:-1])

    # ------------------------------------------------------------------ tables and pictures

    @checks_arguments
    def top(self, k: int = 10, *, by: Literal["absolute", "highest", "lowest"] = "absolute") -> list[dict[str, Any]]:
        """List the cells that moved the metric most, the first the strongest.

        Args:
            k: How many.
            by: The size of the mean effect, or its highest or lowest values.

        Returns:
            Records of each axis' number, `effect` and `value` (means over the rows). Cells without a value are left
            out.
        """
        if not is_whole(k):
            raise ArgumentError(f"k is how many cells are listed, 1 or more; got {k!r}")
        if by not in ("absolute", "highest", "lowest"):
            raise ArgumentError(f"by is 'absolute', 'highest' or 'lowest'; got {by!r}")
        effect = self.effect.mean(-1)
        flat = effect.flatten()
        strength = {"absolute": flat.abs(), "highest": flat, "lowest": -flat}[by].nan_to_num(nan=-torch.inf)
        order: Any = strength.argsort(descending=True, stable=True)[:k]
        found: list[dict[str, Any]] = []
        for number in order.tolist():
            if strength[number] == -torch.inf:
                break
            at = [int(place) for place in torch.unravel_index(torch.tensor(number), effect.shape)]
            cell = {axis: self.indices[axis_number][at[axis_number]] for axis_number, axis in enumerate(self.axes)}
            found.append({**cell, "effect": float(flat[number]), "value": float(self.mean.flatten()[number])})
        return found

    def to_dataframe(self) -> Any:
        """Give a pandas DataFrame with a line for each cell and row: the axes, `row`, `value`, `baseline`, `effect`.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas: Any = need("pandas", "a data frame")
        ranges = [*self.indices, range(self.values.shape[-1])]
        index = pandas.MultiIndex.from_product(ranges, names=[*self.axes, "row"])
        columns: Mapping[str, Tensor] = {
            "value": self.values,
            "baseline": self.baseline.expand_as(self.values),
            "effect": self.effect,
        }
        arrays = {name: tensor.detach().cpu().flatten().numpy() for name, tensor in columns.items()}
        return pandas.DataFrame(arrays, index=index).reset_index()

    @property
    def picture(self) -> view.Picture:
        """The mean effect as a heat map, the last axis in columns, a row for each combination of the others."""
        effect = self.effect.mean(-1)
        title = f"{self.name}: mean effect on {self.metric}"
        labels = self.labels or (("all",),)
        rows = [""]
        for axis, names in zip(self.axes[:-1], labels[:-1], strict=False):
            rows = [f"{before} {axis} {name}".strip() for before in rows for name in names]
        if len(self.axes) < 2:
            rows = [self.name]
        return view.grid(rows, list(labels[-1]), effect.reshape(len(rows), -1), title=title)

    def _repr_html_(self) -> str:
        """Show the heat map in a notebook."""
        return self.picture._repr_html_()  # pyright: ignore[reportPrivateUsage]


def _random(function: Any, seed: int, numpy: Any) -> dict[str, Any]:
    """Give the generator under the name that the installed scipy has for it."""
    import inspect

    name = "rng" if "rng" in inspect.signature(function).parameters else "random_state"
    return {name: numpy.random.default_rng(seed)}
