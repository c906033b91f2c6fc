"""How much of what one head writes another one reads: composition scores, from the weights alone.

The score of an earlier head with matrix `L` into the residual stream and a later one with matrix `R` out of it is
`|L R| / (|L| |R|)` in Frobenius norms: between 0 and 1, and 1 where both have rank one and one direction. `L` is the
earlier head's OV; `R` is the later one's QK (Q-composition), QK^T (K-composition) or OV (V-composition). Turning `L` at
random gives `1 / sqrt(d_model)` in root mean square, whatever the two are: what is well above that is no accident.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from typing import TYPE_CHECKING, Any, Literal, cast

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments
from lens_core._extras import need
from lens_core._gains import as_read, as_written, norm_before
from lens_core.errors import ArgumentError, WeightError
from lens_core.factored import FactoredMatrix

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["CompositionScores", "all_composition_scores", "composition_scores"]

_linalg: Any = torch.linalg  # untyped
_MOST_ELEMENTS = 2**24
"""Of the products that are held at once: 64 MiB in float32."""


@attrs.frozen(kw_only=True, eq=False)
class CompositionScores:
    """Composition scores of every pair of heads of a model.

    Attributes:
        scores: 0 to 1, from the head that writes to the one that reads; 0 where the second is in no later block.
        mode: What the second head does with what it reads: `"Q"`, `"K"` or `"V"`.
        layer_indices: The blocks of the first and third axis; all, unless the model is a hybrid.
        baseline: What two unrelated heads have, in root mean square: `1 / sqrt(d_model)`.
    """

    scores: Float[Tensor, "layer n_heads layer n_heads"] = attrs.field(repr=False)
    mode: str
    layer_indices: tuple[int, ...]
    baseline: float

    @property
    def head_labels(self) -> list[str]:
        """Name the heads, `L0H0`, `L0H1`, ..., in the order of the axes."""
        return [f"L{layer}H{head}" for layer in self.layer_indices for head in range(self.scores.shape[1])]

    @property
    def table(self) -> Float[Tensor, "head head"]:
        """The scores with layers and heads in one axis each, as `head_labels`."""
        heads = len(self.head_labels)
        return self.scores.reshape(heads, heads)

    def top(self, k: int = 10) -> list[tuple[str, str, float]]:
        """List the k largest as `(writer, reader, score)`."""
        pairs = sorted(self._pairs(), key=lambda pair: -pair[2])
        return pairs[: max(k, 0)]

    def _pairs(self) -> list[tuple[str, str, float]]:
        labels, heads = self.head_labels, self.scores.shape[1]
        table = cast("list[list[float]]", self.table.tolist())  # pyright: ignore[reportUnknownMemberType]
        return [
            (labels[a], labels[b], table[a][b])
            for a in range(len(labels))
            for b in range((a // heads + 1) * heads, len(labels))
        ]

    def to_dataframe(self) -> Any:
        """Give a row for each pair of heads in different layers, the writer's first: `writer, reader, score`.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas = need("pandas", "a data frame")
        return pandas.DataFrame(self._pairs(), columns=["writer", "reader", "score"])

    def picture(self) -> view.Picture:
        """Draw the scores: rows write, columns read."""
        labels = self.head_labels
        places = {label: place for place, label in enumerate(labels)}
        shown: list[list[float | None]] = [[None] * len(labels) for _ in labels]
        for writer, reader, score in self._pairs():
            shown[places[writer]][places[reader]] = score
        return view.grid(labels, labels, shown, title=f"{self.mode}-composition: row writes, column reads")

    def _repr_html_(self) -> str:
        return self.picture()._repr_html_()  # pyright: ignore[reportPrivateUsage]


@checks_arguments
def composition_scores(left: Tensor | FactoredMatrix, right: Tensor | FactoredMatrix) -> Tensor:
    """Score every matrix of `left` with every one of `right`: `|L R| / (|L| |R|)`, in Frobenius norms.

    Costs the products of the factors' inner sides: `mdim_left * d * mdim_right` for each pair.

    Args:
        left: `[*m, rows, d]`, factored or not; `x @ left` is what is written.
        right: `[*n, d, columns]`; what is written is multiplied by it.

    Returns:
        `[*m, *n]`, 0 to 1, in at least float32; 0 for a matrix of zeros. Leading axes are not matched with each other,
        as with TransformerLens' `broadcast_dims=True`.

    Raises:
        ArgumentError: Not matrices, or of widths that do not meet.

    Example:
        >>> import torch
        >>> writes, reads = torch.zeros(4, 4), torch.zeros(2, 4, 4)
        >>> writes[0, 1] = reads[0, 1, 2] = reads[1, 3, 2] = 5.0
        >>> composition_scores(writes, reads)
        tensor([1., 0.])
    """
    for name, given in (("left", left), ("right", right)):
        if not isinstance(given, Tensor | FactoredMatrix) or given.ndim < 2 or not given.dtype.is_floating_point:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError(f"{name} is a floating tensor of matrices or a FactoredMatrix; got {type(given)}")
    if left.shape[-1] != right.shape[-2]:
        raise ArgumentError(
            f"left {list(left.shape)} writes {left.shape[-1]} numbers, right {list(right.shape)} reads "
            f"{right.shape[-2]}"
        )
    writes, reads = _core(left), _core(right.mT if isinstance(right, Tensor) else right.T).mT
    scores = _scores(writes.reshape(-1, *writes.shape[-2:]), reads.reshape(-1, *reads.shape[-2:]))
    return scores.reshape((*left.shape[:-2], *right.shape[:-2]))


def _core(matrix: Tensor | FactoredMatrix) -> Float[Tensor, "*leading k columns"]:
    """Give a matrix with as few rows as can be, which has the same norm, as has all that multiplies it on the right."""
    left, right = matrix.pair if isinstance(matrix, FactoredMatrix) else (matrix, None)
    wide = torch.promote_types(left.dtype, torch.float32)
    core = _linalg.qr(left.to(wide), mode="r").R
    return core if right is None else core @ right.to(wide)


def _scores(writes: Float[Tensor, "m rows d"], reads: Float[Tensor, "n d columns"]) -> Float[Tensor, "m n"]:
    """Multiply all with all, a few of the first at a time."""
    norms = [_linalg.matrix_norm(core) for core in (writes, reads)]
    side = reads.movedim(0, 1).flatten(1)  # d (n columns)
    step = max(1, _MOST_ELEMENTS // (writes.shape[1] * side.shape[1]))
    parts: list[Tensor] = []
    for start in range(0, len(writes), step):
        product = (writes[start : start + step] @ side).reshape(-1, writes.shape[1], len(reads), reads.shape[2])
        parts.append(product.square().sum((1, 3)).sqrt())
    products = torch.cat(parts)
    sizes = norms[0][:, None] * norms[1]
    return torch.where(sizes > 0, products / sizes, 0.0)


@checks_arguments
def all_composition_scores(
    model: "LensModel", mode: Literal["Q", "K", "V"], *, with_norms: bool = True
) -> CompositionScores:
    """Score how each head composes with each head of later blocks.

    Grouped keys and values count for each query head that reads them. With rotary embeddings, QK is the part that
    does not depend on position. Norms of queries and keys are left out.

    Args:
        model: The model.
        mode: What of the later head reads: its queries, keys or values.
        with_norms: Whether the gains of the norms between stream and heads, and the centring of LayerNorm, are
            multiplied in: what a head reads of the *stream*. The scores are then the same before and after norms
            are folded and written weights centred, and those that TransformerLens gives for its processed weights.
            False takes the bare weights.

    Raises:
        WeightError: No block has attention, or weights are quantised.
        ArgumentError: Another mode.

    Example:
        >>> import lens_core as lens
        >>> found = lens.load("toy:gpt2").all_composition_scores("K")
        >>> writer, reader, score = found.top(1)[0]
        >>> writer[:2], reader[:2], score > 2 * found.baseline
        ('L0', 'L1', True)
    """
    if mode not in ("Q", "K", "V"):
        raise ArgumentError(f"mode is 'Q', 'K' or 'V'; got {mode!r}")
    if "W_O" not in model.weight_names:
        raise WeightError("composition is between attention heads, and no block of this model has any")
    layers, _ = model.stacked_weight("b_O")
    with torch.no_grad():
        scores = _between([_sides(model, layer, mode, with_norms=with_norms) for layer in layers])
    return CompositionScores(scores=scores, mode=mode, layer_indices=layers, baseline=float(model.cfg.d_model) ** -0.5)


def _between(sides: list[tuple[Tensor, Tensor]]) -> Float[Tensor, "layer n_heads layer n_heads"]:
    """Score the writers of each block with the readers of all later ones."""
    n_heads = len(sides[0][0])
    scores = sides[0][0].new_zeros(len(sides), n_heads, len(sides), n_heads)
    for place, (writers, _) in enumerate(sides[:-1]):
        later = torch.cat([readers.to(writers.device) for _, readers in sides[place + 1 :]])
        scores[place, :, place + 1 :] = _scores(writers, later).to(scores.device).reshape(n_heads, -1, n_heads)
    return scores


def _sides(model: "LensModel", layer: int, mode: str, *, with_norms: bool) -> tuple[Tensor, Tensor]:
    """Give the cores of one block's heads: of OV to the stream, and of what reads the stream."""
    before = norm_before(model, layer, "ln1") if with_norms else None
    after = norm_before(model, layer, "ln1_post") if with_norms else None
    values = model.factored_weight("OV", layer)
    written = as_written(model, _wide(values.B), after, layer)
    if before is not None and model.declaration.norms[before].kind.centres:
        written = written - written.mean(-1, keepdim=True)  # what every later norm takes away, no head reads
    writer = FactoredMatrix(as_read(model, _wide(values.A), before, layer), written)
    if mode == "V":
        return _core(writer), _core(writer.T).mT
    scores = model.factored_weight("QK", layer)
    query, key = as_read(model, _wide(scores.A), before, layer), as_read(model, _wide(scores.B.mT), before, layer)
    reader = FactoredMatrix(query, key.mT) if mode == "Q" else FactoredMatrix(key, query.mT)
    return _core(writer), _core(reader.T).mT


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
