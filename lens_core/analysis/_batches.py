"""Texts in batches: padded on the right, with the mask, so that position p of a text is column p."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

import attrs
import torch
from jaxtyping import Int
from torch import Tensor

from lens_core import tokens as _tokens
from lens_core._arguments import is_whole
from lens_core.errors import ArgumentError, EmptyInputError, HookDidNotFireError

__all__ = ["Batch", "batches", "run_through", "token_rows"]


@attrs.frozen(kw_only=True, eq=False)
class Batch:
    """Some texts as ids.

    Attributes:
        tokens: Padding holds id 0, which the mask hides.
        attention_mask: 1 for real tokens.
        first: Which of all texts the first row is.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    first: int = 0

    @property
    def call(self) -> dict[str, Any]:
        """Give what a run of the model takes besides the ids; no mask where nothing is padding."""
        return {} if bool(self.attention_mask.all()) else {"attention_mask": self.attention_mask}

    @property
    def lengths(self) -> list[int]:
        """Count the real tokens of each row."""
        return cast("Any", self.attention_mask.sum(1)).tolist()


def batches(model: Any, texts: Any, batch_size: int, *, prepend_bos: bool | None = None) -> Iterator[Batch]:
    """Go through texts, or rows of ids, a batch at a time; no more than a batch is in memory.

    No pad token is needed: the mask hides padding from the model.

    Args:
        model: Whose tokenizer and device are used.
        texts: A text; or an iterable of texts, of rows of ids, or of anything else that `to_tokens` takes for one row;
            or a tensor of ids `[row, pos]`.
        batch_size: Rows at a time.
        prepend_bos: As in `forward`; not with ids.

    Raises:
        ArgumentError: Neither texts nor ids; a batch size below 1.
        EmptyInputError: No texts.
    """
    if not is_whole(batch_size):
        raise ArgumentError(f"batch_size is a positive number; got {batch_size!r}")
    rows = token_rows(model, texts, prepend_bos=prepend_bos)
    first = 0
    while some := list(islice(rows, batch_size)):
        yield _padded(some, first, model.input_device)
        first += len(some)
    if not first:
        raise EmptyInputError("there are no texts; give at least one")


def run_through(model: Any, tokens: Tensor, last: int, hooks: Sequence[Any], **call: Any) -> None:
    """Run up to a block, without gradients, for what the hooks take; `last` of `n_layers` runs the whole model.

    Where hooks of the caller's own are further on, all is run: the result is the same.
    """
    stop = {} if last >= model.cfg.n_layers else {"stop_at_layer": last + 1}
    with torch.no_grad():
        try:
            model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None, **stop, **call)
        except HookDidNotFireError:  # before anything was computed, if it was for the stop
            if not stop:
                raise
            model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None, **call)


def token_rows(model: Any, texts: Any, *, prepend_bos: bool | None = None) -> Iterator[Tensor]:
    """Give each text as ids `[pos]`."""
    given: Iterable[Any]
    if isinstance(texts, str) or (isinstance(texts, Tensor) and texts.ndim < 2) or _is_ids(texts):
        given = [texts]
    elif isinstance(texts, Iterable):
        given = cast("Iterable[Any]", texts)
    else:
        raise ArgumentError(f"texts are strings, or rows of token ids; got {type(texts).__name__}")
    for one in given:
        if isinstance(one, Tensor) or _is_ids(one):
            if prepend_bos is not None:
                raise ArgumentError("prepend_bos is for text; ids are taken as they are")
            ids = torch.as_tensor(one)
            if ids.ndim != 1 or ids.is_floating_point() or not len(ids):
                raise ArgumentError(f"a row of ids is [pos], integers, not empty; got shape {list(ids.shape)}")
            yield ids
        else:
            yield _tokens.to_tokens(model.tokenizer, one, prepend_bos=prepend_bos).tokens[0]


def _is_ids(one: Any) -> bool:
    return isinstance(one, Sequence) and len(cast("Sequence[Any]", one)) > 0 and type(cast("Any", one)[0]) is int


def _padded(rows: Sequence[Tensor], first: int, device: torch.device) -> Batch:
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], mask[index, : len(row)] = row, 1
    return Batch(tokens=tokens.to(device), attention_mask=mask.to(device), first=first)
