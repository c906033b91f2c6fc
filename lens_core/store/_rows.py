"""From documents to rows of token ids, and which of their positions are kept."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import attrs
import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lens_core import tokens as _tokens
from lens_core._arguments import is_whole
from lens_core._positions import Positions, local_positions
from lens_core._tokenizer import encode, text_rows
from lens_core.errors import ArgumentError
from lens_core.store._corpus import Corpus, check_ids
from lens_core.store._layout import Manifest, RowRules

__all__ = ["Row", "Rows", "row_rules", "rows_of_unit", "stacked"]

_ENCODED = 64  # texts at a time
NONE = -1
"""No token: padding. No document: what was put between documents, or before them."""


@attrs.frozen(kw_only=True, eq=False)
class Row:
    """One row: its ids, and for each the document and which of the document's tokens it is; -1 for what was added."""

    tokens: Int[np.ndarray, " pos"]
    documents: Int[np.ndarray, " pos"]
    offsets: Int[np.ndarray, " pos"]

    def __len__(self) -> int:
        """Count the tokens."""
        return len(self.tokens)


@attrs.frozen(kw_only=True, eq=False)
class Rows:
    """Rows beside each other, padded on the right with -1."""

    tokens: Int[Tensor, "row pos"]
    documents: Int[Tensor, "row pos"]
    offsets: Int[Tensor, "row pos"]
    kept: Bool[Tensor, "row pos"]

    @property
    def lengths(self) -> list[int]:
        """Count the real tokens of each."""
        return cast("Any", (self.tokens != NONE).sum(1)).tolist()


def row_rules(
    model: Any,
    corpus: Corpus,
    *,
    context: int | None,
    pack: bool,
    prepend_bos: bool | None,
    positions: Positions,
    skip_special: bool,
) -> RowRules:
    """Decide how rows are made, from what was asked and what the tokenizer does.

    Raises:
        ArgumentError: A context that the model does not have, or without place for text; `prepend_bos` with ids.
        TokenizerError: Texts without a tokenizer, or a BOS that it does not have.
    """
    tokenizer, n_ctx = model.tokenizer, model.cfg.n_ctx
    context = min(n_ctx or 512, 512) if context is None else context
    if not is_whole(context) or context > (n_ctx or context):
        raise ArgumentError(f"context is 1 to {n_ctx}, the model's; got {context}")
    bos = separator = None
    if not corpus.is_text and prepend_bos is not None:
        raise ArgumentError("prepend_bos is for text; ids are taken as they are")
    if corpus.is_text and prepend_bos is None:
        prepend_bos = model.default_prepend_bos
    if corpus.is_text:
        _tokens.to_tokens(tokenizer, "a", prepend_bos=prepend_bos)  # whatever is wrong is told now
    if corpus.is_text and pack:
        separator = next((one for one in (tokenizer.eos_token_id, tokenizer.bos_token_id) if one is not None), None)
        first = int(_tokens.to_tokens(tokenizer, "a", prepend_bos=prepend_bos).tokens[0, 0])
        bos = first if first == tokenizer.bos_token_id else None
    if pack and context <= (bos is not None):
        raise ArgumentError(f"context={context} leaves no place for text beside BOS")
    special = sorted(getattr(tokenizer, "all_special_ids", ())) if skip_special else ()
    return RowRules(
        context=context,
        pack=pack,
        prepend_bos=prepend_bos,
        bos=bos,
        separator=separator,
        positions=_noted(positions),
        skipped=tuple(special),
    )


def rows_of_unit(model: Any, corpus: Corpus, manifest: Manifest, unit: int) -> tuple[list[Row], int]:
    """Make the rows of a unit of documents; the second is how many tokens found no place."""
    rules = manifest.rows
    numbers = manifest.sources[0].documents(unit)
    first, documents = numbers.start, corpus.read(numbers.start, numbers.stop)
    ids = _ids(model, documents, rules) if corpus.is_text else documents
    check_ids(ids, model.cfg.d_vocab, first)
    if rules.pack:
        return list(_packed(ids, first, rules)), 0
    rows = [_row(row[: rules.context], first + index) for index, row in enumerate(ids) if len(row)]
    return rows, sum(max(len(row) - rules.context, 0) for row in ids)


def _ids(model: Any, texts: Sequence[str], rules: RowRules) -> list[Any]:
    """Give the ids of each text: for packing what is in it alone, otherwise with what the tokenizer adds.

    Some texts at a time, and in arrays: a tokenizer's own record of a token takes a hundred bytes and more.
    """
    found: list[Any] = []
    for start in range(0, len(texts), _ENCODED):
        rows = _encoded(model, texts[start : start + _ENCODED], rules)
        found += [np.asarray(row, dtype=np.int32) for row in rows]
    return found


def _encoded(model: Any, texts: Sequence[str], rules: RowRules) -> list[list[int]]:
    given = [text for text in texts if text]  # an empty one is no document, whatever the tokenizer would add to it
    if not given:
        return [[] for _ in texts]
    if rules.pack:
        rows = iter(encode(model.tokenizer, given, add_special_tokens=False))
    else:
        rows = iter(text_rows(model.tokenizer, given, prepend_bos=rules.prepend_bos))
    return [next(rows) if text else [] for text in texts]


def _row(ids: Any, document: int) -> Row:
    tokens = np.asarray(ids, dtype=np.int32)
    owners = np.full(len(tokens), document, dtype=np.int64)
    return Row(tokens=tokens, documents=owners, offsets=np.arange(len(tokens), dtype=np.int32))


def _packed(ids: Sequence[Any], first: int, rules: RowRules) -> Iterator[Row]:
    """Put documents one after the other, the separator between two, and cut: each row begins with BOS, if any."""
    pieces = list[Row]()
    for index, document in enumerate(ids):
        if not len(document):
            continue
        if pieces and rules.separator is not None:
            pieces.append(_added(rules.separator))
        pieces.append(_row(document, first + index))
    if not pieces:
        return
    whole = _joined(pieces)
    head = [] if rules.bos is None else [_added(rules.bos)]
    size = rules.context - len(head)
    for start in range(0, len(whole), size):
        part = slice(start, start + size)
        body = Row(tokens=whole.tokens[part], documents=whole.documents[part], offsets=whole.offsets[part])
        yield _joined([*head, body])


def _added(token: int) -> Row:
    none = np.full(1, NONE)
    return Row(tokens=np.array([token], dtype=np.int32), documents=none, offsets=none.astype(np.int32))


def _joined(rows: Sequence[Row]) -> Row:
    return Row(
        tokens=np.concatenate([row.tokens for row in rows]),
        documents=np.concatenate([row.documents for row in rows]),
        offsets=np.concatenate([row.offsets for row in rows]),
    )


def stacked(rows: Sequence[Row], rules: RowRules) -> Rows:
    """Put rows beside each other and say which positions are kept."""
    width = max(map(len, rows), default=0)

    def column(name: str, dtype: torch.dtype) -> Tensor:
        found = torch.full((len(rows), width), NONE, dtype=dtype)
        for index, row in enumerate(rows):
            found[index, : len(row)] = torch.as_tensor(getattr(row, name))
        return found

    tokens = column("tokens", torch.int32)
    kept = torch.zeros(len(rows), width, dtype=torch.bool)
    positions = _positions(rules)
    for index, row in enumerate(rows):
        kept[index, local_positions(positions, first=0, total=len(row))] = True
    kept &= ~torch.isin(tokens, torch.tensor(rules.skipped, dtype=torch.int32))
    return Rows(
        tokens=tokens, documents=column("documents", torch.int64), offsets=column("offsets", torch.int32), kept=kept
    )


def _noted(positions: Positions) -> Any:
    """Bring positions to what JSON holds."""
    if isinstance(positions, slice):
        ends: Any = positions
        return {"slice": [None if end is None else int(end) for end in (ends.start, ends.stop, ends.step)]}
    return positions if positions is None or isinstance(positions, int) else list(positions)


def _positions(rules: RowRules) -> Positions:
    given: Any = rules.positions
    return slice(*cast("dict[str, Any]", given)["slice"]) if isinstance(given, dict) else given
