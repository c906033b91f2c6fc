"""Effective attention of SSM layers: how much of each source token's input is in each target token's output.

    y_t = sum over s <= t of alpha[t, s] x_s,   alpha[t, s] = sum_n C_t[n] decay_(s+1)[n] ... decay_t[n] B_s[n] delta_s

for each channel (Mamba-1) or head (Mamba-2). With the skip connection, D is on the diagonal and the sum is
`hook_ssm_output`. It is exact, given the step sizes, B and C that the run had. It is not a softmax: **rows do not sum
to 1 and entries may be negative**.

Source: hidden attention, Ali, Zimerman and Wolf 2024 (arXiv 2403.01590, equation 11); the matrix of a scalar-decay SSM,
Dao and Gu 2024 (arXiv 2405.21060, section 3). TransformerLens' form leaves delta_s out (`with_delta=False` here).

Cost, for E channels or heads, N states and T positions: one target or source O(T E N) time and O(E N) memory (the
decay is run backwards from the target, or forwards from the source); all pairs O(T^2 E N) time, in blocks of heads.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core._decomposition import sliced
from lens_core._positions import read_positions
from lens_core.analysis.ssm_blocks import MAX_BYTES, attention_blocks, take
from lens_core.analysis.ssm_scan import Scan, read_layers, read_scan
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache

__all__ = ["EffectiveAttention", "effective_attention", "reconstruction_error", "scan_attention"]

Reduction: TypeAlias = Literal["sum", "mean", "mean_abs", "norm"]
REDUCTIONS = ("sum", "mean", "mean_abs", "norm")


@attrs.frozen(kw_only=True, eq=False)
class EffectiveAttention:
    """Effective attention of one layer in one run.

    Attributes:
        values: Zero where the source comes later.
        axes: What the axes of `values` are: of `batch`, `channel` or `head`, `target` and `source` those that no int,
            no reduction and no cache without a batch axis dropped.
        layer: The layer.
        heads: The channels or heads that are there, or that were reduced.
        per: What one map belongs to: a `channel` (Mamba-1) or a `head` (Mamba-2).
        skip: Whether D is on the diagonal.
        with_delta: Whether the source's step size is in it, so that it gives the output back.
        error: The largest difference between the output rebuilt from the inputs and the output that the run had, as a
            share of the largest output; None where it cannot be told: one source only, without delta, or where
            `hook_ssm_input` or the output was not cached. About 1e-6 in float32. Large where something between was
            edited (the write, the state or the output), or where the cache lacks earlier positions.
    """

    values: Tensor = attrs.field(repr=lambda tensor: f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}")
    axes: tuple[str, ...]
    layer: int
    heads: tuple[int, ...] = attrs.field(repr=False)
    per: Literal["channel", "head"]
    skip: bool
    with_delta: bool
    error: float | None


@checks_arguments
def effective_attention(
    cache: "ActivationCache",
    layer: int,
    *,
    target: Any = None,
    source: Any = None,
    heads: Any = None,
    reduce: Reduction | None = None,
    skip: bool = False,
    with_delta: bool = True,
    max_bytes: int = MAX_BYTES,
) -> EffectiveAttention:
    """Give how much of each source token's SSM input is in each target token's SSM output, for each channel or head.

    Computed from the values of that run, edits included: the cached step sizes, B and C, and `hook_decay` where it was
    cached (elsewhere `exp(delta A)`). It needs no run and changes nothing in the cache. Rows do not sum to 1, and
    entries may be negative.

    Args:
        cache: The cache; it holds `mixer.hook_delta`, `hook_B` and `hook_C` of the layer (default names) for all
            positions from the first on.
        layer: The layer; negative counts from the end. In a hybrid, one with a mixer: attention's own pattern is at
            `attn.hook_pattern`.
        target: Positions along the cached axis whose outputs are explained: an int drops the axis, None takes all.
        source: Positions whose inputs are looked at, likewise.
        heads: Channels (Mamba-1) or heads (Mamba-2), likewise.
        reduce: Over channels or heads: `"sum"`, `"mean"`, `"mean_abs"`, or `"norm"` (root of the sum of squares).
            Blocks are reduced one after the other, so the whole is never in memory.
        skip: Whether to add D on the diagonal: the sum is then `hook_ssm_output` instead of `hook_y`.
        with_delta: False leaves the source's step size out; the sum is then not the output.
        max_bytes: How much memory to work in, beside the result. At least one head is computed at a time.

    Returns:
        The values and how well they give the run's own output back.

    Raises:
        CacheError: A value that it needs was not cached; it is named.
        ArgumentError: No such layer, position, head or reduction; a layer without an SSM mixer.

    Example:
        >>> import torch, lens_core as lens
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
        >>> model = lens.load(MambaForCausalLM(config))
        >>> tokens = torch.tensor([[3, 14, 15, 9, 26, 5]])
        >>> _, cache = model.run_with_cache(tokens)
        >>> found = cache.effective_attention(0, target=-1)  # what the last token reads: [batch, channel, source]
        >>> found.values.shape == (1, model.cfg.d_inner, cache["delta", 0].shape[1])
        True
        >>> found.error < 1e-4
        True
    """
    (layer,), heads = read_layers(cache.table, layer), read_positions(heads)
    scan = read_scan(cache, layer)
    wanted = _Wanted(target=target, source=source, reduce=reduce, skip=skip, with_delta=with_delta, max_bytes=max_bytes)
    rebuilt = _Rebuilt()
    can_rebuild = with_delta and source is None and None not in (scan.x, scan.output if skip else scan.y)
    values = _streamed(scan, heads, wanted, rebuilt.see if can_rebuild else None)
    per = "channel" if "d_inner" in cache.table[f"blocks.{layer}.mixer.hook_delta"].shape.split() else "head"
    dropped = {
        "batch": not cache.has_batch_dim,
        per: reduce is not None or isinstance(heads, int),
        "target": isinstance(read_positions(target), int),
        "source": isinstance(read_positions(source), int),
    }
    return EffectiveAttention(
        values=values if cache.has_batch_dim else values[0],
        axes=tuple(axis for axis, gone in dropped.items() if not gone),
        layer=layer,
        heads=tuple(int(head) for head in sliced(torch.arange(scan.n_heads), 0, heads).reshape(-1)),
        per=per,
        skip=skip,
        with_delta=with_delta,
        error=rebuilt.error if can_rebuild else None,
    )


@checks_arguments
def scan_attention(
    scan: Scan,
    *,
    target: Any = None,
    source: Any = None,
    heads: Any = None,
    reduce: Reduction | None = None,
    skip: bool = False,
    with_delta: bool = True,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """Give the effective attention of a scan; see `effective_attention` for the arguments.

    Gradients flow to the scan's tensors, and are finite however fast it forgets.

    Returns:
        `[batch, head, target, source]`, without the axes that ints and a reduction dropped.

    Raises:
        ArgumentError: No such position, head or reduction; `skip` without D.

    Example:
        >>> one = torch.ones(1, 3, 1)
        >>> scan = Scan(delta=one, B=one[..., None], C=one[..., None], A=-torch.log(torch.tensor([[2.0]])))
        >>> scan_attention(scan)[0, 0]  # every step forgets half
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 1.0000, 0.0000],
                [0.2500, 0.5000, 1.0000]])
        >>> scan_attention(scan, target=-1)
        tensor([[[0.2500, 0.5000, 1.0000]]])
    """
    wanted = _Wanted(target=target, source=source, reduce=reduce, skip=skip, with_delta=with_delta, max_bytes=max_bytes)
    return _streamed(scan, read_positions(heads), wanted, None)


@checks_arguments
def reconstruction_error(
    attention: Float[Tensor, "batch head target source"],
    x: Float[Tensor, "batch source head head_dim"],
    y: Float[Tensor, "batch target head head_dim"],
) -> float:
    """Give the largest difference between `sum_s attention[t, s] x_s` and the outputs, over the largest output.

    Example:
        >>> x = torch.ones(1, 2, 1, 1)
        >>> reconstruction_error(torch.eye(2)[None, None], x, x)
        0.0
    """
    rebuilt = _Rebuilt()
    rebuilt.compare(attention, x, y)
    return rebuilt.error


@attrs.frozen(kw_only=True)
class _Wanted:
    """What was asked for, heads aside."""

    target: Any
    source: Any
    reduce: str | None
    skip: bool
    with_delta: bool
    max_bytes: int


class _Rebuilt:
    """How well outputs are given back, over several blocks."""

    def __init__(self) -> None:
        self.off, self.largest = 0.0, 0.0

    def compare(self, attention: Tensor, x: Tensor, y: Tensor) -> None:
        """Take `[batch head target source]`, the inputs, and the outputs at these targets."""
        if not y.numel():
            return
        with torch.no_grad():
            rebuilt = torch.einsum("bhts,bshp->bthp", attention, x.to(attention))
            self.off = max(self.off, float((rebuilt - y).abs().max()))
            self.largest = max(self.largest, float(y.abs().max()))

    def see(self, block: Scan, values: Tensor, targets: Sequence[int], skip: bool) -> None:
        """Take a block."""
        output = block.output if skip else block.y
        if block.x is not None and output is not None:
            self.compare(values, block.x, take(output, 1, targets))

    @property
    def error(self) -> float:
        """The largest difference as a share of the largest output."""
        return self.off / self.largest if self.largest else (0.0 if self.off == 0.0 else math.inf)


def _streamed(
    scan: Scan,
    heads: Any,
    wanted: _Wanted,
    see: Callable[[Scan, Tensor, Sequence[int], bool], None] | None,
) -> Tensor:
    """Go through the blocks, showing each, and put together what was asked for."""
    if wanted.reduce is not None and wanted.reduce not in REDUCTIONS:
        raise ArgumentError(f"reduce is None or one of {', '.join(map(repr, REDUCTIONS))}; got {wanted.reduce!r}")
    if wanted.skip and scan.D is None:
        raise ArgumentError("skip=True needs D, which this scan has not: its cache has no model")
    scan = scan if heads is None else scan.heads(heads)
    if not scan.n_heads:
        raise ArgumentError(f"heads={heads!r} names no channel or head")
    targets, sources = _positions(scan, wanted.target), _positions(scan, wanted.source)
    rows, columns = sorted(set(targets)), sorted(set(sources))
    pieces, total = list[Tensor](), torch.zeros(())
    for block, own in attention_blocks(
        scan,
        rows,
        None if wanted.source is None else columns,
        with_delta=wanted.with_delta,
        max_bytes=wanted.max_bytes,
    ):
        values = _with_skip(own, block.D, rows, columns) if wanted.skip and block.D is not None else own
        if see is not None:
            see(block, values, rows, wanted.skip)
        if wanted.reduce is None:
            pieces.append(values)
        else:
            total = total.to(values) + _summed(values, wanted.reduce)
    whole = torch.cat(pieces, dim=1) if wanted.reduce is None else _reduced(total, wanted.reduce, scan.n_heads)
    whole = _in_order(_in_order(whole, -2, rows, targets), -1, columns, sources)
    return _without_axes(whole, wanted, drops_heads=isinstance(heads, int) and wanted.reduce is None)


def _without_axes(values: Tensor, wanted: _Wanted, *, drops_heads: bool) -> Tensor:
    """Drop the axes of length 1 that ints asked for."""
    values = values.squeeze(1) if drops_heads else values
    values = values.squeeze(-2) if isinstance(read_positions(wanted.target), int) else values
    return values.squeeze(-1) if isinstance(read_positions(wanted.source), int) else values


def _positions(scan: Scan, given: Any) -> list[int]:
    named: Any = sliced(torch.arange(scan.n_pos), 0, given)
    chosen: list[int] = named.reshape(-1).tolist()
    if not chosen:
        raise ArgumentError(f"{given!r} names none of the {scan.n_pos} positions")
    return chosen


def _in_order(values: Tensor, axis: int, there: Sequence[int], asked: Sequence[int]) -> Tensor:
    """Bring positions that were computed once, in ascending order, to the order and number that was asked for."""
    place = {position: index for index, position in enumerate(there)}
    return take(values, axis % values.ndim, [place[position] for position in asked])


def _with_skip(values: Tensor, D: Tensor, targets: Sequence[int], sources: Sequence[int]) -> Tensor:
    same = torch.tensor(list(targets))[:, None] == torch.tensor(list(sources))
    return values + same.to(values) * D[:, None, None]


def _summed(values: Tensor, reduce: str) -> Tensor:
    if reduce == "norm":
        return values.square().sum(1)
    return (values.abs() if reduce == "mean_abs" else values).sum(1)


def _reduced(total: Tensor, reduce: str, n_heads: int) -> Tensor:
    if reduce == "norm":  # the root's gradient at 0, where nothing is, would be infinite
        return torch.where(total > 0, total.masked_fill(total <= 0, 1.0).sqrt(), 0.0)
    return total if reduce == "sum" else total / n_heads
