"""From what users hand in to plain numbers and safe text."""

import html
import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, cast

from lens_core.errors import ArgumentError

# Categories without a visible shape: controls, format marks (text direction among them), lone surrogates (which cannot
# even be written to a file), unassigned and private characters, separators.
_INVISIBLE = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"})
MINUS = "\N{MINUS SIGN}"
_MARKS = {" ": "·", "\n": "↵", "\t": "⇥"}


def visible(token: str) -> str:
    r"""Return the token with every character visible.

    A space becomes `·`, a newline `↵`, a tab `⇥`, an empty token `∅`, another invisible character its escape.

    Example:
        >>> visible(" a\n"), visible("\u200b"), visible("")
        ('·a↵', '\\u200b', '∅')
    """
    return "".join(_MARKS.get(char) or _escaped(char, _INVISIBLE) for char in token) or "∅"


def text(value: str) -> str:
    """Return the value as HTML text, also fit for a quoted attribute; only what no file may hold is made visible."""
    return html.escape("".join(char if char in _MARKS else _escaped(char, {"Cc", "Cs"}) for char in value))


def _escaped(char: str, categories: Set[str]) -> str:
    return ascii(char)[1:-1] if unicodedata.category(char) in categories else char


def json_script(data: object) -> str:
    """Return a data block; no `<` in it, so nothing in the data can close the element or open another."""
    encoded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json">{encoded}</script>'


def strings(values: Sequence[str], what: str) -> list[str]:
    """Return the values as a list, or raise `ArgumentError` if they are not one or more strings."""
    if isinstance(values, str) or not values or not all(isinstance(value, str) for value in cast("list[Any]", values)):
        raise ArgumentError(f"{what} must be a non-empty sequence of strings, not {_brief(values)}.")
    return list(values)


def vector(values: object, length: int, what: str) -> list[float | None]:
    """Return one number for each of `length` things; None where a value is missing or not finite.

    Raises:
        ArgumentError: the values are not numbers, or not that many.
    """
    items = _plain(values)
    if not isinstance(items, list):
        raise ArgumentError(f"{what} must be a sequence of numbers, not {_brief(values)}.")
    found = cast("list[object]", items)
    if len(found) != length:
        raise ArgumentError(f"{what} has {len(found)} values where {length} are needed, one for each.")
    return [_number(item, what) for item in found]


def matrix(values: object, size: int, what: str) -> list[list[float | None]]:
    """Return `size` rows of `size` numbers each, as `vector` does."""
    found = _plain(values)
    rows = cast("list[list[object]]", found)
    if _shape(found) != [size, size]:
        given = " x ".join(map(str, _shape(found))) or "a single value"
        raise ArgumentError(f"{what} must be {size} x {size} (query, key), as there are {size} tokens; it is {given}.")
    return [[_number(value, what) for value in row] for row in rows]


def outer(values: object, what: str) -> list[object]:
    """Return the entries along the first axis."""
    # One level only: `matrix` turns each entry into numbers and says whose shape is wrong.
    items = list(cast("Iterable[object]", values)) if isinstance(values, (list, tuple)) else _plain(values)
    if not isinstance(items, list):
        raise ArgumentError(f"{what} must be a sequence, not {_brief(cast('object', values))}.")
    return cast("list[object]", items)


def _plain(values: object) -> object:
    """Turn tensors, arrays and sequences of them into lists of Python numbers."""
    if hasattr(values, "tolist"):
        return cast("Any", values).tolist()
    if isinstance(values, (list, tuple)):
        return [value if type(value) is float else _plain(value) for value in cast("Iterable[object]", values)]
    return values


def _shape(values: object) -> list[int | str]:
    """Return the lengths of nested lists, outermost first, `uneven` where they differ."""
    if not isinstance(values, list):
        return []
    items = cast("list[object]", values)
    inner = _shape(items[0]) if items else []
    return [len(items), *(inner if all(_shape(item) == inner for item in items) else ["uneven"])]


def _number(value: object, what: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)):
        raise ArgumentError(f"{what} must hold numbers, not {_brief(value)}.")
    return float(value) if math.isfinite(value) else None


def _brief(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def present(values: Iterable[float | None]) -> list[float]:
    """Return the values that are there."""
    return [value for value in values if value is not None]


def number_format(values: Iterable[float | None], *, sign: bool = False) -> Callable[[float | None], str]:
    """Return one format for all the values: as many decimals as the largest needs for four digits, rarely over three.

    Args:
        values: What will be shown together.
        sign: Write a plus before positive numbers.
    """
    largest = max(map(abs, present(values)), default=0.0)
    plus = "+" if sign else ""
    ordinary = largest == 0 or 1e-6 <= largest < 1e9
    decimals = 3 - math.floor(math.log10(largest)) if ordinary and largest else 3
    if largest >= 0.01 or not ordinary:
        decimals = min(max(decimals, 0), 3)

    def shown(value: float | None) -> str:
        if value is None:
            return "no value"
        if not ordinary:
            return f"{value:{plus}.3e}".replace("-", MINUS)
        rounded = round(value, decimals) + 0.0  # + 0.0 turns -0.0 into 0.0
        return f"{rounded:{plus if rounded else ''}.{decimals}f}".replace("-", MINUS)

    return shown
