"""What the scan of one SSM layer read in one run, in one form for Mamba-1 and Mamba-2.

A channel of Mamba-1 is a head of width 1 (Dao and Gu 2024, arXiv 2405.21060, section 7.2), so one form serves both:

    h_t = decay_t h_(t-1) + delta_t x_t B_t        for each head, [head_dim, d_state]; decay_t = exp(delta_t A)
    y_t = h_t C_t;  output_t = y_t + D x_t

Glossary: axis `head` is channels in Mamba-1 and heads in Mamba-2, `head_dim` is 1 in Mamba-1; axis `state` is d_state
where every state decays by itself (Mamba-1) and 1 where a head has one decay (Mamba-2); B and C belong to a `group` of
heads (Mamba-1: one group).

Everything is read by the names of the hook contract, so any architecture that declares them is served.
"""

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core._decomposition import read_values, sliced
from lens_core._positions import read_positions
from lens_core.errors import ArgumentError, CacheError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache

__all__ = ["SCAN_INPUTS", "Scan", "log_decay", "mixer_layers", "read_layers", "read_scan", "scan_of", "segment_sum"]

SCAN_INPUTS = ("ssm_input", "B", "C", "delta", "decay")
"""What a scan reads: hook names below `mixer.hook_`."""


def _groups(scan: "Scan") -> Int[Tensor, " head"]:
    """Give head h group `h // (heads / groups)`."""
    n_heads, n_groups = scan.delta.shape[2], scan.B.shape[2]
    return torch.arange(n_heads, device=scan.delta.device) // max(n_heads // n_groups, 1)


@attrs.frozen(kw_only=True, eq=False)
class Scan:
    """What one scan reads, and perhaps what it gave.

    Attributes:
        delta: Step sizes.
        B: What a write is spread over; shared by the heads of a group.
        C: What a state is read by.
        A: Negative decay rates; the decay is then `exp(delta A)`.
        decay: The decays themselves, where they were cached; they go before A.
        x: Inputs, as `hook_ssm_input`.
        D: The skip connection's weight.
        y: What the run had at `hook_y`.
        output: What the run had at `hook_ssm_output`.
        group: Which group's B and C each head reads; head h that of `h // (heads / groups)` unless given.
    """

    delta: Float[Tensor, "batch pos head"] = attrs.field(repr=False)
    B: Float[Tensor, "batch pos group d_state"] = attrs.field(repr=False)
    C: Float[Tensor, "batch pos group d_state"] = attrs.field(repr=False)
    A: Float[Tensor, "head state"] | None = attrs.field(default=None, repr=False)
    decay: Float[Tensor, "batch pos head state"] | None = attrs.field(default=None, repr=False)
    x: Float[Tensor, "batch pos head head_dim"] | None = attrs.field(default=None, repr=False)
    D: Float[Tensor, " head"] | None = attrs.field(default=None, repr=False)
    y: Float[Tensor, "batch pos head head_dim"] | None = attrs.field(default=None, repr=False)
    output: Float[Tensor, "batch pos head head_dim"] | None = attrs.field(default=None, repr=False)
    group: Int[Tensor, " head"] = attrs.field(default=attrs.Factory(_groups, takes_self=True), repr=False)

    def __attrs_post_init__(self) -> None:
        """Refuse a scan without any decay."""
        if self.A is None and self.decay is None:
            raise ArgumentError("a scan needs A or decay: without one of them nothing says how fast a state fades")

    @property
    def n_pos(self) -> int:
        """Number of positions."""
        return self.delta.shape[1]

    @property
    def n_heads(self) -> int:
        """Number of heads (Mamba-1: channels)."""
        return self.delta.shape[2]

    @property
    def has_one_decay(self) -> bool:
        """Whether all states of a head decay alike, as in Mamba-2."""
        rates = self.decay if self.decay is not None else self.A
        return rates is not None and rates.shape[-1] == 1

    def decay_at(self, pos: int) -> Float[Tensor, "batch head state"]:
        """Give the decays at one position."""
        if self.decay is not None:
            return self.decay[:, pos]
        return (self.delta[:, pos, :, None] * cast("Tensor", self.A)).exp()

    def B_at(self, pos: int) -> Float[Tensor, "batch head d_state"]:
        """Give B at one position, for each head."""
        return self.B[:, pos, self.group]

    def C_at(self, pos: int) -> Float[Tensor, "batch head d_state"]:
        """Give C at one position, for each head."""
        return self.C[:, pos, self.group]

    def heads(self, chosen: Any) -> "Scan":
        """Give the scan of some heads: an int, a slice (then tensors are views) or ints; the axis stays."""
        chosen = read_positions(chosen)
        chosen = (chosen,) if isinstance(chosen, int) else chosen

        def pick(tensor: Tensor | None, axis: int) -> Any:
            return None if tensor is None else sliced(tensor, axis, chosen)

        return attrs.evolve(
            self,
            delta=pick(self.delta, 2),
            A=pick(self.A, 0),
            decay=pick(self.decay, 2),
            x=pick(self.x, 2),
            D=pick(self.D, 0),
            y=pick(self.y, 2),
            output=pick(self.output, 2),
            group=pick(self.group, 0),
        )


@checks_arguments
def segment_sum(values: Float[Tensor, "*batch pos"]) -> Float[Tensor, "*batch target source"]:
    """Sum `values[source + 1 .. target]` for every pair of positions; -inf where the source comes later.

    `exp(segment_sum(delta * A))` is how much of what was written at the source is left at the target. The sums are made
    of masked terms, not as differences of one running sum: these lose their digits, and their exponentials overflow
    above the diagonal, which leaves no finite gradient (Dao and Gu 2024, listing 1).

    Returns:
        A new tensor; its size is quadratic in the positions.

    Example:
        >>> segment_sum(torch.tensor([1.0, 2.0, 4.0]))
        tensor([[0., -inf, -inf],
                [2., 0., -inf],
                [6., 4., 0.]])
    """
    length = values.shape[-1]
    lower = torch.ones(length, length, dtype=torch.bool, device=values.device).tril()
    terms = values[..., :, None].expand(*values.shape, length).masked_fill(~lower.tril(-1), 0.0)
    return terms.cumsum(-2).masked_fill(~lower, -torch.inf)


def log_decay(scan: Scan) -> Float[Tensor, "batch pos head state"]:
    """Give `delta A`; where decays were cached that differ from its exponential, their logarithm (-inf where 0).

    The logarithm of a decay near 0 or 1 has lost its digits, so it serves only where decays were edited.
    """
    if scan.A is None:
        return cast("Tensor", scan.decay).abs().log()
    rates = scan.delta[..., None] * scan.A
    if scan.decay is None:
        return rates
    limits = torch.finfo(rates.dtype)
    own = torch.isclose(scan.decay, rates.exp(), rtol=64 * limits.eps, atol=limits.tiny)
    return torch.where(own, rates, scan.decay.abs().log())


def mixer_layers(table: Any) -> list[int]:
    """List the layers that have an SSM mixer: all, or some in a hybrid.

    Raises:
        ArgumentError: None has.
    """
    layers = [layer for layer in range(table.n_layers) if f"blocks.{layer}.mixer.hook_delta" in table]
    if not layers:
        raise ArgumentError("no block of this model has an SSM mixer (a 'mixer.hook_delta')")
    return layers


def read_layers(table: Any, layers: Any) -> list[int]:
    """Resolve layers that have a mixer: None for all, an int or several, negative ones from the end.

    Raises:
        ArgumentError: No such layer, or one without a mixer.
    """
    found = mixer_layers(table)
    if layers is None:
        return found
    if isinstance(layers, bool | str | slice):
        raise ArgumentError(f"a layer is an int from 0 to {table.n_layers - 1}, or several are; got {layers!r}")
    listed: list[Any] = [operator.index(layers)] if isinstance(layers, SupportsIndex) else list(layers)
    if not listed:
        raise ArgumentError(f"no layer is named; blocks {found} have a mixer")
    resolved: list[int] = []
    for layer in listed:
        if isinstance(layer, bool) or not isinstance(layer, SupportsIndex):
            raise ArgumentError(f"a layer is an int from 0 to {table.n_layers - 1}; got {layer!r}")
        layer = operator.index(layer)  # noqa: PLW2901 - numpy's ints too
        if not -table.n_layers <= layer < table.n_layers:
            raise ArgumentError(f"a layer is an int from 0 to {table.n_layers - 1}; got {layer!r}")
        if layer % table.n_layers not in found:
            raise ArgumentError(f"block {layer} is {_other(table, layer % table.n_layers)}; blocks {found} have one")
        resolved.append(layer % table.n_layers)
    return resolved


def _other(table: Any, layer: int) -> str:
    """Say what a block is that has no mixer."""
    kind = "attention" if f"blocks.{layer}.hook_attn_out" in table else "an MLP alone"
    return f"{kind} and has no SSM mixer"


@checks_arguments
def read_scan(cache: "ActivationCache", layer: int) -> Scan:
    """Read from a cache what the scan of one layer read in that run, edits included.

    The decays are the cached `mixer.hook_decay` where it is there, and `exp(delta A)` elsewhere.

    Args:
        cache: Holds `mixer.hook_delta`, `hook_B` and `hook_C` of the layer for all positions from the first on. Where
            it also has `hook_ssm_input`, `hook_y` and `hook_ssm_output` (they are default names), so has the scan.
        layer: The layer; negative counts from the end.

    Returns:
        A scan in at least float32, with a batch axis, whose tensors may share storage with the cache.

    Raises:
        CacheError: A value that it needs was not cached, or positions in between were not; or A is needed and the cache
            has no model.
        ArgumentError: No such layer, or one without an SSM mixer.

    Example:
        >>> import torch, lens_core as lens
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
        >>> model = lens.load(MambaForCausalLM(config))
        >>> tokens = torch.tensor([[3, 14, 15, 9, 26, 5]])
        >>> _, cache = model.run_with_cache(tokens)
        >>> scan = read_scan(cache, 0)
        >>> scan.n_heads == model.cfg.d_inner  # a channel is a head of width 1
        True
    """
    (layer,) = read_layers(cache.table, layer)
    prefix = f"blocks.{layer}.mixer.hook_"
    read_values(cache, [prefix + name for name in ("delta", "B", "C")])
    if cache.has_gaps:
        raise CacheError(
            "this cache leaves out positions between those that it has, and states pass through all of them"
        )
    if cache.model is None and prefix + "decay" not in cache:
        raise CacheError(f"this cache has no model to take A from: load it with one, or cache '{prefix}decay' too")
    names = [name for name in (*SCAN_INPUTS, "y", "ssm_output") if prefix + name in cache]
    values = {name: cache[prefix + name] if cache.has_batch_dim else cache[prefix + name][None] for name in names}
    if cache.model is None:
        return scan_of(values)
    on_graph = any(value.requires_grad for value in values.values())  # then A and D have gradients, too
    A, D = (cache.model.weight(name, layer) for name in "AD")
    return scan_of(values, A=A if on_graph else A.detach(), D=D if on_graph else D.detach())


def scan_of(values: Mapping[str, Tensor], *, A: Tensor | None = None, D: Tensor | None = None) -> Scan:
    """Bring values of one layer's hook points, by the part of their names after `hook_`, into one form.

    What tells the architectures apart is their shapes: without an axis of groups, B and C belong to one.
    """
    like = values["delta"]
    dtype, device = torch.promote_types(like.dtype, torch.float32), like.device

    def per_head(name: str) -> Tensor | None:
        """Give a value with an axis of the head's own after the heads'."""
        value = values.get(name)
        return None if value is None else (value[..., None] if value.ndim == 3 else value).to(device, dtype)

    def per_group(value: Tensor) -> Tensor:
        return (value[..., None, :] if value.ndim == 3 else value).to(device, dtype)

    return Scan(
        delta=like.to(dtype),
        B=per_group(values["B"]),
        C=per_group(values["C"]),
        A=None if A is None else (A[:, None] if A.ndim == 1 else A).to(device, dtype),
        decay=per_head("decay"),
        x=per_head("ssm_input"),
        D=None if D is None else D.to(device, dtype),
        y=per_head("y"),
        output=per_head("ssm_output"),
    )
