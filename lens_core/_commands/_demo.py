"""`lens demo`: the library's main job on one text, told in the terminal and on a page."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lens_core import view
from lens_core._commands._demo_page import Attribution, DemoResult, demo_page, head_label
from lens_core._commands._demo_parts import Reading
from lens_core._commands._demo_scan_page import NO_SOFTMAX, ScanResult, TokenParts, place_label, scan_page
from lens_core._commands._given import MODEL_HELP, add_loading, add_text, check_target, load, read_text
from lens_core._commands._terminal import console, progress

if TYPE_CHECKING:
    from collections.abc import Iterable

_HEADS = 8  # in each table
_TOKENS = 120  # of the text; the page has all
_STEPS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Load a model, show what it predicts, cache every activation, and find what copies: induction heads by their "
        "attention patterns, which are ablated beside a control; or, in state-space mixers, the tokens that the "
        "effective attention reads from, which are hidden beside a control. Attribute the logits to heads or to source "
        "tokens, and write it all on one HTML page."
    )
    parser.add_argument("--model", metavar="MODEL", default="toy:gpt2", help=f"{MODEL_HELP} (default: toy:gpt2)")
    add_text(parser, required=False)
    parser.add_argument("--seed", type=int, default=0, help="of the random words that are the text when none is given")
    parser.add_argument("--out", metavar="FILE", default="lens-demo.html", help="the page (default: lens-demo.html)")
    add_loading(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; the exit code is 1 where the attribution does not sum to the logits."""
    given = read_text(arguments)
    check_target(arguments.out)
    with progress(_STEPS) as begin:
        begin("loading the model")
        from lens_core._commands._demo_measure import choose_text, measure  # brings torch

        model = load(arguments.model, arguments)
        text = choose_text(model, given, seed=arguments.seed)
        result = measure(model, text, _command(arguments), begin=begin)
        begin("writing the page")
        page = scan_page(result) if isinstance(result, ScanResult) else demo_page(result)
        path = page.save(arguments.out)
    out = console()
    _print_text(out, result, text.notes)
    if isinstance(result, ScanResult):
        _print_maps(out, result)
        _print_knocked_out(out, result)
        _print_tokens(out, result)
    else:
        _print_heads(out, result)
        _print_ablation(out, result)
        if result.attribution is not None:
            _print_attribution(out, result.attribution)
    print(f"\nThe page, for a browser: {path.absolute()}")
    return int(result.attribution is not None and not result.attribution.is_exact)


def _command(arguments: argparse.Namespace) -> str:
    """Give the command that makes the same page again."""
    words = ["lens", "demo", "--model", arguments.model]
    for name in ("text", "file", "dtype", "device", "revision"):
        if getattr(arguments, name) is not None:
            words += [f"--{name}", getattr(arguments, name)]
    if arguments.text is None and arguments.file is None:
        words += ["--seed", str(arguments.seed)]
    return shlex.join([*words, "--out", Path(arguments.out).name])


def _print_text(out: Console, result: Reading, notes: "Iterable[str]") -> None:
    out.print(Text(f"{result.model}: {result.description}; {result.activations} cached", style="bold"))
    for note in notes:
        out.print(Text(f"Note: {note}.", style="yellow"))
    again = set(result.repeated)
    words = [
        Text(view.visible(word).removeprefix("·"), style="bold cyan" if at in again else "")
        for at, word in enumerate(result.tokens[:_TOKENS])
    ]
    if len(words) < len(result.tokens):
        words.append(Text(f"and {len(result.tokens) - len(words)} more", style="dim"))
    out.print()
    out.print(Text(" ").join(words))
    count = f"{len(again)} of {len(result.tokens)} tokens repeat what came before"
    remark = ": the text gives nothing to copy" if not again else " (in colour)" if out.is_terminal else ""
    out.print(Text(f"{count}{remark}.", style="dim"))
    table = _table("after", "what follows", "its guesses")
    for prediction in result.predictions:
        after = prediction.position + 1
        so_far = " ".join(view.visible(word).removeprefix("·") for word in result.tokens[max(0, after - 3) : after])
        actual = result.tokens[after] if after < len(result.tokens) else None
        guesses = ", ".join(f"{view.visible(word).removeprefix('·')} {share:.0%}" for word, share in prediction.top)
        follows = "(the end)" if actual is None else view.visible(actual).removeprefix("·")
        table.add_row(
            Text(so_far), Text(follows), Text(guesses, style="green" if prediction.top[0][0] == actual else "")
        )
    _print_table(out, "What the model expects next", table)


def _print_heads(out: Console, result: DemoResult) -> None:
    found = {head_label(*head) for head in result.induction_heads}
    ranked = sorted(result.scores, key=lambda score: -score.induction)[: max(_HEADS, len(found))]
    table = _table("head", "induction", "previous token", "duplicate token")
    for score in ranked:
        shares = [f"{share:.2f}" for share in (score.induction, score.previous, score.duplicate)]
        table.add_row(score.label, *shares, style="bold" if score.label in found else "")
    _print_table(
        out, f"Where heads look, as shares of their attention (induction heads: from {result.threshold})", table
    )
    if not found and result.repeated:
        out.print(f"No head has an induction share of {result.threshold}, so there is nothing to ablate.")


def _print_ablation(out: Console, result: DemoResult) -> None:
    ablation = result.ablation
    if ablation is None:
        return
    table = _table("ablated", "loss", "change")
    table.add_row("nothing", f"{ablation.clean:.3f}", "")
    rows = [("induction", result.induction_heads, ablation.induction)]
    if ablation.control is not None:
        rows.append(("control", result.control_heads, ablation.control))
    for name, heads, loss in rows:
        shown = ", ".join(head_label(*head) for head in heads)
        table.add_row(f"{name}: {shown}", f"{loss:.3f}", f"{loss - ablation.clean:+.3f}")
    title = f"Loss on the {len(result.repeated)} repeated tokens in nats, the output of heads {ablation.method}"
    _print_table(out, title, table)


def _print_attribution(out: Console, parts: Attribution) -> None:
    table = _table("part", "logits")
    ranked = sorted(zip(parts.labels, parts.values, strict=True), key=lambda part: -abs(part[1]))
    for label, value in ranked[:_HEADS]:
        table.add_row(label, f"{value:+.3f}")
    if ranked[_HEADS:]:
        table.add_row(f"{len(ranked) - _HEADS} other heads", f"{sum(value for _, value in ranked[_HEADS:]):+.3f}")
    table.add_row("embeddings, MLPs, biases", f"{parts.remainder:+.3f}")
    _print_sum(out, table, parts)


def _print_maps(out: Console, result: ScanResult) -> None:
    places = [place_label(offset) for offset in range(len(result.even))]
    table = _table("map", *places)
    for score in result.scores[:_HEADS]:
        style = "bold" if score.label == result.copying else ""
        table.add_row(score.label, *[f"{share:.2f}" for share in score.shares], style=style)
    table.add_row("all tokens alike", *[f"{share:.2f}" for share in result.even], style="dim")
    _print_table(out, f"Where the effective attention of layers and {result.per}s looks, as shares of its size", table)
    out.print(Text(NO_SOFTMAX, style="dim"))


def _print_knocked_out(out: Console, result: ScanResult) -> None:
    run = result.knocked_out
    if run is None:
        return
    table = _table("hidden", "loss", "change")
    table.add_row("nothing", f"{run.clean:.3f}", "")
    for name, loss in ((place_label(result.offset), run.copied), ("control: as many others", run.control)):
        table.add_row(name, f"{loss:.3f}", f"{loss - run.clean:+.3f}")
    title = (
        f"Loss on {len(run.pairs)} repeated tokens in nats, with tokens hidden from the positions that foretell them"
    )
    _print_table(out, title, table)


def _print_tokens(out: Console, result: ScanResult) -> None:
    parts = result.attribution
    table = _table("layer", "position", "token", "logits")
    every = [(value, layer, at) for layer, row in enumerate(parts.values) for at, value in enumerate(row)]
    ranked = sorted(every, key=lambda part: -abs(part[0]))
    for value, layer, at in ranked[:_HEADS]:
        token = Text(view.visible(result.tokens[at]).removeprefix("·"))
        table.add_row(parts.labels[layer], str(at), token, f"{value:+.3f}")
    table.add_row("", "", "other tokens", f"{sum(value for value, _, _ in ranked[_HEADS:]):+.3f}")
    table.add_row("", "", "biases, the token's own embedding", f"{parts.remainder:+.3f}")
    _print_sum(out, table, parts)


def _print_sum(out: Console, table: Table, parts: "Attribution | TokenParts") -> None:
    """End a table of parts: their sum, what was measured, and whether the two agree."""
    blank = [""] * (len(table.columns) - 2)
    table.add_row(*blank, "sum", f"{parts.sum:+.3f}", style="bold")
    table.add_row(*blank, "the model's own logits", f"{parts.total:+.3f}", style="bold")
    answer, rival = (view.visible(word).removeprefix("·") for word in (parts.answer, parts.rival))
    _print_table(out, f"Logit of “{answer}” less that of “{rival}”, after position {parts.position}", table)
    if parts.is_exact:
        out.print(Text(f"The two agree to {parts.error:.0e}.", style="dim"))
    else:
        out.print(Text(f"The sum is off by {parts.error:.1e}: this is a mistake in lens.", style="bold red"))


def _print_table(out: Console, title: str, table: Table) -> None:
    out.print(Text(f"\n{title}", style="italic"))  # beside the table: a title inside is as narrow as the table
    out.print(table)


def _table(*columns: str) -> Table:
    words = ("after", "what follows", "its guesses", "head", "part", "ablated", "map", "hidden", "layer", "token")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in columns:
        table.add_column(heading, justify="left" if heading in words else "right")
    return table
