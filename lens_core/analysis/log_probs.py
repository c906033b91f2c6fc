"""Log-probabilities of a text's tokens, without the logits of all positions and tokens being there at once.

HF's own model runs as far as what the unembedding receives; from there on `readout.py` multiplies some positions with
some of the vocabulary at a time.
"""

from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_core._arguments import checks_arguments, is_whole
from lens_core._inputs import read_input
from lens_core.analysis.readout import CHUNK, Readout, read_vocabulary
from lens_core.errors import ArgumentError, InputError, UnsupportedHookError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["LogProbs", "log_probs"]

ROWS = 128
"""Positions at once."""
BEYOND = ("unembed.hook_out", "hook_logits")
"""Hook points that hold logits of the whole vocabulary."""


@attrs.frozen(kw_only=True, eq=False)
class LogProbs:
    """What a model gives for each next token of a text.

    Position `i` is about the token at `i + 1`, predicted from those up to `i`.

    Attributes:
        tokens: The tokens that were predicted.
        log_probs: Their log-probabilities in nats; 0 where the token or its context is padding.
        is_real: Where neither is.
        ranks: How many tokens are more likely.
        entropy: Of each distribution, in nats.
        top_tokens: Ids of the most likely tokens, best first.
        top_log_probs: Their log-probabilities, in nats.
    """

    tokens: Int[Tensor, "batch pos"]
    log_probs: Float[Tensor, "batch pos"]
    is_real: Tensor
    ranks: Int[Tensor, "batch pos"]
    entropy: Float[Tensor, "batch pos"]
    top_tokens: Int[Tensor, "batch pos top"]
    top_log_probs: Float[Tensor, "batch pos top"]

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The mean next-token cross-entropy in nats, real tokens only: `return_type="loss"`, to rounding."""
        return -self.log_probs.sum() / self.is_real.sum().clamp(min=1)


@checks_arguments
def log_probs(
    model: "LensModel",
    input: Any,
    *,
    top: int = 1,
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] | None = None,
    attention_mask: Tensor | None = None,
    rows: int = ROWS,
    chunk: int = CHUNK,
) -> LogProbs:
    """Give the log-probability of each next token of a text, with its rank, and the entropy and best tokens there.

    At most `rows * chunk` logits are there at once, a few times over, in at least float32; besides, the activations of
    a plain run, and what the unembedding receives. Live hooks count, but none at the logits. No gradient.

    Args:
        model: The model.
        input: Text, texts, or token ids, as `forward` takes them; at least two tokens.
        top: How many of the most likely tokens to keep at each position.
        prepend_bos: As in `forward`.
        padding_side: As in `forward`.
        attention_mask: 1 for real tokens; None derives it.
        rows: Positions at once.
        chunk: Tokens of the vocabulary at once.

    Raises:
        InputError: What the model cannot take, embeddings, or one token, after which none comes.
        UnsupportedHookError: A hook at `unembed.hook_out` or `hook_logits`, which are never there as a whole.
        ArgumentError: `top`, `rows` or `chunk` is not a positive int.
        WeightError: The unembedding is quantised.

    Example:
        >>> import torch, lens_core as lens
        >>> from lens_core.analysis.log_probs import log_probs
        >>> model = lens.load("toy:gpt2")
        >>> found = log_probs(model, "the cat sat on the mat.")
        >>> torch.allclose(found.loss, model("the cat sat on the mat.", return_type="loss"), atol=1e-4)
        True
    """
    for name, given in (("top", top), ("rows", rows), ("chunk", chunk)):
        if not is_whole(given):
            raise ArgumentError(f"{name} is a whole number, at least 1; got {given!r}")
    inputs = read_input(model, input, prepend_bos=prepend_bos, padding_side=padding_side, attention_mask=attention_mask)
    tokens, mask = inputs.tokens, inputs.attention_mask
    if tokens is None or tokens.shape[1] < 2:
        what = "embeddings have no next tokens" if tokens is None else "there is one token, and none comes after it"
        raise InputError(f"log-probabilities are of tokens that follow others: {what}; give text or ids of at least 2")
    with torch.no_grad():
        final = _final(model, inputs)[:, :-1].flatten(0, 1)
        targets = tokens[:, 1:].reshape(-1, 1)
        parts = [
            read_vocabulary(
                model, [final[first : first + rows]], targets=targets[first : first + rows], top=top, chunk=chunk
            )
            for first in range(0, len(final), rows)
        ]
    real = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    if mask is not None:
        real = mask[:, 1:].bool() & mask[:, :-1].bool()
    return _joined(parts, tokens[:, 1:], real)


def _final(model: "LensModel", inputs: Any) -> Float[Tensor, "batch pos d_model"]:
    """Run the model, and give what the unembedding receives; HF computes the logits of one position only."""
    added = [name for entry in model.added_hooks for name in entry.names]
    with model.caching("unembed.hook_in") as cache, model.running() as run:
        asked = [watch.name for watch in run.watches if watch.name in BEYOND] or [n for n in added if n in BEYOND]
        if asked:
            raise UnsupportedHookError(
                f"a hook at {asked[0]!r} has the logits of all tokens, and log_probs never makes them; take it away, "
                "or take the log-probabilities of model(tokens)"
            )
        model.hf_model(**inputs.for_hf(), use_cache=False, logits_to_keep=1)
    return cache["unembed.hook_in"]


def _joined(parts: list[Readout], tokens: Tensor, real: Tensor) -> LogProbs:
    def join(values: list[Any]) -> Tensor:
        value = torch.cat([one[0] for one in values]).to(tokens.device)
        return value.view(*tokens.shape, *value.shape[1:])

    scores = join([part.target_log_probs for part in parts])[..., 0]
    return LogProbs(
        tokens=tokens,
        log_probs=torch.where(real, scores, torch.zeros((), dtype=scores.dtype, device=scores.device)),
        is_real=real,
        ranks=join([part.target_ranks for part in parts])[..., 0],
        entropy=join([part.entropy for part in parts]),
        top_tokens=join([part.top_tokens for part in parts]),
        top_log_probs=join([part.top_log_probs for part in parts]),
    )
