"""Self-contained HTML pictures.

Each function takes plain values, nested lists or anything with `tolist()` (a tensor, an array), and returns a
`Picture`; `page` puts pictures and paragraphs one under another. The result opens from a file, without a network,
in light and dark, and shows itself in a notebook. Nothing here imports torch.

Text that comes from outside (tokens, labels, titles) is escaped, and characters that cannot be seen are made visible,
so that a page always shows exactly the tokens there are.
"""

from lens_core.view._page import Page, Picture, code, heading, page
from lens_core.view._pictures import attention, bars, grid, table, tokens
from lens_core.view._values import visible

__all__ = [
    "Page",
    "Picture",
    "attention",
    "bars",
    "code",
    "grid",
    "heading",
    "page",
    "table",
    "tokens",
    "visible",
]
