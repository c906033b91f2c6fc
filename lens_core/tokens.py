"""Text to token ids and back, over any HF tokenizer, which is never changed.

One rule for the beginning-of-sequence token (BOS), the same in every function: `prepend_bos=None` is what the
checkpoint's own tokenizer does when it is called plainly; True gives exactly one BOS at the start of every row, after
left padding; False gives none of the tokenizer's making. False leaves a BOS that the user typed into a text, and
everything else that the tokenizer adds, such as an end-of-sequence token. Role/content messages go through the
tokenizer's chat template, whose leading BOS counts as the tokenizer's: None keeps it, True never makes it two.

Padding is done here, from lists of ids, so that no attribute of the tokenizer is set, not even for a moment: several
threads may share one. The mask that comes with the tokens says what is padding; the pad token's id says nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias, TypeGuard, cast

import attrs
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from lens_core._token_ids import check_mask, check_tokens, id_rows, id_tensor, position_ids
from lens_core._tokenizer import (
    Tokenizer,
    apply_template,
    decode,
    encode,
    find_tokenizer,
    text_rows,
    token_text,
    without_leading,
)
from lens_core.errors import ArgumentError, EmptyInputError, PaddingError, TokenIdError, TokenizerError

__all__ = [
    "Encoded",
    "Tokenizer",
    "check_mask",
    "check_tokens",
    "find_tokenizer",
    "get_token_position",
    "position_ids",
    "to_single_str_token",
    "to_single_token",
    "to_str_tokens",
    "to_string",
    "to_tokens",
    "tokenize_and_concatenate",
]

Device: TypeAlias = torch.device | str | int | None


@attrs.frozen(kw_only=True, eq=False)
class Encoded:
    """Hold a batch of token rows, padded to one length.

    Attributes:
        tokens: ids; padding holds the pad token's id.
        attention_mask: 1 where a token is real, 0 where it is padding.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]


def to_tokens(
    tokenizer: Tokenizer | None,
    input: object,
    *,
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
    truncate_to: int | None = None,
    device: Device = None,
) -> Encoded:
    """Turn text or chat messages into a batch of token ids.

    Args:
        tokenizer: an HF tokenizer.
        input: a string, a list of strings, a list of role/content messages, or a list of such lists. Messages get the
            template's generation prompt.
        prepend_bos: None for what the tokenizer does, True for exactly one BOS per row, False for none.
        padding_side: "left" or "right"; None is the tokenizer's own.
        truncate_to: keep at most this many tokens of each row, from its start.
        device: where the tensors go.

    Raises:
        TokenizerError: no tokenizer; no BOS token to prepend; no chat template, or one that refuses the messages.
        PaddingError: rows of unequal length and no pad token.
        EmptyInputError: no texts, or a text without tokens.
        ArgumentError: anything else as input, or a bad `padding_side` or `truncate_to`.
    """
    tokenizer = _present(tokenizer)
    side = _side(tokenizer, padding_side)
    rows = _rows(tokenizer, _conversations(input), prepend_bos)
    if truncate_to is not None:
        if truncate_to < 1:
            raise ArgumentError(f"truncate_to={truncate_to} keeps no tokens. Give 1 or more.")
        rows = [row[:truncate_to] for row in rows]
    return _padded(tokenizer, rows, side, device)


def _present(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        message = "Text was given and the model has no tokenizer. Pass tokenizer= to lens.load, or give token ids."
        raise TokenizerError(message)
    return tokenizer


def _side(tokenizer: Tokenizer, padding_side: str | None) -> str:
    side = getattr(tokenizer, "padding_side", "right") if padding_side is None else padding_side
    if side not in ("left", "right"):
        raise ArgumentError(f'padding_side={side!r} is not a side. Give "left", "right" or None.')
    return side


def _conversations(input: object) -> list[str] | list[list[dict[str, Any]]]:
    """Sort the input into strings or into lists of messages, one per row."""
    if isinstance(input, str):
        return [input]
    if not isinstance(input, list | tuple):
        message = f"Text must be a string, a list of strings or a list of messages, not {type(input).__name__}."
        raise ArgumentError(message)
    items = cast("Sequence[object]", input)
    if not items:
        raise EmptyInputError("An empty list was given. Give at least one text.")
    if all(isinstance(item, str) for item in items):
        return cast("list[str]", list(items))
    conversations = [items] if isinstance(items[0], Mapping) else items
    return [_messages(conversation) for conversation in conversations]


def _messages(conversation: object) -> list[dict[str, Any]]:
    if not isinstance(conversation, list | tuple):
        message = f"A batch must hold strings only or lists of messages only; it holds {conversation!r}."
        raise ArgumentError(message)
    messages = cast("Sequence[object]", conversation)
    if not messages:
        raise EmptyInputError("A conversation without messages was given. Give at least one message.")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            text = f'A message is a mapping such as {{"role": "user", "content": "Hello"}}, not {message!r}.'
            raise ArgumentError(text)
    return [dict(cast("Mapping[str, Any]", message)) for message in messages]


def _rows(
    tokenizer: Tokenizer, texts: list[str] | list[list[dict[str, Any]]], prepend_bos: bool | None
) -> list[list[int]]:
    """Give the unpadded ids of every text or conversation, BOS by the module's rule."""
    if prepend_bos and tokenizer.bos_token_id is None:
        message = "prepend_bos=True, and the tokenizer has no BOS token. Set tokenizer.bos_token, or leave it out."
        raise TokenizerError(message)
    if _all_strings(texts):
        rows = text_rows(tokenizer, texts, prepend_bos=prepend_bos)
    else:
        rows = [apply_template(tokenizer, messages) for messages in texts if not isinstance(messages, str)]
        if prepend_bos is not None:
            bos = tokenizer.bos_token_id
            rows = [[bos] * prepend_bos + without_leading(row, bos) for row in rows]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            message = f"{text!r} gives no tokens. Give some text, or pass prepend_bos=True for the BOS token alone."
            raise EmptyInputError(message)
    return rows


def _all_strings(texts: Sequence[object]) -> TypeGuard[list[str]]:
    return isinstance(texts[0], str)


def _padded(tokenizer: Tokenizer, rows: list[list[int]], side: str, device: Device) -> Encoded:
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    pad = tokenizer.pad_token_id
    if any(gaps) and pad is None:
        message = (
            f"The texts have {longest - max(gaps)} to {longest} tokens and the tokenizer has no pad token. Set one, "
            "such as `tokenizer.pad_token = tokenizer.eos_token`, or give texts of equal length."
        )
        raise PaddingError(message)

    def fill(row: list[int], gap: int, value: int) -> list[int]:
        return [value] * gap + row if side == "left" else row + [value] * gap

    tokens = [fill(row, gap, pad or 0) for row, gap in zip(rows, gaps, strict=True)]
    mask = [fill([1] * len(row), gap, 0) for row, gap in zip(rows, gaps, strict=True)]
    return Encoded(tokens=torch.tensor(tokens, device=device), attention_mask=torch.tensor(mask, device=device))


def to_string(tokenizer: Tokenizer | None, tokens: object) -> str | list[str]:
    """Decode ids, special tokens included: up to one axis to a string, two axes to a list of strings.

    Raises:
        TokenizerError: no tokenizer.
        TokenIdError: a negative id, or one too large for any vocabulary.
        ArgumentError: not integers, or more than two axes.
    """
    tokenizer = _present(tokenizer)
    ids = id_tensor(tokens)
    if ids.ndim > 2:
        raise ArgumentError(f"Token ids have shape [], [pos] or [batch, pos], not {list(ids.shape)}.")
    if ids.ndim < 2:
        return decode(tokenizer, id_rows(ids.reshape(-1))[0])
    return [decode(tokenizer, row) for row in id_rows(ids)]


def to_str_tokens(
    tokenizer: Tokenizer | None, input: object, *, prepend_bos: bool | None = None, padding_side: str | None = None
) -> list[str] | list[list[str]]:
    """Split text, or ids, into the text of each token.

    The first token of a row reads as it does at the start of a text, the others as they do after another token, so
    that joining a row gives `to_string` of it, but where a character is spread over several tokens.

    Args:
        tokenizer: an HF tokenizer.
        input: what `to_tokens` takes, or ids of shape [pos] or [batch, pos].
        prepend_bos: as for `to_tokens`; not with ids.
        padding_side: pad the rows of a batch of texts on this side; None leaves them unpadded. Not with ids.

    Returns:
        A list of strings for one text, one conversation or a row of ids (a tensor of one row included), else a list
        of such lists.

    Raises:
        ArgumentError: `prepend_bos` or `padding_side` with ids; more than two axes.
        LensError: whatever `to_tokens` and `to_string` raise.
    """
    tokenizer = _present(tokenizer)
    if _is_text(input):
        conversations = _conversations(input)
        rows = _rows(tokenizer, conversations, prepend_bos)
        if padding_side is not None:
            rows = id_rows(_padded(tokenizer, rows, _side(tokenizer, padding_side), None).tokens)
        is_single = isinstance(input, str) or isinstance(cast("list[object]", input)[0], Mapping)
    else:
        ids = _given_ids(input, prepend_bos, padding_side)
        is_single = ids.ndim == 1 or (ids.shape[0] == 1 and not isinstance(input, list | tuple))
        rows = id_rows(ids)
    pieces = [[token_text(tokenizer, token, is_first=i == 0) for i, token in enumerate(row)] for row in rows]
    return pieces[0] if is_single else pieces


def _is_text(input: object) -> bool:
    if isinstance(input, list | tuple) and input:
        return _is_text(cast("Sequence[object]", input)[0])
    return isinstance(input, str | Mapping)


def _given_ids(input: object, prepend_bos: bool | None, padding_side: str | None) -> Integer[Tensor, "*shape"]:
    for name, value in (("prepend_bos", prepend_bos), ("padding_side", padding_side)):
        if value is not None:
            raise ArgumentError(
                f"{name}={value!r} was given with token ids, which are taken as they are. Leave it out."
            )
    ids = id_tensor(input)
    if ids.ndim not in (1, 2):
        raise ArgumentError(f"Token ids have shape [pos] or [batch, pos], not {list(ids.shape)}.")
    return ids


def to_single_token(tokenizer: Tokenizer | None, string: str) -> int:
    """Give the id of the one token that a string is, a leading space included.

    Raises:
        TokenizerError: no tokenizer, or the string is no token, several, or the unknown token.
    """
    hf = _present(tokenizer)
    (ids,) = encode(hf, [string], add_special_tokens=False)
    if len(ids) != 1 and string.startswith(" "):  # some tokenizers put the space there themselves
        (bare,) = encode(hf, [string[1:]], add_special_tokens=False)
        if len(bare) == 1 and token_text(hf, bare[0], is_first=False) == string:
            ids = bare
    if len(ids) != 1:
        pieces = [token_text(hf, token, is_first=i == 0) for i, token in enumerate(ids)]
        message = f"{string!r} is {len(ids)} tokens, not one: {pieces} (ids {ids}). Note that a leading space counts."
        raise TokenizerError(message)
    if ids[0] == hf.unk_token_id and string != hf.unk_token:
        raise TokenizerError(f"{string!r} is not in the vocabulary: the tokenizer gives {hf.unk_token!r} for it.")
    return ids[0]


def to_single_str_token(tokenizer: Tokenizer | None, token: int) -> str:
    """Give the text of one token id, by itself.

    Raises:
        TokenizerError: no tokenizer.
        TokenIdError: the tokenizer has no such id.
    """
    hf = _present(tokenizer)
    if not 0 <= token < len(hf):
        raise TokenIdError(f"The tokenizer has no id {token}; it has {len(hf)} (0 to {len(hf) - 1}).")
    return decode(hf, [token])


def get_token_position(
    tokenizer: Tokenizer | None,
    single_token: str | int,
    input: object,
    *,
    mode: str = "first",
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
) -> int:
    """Find where a token stands in one text or one row of ids, 0-based, a BOS counted.

    Args:
        tokenizer: an HF tokenizer; None will do when both the token and the input are ids.
        single_token: the token as text or id.
        input: what `to_tokens` takes, or ids, of one row.
        mode: "first" or "last" of several.
        prepend_bos: as for `to_tokens`; not with ids.
        padding_side: as for `to_tokens`, though one row is never padded; not with ids.

    Raises:
        TokenizerError: the token is not there, or `single_token` is not one token.
        ArgumentError: a bad `mode`, or more than one row.
        LensError: whatever `to_tokens` raises.
    """
    if mode not in ("first", "last"):
        raise ArgumentError(f'mode={mode!r} is not known. Give "first" or "last".')
    if _is_text(input):
        ids = to_tokens(tokenizer, input, prepend_bos=prepend_bos, padding_side=padding_side).tokens
    else:
        ids = _given_ids(input, prepend_bos, padding_side)
    if ids.ndim > 1 and ids.shape[0] != 1:
        raise ArgumentError(f"The position of a token is looked up in one row, and {ids.shape[0]} were given.")
    token = to_single_token(tokenizer, single_token) if isinstance(single_token, str) else single_token
    row = id_rows(ids.reshape(-1))[0]
    places = [pos for pos, other in enumerate(row) if other == token]
    if not places:
        message = f"Token {single_token!r} (id {token}) is not in the input of {len(row)} tokens, ids {row[:20]}"
        raise TokenizerError(f"{message}{'...' if len(row) > 20 else ''}.")
    return places[0] if mode == "first" else places[-1]


def tokenize_and_concatenate(
    dataset: Iterable[Any],
    tokenizer: Tokenizer | None,
    *,
    max_length: int = 1024,
    column_name: str = "text",
    add_bos_token: bool = True,
) -> Int[Tensor, "row pos"]:
    """Tokenize texts, put them one after the other, and cut that into rows of equal length, without padding.

    Args:
        dataset: texts, or mappings that have them under `column_name`, as HF's data sets give; an iterator will do.
        tokenizer: an HF tokenizer; the end-of-sequence token stands between two texts.
        max_length: tokens in a row, BOS included.
        column_name: where a mapping has its text.
        add_bos_token: begin each row with BOS. The tokenizer's own special tokens are left out.

    Returns:
        Rows on the CPU. What does not fill a row at the end is left out (TransformerLens pads it where it is all).

    Raises:
        TokenizerError: no tokenizer, no EOS token, or no BOS token to add.
        EmptyInputError: the texts do not fill one row.
        ArgumentError: a row that has no place for text.
    """
    hf = _present(tokenizer)
    bos, eos = (getattr(hf, f"{name}_token_id", None) for name in ("bos", "eos"))
    if eos is None or (add_bos_token and bos is None):
        which = "EOS token to put between texts" if eos is None else "BOS token; pass add_bos_token=False"
        raise TokenizerError(f"The tokenizer has no {which}.")
    size = max_length - add_bos_token
    if size < 1:
        raise ArgumentError(f"max_length={max_length} leaves no place for text.")
    texts = (cast("Any", one)[column_name] if isinstance(one, Mapping) else one for one in dataset)
    ids: list[int] = []
    while some := list(islice(texts, 256)):
        for row in encode(hf, some, add_special_tokens=False):
            ids += [eos, *row] if ids else row
    if len(ids) < size:
        raise EmptyInputError(f"The texts have {len(ids)} tokens, and a row takes {size}. Give more, or shorter rows.")
    rows = torch.tensor(ids[: len(ids) // size * size]).reshape(-1, size)
    return torch.nn.functional.pad(rows, (1, 0), value=bos) if add_bos_token else rows
