"""`lens view`: a file of activations as one HTML page."""

import argparse
import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_core import view
from lens_core._commands._given import MODEL_HELP, check_file, check_target, folder_of
from lens_core._commands._terminal import progress
from lens_core.errors import ArgumentError, EmptyFilterError

if TYPE_CHECKING:
    from torch import Tensor

    from lens_core.cache import ActivationCache

_PICTURED = 2_000_000  # cells of attention patterns on the page, about 5 MB
_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
_WRITES = ("hook_embed", "hook_pos_embed", "hook_attn_out", "hook_mlp_out", "hook_mixer_out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("file", metavar="FILE", help="what `lens cache` or cache.save wrote")
    parser.add_argument("--out", metavar="FILE", help="the page (default: FILE with .html)")
    parser.add_argument("--names", metavar="GLOB", action="append", help="show these entries; may be repeated")
    parser.add_argument("--row", metavar="N", type=int, default=0, help="which row of a batch (default: 0)")
    parser.add_argument("--model", metavar="MODEL", help=f"for tokens as text, its tokenizer: {MODEL_HELP}")
    parser.epilog = (
        "The page shows attention patterns, norms of the residual stream by token, and a table of the entries."
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print its path."""
    check_file(arguments.file)
    out = arguments.out or str(Path(arguments.file).with_suffix(".html"))
    if Path(out).absolute() == Path(arguments.file).absolute():
        raise ArgumentError(f"the page would overwrite {arguments.file!r}; give another name by --out")
    check_target(out)
    with progress(2) as begin:
        begin("reading the file")
        from lens_core.cache import ActivationCache  # brings torch

        cache = ActivationCache.load(arguments.file)
        names = _chosen(cache, arguments.names)
        begin("drawing")
        words = _words(cache, arguments.row, arguments.model)
        path = _page(cache, names, words, arguments.row, title=Path(arguments.file).name).save(out)
    print(path.absolute())
    return 0


def _chosen(cache: "ActivationCache", globs: Sequence[str] | None) -> list[str]:
    if not globs:
        return list(cache)
    chosen: set[str] = set()
    for glob in globs:
        found = fnmatch.filter(cache, glob) or [name for name in cache if name.endswith(f"hook_{glob}")]
        if not found:
            raise EmptyFilterError(
                f"--names {glob!r} matches none of the {len(cache)} entries, such as {next(iter(cache))!r}"
            )
        chosen.update(found)
    return [name for name in cache if name in chosen]


def _words(cache: "ActivationCache", row: int, model: str | None) -> list[str] | None:
    """Give the tokens as text where the tokenizer is known, else as ids; None where the file does not hold them."""
    if "hook_tokens" not in cache:
        return None
    ids = _row(cache, "hook_tokens", row)
    origin = cache.metadata.get("model", "")
    model = origin if model is None and origin.startswith("toy:") else model
    if model is None:
        return [str(int(token)) for token in ids]
    from lens_core import tokens as _tokens

    found: Any = _tokens.to_str_tokens(_tokens.find_tokenizer(None, folder_of(model)), ids)
    return found


def _row(cache: "ActivationCache", name: str, row: int) -> "Tensor":
    """Give one row of an entry, whether or not it has an axis of them."""
    value = cache[name]
    if not cache.has_batch_dim:
        return value
    if not 0 <= row < len(value):
        raise ArgumentError(f"--row {row} is not there: {name!r} has {len(value)} (0 to {len(value) - 1})")
    return value[row]


def _page(
    cache: "ActivationCache", names: Sequence[str], words: Sequence[str] | None, row: int, *, title: str
) -> view.Page:
    size = sum(cache[name].nbytes for name in names)
    subtitle = " · ".join(
        [
            cache.metadata.get("model", "a model that is not named"),
            f"{len(names)} of {len(cache)} entries",
            f"{size / 2**20:.1f} MiB",
        ]
    )
    if cache.has_batch_dim and len(cache[names[0]]) > 1:
        subtitle += f" · row {row} of {len(cache[names[0]])}"
    sections = [
        *_norms(cache, names, words, row, _STREAM, "Norms of the residual stream"),
        *_norms(cache, names, words, row, _WRITES, "Norms of what is added to it"),
        *_patterns(cache, names, words, row),
        view.heading("Entries"),
        _entries(cache, names),
        _origin(cache.metadata),
    ]
    return view.page(title, sections, subtitle=subtitle)


def _origin(metadata: Mapping[str, str]) -> str:
    """Say what wrote the file."""
    known = ("plugin", "lens_core", "torch", "transformers")
    versions = ", ".join(f"{name.replace('_', '-')} {metadata[name]}" for name in known[1:] if metadata.get(name))
    plugin = f"{metadata['plugin']}, " if metadata.get("plugin") else ""
    return f"The file was written with {plugin}{versions}. This page loads nothing and sends nothing."


def _norms(
    cache: "ActivationCache",
    names: Sequence[str],
    words: Sequence[str] | None,
    row: int,
    parts: Sequence[str],
    title: str,
) -> list[view.Picture | str]:
    """Draw the norms of residual entries, those once that leave a block and enter the next."""
    norms = {
        _short(name): _row(cache, name, row).float().square().sum(-1).sqrt()
        for name in names
        if name.rsplit(".", 1)[-1] in parts and not _enters_from(cache, name, names)
    }
    if not norms:
        return []
    values = list(norms.values())
    length = len(values[0])
    largest = max((float(value[1:].max()) for value in values if length > 1), default=0.0)
    full = largest if 0 < largest < math.inf else None
    return [
        view.heading(title),
        "The colours are scaled to all tokens but the first, whose norm is often far larger.",
        view.grid(list(norms), _labels(words, length), values, unit="norm", full=full),
    ]


def _enters_from(cache: "ActivationCache", name: str, names: Sequence[str]) -> bool:
    layer = cache.table[name].layer
    return name.endswith("hook_resid_pre") and layer is not None and f"blocks.{layer - 1}.hook_resid_post" in names


def _short(name: str) -> str:
    """Write a name as a label: `L3 resid_post`."""
    return re.sub(r"^blocks\.(\d+)\.", r"L\1 ", name).replace("hook_", "")


def _labels(words: Sequence[str] | None, length: int) -> Sequence[str]:
    """Give the words where they fit (a cache of some positions holds all tokens), else positions."""
    return words if words is not None and len(words) == length else [str(at) for at in range(length)]


def _patterns(
    cache: "ActivationCache", names: Sequence[str], words: Sequence[str] | None, row: int
) -> list[view.Picture | str]:
    every = {name: _row(cache, name, row) for name in names if name.endswith("hook_pattern")}
    if not every:
        return []
    whole = {name: heads for name, heads in every.items() if heads.shape[-1] == heads.shape[-2]}
    shown: dict[str, Any] = {}
    for name, heads in whole.items():
        if shown and heads[0].numel() * (len(shown) + len(heads)) > _PICTURED:
            break
        numbers = range(len(heads)) if cache.heads is None else cache.heads
        shown |= {f"L{cache.table[name].layer}H{head}": each for head, each in zip(numbers, heads.float(), strict=True)}
    story = "Each square is one head: row by row, how a token spreads its attention over the tokens before it."
    if len(whole) < len(every):
        story += (
            f" Not drawn, as they hold some of the positions only: {len(every) - len(whole)} of {len(every)} patterns."
        )
    drawn = len({label.partition("H")[0] for label in shown})
    if drawn < len(whole):
        story += f" Drawn are {drawn} of {len(whole)} layers; choose others by --names."
    parts: list[view.Picture | str] = [view.heading("Attention patterns"), story]
    if shown:
        parts.append(view.attention(_labels(words, len(next(iter(shown.values())))), shown))
    return parts


def _entries(cache: "ActivationCache", names: Sequence[str]) -> view.Picture:
    rows = [
        [
            name,
            cache.table[name].shape,
            " × ".join(map(str, value.shape)),
            str(value.dtype).removeprefix("torch."),
            value.nbytes / 2**20,
        ]
        for name, value in ((name, cache[name]) for name in names)
    ]
    return view.table(rows, ["name", "axes", "shape", "dtype", "MiB"])
