"""How long an SSM state keeps what was written to it.

A state keeps the share `decay_t` of itself at each step; of what was written at position s it holds at position t the
product of the decays after s, `exp(A (delta_(s+1) + ... + delta_t))`. At a steady step size that is one half after
`ln 2 / (delta |A|)` tokens, the half-life.

Source: Gu and Dao 2023 (arXiv 2312.00752, section 3.5.2: A and delta as forgetting); the retained contribution of a
source is what Sharma, Atkinson and Bau 2024 (arXiv 2404.03646) knock out.
"""

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core._decomposition import sliced
from lens_core._positions import read_positions
from lens_core.analysis.ssm_scan import Scan, log_decay, read_layers, read_scan
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache

__all__ = ["half_life", "retention", "scan_half_life", "scan_retention"]


@checks_arguments
def retention(cache: "ActivationCache", layer: int, source: int, target: Any = None, heads: Any = None) -> Tensor:
    """Give the share of what was written to each state at one position that is left at others.

    Args:
        cache: Holds `mixer.hook_delta`, `hook_B` and `hook_C` of the layer; its `hook_decay` is used where it is there.
        layer: The layer; negative counts from the end.
        source: Where it was written, along the cached axis.
        target: Positions that look at it: an int drops the axis, None takes all.
        heads: Channels (Mamba-1) or heads (Mamba-2): an int drops the axis, None takes all.

    Returns:
        `[batch, target, channel, d_state]` (Mamba-1) or `[batch, target, head]` (Mamba-2): 1 at the source, 0 before.

    Raises:
        CacheError: A value that it needs was not cached.
        ArgumentError: No such layer, position or head.

    Example:
        >>> import torch, lens_core as lens
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
        >>> model = lens.load(MambaForCausalLM(config))
        >>> tokens = torch.tensor([[3, 14, 15, 9, 26, 5]])
        >>> _, cache = model.run_with_cache(tokens)
        >>> kept = retention(cache, 0, source=1, target=-1)
        >>> kept.shape == (1, model.cfg.d_inner, model.cfg.d_state)
        True
    """
    scan, heads = read_scan(cache, layer), read_positions(heads)
    kept = scan_retention(scan if heads is None else scan.heads(heads), source, target)
    kept = _per_head(kept, is_scalar=_is_scalar(cache, layer), drops_heads=isinstance(heads, int))
    return kept if cache.has_batch_dim else kept[0]


@checks_arguments
def half_life(
    cache: "ActivationCache",
    layer: int,
    *,
    pos_slice: Any = None,
    mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
) -> Tensor:
    """Give how many tokens each state takes to forget half, at the mean step size of a run.

    Args:
        cache: As for `retention`.
        layer: The layer; negative counts from the end.
        pos_slice: Positions that are averaged over, along the cached axis.
        mask: 1 at the tokens that count, for a batch with padding; the mean is over all of these.

    Returns:
        Tokens, `[channel, d_state]` (Mamba-1) or `[head]` (Mamba-2); infinite where nothing is forgotten.

    Raises:
        CacheError: A value that it needs was not cached.
        ArgumentError: No such layer or position; a mask of another shape, or that leaves no token.

    Example:
        >>> import torch, lens_core as lens
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
        >>> model = lens.load(MambaForCausalLM(config))
        >>> tokens = torch.tensor([[3, 14, 15, 9, 26, 5]])
        >>> _, cache = model.run_with_cache(tokens)
        >>> half_life(cache, 0).shape == (model.cfg.d_inner, model.cfg.d_state)
        True
    """
    tokens = scan_half_life(read_scan(cache, layer), pos_slice=pos_slice, mask=mask)
    return tokens[:, 0] if _is_scalar(cache, layer) else tokens


@checks_arguments
def scan_retention(scan: Scan, source: int, target: Any = None) -> Float[Tensor, "batch *target head state"]:
    """Give the product of the decays after a source, up to each target; see `retention`.

    Example:
        >>> one = torch.ones(1, 3, 1)
        >>> scan = Scan(delta=one, B=one[..., None], C=one[..., None], A=-torch.log(torch.tensor([[2.0]])))
        >>> scan_retention(scan, 0).flatten()
        tensor([1.0000, 0.5000, 0.2500])
    """
    if not -scan.n_pos <= source < scan.n_pos:
        raise ArgumentError(f"the source {source} is outside of {scan.n_pos} positions")
    source %= scan.n_pos
    later = torch.arange(scan.n_pos, device=scan.delta.device) > source
    chosen = read_positions(target)
    if scan.decay is not None:
        kept = sliced(scan.decay.masked_fill(~later[:, None, None], 1.0).cumprod(1), 1, chosen)
    else:
        steps = sliced(scan.delta.masked_fill(~later[:, None], 0.0).cumsum(1), 1, chosen)
        kept = (steps[..., None] * cast("Tensor", scan.A)).exp()
    before = sliced(torch.arange(scan.n_pos, device=kept.device) < source, 0, chosen)
    return kept.masked_fill(before[..., None, None], 0.0)


@checks_arguments
def scan_half_life(
    scan: Scan, *, pos_slice: Any = None, mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None
) -> Float[Tensor, "head state"]:
    """Give `ln 2` over the mean of `-delta A` (or of `-log decay`, where decays were cached), in tokens.

    Example:
        >>> steps = torch.tensor([[[1.0], [3.0]]])  # two tokens, mean 2
        >>> scan = Scan(delta=steps, B=steps[..., None], C=steps[..., None], A=-torch.log(torch.tensor([[2.0]])))
        >>> scan_half_life(scan)
        tensor([[0.5000]])
    """
    shape = scan.delta.shape[:2]
    counted = torch.ones(shape, dtype=torch.bool, device=scan.delta.device)
    if mask is not None:
        if mask.shape != shape:
            raise ArgumentError(f"the mask has shape {tuple(mask.shape)}, and the run has {tuple(shape)} tokens")
        counted = mask.to(counted)
    chosen = read_positions(pos_slice)
    chosen = (chosen,) if isinstance(chosen, int) else chosen
    counted = sliced(counted, 1, chosen)
    if not counted.any():
        raise ArgumentError("no token is left to average over")
    rates = sliced(log_decay(scan), 1, chosen)[counted].mean(0)
    return math.log(2) / (0.0 - rates)  # not -rates: where nothing is forgotten, +inf


def _is_scalar(cache: "ActivationCache", layer: int) -> bool:
    """Whether a head has one decay, without an axis of states."""
    (layer,) = read_layers(cache.table, layer)
    return "d_state" not in cache.table[f"blocks.{layer}.mixer.hook_decay"].shape.split()


def _per_head(kept: Tensor, *, is_scalar: bool, drops_heads: bool) -> Tensor:
    kept = kept.squeeze(-2) if drops_heads else kept
    return kept.squeeze(-1) if is_scalar else kept
