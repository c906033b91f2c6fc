"""Effective attention of a scan in blocks of heads: three ways to compute one, all without overflow.

One running vector for each target (or source) carries the decay as a product, one position after the other; where all
states of a head decay alike, products of matrices and a masked segment sum are faster. No `exp` of a positive number is
taken, so nothing overflows and gradients are finite however fast the scan forgets.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core.analysis.ssm_scan import Scan, log_decay
from lens_core.errors import ArgumentError

__all__ = ["MAX_BYTES", "attention_blocks", "take"]

MAX_BYTES = 2**28
"""What one block takes at most, unless another limit is given: 256 MiB."""


@checks_arguments
def attention_blocks(
    scan: Scan,
    targets: Sequence[int],
    sources: Sequence[int] | None = None,
    *,
    with_delta: bool = True,
    max_bytes: int = MAX_BYTES,
) -> Iterator[tuple[Scan, Float[Tensor, "batch head target source"]]]:
    """Go through the heads in blocks that fit into a memory: give each block's scan and effective attention.

    Args:
        scan: The scan.
        targets: Positions, each once, in ascending order.
        sources: The same; None for all.
        with_delta: Whether the source's step size is in it.
        max_bytes: What one block may take at most; it has at least one head.

    Example:
        >>> one = torch.ones(1, 3, 4)
        >>> scan = Scan(delta=one, B=one[:, :, :1, None], C=one[:, :, :1, None], A=-one[0, 0, :, None])
        >>> sum(values.abs().sum() for _, values in attention_blocks(scan, range(3), max_bytes=1)).item() > 0
        True
    """
    from_sources = sources is not None and len(sources) < len(targets)
    lanes = len(sources or ()) if from_sources else len(targets)
    size = _block_size(scan, lanes, max_bytes)
    for first in range(0, scan.n_heads, size):
        block = scan.heads(slice(first, first + size))
        if from_sources:
            values = _from_sources(block, sources or (), with_delta=with_delta)
            values = take(values, 2, targets)
        else:
            values = (_one_decay if block.has_one_decay else _to_targets)(block, targets, with_delta=with_delta)
            values = values if sources is None else take(values, 3, sources)
        yield block, values


# ---------------------------------------------------------------------- the three ways to compute a block


def _to_targets(scan: Scan, targets: Sequence[int], *, with_delta: bool) -> Float[Tensor, "batch head target source"]:
    """Run the decay backwards: q_t = C_t, q_s = decay_(s+1) q_(s+1), alpha[t, s] = (q_s . B_s) delta_s."""
    batch, heads, length = scan.delta.shape[0], scan.n_heads, scan.n_pos
    wanted, columns = set(targets), list[Tensor]()
    q = scan.C.new_zeros(batch, heads, 0, scan.C.shape[-1])  # the targets at s and later, first to last
    for s in reversed(range(length)):
        if q.shape[2]:
            q = q * scan.decay_at(s + 1)[:, :, None]
        if s in wanted:
            q = torch.cat([scan.C_at(s)[:, :, None], q], dim=2)
        column = (q @ scan.B_at(s)[..., None]).squeeze(-1)
        columns.append(torch.nn.functional.pad(column, (len(targets) - q.shape[2], 0)))
    values = torch.stack(columns[::-1], dim=-1)
    return values * scan.delta.transpose(1, 2)[:, :, None] if with_delta else values


def _from_sources(scan: Scan, sources: Sequence[int], *, with_delta: bool) -> Float[Tensor, "batch head target source"]:
    """Run the decay forwards: p_s = B_s delta_s, p_t = decay_t p_(t-1), alpha[t, s] = C_t . p_t."""
    batch, heads = scan.delta.shape[0], scan.n_heads
    wanted, rows = set(sources), list[Tensor]()
    p = scan.B.new_zeros(batch, heads, 0, scan.B.shape[-1])  # the sources at t and before
    for t in range(scan.n_pos):
        if p.shape[2]:
            p = p * scan.decay_at(t)[:, :, None]
        if t in wanted:
            write = scan.B_at(t) * scan.delta[:, t, :, None] if with_delta else scan.B_at(t)
            p = torch.cat([p, write[:, :, None]], dim=2)
        row = (p @ scan.C_at(t)[..., None]).squeeze(-1)
        rows.append(torch.nn.functional.pad(row, (0, len(sources) - p.shape[2])))
    return torch.stack(rows, dim=2)


def _one_decay(scan: Scan, targets: Sequence[int], *, with_delta: bool) -> Float[Tensor, "batch head target source"]:
    """Where all states of a head decay alike: `(C B^T)` times what is left from source to target, as matrices."""
    rows = torch.tensor(list(targets), device=scan.delta.device)
    present = torch.tensor(sorted(set(map(int, scan.group))), device=rows.device)
    group = torch.searchsorted(present, scan.group)
    matches = torch.einsum("btgn,bsgn->bgts", scan.C[:, rows[:, None], present], scan.B[:, :, present])
    values = matches[:, group] * _retained(scan, rows)
    return values * scan.delta.transpose(1, 2)[:, :, None] if with_delta else values


def _retained(scan: Scan, rows: Tensor) -> Float[Tensor, "batch head target source"]:
    """Multiply the decays from each source (itself left out) to each target row, by masked sums or products."""
    places = torch.arange(scan.n_pos, device=rows.device)
    before = places <= rows[:, None]  # target source
    if scan.decay is None:
        terms = log_decay(scan)[..., 0].transpose(1, 2)[:, :, None].masked_fill(~before, 0.0)
        sums = _after(terms.flip(-1).cumsum(-1).flip(-1), 0.0)
        return sums.masked_fill(~before, -torch.inf).exp()
    factors = scan.decay[..., 0].transpose(1, 2)[:, :, None].masked_fill(~before, 1.0)
    return _after(factors.flip(-1).cumprod(-1).flip(-1), 1.0).masked_fill(~before, 0.0)


def _after(totals: Tensor, nothing: float) -> Tensor:
    """From sums over `k >= s` to those over `k > s`."""
    return torch.nn.functional.pad(totals[..., 1:], (0, 1), value=nothing)


def _block_size(scan: Scan, lanes: int, max_bytes: int) -> int:
    """Say how many heads fit: copies of the running vectors, and of the block's values."""
    if max_bytes < 1:
        raise ArgumentError(f"max_bytes is a number of bytes above 0; got {max_bytes}")
    per_lane = 6 * scan.n_pos if scan.has_one_decay else 3 * scan.B.shape[-1] + 4 * scan.n_pos
    per_head = scan.delta.shape[0] * lanes * per_lane * scan.delta.element_size()
    return min(scan.n_heads, max(1, max_bytes // max(per_head, 1)))


def take(values: Tensor, axis: int, positions: Sequence[int]) -> Tensor:
    """Give some positions of an axis; the tensor itself where they are all, in order."""
    if list(positions) == list(range(values.shape[axis])):
        return values
    return values.index_select(axis, torch.tensor(list(positions), dtype=torch.long, device=values.device))
