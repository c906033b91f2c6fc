"""Knocking out what a source token hands to later tokens through an SSM layer's state: three kinds, as hook entries.

With `h_t = decay_t h_(t-1) + delta_t x_t B_t` and `y_t = C_t h_t`, for source s:

- `"attention"`: for the chosen targets only, `y_t` is read without what s had written and the state still kept of it:
  `y_t - alpha[t, s] x_s`. The state itself, its decay and all other targets stay as they are. (Attention knockout:
  Sharma, Atkinson and Bau 2024, arXiv 2404.03646; Endy et al. 2025, arXiv 2505.24244, who keep the decay, too.)
- `"write"`: nothing is written at s, `delta_s x_s B_s = 0`, for every later target. The state still decays at s.
- `"delta"`: `delta_s = 0`: neither written nor decayed, as if the state did not see s. (Endy et al.'s other kind.)

In one layer, "attention" for all targets gives the outputs of "write"; "delta" differs by the decay at s.

What stays in all three: the skip connection `D x_s`, and the convolution, through which s is also part of the inputs
x, B, C and delta of the next few positions (the kernel's width less one). To cut these too, name them as sources.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core._positions import Positions, local_positions, read_positions
from lens_core.analysis.ssm_scan import SCAN_INPUTS, Scan, read_layers, scan_of
from lens_core.errors import ArgumentError, UnsupportedHookError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["Entry", "Knockout", "knockout"]

Knockout: TypeAlias = Literal["attention", "write", "delta"]
Entry: TypeAlias = tuple[Any, ...]
"""What `fwd_hooks` takes: `(name, function)` or `(name, function, positions)`."""


@checks_arguments
def knockout(
    model: "LensModel",
    kind: Knockout,
    sources: Any,
    targets: Any = None,
    *,
    layers: Any = None,
    heads: Any = None,
) -> list[Entry]:
    """Give the hook entries that knock sources out; see the module for the three kinds.

    The entries are for `run_with_hooks`, `hooks` and `generate`. While decoding, what was written in the prompt stays
    knocked out. An "attention" knockout uses that run's own values, those of knockouts in earlier layers and of other
    edits included: of step sizes, decays, inputs, B and C that come before it in the list of hooks. It does not see
    edits of what is written or of the state: where a `"write"` knockout or a patched state of the same layer has taken
    a source's part away, it takes that part away again. It must see the sequence from its beginning, one sequence at a
    time, and beam search, which swaps rows, is not for it.

    Args:
        model: The model.
        kind: `"attention"`, `"write"` or `"delta"`.
        sources: Positions that are knocked out, as in hook entries: absolute and 0-based, or negative from the end of
            the sequence so far; an int, several, or a slice.
        targets: Positions that no longer see them, with `"attention"` only; None for all.
        layers: An int or several; None for all that have an SSM mixer.
        heads: Channels (Mamba-1) or heads (Mamba-2) in which they are knocked out; None for all.

    Returns:
        Entries; an "attention" knockout's follow one sequence at a time, so make new ones for each run in parallel.

    Raises:
        ArgumentError: No such kind or layer; `targets` with a kind that cannot tell targets apart.

    Example:
        >>> import torch, lens_core as lens
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
        >>> model = lens.load(MambaForCausalLM(config))
        >>> tokens = torch.tensor([[3, 14, 15, 9, 26, 5]])
        >>> plain = model(tokens)
        >>> cut = model.run_with_hooks(
        ...     tokens, fwd_hooks=knockout(model, "attention", sources=1, targets=-1)
        ... )
        >>> bool((cut[0, -1] != plain[0, -1]).any()), bool((cut[0, :-1] == plain[0, :-1]).all())
        (True, True)
    """
    if kind not in ("attention", "write", "delta"):
        raise ArgumentError(f"a knockout is of kind 'attention', 'write' or 'delta'; got {kind!r}")
    if kind != "attention" and targets is not None:
        raise ArgumentError(f"a {kind!r} knockout reaches every later target; give targets with kind 'attention' only")
    where, seen, chosen = read_positions(sources), read_positions(targets), read_positions(heads)
    if where is None:
        raise ArgumentError("give the sources to knock out: an int, several, or a slice")
    entries: list[Entry] = []
    for layer in read_layers(model.table, layers):
        prefix = f"blocks.{layer}.mixer.hook_"
        if kind == "attention":
            entries += _Forgotten(where, seen, chosen).entries(prefix)
        else:
            name = prefix + ("ssm_write" if kind == "write" else "delta")
            entries.append((name, _zeroed(chosen), where))
    return entries


def _zeroed(heads: Positions) -> Callable[..., Tensor]:
    def knocked_out(tensor: Tensor, hook: Any) -> Tensor:
        return tensor.masked_fill(_marked(heads, tensor), 0.0)

    return knocked_out


def _marked(heads: Positions, tensor: Tensor) -> Tensor:
    """Mark the chosen entries of axis 2, in a shape that broadcasts."""
    n_heads = tensor.shape[2]
    listed = [heads] if isinstance(heads, int) else heads if isinstance(heads, tuple) else []
    outside = [head for head in listed if not -n_heads <= head < n_heads]
    if outside:
        raise ArgumentError(f"there is no channel or head {outside[0]}: they are 0 to {n_heads - 1}")
    marked = torch.zeros(n_heads, dtype=torch.bool, device=tensor.device)
    marked[local_positions(heads, first=0, total=n_heads)] = True
    return marked.reshape([n_heads] + [1] * (tensor.ndim - 3))


class _Forgotten:
    """The part of one layer's state that came from the sources: kept beside the run, and taken from the outputs.

    `r_t = decay_t r_(t-1) + [t is a source] delta_t x_t B_t`; at a target, `y_t - C_t r_t`.
    """

    def __init__(self, sources: Positions, targets: Positions, heads: Positions) -> None:
        self._sources, self._targets, self._heads = sources, targets, heads
        self._read: dict[str, Tensor] = {}
        self._state: Tensor | None = None
        self._seen = 0  # positions of the sequence so far

    def entries(self, prefix: str) -> list[Entry]:
        """Give the entries that read what the scan reads, and the one that edits what it gives."""
        readers: list[Entry] = [(prefix + name, self._reader(name)) for name in SCAN_INPUTS]
        return [*readers, (prefix + "y", self._forget)]

    def _reader(self, name: str) -> Callable[..., None]:
        def read(tensor: Tensor, hook: Any) -> None:
            self._read[name] = tensor

        return read

    def _forget(self, y: Tensor, hook: Any) -> Tensor:
        first = int(hook.positions[0])
        total = first + len(hook.positions)
        self._follow(hook, first, total)
        scan = scan_of(self._read)
        self._read.clear()
        sources = local_positions(self._sources, first=first, total=total)
        targets = local_positions(self._targets, first=first, total=total)
        removed = torch.stack([self._step(scan, t, is_source=t in sources) for t in range(scan.n_pos)], dim=1)
        at_target = torch.zeros(scan.n_pos, dtype=torch.bool, device=y.device)
        at_target[targets] = True
        mask = at_target.reshape([-1] + [1] * (y.ndim - 2)) & _marked(self._heads, y)
        return torch.where(mask, y - removed.reshape(y.shape).to(y.device), y)

    def _follow(self, hook: Any, first: int, total: int) -> None:
        """Begin a sequence, or go on with the one that was begun."""
        if hook.is_prefill:
            self._state = None
        elif first != self._seen:
            raise UnsupportedHookError(
                f"the 'attention' knockout at {hook.name!r} saw {self._seen} positions, and this call begins at "
                f"{first}: what sources wrote before is unknown. Run the sequence from its beginning with the knockout"
            )
        self._seen = total

    def _step(self, scan: Scan, t: int, *, is_source: bool) -> Float[Tensor, "batch head head_dim"]:
        """Go one position on; give what is read there of the sources' part of the state."""
        x = cast("Tensor", scan.x)[:, t]
        if self._state is None and not is_source:
            return torch.zeros_like(x)
        state = x.new_zeros(()) if self._state is None else self._state * scan.decay_at(t)[:, :, None]
        if is_source:
            state = state + (scan.delta[:, t, :, None] * x)[..., None] * scan.B_at(t)[:, :, None]
        self._state = state
        return (state @ scan.C_at(t)[..., None]).squeeze(-1)
