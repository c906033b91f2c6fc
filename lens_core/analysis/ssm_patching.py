"""Putting the SSM state of one run into another, and measuring what that does, layer by layer and position by position.

The state after a position is all that an SSM layer hands on of the past (the convolution's last few inputs aside), so a
patched state at position p carries everything that the source's layer kept of the tokens up to p. Later positions write
to it as they did.

Source: Ensign and Garriga-Alonso 2024 (arXiv 2407.14008), who patch h at one position and layer after the other.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from lens_core import edits
from lens_core._arguments import checks_arguments
from lens_core._decomposition import sliced
from lens_core._positions import Positions, local_positions, read_positions
from lens_core._state import State
from lens_core.analysis.ssm_knockout import Entry
from lens_core.analysis.ssm_scan import read_layers
from lens_core.errors import ArgumentError, CacheError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["StatePatching", "patch_state", "sweep_states"]


@checks_arguments
def patch_state(
    model: "LensModel", source: Tensor | Mapping[str, Tensor], positions: Any, *, layers: Any = None, heads: Any = None
) -> list[Entry]:
    """Give hook entries that put the states of another run in place, at some positions.

    Args:
        model: The model.
        source: A cache of the other run that holds `ssm_state` of these layers, or one layer's states as a tensor,
            `[batch, pos, ...]` (row p is for position p), or without batch, or one state without batch and position.
        positions: After which positions the state is replaced: absolute, or negative from the end of the sequence so
            far; an int, several, or a slice. What follows computes on from there.
        layers: An int or several; None for all that have an SSM mixer.
        heads: Channels (Mamba-1) or heads (Mamba-2) that are replaced; None for all.

    Raises:
        ArgumentError: No such layer; a tensor for several layers.
        CacheError: The source does not hold a layer's states.

    Example:
        >>> import torch, lens_core as lens
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
        >>> model = lens.load(MambaForCausalLM(config))
        >>> tokens = torch.tensor([[3, 14, 15, 9, 26, 5]])
        >>> _, other = model.run_with_cache(tokens.flip(1), names_filter="ssm_state")
        >>> entries = patch_state(model, other, positions=2, layers=0)
        >>> logits = model.run_with_hooks(tokens, fwd_hooks=entries)
    """
    chosen = read_layers(model.table, layers)
    if isinstance(source, Tensor) and len(chosen) > 1:
        raise ArgumentError(f"a tensor holds one layer's states, and the layers are {chosen}; give a cache, or a layer")
    entries: list[Entry] = []
    for layer in chosen:
        name = f"blocks.{layer}.mixer.hook_ssm_state"
        if not isinstance(source, Tensor) and name not in source:
            raise CacheError(f"the source does not hold {name!r}; run it with names_filter='ssm_state'")
        entries.append((name, _replaced(source, heads), positions))
    return entries


def _replaced(source: Tensor | Mapping[str, Tensor], heads: Any) -> Callable[..., Tensor]:
    replace = edits.replace(source)
    if heads is None:
        return replace

    def patched(state: Tensor, hook: Any) -> Tensor:
        new = replace(state, hook=hook)
        mask = torch.zeros(state.shape[2], dtype=torch.bool, device=state.device)
        mask[sliced(torch.arange(len(mask), device=mask.device), 0, heads)] = True
        return torch.where(mask.reshape([-1] + [1] * (state.ndim - 3)), new, state)

    return patched


@attrs.frozen(kw_only=True, eq=False)
class StatePatching:
    """What patching each layer's state after each position did to a metric.

    Attributes:
        values: The metric of the patched run.
        baseline: The metric of the run that is patched, with nothing patched.
        layers: Rows of `values`.
        positions: Columns of `values`.
    """

    values: Float[Tensor, "layer position batch"] = attrs.field(repr=False)
    baseline: Float[Tensor, " batch"] = attrs.field(repr=False)
    layers: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def effect(self) -> Float[Tensor, "layer position batch"]:
        """Give how much each patch moved the metric."""
        return self.values - self.baseline


@checks_arguments
def sweep_states(
    model: "LensModel",
    input: Any,
    source: Mapping[str, Tensor],
    metric: Callable[[Tensor], Tensor],
    *,
    layers: Any = None,
    positions: Any = None,
    **kwargs: Any,
) -> StatePatching:
    """Patch the state of one layer after one position, for every layer and position, and measure each time.

    It costs one forward pass for each cell, and one more. `lens.patching.patch_sweep(..., "ssm_state")` does the same
    for several cells at once, by head too, and with statistics; this one goes on from a state (`past_key_values`).

    Args:
        model: The model.
        input: What is run, as in `forward`; its rows and positions are those of the source.
        source: A cache of the other run that holds `ssm_state` of these layers.
        metric: From the logits `[batch, pos, d_vocab]` to one number for each row `[batch]`.
        layers: Layers to patch; None for all that have an SSM mixer.
        positions: Positions to patch, absolute (a state's count) or negative from the end; None for all of this input.
        **kwargs: As in `forward`, but for what changes what it returns. To go on from earlier positions give a state
            as `past_key_values`: a cache of HF's own would be extended by every cell.

    Raises:
        ArgumentError: No such layer or position; a metric that does not give one number for each row; an argument that
            changes what `forward` returns, or an HF cache.
        CacheError: The source does not hold a layer's states.

    Example:
        >>> import torch, lens_core as lens
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
        >>> model = lens.load(MambaForCausalLM(config))
        >>> tokens = torch.tensor([[3, 14, 15, 9, 26, 5]])
        >>> _, other = model.run_with_cache(tokens.flip(1), names_filter="ssm_state")
        >>> def difference(logits):
        ...     return logits[:, -1, 7] - logits[:, -1, 8]
        >>> table = sweep_states(model, tokens, other, difference, positions=[1, 2])
        >>> table.effect.shape == (model.cfg.n_layers, 2, 1)
        True
    """
    chosen = read_layers(model.table, layers)
    _check_call(kwargs)
    reached: list[int] = []

    def note(delta: Tensor, hook: Any) -> None:
        reached.extend(hook.positions.tolist())

    logits = model.run_with_hooks(input, fwd_hooks=[(f"blocks.{chosen[0]}.mixer.hook_delta", note)], **kwargs)
    columns = _columns(read_positions(positions), reached)
    baseline = _measured(metric, logits)
    rows = [
        torch.stack(
            [
                _measured(
                    metric,
                    model.run_with_hooks(input, fwd_hooks=patch_state(model, source, column, layers=layer), **kwargs),
                )
                for column in columns
            ]
        )
        for layer in chosen
    ]
    return StatePatching(values=torch.stack(rows), baseline=baseline, layers=tuple(chosen), positions=tuple(columns))


def _check_call(kwargs: Mapping[str, Any]) -> None:
    """Refuse what makes a call give something else than logits, or makes one cell change the next."""
    given = sorted(kwargs.keys() & {"return_type", "return_state", "loss_per_token", "stop_at_layer", "labels"})
    if given:
        raise ArgumentError(f"a sweep hands the logits to the metric; leave out {', '.join(given)}")
    past = kwargs.get("past_key_values")
    if past is not None and not isinstance(past, State):
        raise ArgumentError(
            f"every cell would extend this {type(past).__name__}; give a state (return_state=True) as past_key_values"
        )


def _columns(positions: Positions, reached: list[int]) -> list[int]:
    """Give absolute positions of this call."""
    first, total = reached[0], reached[-1] + 1
    listed = [positions] if isinstance(positions, int) else positions if isinstance(positions, tuple) else []
    outside = [at for at in listed if not (first <= at < total or -len(reached) <= at < 0)]
    columns = [first + at for at in local_positions(positions, first=first, total=total)]
    if outside or not columns:
        raise ArgumentError(
            f"the input has positions {first} to {total - 1}; got {outside[0] if outside else positions!r}"
        )
    return columns


def _measured(metric: Callable[[Tensor], Tensor], logits: Tensor) -> Float[Tensor, " batch"]:
    value: Any = metric(logits)
    if not isinstance(value, Tensor) or value.shape != logits.shape[:1]:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(f"the metric gives one number for each of the {len(logits)} rows; got {got}")
    return value.detach()
