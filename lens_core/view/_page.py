"""What pictures are put into: a record that shows itself, and the document around it."""

import base64
import hashlib
import os
import secrets
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import attrs

from lens_core.errors import ArgumentError
from lens_core.view._values import text


@attrs.frozen(kw_only=True)
class _Shown:
    """Something to show.

    Attributes:
        title: Plain text; the title of the window when shown alone.
        content: HTML without style, script and ids.
    """

    title: str
    content: str = attrs.field(repr=False)

    @property
    def html(self) -> str:
        """The whole document, which needs nothing else, and which may load nothing else."""
        script = _resource("page.js")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        # No network at all, and no script but ours, even if some text should slip through unescaped.
        policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        return (
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta name="color-scheme" content="light dark">\n<title>{text(self.title)}</title>\n'
            f"<style>{_resource('page.css')}</style>\n</head>\n<body>\n"
            f'<div class="lens lens-document"><main>{self.content}</main></div>\n'
            f"<script>{script}</script>\n</body>\n</html>\n"
        )

    def _repr_html_(self) -> str:
        """Return a fragment for a notebook; any number of them can stand in one document."""
        return (
            f'<div class="lens" id="lens-{secrets.token_hex(6)}"><style>{_resource("page.css")}</style>'
            f"<main>{self.content}</main></div><script>{_resource('page.js')}</script>"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the document and return its path.

        Raises:
            OSError: the file cannot be written.
        """
        target = Path(path)
        target.write_text(self.html, encoding="utf-8")
        return target


class Picture(_Shown):
    """One picture, for a notebook, a file of its own, or a page."""


class Page(_Shown):
    """Pictures and paragraphs, one under another."""


@cache
def _resource(name: str) -> str:
    return files("lens_core.view").joinpath(name).read_text(encoding="utf-8")


def heading(title: str) -> Picture:
    """Return a heading, to part a page.

    Example:
        >>> heading("Results").title
        'Results'
    """
    return Picture(title=title, content=f"<h2>{text(title)}</h2>")


def code(source: str) -> Picture:
    """Return lines of code, set as they are.

    Example:
        >>> "lens demo" in code("lens demo").html
        True
    """
    return Picture(title="code", content=f"<pre>{text(source)}</pre>")


def page(title: str, sections: Sequence[Picture | str], *, subtitle: str | None = None) -> Page:
    """Put pictures and paragraphs, in order, on one page.

    Args:
        title: Stands at the top and names the window.
        sections: Pictures, and strings: each string is a paragraph of plain text.
        subtitle: A line under the title.

    Raises:
        ArgumentError: a section is neither a picture nor a string.

    Example:
        >>> page("Two parts", ["First.", heading("Then"), "Second."]).title
        'Two parts'
    """
    if isinstance(sections, str):
        raise ArgumentError("page: sections is one string; give a list of pictures and paragraphs.")
    lead = f'<p class="lens-subtitle">{text(subtitle)}</p>' if subtitle else ""
    parts = [f"<header><h1>{text(title)}</h1>{lead}</header>"]
    for section in sections:
        if isinstance(section, Picture):
            parts.append(section.content)
        elif isinstance(section, str):  # pyright: ignore[reportUnnecessaryIsInstance] -- callers may not be checked
            parts.append(f"<p>{text(section)}</p>")
        else:
            raise ArgumentError(f"page: a section must be a picture or a string, not {type(section).__name__}.")
    return Page(title=title, content="\n".join(parts))
