"""The one softmax of an eager attention function, intercepted: its argument is the scores, its result the pattern.

Every cast, scale and soft cap is then that model's own. The key axis that is shown has all real positions: unused slots
of a static cache are trimmed, and keys that a sliding window's cache has dropped are shown as masked.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from lens_core._choice import Part
from lens_core._graph import FunctionMode
from lens_core._watch import Watch
from lens_core.errors import UnsupportedHookError

__all__ = ["Enough", "InsideSoftmax", "additive_mask", "masked_cells"]

SOFTMAXES = (nn.functional.softmax, torch.softmax, Tensor.softmax)
DROPOUTS = (nn.functional.dropout, torch.dropout)


class Enough(Exception):  # noqa: N818 - not an error: leaves the eager function once the pattern is known
    """The pattern is known and nothing after it is wanted."""


class InsideSoftmax(FunctionMode):
    """Intercept the one softmax of an eager attention function, and the dropout after it."""

    def __init__(
        self,
        scores: Watch | None,
        pattern: Watch | None,
        *,
        is_real: bool,
        masked: Bool[Tensor, "..."] | None,
        stops: bool = False,
        part: Part | None = None,
    ) -> None:
        """Serve these watches.

        `is_real` says that the result is the model's, `stops` that only the pattern matters, `part` which cells are
        computed, where these are not all.
        """
        super().__init__()
        self.part = part
        self.scores, self.pattern = scores, pattern
        self.is_real, self.masked, self.stops = is_real, masked, stops
        self.softmaxes = 0
        self.sinks = 0
        """Columns of an attention sink behind the keys'; they are no cells of scores and pattern."""

    changed: Tensor | None = None
    """The rows `[batch, query]` in which a function changed a cell of any head."""

    @property
    def is_edited(self) -> bool:
        """Whether a function changed a value."""
        return any(watch.edited for watch in (self.scores, self.pattern) if watch is not None)

    @property
    def is_rerouted(self) -> bool:
        """Whether a value's place in autograd's graph matters."""
        return any(watch.rerouted for watch in (self.scores, self.pattern) if watch is not None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_over:
            return func(*args, **kwargs)
        if func in SOFTMAXES:
            return self._softmax(func, args, kwargs)
        if func is torch.cat and _is_sink(args[0], kwargs.get("dim")):
            cells, sink = args[0]
            self.sinks = sink.shape[-1]
            return func([self._scores(cells), sink], **kwargs)
        if func in DROPOUTS and not self.is_real and not self.is_edited and not self.is_rerouted:
            return args[0] if args else kwargs["input"]  # beside the model: draw no random numbers
        return func(*args, **kwargs)

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        self.softmaxes += 1
        scores, rest = args[0], args[1:]
        scores = scores if self.sinks else self._scores(scores)
        pattern = func(scores, *rest, **kwargs)
        if self.pattern is not None and self.sinks:
            cells = pattern[..., : -self.sinks]
            cells = self._noted(cells, _fire_pattern(self.pattern, cells, scores.dtype, self.part))
            pattern = torch.cat([cells, pattern[..., -self.sinks :].to(cells.dtype)], dim=-1)
        elif self.pattern is not None:
            pattern = self._noted(pattern, _fire_pattern(self.pattern, pattern, scores.dtype, self.part))
        if self.stops:
            raise Enough
        return pattern

    def _scores(self, cells: Tensor) -> Tensor:
        if self.scores is None:
            return cells
        return self._noted(cells, _fire_scores(self.scores, cells, self.masked, self.part))

    def _noted(self, before: Tensor, after: Tensor) -> Tensor:
        if after is not before:
            rows = (after != before.to(after.dtype)).any(-1).any(1)
            self.changed = rows if self.changed is None else self.changed | rows
        return after

    def check(self, module: nn.Module) -> None:
        """Raise when the eager function did not compute one softmax."""
        if self.softmaxes != 1:
            raise UnsupportedHookError(
                f"the eager attention of {type(module).__name__} computed {self.softmaxes} softmaxes where one was "
                "expected; scores and pattern cannot be told apart there"
            )


def _is_sink(tensors: Any, dim: int | None) -> bool:
    """Whether scores get a column that is no key's, as `gpt_oss` has it."""
    return len(tensors) == 2 and dim == -1 and tensors[0].ndim == 4 and tensors[1].shape[-1] == 1


def _fire_pattern(
    watch: Watch, pattern: Float[Tensor, "batch heads query slots"], dtype: torch.dtype, part: Part | None
) -> Tensor:
    """Show the pattern in the scores' dtype: where the softmax is float32's, HF casts to that before using it."""
    keys, dropped = _real_keys(watch, pattern)
    real = (pattern if keys == pattern.shape[-1] else pattern[..., :keys]).to(dtype)
    shown = pad(real, (dropped, 0)) if dropped else real
    new = watch.fire(shown, beside=True, part=part)
    if new is shown and not (watch.rerouted and shown is not pattern):
        return pattern
    return _put_back(new[..., dropped:], pattern.to(dtype), keys)


def _fire_scores(watch: Watch, scores: Tensor, masked: Tensor | None, part: Part | None) -> Tensor:
    """Show scores with -inf in masked cells; HF's own finite number goes back where a function left -inf."""
    keys, dropped = _real_keys(watch, scores)
    real = scores if keys == scores.shape[-1] else scores[..., :keys]
    hidden = None if masked is None else masked[..., :keys].expand_as(real)
    shown = real if hidden is None else real.masked_fill(hidden, float("-inf"))
    shown = pad(shown, (dropped, 0), value=float("-inf")) if dropped else shown
    new = watch.fire(shown, beside=True, part=part)
    if not watch.edited and not watch.rerouted:
        return scores
    new = new[..., dropped:]
    # -inf is for show: HF's numbers are finite, so that a row which may see nothing is uniform and not NaN.
    lowest = torch.finfo(real.dtype).min
    finite = new.masked_fill(new.isneginf(), lowest)
    kept = real if new.requires_grad else real.detach()  # a row that is all masked has a gradient in HF, too
    new = finite if hidden is None else torch.where(hidden & new.isneginf(), kept, finite)
    return _put_back(new, scores, keys)


def _real_keys(watch: Watch, cells: Tensor) -> tuple[int, int]:
    """Count the leading slots that hold real keys, and the earlier keys that the cache has dropped."""
    total = watch.run.now.total
    return min(cells.shape[-1], total), max(0, total - cells.shape[-1])


def _put_back(new: Tensor, cells: Tensor, keys: int) -> Tensor:
    return new if keys == cells.shape[-1] else torch.cat([new, cells[..., keys:]], dim=-1)


def masked_cells(mask: Tensor | None) -> Bool[Tensor, "..."] | None:
    """Find the cells that an additive mask closes."""
    if mask is None:
        return None
    return ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2


def additive_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
    *,
    past: int,
    rows: Int[Tensor, " row"] | None = None,
) -> tuple[Float[Tensor, "batch heads query key"] | None, int]:
    """Bring the mask of any kernel to the additive form of the eager one; also give the number of keys it covers.

    SDPA's is additive, boolean or None, flash attention's a padding mask `[batch, key]` or None, flex attention's a
    `BlockMask`. None means causal where the module is and more than one position asks. `rows` are those of the call's
    positions that the mask is wanted for, the others are never made; None for all.
    """
    n_query, n_key = query.shape[2], key.shape[2]
    if mask is not None and not isinstance(mask, Tensor):
        mask = _from_blocks(mask, query, n_key, rows)
    elif mask is not None and mask.ndim == 4 and rows is not None and mask.shape[2] == n_query:
        mask = mask[:, :, rows]
    if mask is not None and mask.ndim == 4 and mask.dtype != torch.bool:
        return mask, mask.shape[-1]
    if mask is not None and mask.ndim == 4:
        closed, length = ~mask, mask.shape[-1]
    else:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        length = min(n_key, past + n_query) if mask is None and causal else n_key
        keys = torch.arange(length, device=query.device)
        asking = torch.arange(n_query, device=query.device) if rows is None else rows
        queries = asking[:, None] + (length - n_query)
        closed = (keys > queries)[None, None] if causal else torch.zeros_like(keys > queries)[None, None]
        if mask is not None:
            closed = closed | ~mask[:, None, None, :length].bool()
        elif n_query == 1 or not causal:
            return None, length if causal else n_key
    lowest = torch.finfo(query.dtype).min
    return torch.zeros_like(closed, dtype=query.dtype).masked_fill(closed, lowest), length


def _from_blocks(mask: Any, query: Tensor, n_key: int, rows: Tensor | None) -> Bool[Tensor, "batch heads query key"]:
    """Write flex attention's mask out."""
    from torch.nn.attention.flex_attention import create_mask

    function, n_query = mask.mask_mod, query.shape[2]
    if rows is not None:
        function, n_query = partial(_at_rows, function, rows), len(rows)
    return create_mask(function, query.shape[0], None, n_query, n_key, device=str(query.device))


def _at_rows(function: Any, rows: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Any:
    return function(batch, head, rows[row], key)
