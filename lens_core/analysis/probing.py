"""Linear probes with controls: what can be read from activations, where, and what that says.

A probe's accuracy alone says little: a wide activation lets a linear classifier find much. Each accuracy is measured on
examples that the probe was not fitted on (cross-validation; tokens of one text stay together), and stands beside

- the **majority**, what always guessing the most frequent class gives;
- the **control**, the same probe on labels without meaning. `"shuffled"`: the labels change places among the examples.
  `"tokens"`: each token id at the probed position gets one random label for good, a task that can be learned from the
  identity of the token alone. Accuracy less control is *selectivity*;
- **random features** of the same width: a random vector for the token, plus the sum of other random vectors for the
  tokens before. They know which tokens there are, and nothing of order or of the model. A probe that does no better has
  found what is in the tokens.

Source: control tasks and selectivity, Hewitt and Liang 2019 (arXiv 1909.03368); difference of means, Marks and Tegmark
2023 (arXiv 2310.06824); sparse probes, Gurnee et al. 2023 (arXiv 2305.01610).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments, is_whole
from lens_core._extras import need
from lens_core.analysis._linear_probe import LinearProbe, Recipe, fit_probe, folds_of, held_out, wilson
from lens_core.analysis._probe_labels import control_labels, read_labels
from lens_core.analysis.activations import Activations
from lens_core.errors import ArgumentError
from lens_core.hook_points import HookTable

__all__ = ["LinearProbe", "ProbeResults", "SparseProbes", "fit_probes", "fit_sparse_probes", "random_features"]

Kind = Literal["logistic", "difference"]
Control = Literal["shuffled", "tokens"]


@attrs.frozen(kw_only=True, eq=False)
class ProbeResults:
    """How well probes at each hook point and position do, and the probes.

    Attributes:
        accuracy: Share of held-out examples whose class is predicted, 0 to 1.
        low: Lower end of Wilson's 95% interval, at the number of texts (examples of one text are not independent).
        high: Its upper end.
        control: Accuracy on labels without meaning, for each draw of them.
        random: Accuracy with random features of the tokens instead of activations; NaN where not asked for.
        majority: Share of the most frequent class.
        probes: The probe fitted on all examples, by hook name and position.
        names: What the axis `name` is.
        positions: What the axis `position` is.
        classes: The labels, sorted.
        n_examples: How many examples there are.
        n_texts: How many texts they are of.
    """

    accuracy: Float[Tensor, "name position"] = attrs.field(repr=False)
    low: Float[Tensor, "name position"] = attrs.field(repr=False)
    high: Float[Tensor, "name position"] = attrs.field(repr=False)
    control: Float[Tensor, "draw name position"] = attrs.field(repr=False)
    random: Float[Tensor, "name position"] = attrs.field(repr=False)
    majority: float
    probes: Mapping[tuple[str, Any], LinearProbe] = attrs.field(repr=False)
    names: tuple[str, ...]
    positions: tuple[Any, ...]
    classes: tuple[Any, ...]
    n_examples: int
    n_texts: int
    table: HookTable = attrs.field(repr=False)

    @property
    def selectivity(self) -> Float[Tensor, "name position"]:
        """Give the accuracy less the mean of the controls."""
        return self.accuracy - self.control.mean(0)

    def best(self) -> tuple[str, Any]:
        """Give hook name and position of the highest accuracy, the first of several; chosen so, it flatters."""
        row, column = divmod(int(self.accuracy.argmax()), len(self.positions))
        return self.names[row], self.positions[column]

    def probe(self, name: Any, position: Any = None) -> LinearProbe:
        """Give the probe at a hook point and a position; None for the only one.

        Raises:
            UnknownHookError: No such hook point.
            ArgumentError: There is no probe there.
        """
        if position is None and len(self.positions) == 1:
            position = self.positions[0]
        key = self.table.canonical(name), position
        if key not in self.probes:
            raise ArgumentError(
                f"no probe at {name!r}, position {position!r}; there are {', '.join(self.names)} at {self.positions}"
            )
        return self.probes[key]

    def to_dataframe(self) -> Any:
        """Give one row for each hook point and position.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        rows = [
            {
                "name": name,
                "position": position,
                "accuracy": float(self.accuracy[i, j]),
                "low": float(self.low[i, j]),
                "high": float(self.high[i, j]),
                "control": float(self.control[:, i, j].mean()),
                "selectivity": float(self.selectivity[i, j]),
                "random": float(self.random[i, j]),
                "majority": self.majority,
            }
            for i, name in enumerate(self.names)
            for j, position in enumerate(self.positions)
        ]
        return need("pandas", "a data frame").DataFrame(rows)

    def _repr_html_(self) -> str:
        shown = {"accuracy": self.accuracy, "selectivity": self.selectivity, "random features": self.random}
        pictures = [
            view.grid(
                list(self.names),
                [str(one) for one in self.positions],
                cast("Any", values).tolist(),
                title=title,
                unit="share",
            )
            for title, values in shown.items()
        ]
        told = f"{len(self.classes)} classes, {self.n_examples} examples of {self.n_texts} texts"
        return view.page("Probes", pictures, subtitle=f"{told}; majority {self.majority:.2f}")._repr_html_()  # pyright: ignore[reportPrivateUsage]


@checks_arguments
def fit_probes(
    activations: Activations,
    labels: Any,
    *,
    kind: Kind = "logistic",
    k: int | None = None,
    C: float = 1.0,
    folds: int = 5,
    control: Control = "shuffled",
    n_controls: int = 2,
    random: bool = True,
    seed: int = 0,
) -> ProbeResults:
    """Fit a linear probe at every hook point and position, and measure it on held-out examples, beside controls.

    It costs `(folds + 1) + n_controls * folds` fits at each hook point and position, and `folds` more for the random
    features of each width.

    Args:
        activations: What `collect_activations` gave.
        labels: A class for each text: strings, ints or bools; with `positions="all"` also a list for each text, of a
            class for each token.
        kind: `"logistic"`, on standardised values; or, for two classes, `"difference"`, whose direction is the
            difference of their means and whose boundary lies half way.
        k: How many neurons a probe may use: those that by themselves tell the classes best, chosen among the examples
            that it is fitted on. None for all.
        C: Inverse strength of the logistic probe's L2 penalty.
        folds: How many parts are held out in turn.
        control: Labels without meaning: `"shuffled"`, or `"tokens"` (see the module).
        n_controls: Draws of such labels.
        random: Whether to measure random features too.
        seed: Of the folds, the labels without meaning and the random features.

    Raises:
        MissingPackageError: scikit-learn is not installed.
        ArgumentError: Labels that do not fit the examples, are numbers of a scale, or of one class; more than two
            classes for `"difference"`; a class in fewer texts than folds; `"tokens"` where all tokens are the same.

    Example:
        >>> import lens_core as lens
        >>> from lens_core.analysis.activations import collect_activations
        >>> model = lens.load("toy:gpt2")
        >>> nouns = ["cat", "dog", "cow", "bird", "fish", "sun", "moon", "star", "sea", "sky"]
        >>> texts = [f"the big {noun}" for noun in nouns]
        >>> found = collect_activations(model, texts, ("resid_post", 0))
        >>> results = fit_probes(found, ["animal"] * 5 + ["thing"] * 5)
        >>> results.accuracy.shape == (1, 1) and results.majority == 0.5
        True
        >>> results.probe(("resid_post", 0)).direction("animal").shape
        torch.Size([96])
    """
    y, classes = read_labels(activations, labels)
    recipe = _recipe(kind, k, C, classes, activations)
    for what, number, least in (("folds", folds, 2), ("n_controls", n_controls, 1)):
        if not is_whole(number, least):
            raise ArgumentError(f"{what} is a number from {least}; got {number!r}")
    generator = torch.Generator().manual_seed(seed)
    splits = folds_of(y, activations.texts, folds, seed)
    n_names, n_positions = len(activations.names), len(activations.positions)
    accuracy, noise = torch.zeros(n_names, n_positions), torch.full((n_names, n_positions), float("nan"))
    controls = torch.zeros(n_controls, n_names, n_positions)
    probes: dict[tuple[str, Any], LinearProbe] = {}
    features: dict[tuple[int, int], float] = {}  # by width and position: these do not depend on the layer
    for j, position in enumerate(activations.positions):
        meaningless = [control_labels(activations, y, j, control, generator) for _ in range(n_controls)]
        for i, name in enumerate(activations.names):
            x = activations.values[name][:, j].double().cpu()
            accuracy[i, j] = _share(held_out(x, y, classes, splits, recipe), y)
            for draw, fake in enumerate(meaningless):
                controls[draw, i, j] = _share(held_out(x, fake, classes, splits, recipe), fake)
            probes[name, position] = fit_probe(x, y, classes, recipe)
            if random and (x.shape[1], j) not in features:
                tokens = random_features(activations, x.shape[1], seed=seed)[:, j]
                features[x.shape[1], j] = _share(held_out(tokens, y, classes, splits, recipe), y)
            noise[i, j] = features.get((x.shape[1], j), float("nan"))
    n_texts = len(activations.ids)
    ends = torch.tensor([[wilson(float(one), n_texts) for one in row] for row in accuracy])
    return ProbeResults(
        accuracy=accuracy,
        low=ends[..., 0],
        high=ends[..., 1],
        control=controls,
        random=noise,
        majority=float(y.bincount().max() / len(y)),
        probes=probes,
        names=activations.names,
        positions=activations.positions,
        classes=classes,
        n_examples=len(y),
        n_texts=n_texts,
        table=activations.table,
    )


@checks_arguments
def random_features(activations: Activations, width: int, *, seed: int = 0) -> Float[Tensor, "example position width"]:
    """Give features that know which tokens a text has up to a position, and nothing else.

    Each is a random vector for the token at the position, plus the sum over the tokens before it of other random
    vectors, divided by the root of their number; for means, over all tokens of the text.

    Example:
        >>> import lens_core as lens
        >>> from lens_core.analysis.activations import collect_activations
        >>> model = lens.load("toy:gpt2")
        >>> found = collect_activations(model, ["the cat saw the dog", "the cat the saw dog"])
        >>> one, other = random_features(found, 8)[:, 0]
        >>> bool(torch.allclose(one, other))
        True
    """
    if not is_whole(width):
        raise ArgumentError(f"width is a positive number; got {width!r}")
    generator = torch.Generator().manual_seed(seed)
    every: Any = torch.cat(activations.ids)
    known: Tensor = every.unique()
    here, before = torch.randn(2, len(known), width, generator=generator, dtype=torch.float64)
    n_positions = activations.at.shape[1]
    found = torch.zeros(len(activations), n_positions, width, dtype=torch.float64)
    for text, ids in enumerate(activations.ids):
        where = torch.searchsorted(known, ids)
        sums = torch.cat([torch.zeros(1, width, dtype=torch.float64), before[where].cumsum(0)])
        rows = (activations.texts == text).nonzero().flatten()
        at = activations.at[rows]
        past = torch.where(at < 0, len(ids), at)
        found[rows] = sums[past] / past.clamp(min=1).double().sqrt()[..., None]
        found[rows] += torch.where(at[..., None] < 0, 0.0, here[where[at.clamp(min=0)]])
    return found


@attrs.frozen(kw_only=True, eq=False)
class SparseProbes:
    """Probes that may use k neurons, for several k.

    Attributes:
        ks: How many neurons.
        results: Of each k.
    """

    ks: tuple[int, ...]
    results: tuple[ProbeResults, ...] = attrs.field(repr=False)

    def neurons(self, name: Any, k: int, position: Any = None) -> tuple[int, ...]:
        """Give the neurons that the probe fitted on all examples uses.

        Raises:
            ArgumentError: There is no such probe.
        """
        if k not in self.ks:
            raise ArgumentError(f"no probes of {k!r} neurons; there are {self.ks}")
        return self.results[self.ks.index(k)].probe(name, position).neurons

    def to_dataframe(self) -> Any:
        """Give the rows of every k's results, with a column `k`.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas = need("pandas", "a data frame")
        frames = [result.to_dataframe().assign(k=k) for k, result in zip(self.ks, self.results, strict=True)]
        return pandas.concat(frames, ignore_index=True)

    def _repr_html_(self) -> str:
        pictures = [
            view.grid(
                list(self.results[0].names),
                [str(k) for k in self.ks],
                [[float(result.accuracy[i, j]) for result in self.results] for i in range(len(result.names))],
                title=f"accuracy by number of neurons, position {position}",
                unit="share",
            )
            for result in self.results[:1]
            for j, position in enumerate(result.positions)
        ]
        return view.page("Sparse probes", pictures)._repr_html_()  # pyright: ignore[reportPrivateUsage]


def fit_sparse_probes(
    activations: Activations, labels: Any, ks: Sequence[int] = (1, 2, 4, 8, 16), **options: Any
) -> SparseProbes:
    """Fit probes that use k neurons, for several k: how few does it take?

    The neurons are those whose variance between the classes is largest beside that within them (F statistic; for two
    classes the order of the standardised difference of means), chosen anew in each fold among the examples that the
    probe is fitted on.

    Args:
        activations: What `collect_activations` gave, at neurons such as `"post"` or `"gated"`.
        labels: As for `fit_probes`.
        ks: Numbers of neurons.
        **options: As for `fit_probes`.

    Raises:
        ArgumentError: As for `fit_probes`; a k below 1 or above the width.

    Example:
        >>> import lens_core as lens
        >>> from lens_core.analysis.activations import collect_activations
        >>> model = lens.load("toy:gpt2")
        >>> texts = [f"the {word} cat" for word in ["red", "big", "old", "sad", "hot"]] + ["the cat saw"] * 5
        >>> found = collect_activations(model, texts, ("post", 0))
        >>> sparse = fit_sparse_probes(found, [True] * 5 + [False] * 5, ks=(1, 2), random=False)
        >>> len(sparse.neurons(("post", 0), 2))
        2
    """
    if not ks:
        raise ArgumentError("ks is empty; give numbers of neurons")
    return SparseProbes(ks=tuple(ks), results=tuple(fit_probes(activations, labels, k=k, **options) for k in ks))


def _recipe(kind: Any, k: Any, C: Any, classes: tuple[Any, ...], activations: Activations) -> Recipe:
    if kind not in ("logistic", "difference"):
        raise ArgumentError(f"kind is 'logistic' or 'difference'; got {kind!r}")
    if kind == "difference" and len(classes) != 2:
        raise ArgumentError(f"a difference of means is between two classes, and there are {len(classes)}")
    if isinstance(C, bool) or not isinstance(C, int | float) or not C > 0:
        raise ArgumentError(f"C is a number above 0; got {C!r}")
    width = min(activations.values[name].shape[-1] for name in activations.names)
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= width):
        raise ArgumentError(f"k is a number of neurons from 1 to {width}; got {k!r}")
    return Recipe(kind=kind, C=float(C), k=k)


def _share(predicted: Int[Tensor, " example"], y: Int[Tensor, " example"]) -> float:
    return float((predicted == y).double().mean())
