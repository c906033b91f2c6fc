"""Finding attention heads of a kind: by the share of attention that goes where such a head looks.

`detect_head` is TransformerLens' function, by its definition. `score_heads` is the same question with controls: every
kind at once, on repeated random tokens or on texts of one's own, beside what the head does where there is nothing to
find.

Source: TransformerLens' `head_detector`; Olsson et al. 2022, "In-context Learning and Induction Heads" (arXiv
2209.11895), who score heads on repeated random tokens.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lens_core._arguments import checks_arguments
from lens_core.analysis._batches import run_through
from lens_core.analysis.heads import duplicate_places, previous_places
from lens_core.cache import ActivationCache
from lens_core.errors import ArgumentError, CacheError, ContextLengthError, UnsupportedHookError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = [
    "HEAD_NAMES",
    "compute_head_attention_similarity_score",
    "detect_head",
    "get_duplicate_token_head_detection_pattern",
    "get_induction_head_detection_pattern",
    "get_previous_token_head_detection_pattern",
    "get_supported_heads",
]

HEAD_NAMES = ("previous_token_head", "duplicate_token_head", "induction_head")
"""Kinds that `detect_head` knows by name."""

Heads: TypeAlias = Sequence[tuple[int, int]] | Mapping[int, Sequence[int]] | None
ErrorMeasure: TypeAlias = Literal["mul", "abs"]


def get_supported_heads() -> tuple[str, ...]:
    """List the kinds that `detect_head` knows by name.

    Example:
        >>> get_supported_heads()
        ('previous_token_head', 'duplicate_token_head', 'induction_head')
    """
    return HEAD_NAMES


@checks_arguments
def get_previous_token_head_detection_pattern(tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "pos pos"]:
    """Mark the token before each: 1 there, 0 elsewhere, `[query, key]`.

    Raises:
        ArgumentError: Not ids of one row.

    Example:
        >>> get_previous_token_head_detection_pattern(torch.tensor([[7, 8, 7]]))
        tensor([[0., 0., 0.],
                [1., 0., 0.],
                [0., 1., 0.]])
    """
    return previous_places(_one_row(tokens))[0].float()


@checks_arguments
def get_duplicate_token_head_detection_pattern(tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "pos pos"]:
    """Mark earlier occurrences of each token: 1 there, 0 elsewhere, `[query, key]`.

    Raises:
        ArgumentError: Not ids of one row.

    Example:
        >>> get_duplicate_token_head_detection_pattern(torch.tensor([[7, 8, 7]]))
        tensor([[0., 0., 0.],
                [0., 0., 0.],
                [1., 0., 0.]])
    """
    return duplicate_places(_one_row(tokens))[0].float()


@checks_arguments
def get_induction_head_detection_pattern(tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "pos pos"]:
    """Mark what came after earlier occurrences of each token: 1 there, 0 elsewhere, `[query, key]`.

    In a run of one token that is the current token, which counts here, as in TransformerLens;
    `lens_core.analysis.heads.induction_places` leaves it out.

    Raises:
        ArgumentError: Not ids of one row.

    Example:
        >>> get_induction_head_detection_pattern(torch.tensor([[7, 8, 7]]))
        tensor([[0., 0., 0.],
                [0., 0., 0.],
                [0., 1., 0.]])
    """
    return F.pad(duplicate_places(_one_row(tokens))[0].float(), (1, 0))[:, :-1]


def _one_row(tokens: object) -> Tensor:
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or len(tokens) != 1 or tokens.is_floating_point():
        got = f"shape {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ArgumentError(f"tokens are ids of one row, [1, pos]; got {got}")
    return tokens


@checks_arguments
def compute_head_attention_similarity_score(
    attention_pattern: Float[Tensor, "query key"],
    detection_pattern: Float[Tensor, "query key"],
    *,
    exclude_bos: bool,
    exclude_current_token: bool,
    error_measure: ErrorMeasure,
) -> float:
    """Say how well one head's pattern matches what is looked for; see `detect_head` for the two measures.

    Nothing is written to the arguments (TransformerLens zeroes what is excluded in the cache itself).

    Raises:
        ArgumentError: Not square, not of one shape, or another measure.

    Example:
        >>> looks_back = torch.tensor([[1.0, 0.0], [0.75, 0.25]])
        >>> options = {"exclude_bos": False, "exclude_current_token": False, "error_measure": "mul"}
        >>> wanted = get_previous_token_head_detection_pattern(torch.tensor([[7, 8]]))
        >>> compute_head_attention_similarity_score(looks_back, wanted, **options)
        0.375
    """
    if attention_pattern.ndim != 2 or attention_pattern.shape[0] != attention_pattern.shape[1]:
        raise ArgumentError(f"an attention pattern is square, [query, key]; got {list(attention_pattern.shape)}")
    _check_pattern(detection_pattern, len(attention_pattern))
    _check_measure(error_measure)
    excluded = _excluded(len(attention_pattern), exclude_bos, exclude_current_token, attention_pattern.device)
    return float(_similarity(attention_pattern[None, None], detection_pattern, excluded, error_measure)[0, 0])


def _excluded(size: int, bos: bool, current: bool, device: torch.device) -> Tensor:
    """Mark the cells that do not count, `[query, key]`."""
    excluded = torch.zeros(size, size, dtype=torch.bool, device=device)
    if bos:
        excluded[:, 0] = True
    if current:
        excluded.fill_diagonal_(fill_value=True)
    return excluded


def _similarity(pattern: Tensor, wanted: Tensor, excluded: Tensor, measure: str) -> Float[Tensor, "batch n_heads"]:
    wide = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    wanted = wanted.to(wide)
    if measure == "mul":
        kept = wide.masked_fill(excluded, 0.0)
        return (kept * wanted).sum((-2, -1)) / kept.sum((-2, -1))
    difference = (wide - wanted).abs().masked_fill(excluded, 0.0)
    return 1 - difference.sum((-2, -1)) / len(wanted)


@checks_arguments
def detect_head(
    model: "LensModel",
    seq: Any,
    detection_pattern: Float[Tensor, "pos pos"] | str,
    heads: Heads = None,
    cache: ActivationCache | None = None,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: ErrorMeasure = "mul",
    prepend_bos: bool | None = None,
) -> Float[Tensor, "layer n_heads"]:
    """Score every head by how well its attention matches a pattern, as TransformerLens' `detect_head` does.

    - `"mul"`: the share of the head's whole attention that goes to the cells of the pattern,
      `sum(attention * pattern) / sum(attention)`, 0 to 1. For patterns of 0 and 1. Queries without any such cell count
      in the denominator; `heads.attention_share` counts only queries that have one.
    - `"abs"`: `1 - sum(|attention - pattern|) / queries`, -1 to 1; 1 is a perfect match. For patterns whose rows sum
      to 1. Not rounded (TransformerLens rounds to three digits).

    It costs one run for each text, without a cache.

    Args:
        model: A model with attention.
        seq: A text, several, or ids. The scores of several are averaged, with the same options (TransformerLens drops
            the options there).
        detection_pattern: `"previous_token_head"`, `"duplicate_token_head"`, `"induction_head"`, or the pattern looked
            for, lower triangular, then the same for all texts.
        heads: `(layer, head)` pairs, or heads by layer, that are scored; the score of the others is -1. None for all.
        cache: Patterns of the one text, all positions, with or without a batch axis; nothing is written to it.
        exclude_bos: Leave out attention to the first token.
        exclude_current_token: Leave out attention of a token to itself.
        error_measure: `"mul"` or `"abs"`.
        prepend_bos: As in `forward`. TransformerLens' default is True.

    Returns:
        Scores, -1 where a head was not scored (in hybrids also where a layer has no attention), at least float32.
        NaN under `"mul"` where all attention of a head is excluded.

    Raises:
        UnsupportedHookError: The model has no attention; `score_heads(..., effective=True)` serves it.
        ArgumentError: Another name or measure; a pattern that is not lower triangular or not of this length; heads that
            do not exist; a cache with several texts.
        CacheError: The cache lacks a layer's pattern, or is of another length.
        ContextLengthError: A text of one token.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> scores = detect_head(model, "king apple river moon book king apple river moon book", "induction_head")
        >>> tuple(scores.shape), divmod(int(scores.argmax()), model.cfg.n_heads)
        ((2, 4), (1, 0))
    """
    _check_measure(error_measure)
    chosen = _chosen_heads(model, heads)
    rows = [model.to_tokens(text, **_bos(prepend_bos)) if _is_text(text) else _row(text) for text in _listed(seq)]
    if cache is not None and len(rows) > 1:
        raise ArgumentError(f"a cache serves one text, and there are {len(rows)}")
    scores: list[Tensor] = []
    for row in rows:
        if row.shape[1] < 2:
            raise ContextLengthError(f"a text of {row.shape[1]} token has no earlier one to look at; give a longer one")
        wanted = _wanted(detection_pattern, row.cpu())
        _check_pattern(wanted, row.shape[1])
        excluded = _excluded(row.shape[1], exclude_bos, exclude_current_token, torch.device("cpu"))
        found = _scored(model, row, cache, sorted(chosen), wanted, excluded, error_measure)
        whole = torch.full((model.cfg.n_layers, int(model.cfg.n_heads or 0)), -1.0, dtype=_widest(found))
        for layer, own in found.items():
            picked = sorted(chosen[layer])
            whole[layer, picked] = own[picked].to(whole.dtype)
        scores.append(whole)
    return torch.stack(scores).mean(0)


def _scored(
    model: "LensModel",
    row: Tensor,
    cache: ActivationCache | None,
    layers: Sequence[int],
    wanted: Tensor,
    excluded: Tensor,
    measure: str,
) -> dict[int, Tensor]:
    """Give the scores of all heads of each layer, `[n_heads]` on the CPU."""
    found: dict[int, Tensor] = {}

    def take(layer: int, pattern: Tensor) -> None:
        found[layer] = _similarity(pattern, wanted, excluded.to(pattern.device), measure)[0].cpu()

    def read(pattern: Tensor, hook: Any) -> None:
        take(hook.layer(), pattern.detach())

    names = {layer: f"blocks.{layer}.attn.hook_pattern" for layer in layers}
    if cache is None:
        hooks = [(name, read) for name in names.values()]
        run_through(model, row.to(model.input_device), max(layers), hooks)
        return found
    for layer, name in names.items():
        pattern = cache[name] if cache.has_batch_dim else cache[name][None]
        if pattern.shape[0] != 1:
            raise ArgumentError(f"the cache has {pattern.shape[0]} rows, and there is one text; slice its batch")
        if pattern.shape[-2:] != excluded.shape:
            raise CacheError(
                f"the cached pattern is {list(pattern.shape[-2:])} and the text has {len(excluded)} tokens; "
                "give the cache of this text, with all positions"
            )
        take(layer, pattern)
    return found


def _wanted(given: Any, row: Tensor) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach().cpu().float()
    makers = {
        "previous_token_head": get_previous_token_head_detection_pattern,
        "duplicate_token_head": get_duplicate_token_head_detection_pattern,
        "induction_head": get_induction_head_detection_pattern,
    }
    if given not in makers:
        raise ArgumentError(f"a detection pattern is a tensor, or one of {', '.join(HEAD_NAMES)}; got {given!r}")
    return makers[given](row)


def _check_pattern(pattern: Tensor, size: int) -> None:
    if pattern.shape != (size, size) or bool(pattern.triu(1).any()):
        raise ArgumentError(
            f"a detection pattern for {size} tokens is [{size}, {size}] and lower triangular; got "
            f"{list(pattern.shape)}{' with cells above the diagonal' if pattern.shape == (size, size) else ''}"
        )


def _check_measure(measure: object) -> None:
    if measure not in ("mul", "abs"):
        raise ArgumentError(f"error_measure is 'mul' or 'abs'; got {measure!r}")


def _chosen_heads(model: "LensModel", heads: Any) -> dict[int, set[int]]:
    """Read which heads are scored, by layer."""
    attending = [layer for layer, kind in enumerate(model.layer_types()) if "attention" in kind]
    n_heads = model.cfg.n_heads or 0
    if not attending:
        raise UnsupportedHookError(
            f"{model.cfg.model_name or 'this model'} has no attention heads; "
            "score_heads(model, effective=True) scores what state-space layers read"
        )
    if heads is None:
        return {layer: set(range(n_heads)) for layer in attending}
    given = cast("Mapping[int, Sequence[int]]", heads) if isinstance(heads, Mapping) else None
    pairs: list[Any] = (
        list(cast("Sequence[Any]", heads))
        if given is None
        else [(layer, head) for layer in given for head in given[layer]]
    )
    chosen: dict[int, set[int]] = {}
    for pair in pairs:
        match pair:
            case (int(layer), int(head)) if layer in attending and 0 <= head < n_heads:
                chosen.setdefault(layer, set()).add(head)
            case _:
                raise ArgumentError(
                    f"heads are (layer, head) pairs of layers {attending} with heads 0 to {n_heads - 1}; got {pair!r}"
                )
    if not chosen:
        raise ArgumentError(f"no heads are named: heads={heads!r}; None scores all")
    return chosen


def _listed(seq: Any) -> list[Any]:
    if isinstance(seq, list) and seq and isinstance(seq[0], str | list | Tensor):
        return list(cast("Any", seq))
    if isinstance(seq, Tensor) and seq.ndim == 2:
        return list(seq)
    return [seq]


def _is_text(text: Any) -> bool:
    return isinstance(text, str)


def _row(ids: Any) -> Tensor:
    row = torch.as_tensor(ids)
    if row.ndim != 1 or row.is_floating_point():
        raise ArgumentError(f"a text is a string, or ids [pos]; got shape {list(row.shape)}, {row.dtype}")
    return row[None]


def _bos(prepend_bos: bool | None) -> dict[str, Any]:
    return {} if prepend_bos is None else {"prepend_bos": prepend_bos}


def _widest(found: Mapping[int, Tensor]) -> torch.dtype:
    return torch.float64 if any(value.dtype == torch.float64 for value in found.values()) else torch.float32
