"""What the strongest directions of a weight mean in tokens: singular vectors read through the unembedding.

A weight that writes to the residual stream (an OV circuit, W_out, a mixer's W_out_proj) has right singular vectors in
the stream: what it writes most strongly. One that reads it (W_in, W_gate, W_in_proj, and OV on its other side) has left
singular vectors there: what it reacts to most. The unembedding gives a logit to every token for each of them.

The sign of a singular vector is arbitrary, so both ends of its token list belong to it.

Source: Millidge and Black 2022, "The Singular Value Decompositions of Transformer Weight Matrices are Highly
Interpretable"; TransformerLens' `SVDInterpreter`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments, is_whole
from lens_core._extras import need
from lens_core._gains import as_read, as_written, norm_before
from lens_core.errors import ArgumentError
from lens_core.factored import FactoredMatrix

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["SingularVectors", "singular_vectors"]

Side = Literal["writes", "reads"]

_ATTENTION, _MLP, _MIXER = ("ln1",), ("ln2", "ln1"), ("norm", "ln1")
_READERS = {"W_in": _MLP, "W_gate": _MLP, "W_in_proj": _MIXER, "OV": _ATTENTION}
"""Weights that read the stream, to the norms that may stand before them."""
_WRITERS = {"W_out": "ln2_post", "W_out_proj": "ln1_post", "OV": "ln1_post"}
"""Weights that write to it, to the norm that may stand behind them."""
_linalg: Any = torch.linalg  # untyped


@attrs.frozen(kw_only=True, eq=False)
class SingularVectors:
    """The strongest directions of one weight in the residual stream, and the tokens at both ends of each.

    Attributes:
        name: The weight.
        layer: Its block.
        head: Its head, where one was chosen.
        side: Whether the directions are what the weight `"writes"` or what it `"reads"`.
        values: Singular values, largest first.
        vectors: Directions of length one, one in each row. `-v` is as good as `v`.
        logits: What the unembedding makes of each direction, by the final norm at scale 1: logits for a step of
            length one.
        tokens: Gives the text of a token id.
    """

    name: str
    layer: int
    head: int | None
    side: Side
    values: Float[Tensor, " k"] = attrs.field(repr=False)
    vectors: Float[Tensor, "k d_model"] = attrs.field(repr=False)
    logits: Float[Tensor, "k d_vocab"] = attrs.field(repr=False)
    tokens: Callable[[int], str] = attrs.field(repr=False)

    def top(self, k: int = 10, *, lowest: bool = False) -> list[list[tuple[str, float]]]:
        """Give the k tokens of the highest (or lowest) logit of each direction, as `(token, logit)`."""
        found = self.logits.topk(min(k, self.logits.shape[1]), largest=not lowest)
        return [
            [(self.tokens(int(token)), float(logit)) for token, logit in zip(*row, strict=True)]
            for row in zip(found.indices, found.values, strict=True)
        ]

    def to_dataframe(self, k: int = 10) -> Any:
        """Give a row for each direction, end and rank: `vector, singular_value, end, rank, token, logit`.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas = need("pandas", "a data frame")
        rows = [
            (vector, float(self.values[vector]), end, rank, token, logit)
            for end in ("highest", "lowest")
            for vector, row in enumerate(self.top(k, lowest=end == "lowest"))
            for rank, (token, logit) in enumerate(row)
        ]
        return pandas.DataFrame(rows, columns=["vector", "singular_value", "end", "rank", "token", "logit"])

    def picture(self, k: int = 8) -> view.Picture:
        """Tabulate the tokens at both ends of each direction."""
        ends = (self.top(k), self.top(k, lowest=True))
        rows = [
            [index, float(value), *("  ".join(view.visible(token) for token, _ in end[index]) for end in ends)]
            for index, value in enumerate(self.values)
        ]
        where = f"{self.name} of block {self.layer}" + ("" if self.head is None else f", head {self.head}")
        title = f"What {where} {self.side} most"
        return view.table(rows, ["vector", "singular value", "highest", "lowest"], title=title)

    def _repr_html_(self) -> str:
        return self.picture()._repr_html_()  # pyright: ignore[reportPrivateUsage]


@checks_arguments
def singular_vectors(
    model: "LensModel",
    name: str,
    layer: int,
    *,
    head: int | None = None,
    side: Side | None = None,
    num_vectors: int = 10,
    through: Literal["W_U", "W_E"] = "W_U",
    with_norms: bool = True,
) -> SingularVectors:
    """Decompose one weight and read its strongest directions in the residual stream as tokens.

    Costs one singular value decomposition of the weight (of OV, of its small factors), and `num_vectors` rows of
    logits.

    Args:
        model: The model.
        name: `"OV"`, `"W_in"`, `"W_gate"`, `"W_out"`; of state-space layers `"W_in_proj"`, `"W_out_proj"`.
        layer: The block, 0-based, negative from the end.
        head: For OV the query head, which must be given; for W_out_proj of a mixer with heads one of these, or all.
        side: `"writes"` or `"reads"`; None is what the weight does (OV: writes).
        num_vectors: How many directions, strongest first; there are no more than the weight's least side.
        through: What turns a direction into tokens: the final norm's gain and the unembedding, or the embedding: which
            tokens' embeddings lie along it, plausible for what the first blocks read.
        with_norms: Whether the gain (and centring) of the norm between the stream and the weight is multiplied in: what
            it reads of the *stream*, as TransformerLens' folded weights do. False takes the bare weight.

    Raises:
        ArgumentError: No such block, head or side; a name that is none of these.
        WeightError: The block has no such weight, or it is quantised.

    Example:
        >>> import lens_core as lens
        >>> found = singular_vectors(lens.load("toy:gpt2"), "OV", 0, head=1, num_vectors=3)
        >>> found.vectors.shape, len(found.top(5)[0])
        (torch.Size([3, 96]), 5)
    """
    side = _checked(name, head, side, through)
    if not is_whole(num_vectors):
        raise ArgumentError(f"num_vectors is 1 or more; got {num_vectors!r}")
    at = _index(layer, model.cfg.n_layers, "blocks", "layer")
    with torch.no_grad():
        matrix = _matrix(model, name, at, head, with_norms=with_norms)
        U, S, Vh = matrix.svd() if isinstance(matrix, FactoredMatrix) else _linalg.svd(matrix, full_matrices=False)
        vectors = (Vh if side == "writes" else U.mT)[:num_vectors]
        logits = vectors @ _to_tokens(model, through).to(vectors)
    return SingularVectors(
        name=name,
        layer=at,
        head=head,
        side=side,
        values=S[:num_vectors].clone(),
        vectors=vectors.clone(),
        logits=logits,
        tokens=_number if model.tokenizer is None else model.to_single_str_token,
    )


def _number(token: int) -> str:
    return f"id {token}"


def _checked(name: str, head: Any, side: Any, through: Any) -> Side:
    sides: list[Side] = ["writes"] if name in _WRITERS else []
    if name in _READERS:
        sides.append("reads")
    if not sides:
        known = ", ".join(dict.fromkeys((*_WRITERS, *_READERS)))
        raise ArgumentError(f"name is one of {known}; got {name!r}")
    if side is not None and side not in sides:
        raise ArgumentError(f"{name} {' and '.join(sides)} the residual stream; got side={side!r}")
    if name == "OV" and head is None:
        raise ArgumentError("OV is of one head: give head=")
    if head is not None and name not in ("OV", "W_out_proj"):
        raise ArgumentError(f"{name} has no heads; leave out head={head!r}")
    if through not in ("W_U", "W_E"):
        raise ArgumentError(f"through is 'W_U' or 'W_E'; got {through!r}")
    return sides[0] if side is None else side


def _matrix(model: "LensModel", name: str, layer: int, head: Any, *, with_norms: bool) -> Tensor | FactoredMatrix:
    """Give the weight as rows that read and columns that write, in at least float32."""
    before = norm_before(model, layer, *_READERS.get(name, ())) if with_norms else None
    after = norm_before(model, layer, _WRITERS[name]) if with_norms and name in _WRITERS else None
    if name == "OV":
        heads = model.factored_weight("OV", layer)
        OV = heads[_index(head, len(heads), "heads", "head")]
        read, written = as_read(model, _wide(OV.A), before, layer), as_written(model, _wide(OV.B), after, layer)
        return FactoredMatrix(read, written)
    weight = _wide(model.weight(name, layer).detach())
    if name in _READERS:
        return as_read(model, weight, before, layer)
    if head is not None:
        width = model.cfg.head_dim
        if width is None:
            raise ArgumentError(f"the mixers of this model have channels and no heads; leave out head={head!r}")
        at = _index(head, len(weight) // width, "heads", "head")
        weight = weight[at * width : (at + 1) * width]
    return as_written(model, weight, after, layer)


def _index(given: Any, count: int, what: str, name: str) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or not -count <= given < count:
        raise ArgumentError(f"there are {what} 0 to {count - 1}; got {name}={given!r}")
    return given % count


def _to_tokens(model: "LensModel", through: str) -> Float[Tensor, "d_model d_vocab"]:
    if through == "W_E":
        return _wide(model.weight("W_E").detach()).T
    unembedding = as_read(model, _wide(model.weight("W_U").detach()), "ln_final")
    return unembedding * model.declaration.logit_factor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
