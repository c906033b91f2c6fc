"""Token ids and masks as a user may give them, checked and brought to one form."""

import reprlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Int, Integer
from torch import Tensor

from lens_core.errors import ArgumentError, ContextLengthError, EmptyInputError, PaddingError, TokenIdError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def check_tokens(
    tokens: object, *, d_vocab: int, n_ctx: int | None = None, n_past: int = 0
) -> Int[Tensor, "batch pos"]:
    """Give token ids as a batch of int64 rows, and refuse what the model cannot take.

    The result may share storage with `tokens`. Waits for the device once; ids on the meta device are not looked at.

    Args:
        tokens: ids of shape [pos] or [batch, pos]: tensor, array or lists.
        d_vocab: how many ids the model's embedding holds.
        n_ctx: the most positions the model takes; None for no limit.
        n_past: positions that a key/value cache holds already.

    Raises:
        ArgumentError: not integers, or neither one nor two axes.
        PaddingError: lists of unequal length.
        EmptyInputError: no ids.
        TokenIdError: an id outside the vocabulary.
        ContextLengthError: more positions than the context holds.
    """
    ids = id_tensor(tokens)
    if ids.ndim not in (1, 2):
        raise ArgumentError(f"Token ids have shape [pos] or [batch, pos], not {list(ids.shape)}.")
    ids = _as_rows(ids).long()
    if ids.numel() == 0:
        raise EmptyInputError(f"No token ids were given (shape {list(ids.shape)}). Give at least one.")
    if n_ctx is not None and n_past + ids.shape[1] > n_ctx:
        past = f" after {n_past} in the cache" if n_past else ""
        message = f"The input has {ids.shape[1]} tokens{past}, and the model's context holds {n_ctx}. Shorten the input"
        raise ContextLengthError(f"{message}, for example with model.to_tokens(text, truncate_to={n_ctx}).")
    if not ids.is_meta:
        outside = (ids < 0) | (ids >= d_vocab)
        if outside.any():
            row, pos = id_rows(outside.nonzero())[0]
            message = (
                f"Token id {int(ids[row, pos])} at row {row}, position {pos} is outside the vocabulary of {d_vocab}"
            )
            raise TokenIdError(f"{message} ids (0 to {d_vocab - 1}). Use ids from this model's own tokenizer.")
    return ids


def id_tensor(tokens: object) -> Integer[Tensor, "*shape"]:
    """Make an integer tensor of any number of axes."""
    if not isinstance(tokens, Tensor):
        try:
            tokens = torch.tensor(_plain(tokens), dtype=torch.long)
        except TypeError as error:
            raise ArgumentError(f"Token ids must be integers in rows of one depth: {error}.") from error
        except ValueError as error:
            if "verflow" in str(error):
                raise TokenIdError(f"A token id does not fit 64 bits ({error}). Use ids from the tokenizer.") from error
            message = (
                f"The rows of ids have unequal lengths ({error}). Pad them, and pass attention_mask= to say where."
            )
            raise PaddingError(message) from error
    if tokens.dtype not in _INTEGERS:
        raise ArgumentError(f"Token ids must be integers, not {tokens.dtype}. Use the ids that a tokenizer gives.")
    return tokens


def id_rows(ids: Integer[Tensor, "*shape"]) -> list[list[int]]:
    """List the ids of one or two axes, row by row."""
    return cast("Any", _as_rows(ids)).tolist()


def _as_rows(ids: Integer[Tensor, "*shape"]) -> Integer[Tensor, "batch pos"]:
    return ids if ids.ndim == 2 else ids.reshape(1, -1)


def _plain(tokens: object) -> object:
    """Turn arrays, and lists of whatever, into nested lists of Python integers."""
    if isinstance(tokens, list | tuple | range):
        return [_plain(item) for item in cast("Sequence[object]", tokens)]
    if not isinstance(tokens, int) and hasattr(tokens, "tolist"):
        return _plain(cast("Any", tokens).tolist())
    if not isinstance(tokens, int) or isinstance(tokens, bool):
        raise TypeError(f"found {reprlib.repr(tokens)}, a {type(tokens).__name__}")
    return tokens


def check_mask(mask: Tensor, *, batch: int, length: int) -> Int[Tensor, "batch pos"]:
    """Give an attention mask as int64, and refuse one that does not fit the tokens.

    Args:
        mask: 1 or True where a token is real, 0 or False where it is padding.
        batch: rows of the input.
        length: positions, those in the cache included.

    Raises:
        ArgumentError: another shape, or values other than 0 and 1.
        EmptyInputError: a row that is nothing but padding.
    """
    if mask.shape != (batch, length):
        raise ArgumentError(f"attention_mask has shape {list(mask.shape)}; the input needs {[batch, length]}.")
    if not mask.is_meta:
        if not ((mask == 0) | (mask == 1)).all():
            raise ArgumentError("attention_mask holds values other than 0 (padding) and 1 (a real token).")
        if not (mask == 1).any(dim=1).all():
            raise EmptyInputError("attention_mask has a row that is nothing but padding. Leave that row out.")
    return mask.long()


def position_ids(mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Number the real tokens of each row from 0; padding gets 0, which no real token depends on.

    With a key/value cache give the whole mask, past included, and take the last columns.

    Example:
        >>> position_ids(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]))
        tensor([[0, 0, 0, 1],
                [0, 1, 2, 0]])
    """
    return (mask.long().cumsum(dim=1) - 1).masked_fill(mask == 0, 0)
