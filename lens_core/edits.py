"""Ready-made hook functions: zero, mean, replace, add, scale, detach.

Each returns a function to put at a hook point, `fn(tensor, hook)`. It returns a new tensor and never writes into the
one that it was given, nor hands out one that the user keeps.

`pos` names positions as hook entries do: absolute and 0-based, or negative from the end of the sequence so far; an int,
several, a slice, or None for all. While decoding, only those positions are edited that the step has, so -1 is every new
token. `heads` names heads, where the hook point has an axis of them; in a Mamba-1 scan its channels. At keys and values
under grouped-query attention these are the key-value heads.

A source is a tensor, or a mapping from names to tensors such as an `ActivationCache`, read at the hook's own name when
the hook fires. Its axes are the hook point's, and it may leave out the batch axis, or both batch and position (a
vector). A position axis of 1 is spread over all positions; any other counts from position 0, padding included, so that
position p of the run gets row p. Devices and floating dtypes are brought to those of the place.

Masked attention scores (-inf) stay masked, whatever the edit: no edit here lets a query see the future or padding.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor

from lens_core._positions import Positions, local_positions, read_positions
from lens_core.errors import ArgumentError

__all__ = ["add", "detach", "mean", "replace", "scale", "zero"]

Source: TypeAlias = Any
"""A tensor, or a mapping from hook names to tensors."""
Some: TypeAlias = Any
"""An int, several ints, a slice, or None for all."""

_ATTENDING = frozenset({"hook_attn_scores", "hook_pattern"})  # batch n_heads query key
_PER_HEAD = frozenset(  # batch pos n_heads ...; in Mamba-1 a channel is a head of width 1
    f"hook_{name}"
    for name in (
        *("q", "k", "v", "z", "result", "rot_q", "rot_k", "q_normed", "k_normed", "k_rep", "v_rep"),
        *("attn_in", "q_input", "k_input", "v_input", "k_input_rep", "v_input_rep"),
        *("ssm_input", "delta_pre", "delta", "decay", "ssm_write", "ssm_state", "y", "ssm_output"),
    )
)


@runtime_checkable
class Hook(Protocol):
    """What an edit asks of the hook that it is handed."""

    @property
    def name(self) -> str:
        """Canonical name of the hook point."""
        ...

    @property
    def positions(self) -> Tensor:
        """Absolute positions along the tensor's position axis."""
        ...


HookFunction: TypeAlias = Callable[..., Tensor]


def zero(heads: Some = None, pos: Some = None) -> HookFunction:
    """Set the activation to zero (zero ablation).

    Example:
        >>> from types import SimpleNamespace
        >>> hook = SimpleNamespace(name="blocks.0.attn.hook_z", positions=torch.arange(1))
        >>> zero(heads=1)(torch.ones(1, 1, 2, 2), hook=hook)
        tensor([[[[1., 1.],
                  [0., 0.]]]])

    Raises:
        ArgumentError: `heads` or `pos` of the wrong kind; at the hook, heads that it has not.
    """
    return _edit("zero", lambda tensor, hook: torch.zeros_like(tensor), heads, pos)


def mean(source: Source, heads: Some = None, pos: Some = None) -> HookFunction:
    """Replace the activation by its mean over the batch and the positions of a source (mean ablation).

    Padding in the source counts. Scores and patterns are averaged over the batch alone: a mean over queries would let
    each see the future. The mean is taken each time the hook fires.

    Example:
        >>> from types import SimpleNamespace
        >>> hook = SimpleNamespace(name="hook_embed", positions=torch.arange(2))
        >>> mean(torch.tensor([[[1.0], [3.0]]]))(torch.zeros(1, 2, 1), hook=hook)
        tensor([[[2.],
                 [2.]]])

    Raises:
        ArgumentError: as for `replace`.
    """
    _check_source(source)

    def average(tensor: Tensor, hook: Hook) -> Tensor:
        value = _value(source, hook)
        given = max(value.ndim - tensor.ndim + 2, 0)  # of batch and position, how many the source has
        if _part(hook.name) in _ATTENDING:
            given = max(given - 1, 0)
        axes = tuple(range(given))
        return _fitted(value.mean(axes, keepdim=True) if axes else value, tensor, hook, pos)

    return _edit("mean", average, heads, pos)


def replace(source: Source, heads: Some = None, pos: Some = None) -> HookFunction:
    """Put another run's activation in place (activation patching).

    Example:
        >>> from types import SimpleNamespace
        >>> hook = SimpleNamespace(name="hook_embed", positions=torch.arange(2))
        >>> replace({"hook_embed": torch.tensor([[[5.0], [6.0]]])}, pos=1)(torch.zeros(1, 2, 1), hook=hook)
        tensor([[[0.],
                 [6.]]])

    Raises:
        ArgumentError: arguments of the wrong kind; at the hook, a source without its name, a shape that does not fit,
            or a position that the source does not reach.
    """
    _check_source(source)
    return _edit("replace", lambda tensor, hook: _fitted(_value(source, hook), tensor, hook, pos), heads, pos)


def add(vector: Source, pos: Some = None, coefficient: float = 1.0, heads: Some = None) -> HookFunction:
    """Add a vector, times a coefficient (steering).

    Example:
        >>> from types import SimpleNamespace
        >>> hook = SimpleNamespace(name="blocks.0.hook_resid_post", positions=torch.arange(2))
        >>> add(torch.tensor([1.0, 0.0]), pos=-1, coefficient=3.0)(torch.zeros(1, 2, 2), hook=hook)
        tensor([[[0., 0.],
                 [3., 0.]]])

    Raises:
        ArgumentError: as for `replace`.
    """
    _check_source(vector)

    def steer(tensor: Tensor, hook: Hook) -> Tensor:
        return tensor + coefficient * _fitted(_value(vector, hook), tensor, hook, pos)

    return _edit("add", steer, heads, pos)


def scale(factor: float, heads: Some = None, pos: Some = None) -> HookFunction:
    """Multiply the activation by a number.

    Example:
        >>> from types import SimpleNamespace
        >>> hook = SimpleNamespace(name="hook_embed", positions=torch.arange(2))
        >>> scale(0.5, pos=0)(torch.ones(1, 2, 1), hook=hook)
        tensor([[[0.5000],
                 [1.0000]]])

    Raises:
        ArgumentError: as for `zero`.
    """
    return _edit("scale", lambda tensor, hook: tensor * factor, heads, pos)


def detach(heads: Some = None, pos: Some = None) -> HookFunction:
    """Stop the gradient and change no bit of the value.

    Example:
        >>> from types import SimpleNamespace
        >>> hook = SimpleNamespace(name="hook_embed", positions=torch.arange(1))
        >>> detach()(torch.ones(1, 1, 1, requires_grad=True), hook=hook).requires_grad
        False

    Raises:
        ArgumentError: as for `zero`.
    """
    if heads is None and pos is None:

        def edit(tensor: Tensor, hook: Hook) -> Tensor:
            return tensor.detach()

        edit.__name__ = "detach"
        return edit
    return _edit("detach", lambda tensor, hook: tensor.detach(), heads, pos)


def _edit(name: str, make: Callable[[Tensor, Hook], Tensor], heads: Some, pos: Some) -> HookFunction:
    """Make the hook function that takes the made value at the chosen heads and positions."""
    heads, pos = _read_heads(heads), read_positions(pos)

    def edit(tensor: Tensor, hook: Hook) -> Tensor:
        new = make(tensor, hook)
        if new.is_floating_point() and tensor.is_floating_point():
            new = new.to(tensor.dtype)
        return torch.where(_chosen(tensor, hook, heads, pos), new, tensor)

    edit.__name__ = name  # errors of the run name the function
    return edit


def _read_heads(heads: Some) -> Positions:
    try:
        return read_positions(heads)
    except ArgumentError:
        raise ArgumentError(f"heads are an int, a slice, or some ints; got {heads!r}") from None


def _check_source(source: Source) -> None:
    if not isinstance(source, Tensor | Mapping):
        message = f"A source is a tensor or a mapping from hook names to tensors, not {type(source).__name__}"
        raise ArgumentError(f"{message}: {source!r}. Pass a cache, or a tensor.")


def _value(source: Source, hook: Hook) -> Tensor:
    if isinstance(source, Tensor):
        return source
    values = cast("Mapping[str, Tensor]", source)
    if hook.name not in values:
        message = f"The source holds no {hook.name!r}, only {len(values)} other names. Cache that name"
        raise ArgumentError(f"{message}, or put the edit at a name that it holds.")
    return values[hook.name]


def _part(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _position_axis(name: str) -> int:
    return 2 if _part(name) in _ATTENDING else 1


def _fitted(source: Tensor, tensor: Tensor, hook: Hook, pos: Some = None) -> Tensor:
    """Bring a source to a shape that broadcasts to the tensor's, its rows chosen by absolute position."""
    value = source.to(tensor.device)
    axis = _position_axis(hook.name)
    if value.ndim == tensor.ndim - 1:
        value = value.unsqueeze(0)
    if value.ndim == tensor.ndim:
        if value.shape[axis] != 1:
            value = value.index_select(axis, _rows(value.shape[axis], tensor, hook, read_positions(pos)))
        if axis == 2:  # a source with later positions has later keys too, which these queries do not see
            value = value[..., : tensor.shape[3]]
    if value.ndim > tensor.ndim or not _broadcasts(value.shape, tensor.shape):
        message = f"A source of shape {list(source.shape)} does not fit {hook.name!r}, shape {list(tensor.shape)}"
        raise ArgumentError(f"{message}. Its axes are the hook point's; batch, or batch and position, may be left out.")
    return value


def _rows(length: int, tensor: Tensor, hook: Hook, pos: Positions) -> Tensor:
    """Give the source's row for each position of the tensor; those that are not edited may have any."""
    positions = _positions(tensor, hook)
    edited = _named(positions, pos, total=_total(hook, positions))
    if (edited & (positions >= length)).any():
        message = f"The source of the edit at {hook.name!r} ends before position {length}, and the run has position"
        last = int(positions[edited].max())
        raise ArgumentError(f"{message} {last}. Name the positions to edit, such as pos=range({length}).")
    return positions.clamp(max=length - 1)


def _positions(tensor: Tensor, hook: Hook) -> Tensor:
    positions = hook.positions.to(tensor.device)
    axis = _position_axis(hook.name)
    if tensor.ndim <= axis or tensor.shape[axis] != len(positions):
        message = f"The value at {hook.name!r}, shape {list(tensor.shape)}, has no axis {axis} of {len(positions)}"
        raise ArgumentError(f"{message} positions. Leave out pos, and give a source without positions.")
    return positions


def _total(hook: Hook, positions: Tensor) -> int:
    """Count the sequence so far; a function that is shown some positions only does not see its end."""
    return getattr(hook, "total", int(positions[-1]) + 1)


def _named(positions: Tensor, pos: Positions, *, total: int) -> Tensor:
    """Say which of these positions are named."""
    named = local_positions(pos, first=0, total=total)
    return torch.isin(positions, torch.tensor(named, dtype=torch.long, device=positions.device))


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def _chosen(tensor: Tensor, hook: Hook, heads: Positions, pos: Positions) -> Tensor:
    """Give a mask, broadcastable to the tensor, of what the edit replaces."""
    mask = torch.ones([1] * tensor.ndim, dtype=torch.bool, device=tensor.device)
    if pos is not None:
        positions = _positions(tensor, hook)
        named = _named(positions, pos, total=_total(hook, positions))
        mask = mask & _along(named, _position_axis(hook.name), tensor)
    if heads is not None:
        mask = mask & _along(_named_heads(tensor, hook, heads), _head_axis(hook.name), tensor)
    if _part(hook.name) == "hook_attn_scores":
        mask = mask & (tensor != -torch.inf)
    return mask


def _along(flags: Tensor, axis: int, tensor: Tensor) -> Tensor:
    return flags.reshape([-1 if i == axis else 1 for i in range(tensor.ndim)])


def _head_axis(name: str) -> int:
    part = _part(name)
    if part not in _ATTENDING | _PER_HEAD:
        such = "mixer.hook_y" if ".mixer." in name else "attn.hook_z"
        raise ArgumentError(f"{name!r} has no axis of heads. Leave out heads, or choose a point such as {such}.")
    return 1 if part in _ATTENDING else 2


def _named_heads(tensor: Tensor, hook: Hook, heads: Positions) -> Tensor:
    n_heads = tensor.shape[_head_axis(hook.name)]
    listed = [heads] if isinstance(heads, int) else heads if isinstance(heads, tuple) else []
    missing = [head for head in listed if not -n_heads <= head < n_heads]
    if missing:
        message = f"{hook.name!r}, shape {list(tensor.shape)}, has no heads {missing}; it has {n_heads}"
        shared = _part(hook.name) in ("hook_k", "hook_v") and "; key-value heads, each read by a group of query heads"
        raise ArgumentError(f"{message} (0 to {n_heads - 1}{shared or ''}).")
    return _named(torch.arange(n_heads, device=tensor.device), heads, total=n_heads)
