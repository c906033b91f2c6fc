"""What a distribution over the vocabulary says, computed without ever holding one logit for every token.

Vectors that went through the final norm are multiplied with a chunk of the unembedding at a time, finished as the model
finishes its logits (factor, soft cap, cast), and folded into running sums: maximum and normaliser, entropy,
Kullback-Leibler divergence from a reference, the best tokens, and the ranks of chosen ones. Sums are in at least
float32. It is the kernel of the logit lens, the tuned lens and the comparison of models.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lens_core._arguments import checks_arguments, is_whole
from lens_core._logit_attrs import token_ids
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["CHUNK", "Readout", "read_vocabulary"]

CHUNK = 8192
"""Tokens of the vocabulary at once."""


@attrs.frozen(kw_only=True, eq=False)
class Readout:
    """What the distributions of some entries, each at the same rows, say.

    Attributes:
        top_tokens: Ids of the most likely tokens, best first.
        top_log_probs: Their log-probabilities, in nats.
        entropy: Of each distribution, in nats.
        kl: From the reference's distribution to each, KL(reference ‖ entry), in nats; None without a reference.
        target_log_probs: Log-probabilities of chosen tokens, in nats.
        target_ranks: How many tokens have a higher logit: 0 is the most likely one.
    """

    top_tokens: Int[Tensor, "entry row top"]
    top_log_probs: Float[Tensor, "entry row top"]
    entropy: Float[Tensor, "entry row"]
    kl: Float[Tensor, "entry row"] | None
    target_log_probs: Float[Tensor, "entry row target"] | None
    target_ranks: Int[Tensor, "entry row target"] | None


@checks_arguments
def read_vocabulary(
    model: "LensModel",
    entries: Sequence[Float[Tensor, "row d_model"]],
    reference: Float[Tensor, "row d_model"] | None = None,
    *,
    targets: Any = None,
    top: int = 5,
    chunk: int = CHUNK,
) -> Readout:
    """Read vectors that went through the final norm as distributions over the next token.

    It costs one product with the unembedding for each entry, and one for the reference; at most `row * chunk` logits of
    two entries are there at once, and no gradient.

    Args:
        model: Whose unembedding reads them.
        entries: What the unembedding is to receive, as `model.ln_final` gives it.
        reference: The same for the distribution that the divergence starts from; None for no divergence.
        targets: Tokens to follow: one as text or id, a list of these; or ids `[row, target]`.
        top: How many of the most likely tokens to keep.
        chunk: Tokens of the vocabulary at once.

    Raises:
        ArgumentError: `top` or `chunk` is not a positive int; targets of another shape.
        TokenizerError: A target that is not one token.
        TokenIdError: A target outside the vocabulary.
        WeightError: The unembedding is quantised.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> logits, cache = model.run_with_cache("the cat sat")
        >>> final = cache["ln_final.hook_out"][0]
        >>> found = read_vocabulary(model, [final], top=1)
        >>> bool((found.top_tokens[0, :, 0] == logits[0].argmax(-1)).all())
        True
    """
    for name, given in (("top", top), ("chunk", chunk)):
        if not is_whole(given):
            raise ArgumentError(f"{name} is a number of tokens, at least 1; got {given!r}")
    with torch.no_grad():
        rows, bias = model.weight("W_U").T, model.weight("b_U")
        head = _Head(model=model, rows=rows, bias=bias)
        ids = _target_ids(model, targets, len(entries[0]))
        sums = [_Sums.start(head, entry, ids, min(top, len(rows))) for entry in entries]
        base = None if reference is None else _Sums.start(head, reference, None, 1)
        for first in range(0, len(rows), chunk):
            part = slice(first, min(first + chunk, len(rows)))
            own = None if base is None else base.add(part)
            for one in sums:
                one.add(part, own)
        return _readout(sums, base, ids)


def _readout(sums: "list[_Sums]", base: "_Sums | None", ids: Tensor | None) -> Readout:
    def stack(values: list[Tensor]) -> Tensor:
        return torch.stack([value.to(values[0].device) for value in values])

    return Readout(
        top_tokens=stack([one.top_ids for one in sums]),
        top_log_probs=stack([one.top - one.log_normaliser[:, None] for one in sums]),
        entropy=stack([one.total.log() - one.first_moment / one.total for one in sums]).clamp(min=0),
        kl=None if base is None else stack([one.divergence(base) for one in sums]).clamp(min=0),
        target_log_probs=None if ids is None else stack([one.target - one.log_normaliser[:, None] for one in sums]),
        target_ranks=None if ids is None else stack([one.ranks for one in sums]),
    )


@attrs.frozen(kw_only=True, eq=False)
class _Head:
    """The unembedding, some tokens at a time."""

    model: "LensModel"
    rows: Float[Tensor, "d_vocab d_model"]
    bias: Float[Tensor, " d_vocab"]

    def logits(self, vectors: Tensor, part: slice) -> Tensor:
        """Give the logits of a range of tokens in at least float32."""
        made = self.model.finish_logits(F.linear(vectors, self.rows[part], self.bias[part]))
        return made.to(torch.promote_types(made.dtype, torch.float32))

    def logits_at(self, vectors: Tensor, ids: Int[Tensor, "row target"]) -> Tensor:
        """Give each row's logits of its own tokens."""
        ids = ids.to(self.rows.device)
        made = torch.einsum("rd,rtd->rt", vectors, self.rows[ids]) + self.bias[ids]
        made = self.model.finish_logits(made)
        return made.to(torch.promote_types(made.dtype, torch.float32))


@attrs.define(kw_only=True, eq=False)
class _Sums:
    """Running sums of one entry, all relative to the largest logit so far."""

    head: _Head
    vectors: Tensor
    largest: Float[Tensor, " row"]
    total: Float[Tensor, " row"]
    """The sum of exp(logit - largest)."""
    first_moment: Float[Tensor, " row"]
    """The sum of exp(logit - largest) * (logit - largest)."""
    gap: Float[Tensor, " row"]
    """The sum of the reference's exp(logit - largest) * (its logit - ours), to the reference's largest."""
    top: Float[Tensor, "row top"]
    top_ids: Int[Tensor, "row top"]
    ids: Int[Tensor, "row target"] | None
    target: Float[Tensor, "row target"]
    ranks: Int[Tensor, "row target"]

    @classmethod
    def start(cls, head: _Head, vectors: Tensor, ids: Tensor | None, n_top: int) -> "_Sums":
        """Begin with no token seen."""
        vectors = vectors.to(head.rows.device, head.rows.dtype)
        target = vectors.new_zeros(len(vectors), 0) if ids is None else head.logits_at(vectors, ids)
        wide = torch.promote_types(vectors.dtype, torch.float32)
        zeros = torch.zeros(len(vectors), dtype=wide, device=vectors.device)
        return cls(
            head=head,
            vectors=vectors,
            largest=zeros - torch.inf,
            total=zeros,
            first_moment=zeros,
            gap=zeros,
            top=(zeros - torch.inf)[:, None].expand(-1, n_top),
            top_ids=torch.zeros(len(vectors), n_top, dtype=torch.long, device=vectors.device),
            ids=ids,
            target=target,
            ranks=torch.zeros(target.shape, dtype=torch.long, device=vectors.device),
        )

    @property
    def log_normaliser(self) -> Tensor:
        """The logarithm of the sum of exp(logit)."""
        return self.largest + self.total.log()

    def divergence(self, base: "_Sums") -> Tensor:
        """Give KL(base ‖ this) in nats."""
        return self.gap / base.total - base.log_normaliser + self.log_normaliser

    def add(self, part: slice, base: "_Chunk | None" = None) -> "_Chunk":
        """Take the logits of a range of tokens."""
        logits = self.head.logits(self.vectors, part)
        best = torch.maximum(self.largest, logits.amax(-1))
        shrunk = (self.largest - best).exp()  # exp(-inf) at the first chunk
        beyond = torch.where(shrunk == 0, 0.0, shrunk * (self.largest - best))
        relative = logits - best[:, None]
        weights = relative.exp()
        self.first_moment = shrunk * self.first_moment + beyond * self.total + _weighted(weights, relative)
        self.total = shrunk * self.total + weights.sum(-1)
        self.largest = best
        if base is not None:
            self.gap = base.shrunk * self.gap + _weighted(base.weights, base.logits - logits.to(base.logits.device))
        n_top = min(self.top.shape[1], logits.shape[1])
        values, ids = logits.topk(n_top, dim=-1)
        both, where = torch.cat([self.top, values], 1), torch.cat([self.top_ids, ids + part.start], 1)
        self.top, index = both.topk(self.top.shape[1], dim=-1)
        self.top_ids = where.gather(1, index)
        self._count(logits, part)
        return _Chunk(logits=logits, weights=weights, shrunk=shrunk)

    def _count(self, logits: Tensor, part: slice) -> None:
        """Count tokens above each target, itself left out: its logit here may be rounded otherwise."""
        if self.ids is None:
            return
        for column in range(self.ids.shape[1]):
            ids, target = self.ids[:, column].to(logits.device), self.target[:, column, None]
            above = logits > target
            inside = (ids >= part.start) & (ids < part.stop)
            own = above.gather(1, (ids - part.start).clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            self.ranks[:, column] += above.sum(-1) - (own & inside).long()


@attrs.frozen(kw_only=True, eq=False)
class _Chunk:
    """The reference's share of one range of tokens."""

    logits: Tensor
    weights: Tensor
    shrunk: Tensor


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Sum values by weights over tokens; a token of weight 0 adds nothing, though its logit be minus infinity."""
    return torch.where(weights == 0, 0.0, weights * values).sum(-1)


def _target_ids(model: "LensModel", targets: Any, n_rows: int) -> Int[Tensor, "row target"] | None:
    if targets is None:
        return None
    ids = token_ids(model, targets)
    if ids.ndim < 2:
        return ids.reshape(1, -1).expand(n_rows, -1)
    if ids.ndim != 2 or len(ids) != n_rows:
        raise ArgumentError(f"targets are one token, a list, or ids [{n_rows}, target]; got shape {list(ids.shape)}")
    return ids
