"""Random tokens that come again, as induction is measured on, and such as do not."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lens_core._arguments import is_whole
from lens_core._tokenizer import added_tokens
from lens_core.errors import ArgumentError, TokenizerError

__all__ = ["ordinary_ids", "random_rows", "repeated_rows", "start_ids"]


def ordinary_ids(model: Any) -> Int[Tensor, " token"]:
    """List the ids that stand for text: all of the vocabulary but the tokenizer's special tokens."""
    tokenizer, d_vocab = model.tokenizer, model.cfg.d_vocab
    ids = torch.arange(d_vocab if tokenizer is None else min(d_vocab, len(tokenizer)))
    special: list[int] = [] if tokenizer is None else list(tokenizer.all_special_ids)
    return ids[~torch.isin(ids, torch.tensor(special, dtype=torch.long))]


def start_ids(model: Any, prepend_bos: bool | None) -> list[int]:
    """Give what every row begins with: None does what the tokenizer does, True gives one BOS, False nothing."""
    tokenizer = model.tokenizer
    if prepend_bos is None:
        return [] if tokenizer is None else list(added_tokens(tokenizer, "a")[0])
    if not prepend_bos:
        return []
    bos: int | None = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise TokenizerError("prepend_bos=True, and the model has no tokenizer with a BOS token; leave it out")
    return [bos]


def random_rows(model: Any, rows: int, length: int, generator: torch.Generator) -> Int[Tensor, "row pos"]:
    """Draw ordinary ids, on the CPU."""
    for name, number in (("rows", rows), ("length", length)):
        if not is_whole(number):
            raise ArgumentError(f"random text has a positive number of {name}; got {number!r}")
    ids = ordinary_ids(model)
    return ids[torch.randint(len(ids), (rows, length), generator=generator)]


def repeated_rows(
    model: Any, rows: int, length: int, generator: torch.Generator, prepend_bos: bool | None
) -> Int[Tensor, "row pos"]:
    """Draw rows of `length` random ids that come twice, after what a row begins with."""
    start = torch.tensor(start_ids(model, prepend_bos), dtype=torch.long).expand(rows, -1)
    once = random_rows(model, rows, length, generator)
    return torch.cat([start, once, once], dim=1)
