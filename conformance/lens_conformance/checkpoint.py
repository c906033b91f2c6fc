"""A user's own checkpoint, on their own versions: the kit's checks on its weights, at some layers and names.

The reference is the same HF model while nothing of lens is on it, which the checks `logits` and `clean` show: a twin
would take the memory twice.
"""

import contextlib
import copy
import random
import warnings
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

import lens_core as lens
from lens_conformance.case import Case, Deck, Worst
from lens_conformance.checks import all_checks
from lens_conformance.families import known_families
from lens_conformance.family import Family
from lens_conformance.oracle import Pair
from lens_conformance.report import Report, versions
from lens_conformance.runner import try_on
from lens_core._offload import has_placement
from lens_core.errors import ArgumentError, LensWarning

__all__ = ["CHECKPOINT_CHECKS", "TEXT", "verify"]

CHECKPOINT_CHECKS = (
    "declaration", "logits", "fires", "values", "equations", "residual", "decompositions", "identity", "edits",
    "liveness", "locality", "restoring", "aliasing", "clean", "stateless", "padding", "split", "generation", "layers",
    "dtypes", "weights", "files", "effective_attention",
)  # fmt: skip
"""The checks that need no other config, no training and no second copy of the weights."""
_EXACT = frozenset(
    ("logits", "fires", "identity", "aliasing", "clean", "stateless", "generation", "layers", "dtypes", "files")
)
"""Those that compare bits, or no values: in half precision they are tried on the checkpoint as it is."""
TEXT = "The cat sat on the mat, and the dog that had chased it all day lay down beside the cat."
_SLACK = {torch.float64: 0.0, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 0.2}
"""Of a value's scale: rounding of dozens of blocks, computed in another order."""


@attrs.frozen(kw_only=True, eq=False)
class _Checkpoint(Pair):
    """The model, with the names of some blocks, and its weights in float64 where memory allows."""

    chosen: tuple[str, ...]
    weights: dict[str, Tensor] | None

    def names(self) -> list[str]:
        """List the names outside of the blocks and those of the chosen blocks."""
        return list(self.chosen)

    def golden(self, tokens: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the golden forward in float64."""
        assert self.family.golden is not None
        with torch.no_grad():
            return self.family.golden(self.weights, self.config, tokens, **options)


class _CheckpointCase(Case):
    """Choices over one model in its own dtype and the tokens of a text."""

    def __init__(self, one: _Checkpoint, tokens: Tensor, number: int, worst: Worst, deck: Deck) -> None:
        super().__init__(one.family, number, worst, deck=deck, variants=())
        self._one, self._tokens = one, tokens

    def exact(self) -> contextlib.AbstractContextManager[None]:
        """Leave HF's own precision."""
        return contextlib.nullcontext()

    def bound(self, tight: float) -> float:
        """Allow for the rounding of the checkpoint's dtype."""
        return max(tight, _SLACK[self._one.dtype])

    def pair(self, dtype: torch.dtype = torch.float32, *, is_own: bool = False, **overrides: Any) -> Pair:
        """Give the checkpoint, whatever was asked for."""
        return self._one

    def tokens(self, *, min_pos: int = 1, max_pos: int = 8, batch: int | None = None) -> Tensor:
        """Cut rows out of the text."""
        rows = self.integer(1, 2, "rows") if batch is None else batch
        length = min(self.integer(min_pos, max_pos, "positions"), len(self._tokens))
        starts = [self._random.randint(0, len(self._tokens) - length) for _ in range(rows)]
        return torch.stack([self._tokens[start : start + length] for start in starts])


def verify(
    model: Any,
    *,
    text: str | None = None,
    examples: int = 3,
    layers: int = 3,
    memory: float = 2.0,
    only: Collection[str] = (),
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Hold one loaded checkpoint to the checks that its own weights can answer.

    Values are tried at the names outside of the blocks and of some blocks; runs have at most 20 positions. Beside the
    model this takes one cache of those names, one default cache, and for models that fit in `memory` the weights in
    float64, from which the golden forward of the family judges values and edits. Of a checkpoint in half precision a
    float32 copy is made, if it fits, on which values are compared; bits are compared on the checkpoint itself.

    Args:
        model: What `lens.load` gives; in evaluation mode it is left as it was.
        text: The text whose tokens are run; None for a sentence, or for random ids where there is no tokenizer.
        examples: Of each check.
        layers: Blocks whose names are tried: first, last, and some evenly between; one is the last.
        memory: GiB that the weights may take in float64; where they take more, no golden forward judges.
        only: Names of checks, of `CHECKPOINT_CHECKS`; all if empty. A report of some is no certificate.
        seed: Of what is chosen.
        progress: Called with each check's title before it is tried.

    Raises:
        ArgumentError: An unknown check, or numbers that make no sense.

    Example:
        >>> import lens_core as lens
        >>> report = verify(lens.load("toy:gpt2"), examples=1, only=["logits", "residual"])
        >>> [outcome.status for outcome in report.outcomes]
        ['passed', 'passed']
    """
    unknown = sorted(set(only) - set(CHECKPOINT_CHECKS))
    if unknown:
        raise ArgumentError(f"no check {unknown[0]!r} for a checkpoint; there are {', '.join(CHECKPOINT_CHECKS)}")
    if examples < 1 or layers < 1:
        raise ArgumentError(f"examples and layers are 1 or more; got {examples} and {layers}")
    only = (only,) if isinstance(only, str) else only
    one = _checkpoint(model, layers=layers, memory=memory)
    wide = _widened(one, layers=layers, memory=memory)
    tokens = _tokens(model, text, seed)
    outcomes = []
    for name, check in all_checks().items():
        if name not in (only or CHECKPOINT_CHECKS):
            continue
        if progress is not None:
            progress(check.title)
        used = one if name in _EXACT else wide
        judged = attrs.evolve(one.family, golden=one.family.golden if used.weights is not None else None)
        case = partial(_CheckpointCase, used, tokens)
        outcomes.append(try_on(check, judged, case, count=examples, seed=seed, no_golden=_no_golden(used, memory)))
    return Report(
        model_type=model.cfg.model_type,
        subject=f"checkpoint {model.cfg.model_name}",
        level="checkpoint",
        seed=seed,
        versions=versions(model.cfg.model_type),
        outcomes=tuple(outcomes),
        device=str(model.cfg.device),
        dtype=str(model.cfg.dtype).removeprefix("torch.") + ("" if wide is one else ", values in float32"),
        options={"text": TEXT if text is None else text, "examples": examples, "layers": layers, "memory": memory},
        is_whole=not only,
    )


def _checkpoint(model: Any, *, layers: int, memory: float) -> _Checkpoint:
    hf, cfg = model.bare_model, model.cfg
    family = known_families().get(cfg.model_type) or Family(model_type=cfg.model_type, config={})
    size = sum(parameter.numel() for parameter in hf.parameters()) * 8
    is_wide = cfg.dtype in (torch.float32, torch.float64)
    fits = family.golden is not None and is_wide and size <= memory * 2**30
    weights = {name: value.detach().cpu().double() for name, value in hf.state_dict().items()} if fits else None
    last = cfg.n_layers - 1
    some = {round(at * last / (layers - 1)) for at in range(layers)} if layers > 1 else {last}
    chosen = [name for name, point in model.table.items() if point.layer is None or point.layer in some]
    return _Checkpoint(
        family=family, model=model, hf=hf, reference=hf, dtype=cfg.dtype, chosen=tuple(chosen), weights=weights
    )


def _widened(one: _Checkpoint, *, layers: int, memory: float) -> _Checkpoint:
    """Give a float32 copy of a half-precision checkpoint, if it fits: half precision's rounding hides mistakes."""
    size = sum(parameter.numel() for parameter in one.hf.parameters()) * 4
    if one.dtype in (torch.float32, torch.float64) or size > memory * 2**30 or has_placement(one.hf):
        return one
    with warnings.catch_warnings(action="ignore", category=LensWarning):
        model = lens.load(copy.deepcopy(one.hf).float(), tokenizer=False)
    return _checkpoint(model, layers=layers, memory=memory)


def _no_golden(one: _Checkpoint, memory: float) -> str:
    if one.family.golden is None:
        return f"the kit has no golden forward of {one.family.model_type}"
    if one.dtype not in (torch.float32, torch.float64):
        return f"half precision hides too much, and a float32 copy takes more than {memory:g} GiB"
    return f"its weights in float64 take more than {memory:g} GiB"


def _tokens(model: Any, text: str | None, seed: int) -> Tensor:
    """Give the ids of a text `[pos]`, at least 12 of them."""
    if model.tokenizer is None:
        if text is not None:
            raise ArgumentError("this checkpoint has no tokenizer to read a text with; leave it out for random ids")
        chance = random.Random(seed)
        return torch.tensor([chance.randrange(model.cfg.d_vocab) for _ in range(24)])
    tokens = model.to_tokens(TEXT if text is None else text)[0].cpu()
    if len(tokens) < 12:
        raise ArgumentError(f"the text has {len(tokens)} tokens; give one of 12 or more")
    return tokens
