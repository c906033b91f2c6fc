"""The pictures themselves."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import attrs

from lens_core.errors import ArgumentError
from lens_core.view import _values
from lens_core.view._page import Picture
from lens_core.view._values import number_format, present, text, visible

_LEVELS = 10_000  # a weight is written as a whole number of 1/10000 of the largest (of 1, where all lie in 0..1)
_COLUMNS = (4, 8)  # small multiples in one row, at least and at most


def attention(
    tokens: Sequence[str],
    patterns: object,
    *,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    highlight: Iterable[str | int] = (),
    note: str | None = None,
) -> Picture:
    """Draw one heat map per head, each with the text it reads.

    Hovering shows the two tokens and the weight; a chosen head is drawn large beside the text, where each token shows
    what it attends to. Weights are kept to four digits; each that is not masked adds 2 to 4 bytes.

    Args:
        tokens: The text, one string per position.
        patterns: `[heads, query, key]` of one batch row, or a mapping from label to `[query, key]`. Rows that should
            sum to 1 need not; with any negative value the colours diverge. Not finite (a masked score): no value.
        labels: A name per head; `head 0`, `head 1`, ... if absent. Not with a mapping.
        title: Stands above the picture.
        highlight: Heads to outline, by label or by number.
        note: A line below the title: what the values are, where they are no attention pattern.

    Raises:
        ArgumentError: shapes, labels and tokens do not fit each other, or a highlighted head does not exist.

    Example:
        >>> picture = attention(["a", "b"], [[[1.0, 0.0], [0.25, 0.75]]], labels=["L0H0"], highlight=["L0H0"])
        >>> picture.html.count("<canvas>")
        1
    """
    words = [visible(token) for token in _values.strings(tokens, "attention: tokens")]
    names, maps = _heads(patterns, labels, len(words))
    marked = _positions(highlight, names, "attention")
    every = present(value for rows in maps for row in rows for value in row)
    largest = max(map(abs, every), default=0.0) or 1.0
    bounded = min(every, default=0.0) >= 0 and largest <= 1 + 1e-3  # a half-precision softmax may exceed 1
    top = 1.0 if bounded else largest
    signed = min(every, default=0.0) < 0
    data = {"tokens": words, "first": min(marked, default=0), **_weights(names, maps, top)}
    shown = number_format([top])
    ends = (shown(-top), shown(top)) if signed else ("0", "1" if bounded else shown(top))
    tiles = "".join(
        _tile(name, rows, words, i in marked) for i, (name, rows) in enumerate(zip(names, maps, strict=True))
    )
    legend = _legend("weight" if bounded else "value", "map-signed" if signed else "map", ends)
    hint = '<span class="lens-muted">rows: the token that looks (query) · columns: the token looked at (key)</span>'
    remark = f'<p class="lens-muted">{text(note)}</p>' if note else ""
    content = (
        f'{remark}<div class="lens-row">{legend}{hint}</div>'
        f'<div class="lens-heads" style="--columns:{_columns(len(names))}">{tiles}</div>'
        f'<div class="lens-detail"></div><noscript><p class="lens-muted">The heat maps need JavaScript.</p></noscript>'
        f"{_values.json_script(data)}"
    )
    return _figure("attention", title or "Attention patterns", content, caption=title)


def tokens(
    tokens: Sequence[str],
    values: object,
    *,
    title: str | None = None,
    unit: str = "",
    full: float | None = None,
) -> Picture:
    """Colour a text by a value per token; hovering shows the value.

    Args:
        tokens: The text, one string per position.
        values: One number per token; None or not finite: no value. With any negative one the colours diverge around 0.
        title: Stands above the picture.
        unit: What the numbers are, such as `nats`.
        full: The size of a value with the deepest colour, so that two pictures compare; the largest one if absent.

    Raises:
        ArgumentError: the values are not numbers, or not one for each token, or `full` is not finite and above 0.

    Example:
        >>> picture = tokens(["The", " cat"], [None, 3.2], title="Loss", unit="nats")
    """
    words = _values.strings(tokens, "tokens: tokens")
    numbers = _values.vector(values, len(words), "tokens: values")
    shades = _Shades.of(numbers, full, "tokens")
    spans: list[str] = []
    for i, (word, value) in enumerate(zip(words, numbers, strict=True)):
        tip = text(f"{_isolated(word, i)}: {shades.shown(value)}{f' {unit}' if unit and value is not None else ''}")
        spans.append(
            f'<span class="lens-token {shades.kind(value)}" style="--v:{shades.share(value):.3f}" title="{tip}">'
            f"{text(visible(word))}</span>"
        )
        spans.append("<br>" if word.endswith("\n") else "")
    content = (
        f'<div class="lens-text" role="group">{"".join(spans)}</div><div class="lens-row">{shades.legend(unit)}</div>'
    )
    return _figure("tokens", title or "Tokens", content, caption=title)


def grid(
    rows: Sequence[str],
    columns: Sequence[str],
    values: object,
    *,
    texts: Sequence[Sequence[str]] | None = None,
    title: str | None = None,
    unit: str = "",
    full: float | None = None,
) -> Picture:
    """Colour a cell for every row and column, such as layers and tokens; hovering shows the value.

    Args:
        rows: A name per row, from the top.
        columns: The text, one string per position, or other names.
        values: `[rows, columns]`; None or not finite: no value. With any negative one the colours diverge around 0.
        texts: A token for each cell, `[rows, columns]`, written in it; none if absent.
        title: Stands above the picture.
        unit: What the numbers are, such as `nats`.
        full: The size of a value with the deepest colour; the largest one if absent.

    Raises:
        ArgumentError: the values are not numbers, values or texts are not one for each cell, or `full` is not finite
            and above 0.

    Example:
        >>> picture = grid(["layer 0", "layer 1"], ["The", " cat"], [[1.0, 2.0], [3.0, None]])
    """
    names, words = _values.strings(rows, "grid: rows"), _values.strings(columns, "grid: columns")
    lines = _values.outer(values, "grid: values")
    if len(lines) != len(names):
        raise ArgumentError(f"grid: values has {len(lines)} rows where there are {len(names)} names.")
    cells = [_values.vector(line, len(words), f"grid: row {name}") for name, line in zip(names, lines, strict=True)]
    said = [[""] * len(words) for _ in names] if texts is None else [list(line) for line in texts]
    if [len(line) for line in said] != [len(words)] * len(names):
        raise ArgumentError(f"grid: texts must be {len(names)} x {len(words)}, one for each cell.")
    kind = "" if texts is None else " said"
    every = [value for line in cells for value in line]
    shades = _Shades.of(every, full, "grid")
    heads = "".join(f'<th scope="col"><span>{text(visible(word))}</span></th>' for word in words)
    body = "".join(
        f'<tr><th scope="row">{text(name)}</th>'
        + "".join(
            f'<td class="lens-cell {shades.kind(value)}{kind}" style="--v:{shades.share(value):.3f}" '
            f'title="{text(f"{name}, {_isolated(word, i)}: {shades.shown(value)}")}">'
            f"{text(visible(own)) if kind else ''}</td>"
            for i, (word, value, own) in enumerate(zip(words, line, own_line, strict=True))
        )
        + "</tr>"
        for name, line, own_line in zip(names, cells, said, strict=True)
    )
    content = (
        f'<div class="lens-scroll"><table class="lens-cells"><thead><tr><td></td>{heads}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><div class="lens-row">{shades.legend(unit)}</div>'
    )
    return _figure("grid", title or "Grid", content, caption=title)


def bars(
    labels: Sequence[str],
    values: object,
    *,
    title: str | None = None,
    unit: str = "",
    highlight: Iterable[str | int] = (),
) -> Picture:
    """Draw one horizontal bar per label, to the left of zero where negative.

    Args:
        labels: A name per bar, from the top.
        values: One number per bar; None or not finite: no value.
        title: Stands above the picture.
        unit: What the numbers are, such as `logits`.
        highlight: Bars to mark, by label or by number.

    Raises:
        ArgumentError: the values are not numbers, or not one for each label, or a highlighted bar does not exist.

    Example:
        >>> picture = bars(["L0H1", "L1H4"], [-0.2, 3.1], title="Direct attribution", unit="logits")
    """
    names = _values.strings(labels, "bars: labels")
    numbers = _values.vector(values, len(names), "bars: values")
    marked = _positions(highlight, names, "bars")
    low, high = min([0.0, *present(numbers)]), max([0.0, *present(numbers)])
    span = (high - low) or 1.0
    zero = abs(low) / span * 100
    shown = number_format(numbers, sign=low < 0)
    rows: list[str] = []
    for i, (name, value) in enumerate(zip(names, numbers, strict=True)):
        width = abs(value or 0.0) / span * 100
        left = zero - width if (value or 0.0) < 0 else zero
        bar = f'<i class="{"neg" if (value or 0.0) < 0 else "pos"}" style="left:{left:.2f}%;width:{width:.2f}%"></i>'
        rows.append(
            f'<tr{" class=marked" if i in marked else ""}><th scope="row">{text(name)}</th>'
            f'<td class="lens-track" style="--zero:{zero:.2f}%">{bar}</td>'
            f'<td class="lens-number">{shown(value)}</td></tr>'
        )
    head = (
        f'<thead><tr><td></td><td></td><th scope="col" class="lens-number">{text(unit)}</th></tr></thead>'
        if unit
        else ""
    )
    content = f'<table class="lens-bars">{head}<tbody>{"".join(rows)}</tbody></table>'
    return _figure("bars", title or "Bars", content, caption=title)


def table(rows: Sequence[Sequence[object]], columns: Sequence[str], *, title: str | None = None) -> Picture:
    """Set a table; a column of numbers is aligned to the right and written in one format.

    Args:
        rows: Cells are numbers, None (left empty), or anything else, of which `str()` is shown.
        columns: A heading per column, with the unit where it has one.
        title: Stands above the table.

    Raises:
        ArgumentError: a row is not as long as there are columns.

    Example:
        >>> picture = table([["clean", 0.11], ["ablated", 3.42]], ["run", "loss (nats)"])
    """
    names = _values.strings(columns, "table: columns")
    lines = [list(row) for row in rows]
    for i, line in enumerate(lines):
        if len(line) != len(names):
            raise ArgumentError(f"table: row {i} has {len(line)} cells where there are {len(names)} columns.")
    cells = [_column([line[c] for line in lines]) for c in range(len(names))]
    numeric = [' class="lens-number"' if is_number else "" for _, is_number in cells]
    head = "".join(f'<th scope="col"{style}>{text(name)}</th>' for name, style in zip(names, numeric, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{numeric[c]}>{text(column[r])}</td>" for c, (column, _) in enumerate(cells)) + "</tr>"
        for r in range(len(lines))
    )
    content = f'<table class="lens-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return _figure("table", title or "Table", content, caption=title)


def _figure(kind: str, title: str, content: str, *, caption: str | None) -> Picture:
    above = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    inside = f'<figure class="lens-{kind}" aria-label="{text(title)}">{above}{content}</figure>'
    return Picture(title=title, content=inside)


def _legend(unit: str, kind: str, ends: tuple[str, str]) -> str:
    return f'<span class="lens-legend">{ends[0]}<i class="{kind}"></i>{ends[1]} {text(unit)}</span>'


@attrs.frozen(kw_only=True)
class _Shades:
    """How values become colours: `full` has the deepest, and with any negative value the colours diverge."""

    full: float
    signed: bool
    shown: Callable[[float | None], str]

    @classmethod
    def of(cls, values: Sequence[float | None], full: float | None, where: str) -> "_Shades":
        if full is not None and not 0 < full < math.inf:
            raise ArgumentError(f"{where}: full must be a finite number above 0, not {full}.")
        signed = min(present(values), default=0.0) < 0
        largest = full or max(map(abs, present(values)), default=0.0) or 1.0
        return cls(full=largest, signed=signed, shown=number_format([*values, largest], sign=signed))

    def kind(self, value: float | None) -> str:
        return "none" if value is None else ("neg" if value < 0 else "pos") if self.signed else "seq"

    def share(self, value: float | None) -> float:
        return min(abs(value or 0.0) / self.full, 1.0)

    def legend(self, unit: str) -> str:
        low = self.shown(-self.full) if self.signed else "0"
        return _legend(unit, "div" if self.signed else "seq", (low, self.shown(self.full)))


def _isolated(word: str, position: int) -> str:
    """Name a token in a sentence that runs from left to right, whichever way the token does."""
    return f"\u2068{visible(word)}\u2069 ({position})"


def _heads(
    patterns: object, labels: Sequence[str] | None, size: int
) -> tuple[list[str], list[list[list[float | None]]]]:
    if isinstance(patterns, Mapping):
        if labels is not None:
            raise ArgumentError("attention: labels and a mapping of patterns both name the heads; leave labels out.")
        named = {str(label): pattern for label, pattern in cast("Mapping[object, object]", patterns).items()}
        names, maps = list(named), list(named.values())
    else:
        maps = _values.outer(patterns, "attention: patterns")
        names = (
            [f"head {i}" for i in range(len(maps))] if labels is None else _values.strings(labels, "attention: labels")
        )
    if not maps:
        raise ArgumentError("attention: there are no patterns.")
    if len(names) != len(maps):
        raise ArgumentError(
            f"attention: {len(names)} labels for {len(maps)} patterns; give [heads, query, key] of one batch row."
        )
    return names, [
        _values.matrix(each, size, f"attention: the pattern of {name}") for name, each in zip(names, maps, strict=True)
    ]


def _weights(names: list[str], maps: list[list[list[float | None]]], top: float) -> dict[str, object]:
    """Write the heads as whole numbers of a unit; what a causal mask hides is left out."""
    causal = not any(value for rows in maps for q, row in enumerate(rows) for value in row[q + 1 :])
    heads = [
        {"label": name, "rows": [_quantised(row[: q + 1] if causal else row, top) for q, row in enumerate(rows)]}
        for name, rows in zip(names, maps, strict=True)
    ]
    decimals = max(0, min(100, 4 - math.ceil(math.log10(top))))  # what one unit can tell
    return {"unit": top / _LEVELS, "decimals": decimals, "causal": causal, "heads": heads}


def _positions(chosen: Iterable[str | int], names: list[str], where: str) -> set[int]:
    items = [chosen] if isinstance(chosen, str) else list(chosen)
    for item in items:
        if item not in names and not (isinstance(item, int) and 0 <= item < len(names)):
            raise ArgumentError(f"{where}: highlight names {item!r}, which is none of {', '.join(names[:20])}.")
    return {i for i, name in enumerate(names) if name in items or i in items}


def _quantised(row: list[float | None], top: float) -> list[int | None]:
    """Write a row as whole numbers, without the zeros at its end."""
    whole = [None if value is None else round(value / top * _LEVELS) for value in row]
    while whole and whole[-1] == 0:
        whole.pop()
    return whole


def _columns(count: int) -> int:
    """Choose how many heads stand in a row, so that the rows come out even where they can."""
    least, most = _COLUMNS
    if count <= most:
        return max(least, count)
    return next((n for n in range(most, least, -1) if count % n == 0), most)


def _tile(name: str, rows: list[list[float | None]], words: list[str], marked: bool) -> str:
    cells = [
        (abs(value), value, q, k) for q, row in enumerate(rows) for k, value in enumerate(row) if value is not None
    ]
    _, value, q, k = max(cells, default=(0.0, None, 0, 0))
    strongest = f"strongest {number_format([value])(value)}: {words[q]} ({q}) to {words[k]} ({k})"
    alt = f"{name}{', highlighted' if marked else ''}, heat map of {len(words)} by {len(words)} tokens, {strongest}"
    return (
        f'<button type="button" class="lens-head{" marked" if marked else ""}" aria-label="{text(alt)}">'
        f"<canvas></canvas><span>{text(name)}</span></button>"
    )


def _column(cells: list[object]) -> tuple[list[str], bool]:
    """Return the cells as text, and whether the column is one of numbers."""
    filled = [cell for cell in cells if cell is not None]
    if not filled or not all(isinstance(cell, (int, float)) and not isinstance(cell, bool) for cell in filled):
        return ["" if cell is None else str(cell) for cell in cells], False
    numbers = cast("list[float | None]", cells)
    if all(isinstance(cell, int) for cell in filled):
        return ["" if cell is None else str(cell).replace("-", _values.MINUS) for cell in numbers], True
    finite = _values.vector(numbers, len(numbers), "table")
    shown = number_format(finite)
    return ["" if cell is None else shown(value) for cell, value in zip(numbers, finite, strict=True)], True
