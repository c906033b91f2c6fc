"""Steering vectors: directions that, added to activations, change what the model does.

How long a vector is, is part of the result: it is kept as its method gives it, so that **scale 1 is one difference** of
the two sides: for `"mean"` the difference of the means; for `"pca"` and probes a unit direction times the mean
difference along it. `units=` of `SteeringVector.hooks` offers unit length and the activations' own norm instead.

Source: difference of means of contrast pairs, Rimsky et al. 2023 (arXiv 2312.06681); one pair, position by position,
Turner et al. 2023 (arXiv 2308.10248); principal component of the differences, Zou et al. 2023 (arXiv 2310.01405).
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import attrs
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lens_core import edits
from lens_core._arguments import checks_arguments
from lens_core._positions import read_positions
from lens_core.analysis import _steering_file
from lens_core.analysis._batches import token_rows
from lens_core.analysis.activations import Activations, collect_activations
from lens_core.analysis.directions import project_out
from lens_core.analysis.probing import ProbeResults
from lens_core.errors import ArgumentError, InputError
from lens_core.hook_points import NameFilter

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["SteeringVector", "activation_addition", "steering_from_probe", "steering_vector"]

Units = Literal["vector", "unit", "activation"]
Entry = tuple[Any, ...]


@attrs.frozen(kw_only=True, eq=False)
class SteeringVector:
    """Vectors to add at hook points, one for each.

    Attributes:
        vectors: By canonical hook name: `[width]`, or `[pos, width]` where each position has its own.
        norms: Mean norm of the activations that each was made from.
        method: How they were made.
        n_examples: From how many texts.
        origin: Model, plugin and versions that they come from.
        facts: What the model's config says that may change a value.
    """

    vectors: Mapping[str, Float[Tensor, "*pos width"]] = attrs.field(
        repr=lambda vectors: str({name: f"norm {float(value.norm()):.3g}" for name, value in vectors.items()})
    )
    norms: Mapping[str, float] = attrs.field(repr=False)
    method: str
    n_examples: int
    origin: Mapping[str, str] = attrs.field(repr=False, factory=dict[str, str])
    facts: Mapping[str, Any] = attrs.field(repr=False, factory=dict[str, Any])

    @checks_arguments
    def hooks(
        self, scale: float = 1.0, *, layers: Any = None, positions: Any = None, units: Units = "vector"
    ) -> list[Entry]:
        """Give hook entries that add the vectors, for `run_with_hooks` and `with model.hooks(...)`.

        Args:
            scale: Factor on the vectors; negative steers to the other side.
            layers: An int or several of the layers that have a vector; None for all of them at once.
            positions: Where, as in hook entries: None for every position, new tokens included; `slice(n, None)` from
                position n on; an int or several. Not where each position has its own vector.
            units: `"vector"` adds `scale * v`; `"unit"` adds `scale * v / |v|`; `"activation"` adds that times the mean
                norm of the activations there, so that a scale of 1 is as large as what it is added to.

        Raises:
            ArgumentError: No such layer or units; positions where each has its own vector.

        Example:
            >>> import torch
            >>> vectors = {"blocks.0.hook_resid_post": torch.tensor([3.0, 4.0])}
            >>> vector = SteeringVector(vectors=vectors, norms={}, method="by hand", n_examples=0)
            >>> (name, add, where), = vector.hooks(2.0, positions=-1, units="unit")
            >>> name, where
            ('blocks.0.hook_resid_post', -1)
        """
        entries: list[Entry] = []
        for name in self.names_of(layers):
            vector = self.vectors[name]
            where = _where(name, vector, positions)
            add = edits.add(vector, coefficient=self.coefficient(name, scale, units))
            entries.append((name, flattened(add), *where))
        return entries

    @checks_arguments
    def ablation_hooks(self, *, layers: Any = None, positions: Any = None) -> list[Entry]:
        """Give hook entries that remove what activations have along the vectors, whatever their length.

        Raises:
            ArgumentError: No such layer; vectors that differ by position.
        """
        names = self.names_of(layers)
        several = [name for name in names if self.vectors[name].ndim > 1]
        if several:
            raise ArgumentError(f"{several[0]!r} has a vector for each position; ablate one direction")
        where = () if positions is None else (positions,)
        return [(name, flattened(project_out(self.vectors[name])), *where) for name in names]

    def names_of(self, layers: Any = None) -> list[str]:
        """List the hook names of some layers; None for all.

        Raises:
            ArgumentError: A layer that has no vector.
        """
        if layers is None:
            return list(self.vectors)
        read = read_positions(layers)
        if read is None or isinstance(read, slice):
            raise ArgumentError(f"layers are an int or several; got {layers!r}")
        wanted = {read} if isinstance(read, int) else set(read)
        missing = wanted - {_layer(name) for name in self.vectors}
        if missing:
            there = sorted({layer for name in self.vectors if (layer := _layer(name)) is not None})
            raise ArgumentError(f"there is no vector for layer {min(missing)}; there are vectors for layers {there}")
        return [name for name in self.vectors if _layer(name) in wanted]

    @checks_arguments
    def coefficient(self, name: str, scale: float, units: Units = "vector") -> float:
        """Give what a vector is multiplied by, for a scale in some units."""
        if isinstance(scale, bool) or not isinstance(scale, int | float):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError(f"scale is a number; got {scale!r}")
        if units == "vector":
            return float(scale)
        if units not in ("unit", "activation"):
            raise ArgumentError(f"units are 'vector', 'unit' or 'activation'; got {units!r}")
        length = float(self.vectors[name].double().square().sum().sqrt())
        if units == "activation" and name not in self.norms:
            raise ArgumentError(f"the norm of the activations at {name!r} is not known; use other units")
        return scale / length * (self.norms[name] if units == "activation" else 1.0)

    def random_like(self, seed: int = 0) -> "SteeringVector":
        """Give vectors of the same norms in random directions: the control of steering.

        Example:
            >>> import torch
            >>> vectors = {"blocks.0.hook_resid_post": torch.tensor([3.0, 4.0])}
            >>> vector = SteeringVector(vectors=vectors, norms={}, method="by hand", n_examples=0)
            >>> other = vector.random_like(seed=1)
            >>> round(other.vectors["blocks.0.hook_resid_post"].norm().item(), 4)
            5.0
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(vector: Tensor) -> Tensor:
            noise = torch.randn(vector.shape, generator=generator, dtype=torch.float64)
            length = vector.double().square().sum(-1, keepdim=True).sqrt().cpu()
            return (F.normalize(noise, dim=-1) * length).to(vector)

        vectors = {name: draw(vector) for name, vector in self.vectors.items()}
        return attrs.evolve(self, vectors=vectors, method=f"random directions with the norms of: {self.method}")

    def save(self, path: Any) -> None:
        """Write the vectors to a safetensors file, with the model that they are of.

        Raises:
            AnalysisFileError: The file cannot be written there.
            ArgumentError: Not a path.
        """
        _steering_file.write(self, path)

    @classmethod
    def load(cls, path: Any, model: "LensModel", *, strict: bool = True) -> "SteeringVector":
        """Read what `save` wrote, for a model.

        Args:
            path: The file.
            model: The model, of any dtype: one of the same config. A finetuned one cannot be told apart.
            strict: False takes any model that has the hook points, at these widths, such as one with a longer context.

        Raises:
            AnalysisFileError: Not a file of ours, damaged, or of another model.
            ArgumentError: Not a path.
        """
        return cls(**_steering_file.read(path, model, strict=strict))


@checks_arguments
def steering_vector(
    model: "LensModel",
    positive: Any,
    negative: Any,
    names: NameFilter = "resid_post",
    *,
    method: Literal["mean", "pca"] = "mean",
    positions: Any = -1,
    batch_size: int = 16,
    prepend_bos: bool | None = None,
) -> SteeringVector:
    """Make steering vectors from contrasting texts.

    - `"mean"`: the mean of the activations of the positive texts less that of the negative ones.
    - `"pca"`: the direction that holds most of the squared length of the differences of pairs (their first principal
      component, not centred: the mean difference is what is wanted), towards the positive side, as long as the mean
      difference along it.

    Args:
        model: The model.
        positive: Texts, or rows of ids, of the side to steer to.
        negative: Those of the other; for `"pca"` as many, each the partner of a positive one.
        names: Hook points that get a vector; the residual stream after every block unless said.
        method: `"mean"` or `"pca"`.
        positions: Which activations of each text: as for `collect_activations`, `-1` (the last token), `"mean"`,
            `"all"`, ...; several are averaged.
        batch_size: Texts at a time.
        prepend_bos: As in `forward`; not with ids.

    Raises:
        ArgumentError: Another method; pairs that do not match; both sides the same.
        UnsupportedHookError, InputError: As for `collect_activations`.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> vector = steering_vector(model, ["the cat saw", "a bird saw"], ["the sun saw", "a star saw"])
        >>> sorted(vector.vectors)
        ['blocks.0.hook_resid_post', 'blocks.1.hook_resid_post']
        >>> with model.hooks(vector.hooks(2.0, layers=1)):
        ...     text = model.generate("the king", max_new_tokens=3, do_sample=False)
        >>> logits = model.run_with_hooks("the king", fwd_hooks=vector.hooks(-1.0, layers=0, positions=-1))
    """
    if method not in ("mean", "pca"):
        raise ArgumentError(f"method is 'mean' or 'pca'; got {method!r}")
    options: dict[str, Any] = {"positions": positions, "batch_size": batch_size, "prepend_bos": prepend_bos}
    high, low = (collect_activations(model, texts, names, **options) for texts in (positive, negative))
    if method == "pca" and high.at.shape != low.at.shape:
        raise ArgumentError(
            f"'pca' needs pairs, and there are {len(high)} positive and {len(low)} negative examples; "
            "give as many of each, or use method='mean'"
        )
    make = _mean_difference if method == "mean" else _principal
    vectors = {name: make(high.values[name].double(), low.values[name].double()) for name in high.names}
    return _made(model, vectors, _norms(high, low), method, len(high.ids) + len(low.ids))


def _mean_difference(high: Tensor, low: Tensor) -> Tensor:
    return high.mean((0, 1)) - low.mean((0, 1))


def _principal(high: Tensor, low: Tensor) -> Tensor:
    differences = (high - low).flatten(0, 1)
    unit: Tensor = cast("Any", torch.linalg).svd(differences, full_matrices=False).Vh[0]
    return (differences @ unit).mean() * unit


def _norms(*sides: Activations) -> dict[str, float]:
    """Give the mean norm of the examples at each hook point."""
    return {
        name: float(torch.cat([side.values[name].double().square().sum(-1).sqrt().flatten() for side in sides]).mean())
        for name in sides[0].names
    }


@checks_arguments
def activation_addition(
    model: "LensModel",
    positive: str,
    negative: str,
    name: Any,
    *,
    pad: str = " ",
    prepend_bos: bool | None = None,
) -> SteeringVector:
    """Make the steering vector of one pair of prompts, position by position (Turner et al. 2023).

    It is added at the first positions of a prompt, as many as the pair has. A shorter prompt is padded on the right
    with a token. Scale 1 is the pair's difference; the paper uses scales of about 5.

    Args:
        model: The model.
        positive: Such as `"Love"`.
        negative: Such as `"Hate"`.
        name: One hook point, such as `("resid_pre", 6)`.
        pad: What pads the shorter prompt, one token.
        prepend_bos: As in `forward`.

    Raises:
        InputError: The prompts differ in length, and `pad` is not one token.
        ArgumentError: More than one hook point, or prompts with the same activations.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> vector = activation_addition(model, "happy", "sad", ("resid_pre", 1))
        >>> vector.vectors["blocks.1.hook_resid_pre"].shape  # BOS and one word
        torch.Size([2, 96])
        >>> logits = model.run_with_hooks("the king", fwd_hooks=vector.hooks(5.0))
    """
    rows = list(token_rows(model, [positive, negative], prepend_bos=prepend_bos))
    length = max(map(len, rows))
    if min(map(len, rows)) < length:
        try:
            token = model.to_single_token(pad)
        except InputError as error:
            raise InputError(
                f"the prompts have {len(rows[0])} and {len(rows[1])} tokens, and pad={pad!r} is not one token; "
                "give prompts of equal length, or another pad"
            ) from error
        rows = [torch.cat([row.cpu(), torch.full((length - len(row),), token)]) for row in rows]
    names = model.table.select(name).names
    if len(names) != 1:
        raise ArgumentError(f"one hook point is wanted, such as ('resid_pre', 6); {name!r} names {len(names)}")
    pair = collect_activations(model, rows, names[0], positions=range(length))
    high, low = pair.values[names[0]].double()
    return _made(model, {names[0]: high - low}, _norms(pair), "one pair, by position", 2)


@checks_arguments
def steering_from_probe(
    model: "LensModel", results: ProbeResults, *, label: Any = None, position: Any = None
) -> SteeringVector:
    """Make steering vectors of probes: the direction towards a class, as long as the class' mean lies off along it.

    Args:
        model: The model that the probes are of.
        results: What `fit_probes` gave, at hook points of this model.
        label: The class to steer to; None for the second of two.
        position: Whose probes; None for the only one.

    Raises:
        ArgumentError: No such class or position.

    Example:
        >>> import lens_core as lens
        >>> from lens_core.analysis.activations import collect_activations
        >>> from lens_core.analysis.probing import fit_probes
        >>> model = lens.load("toy:gpt2")
        >>> texts = [f"the {noun}" for noun in ["cat", "dog", "cow", "bird", "sun", "moon", "star", "sea"]]
        >>> probes = fit_probes(collect_activations(model, texts), ["animal"] * 4 + ["thing"] * 4, folds=2)
        >>> steering_from_probe(model, probes, label="animal").method
        "probe of 'animal'"
    """
    probes = {name: results.probe(name, position) for name in results.names}
    first = next(iter(probes.values()))
    told = first.classes[1] if label is None and len(first.classes) == 2 else label
    vectors = {name: probe.gap(label) * probe.direction(label) for name, probe in probes.items()}
    norms = {name: probe.norm for name, probe in probes.items()}
    return _made(model, vectors, norms, f"probe of {told!r}", results.n_texts)


def _made(
    model: "LensModel", vectors: Mapping[str, Tensor], norms: Mapping[str, float], method: str, n_examples: int
) -> SteeringVector:
    for name, vector in vectors.items():
        if not bool(vector.isfinite().all()) or not bool(vector.any()):
            raise ArgumentError(f"both sides have the same activations at {name!r}: there is no direction to steer in")
    wide = torch.float64 if model.cfg.dtype == torch.float64 else torch.float32
    return SteeringVector(
        vectors={name: vector.to(device=model.input_device, dtype=wide) for name, vector in vectors.items()},
        norms=norms,
        method=method,
        n_examples=n_examples,
        **_steering_file.identity(model),
    )


def flattened(edit: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Show an edit the axes beyond batch and position as one width, as vectors have it (heads, in `hook_z`)."""

    def on_width(tensor: Tensor, hook: Any) -> Tensor:
        return edit(tensor.flatten(2), hook=hook).reshape(tensor.shape)

    on_width.__name__ = edit.__name__
    return on_width


def _where(name: str, vector: Tensor, positions: Any) -> tuple[Any, ...]:
    """Give an entry's third element, if it has one."""
    if vector.ndim == 1:
        return () if positions is None else (positions,)
    if positions is not None:
        raise ArgumentError(f"{name!r} has a vector for each of its {len(vector)} positions; leave positions out")
    return (range(len(vector)),)


def _layer(name: str) -> int | None:
    bits = name.split(".")
    return int(bits[1]) if bits[0] == "blocks" else None
