"""Edits of what an activation has along a direction, or in the span of several: remove it, set it, exchange it.

Each gives a hook function, `fn(tensor, hook)`, for hook points whose last axis is the directions' width; an entry's
third element says at which positions. The rest of the activation, all that is orthogonal, keeps its value. Lengths of
the directions do not matter. The arithmetic is in float32 at least.

Source: directional ablation, Arditi et al. 2024 (arXiv 2406.11717); interchange of a subspace, Geiger et al. 2023
(arXiv 2303.02536).
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lens_core import edits
from lens_core._arguments import checks_arguments
from lens_core.errors import ArgumentError

__all__ = ["interchange", "orthonormal", "project_out", "set_coordinate"]

HookFunction = Callable[..., Tensor]


@checks_arguments
def orthonormal(directions: Float[Tensor, "*k width"]) -> Float[Tensor, "k width"]:
    """Give orthonormal rows that span the directions, float64; fewer rows where some depend on others.

    Raises:
        ArgumentError: Not one direction or several, zeros only, or not finite.

    Example:
        >>> orthonormal(torch.tensor([[3.0, 4.0], [6.0, 8.0]])).abs()
        tensor([[0.6000, 0.8000]], dtype=torch.float64)
    """
    if not isinstance(directions, Tensor) or directions.ndim not in (1, 2) or not directions.is_floating_point():  # pyright: ignore[reportUnnecessaryIsInstance]
        got = list(directions.shape) if isinstance(directions, Tensor) else type(directions).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"directions are [width] or [k, width], floating; got {got}")
    wide = directions.detach().double().reshape(-1, directions.shape[-1])
    if not bool(wide.isfinite().all()) or not bool(wide.any()):
        raise ArgumentError("directions are finite and not all zero")
    _, sizes, rows = cast("tuple[Tensor, Tensor, Tensor]", cast("Any", torch.linalg).svd(wide, full_matrices=False))
    return rows[sizes > sizes[0] * max(wide.shape) * torch.finfo(directions.dtype).eps]


@checks_arguments
def project_out(directions: Float[Tensor, "*k width"]) -> HookFunction:
    """Remove what lies along a direction, or in the span of several (directional ablation).

    Raises:
        ArgumentError: As for `orthonormal`; at the hook, another width.

    Example:
        >>> from types import SimpleNamespace
        >>> hook = SimpleNamespace(name="blocks.0.hook_resid_post")
        >>> project_out(torch.tensor([0.0, 2.0]))(torch.tensor([[[3.0, 4.0]]]), hook=hook)
        tensor([[[3., 0.]]])
    """
    basis = orthonormal(directions)

    def ablate(tensor: Tensor, hook: Any) -> Tensor:
        wide, rows = _wide(tensor, basis, hook)
        return (wide - _within(wide, rows)).to(tensor.dtype)

    ablate.__name__ = "project_out"
    return ablate


@checks_arguments
def set_coordinate(direction: Float[Tensor, " width"], value: float | Float[Tensor, " batch"]) -> HookFunction:
    """Set how far an activation reaches along a direction: `x + (value - x . u) u`, where u has length 1.

    Args:
        direction: Of any length.
        value: In the activation's units, one for all or one for each row of the batch.

    Raises:
        ArgumentError: As for `orthonormal`; several directions; a value that is neither; at the hook, another width or
            batch.

    Example:
        >>> from types import SimpleNamespace
        >>> hook = SimpleNamespace(name="blocks.0.hook_resid_post")
        >>> set_coordinate(torch.tensor([0.0, 2.0]), -1.0)(torch.tensor([[[3.0, 4.0]]]), hook=hook)
        tensor([[[ 3., -1.]]])
    """
    orthonormal(direction)
    if direction.ndim != 1:
        raise ArgumentError(f"a coordinate is along one direction, [width]; got {list(direction.shape)}")
    unit = F.normalize(direction.detach().double(), dim=0)[None]
    if not isinstance(value, int | float | Tensor) or (isinstance(value, Tensor) and value.ndim > 1):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"a value is a number, or a tensor [batch]; got {value!r}")

    def put(tensor: Tensor, hook: Any) -> Tensor:
        wide, rows = _wide(tensor, unit, hook)
        wanted = torch.as_tensor(value, dtype=wide.dtype, device=wide.device)
        if wanted.ndim and len(wanted) != len(tensor):
            raise ArgumentError(f"there are {len(wanted)} values for a batch of {len(tensor)} at {hook.name!r}")
        wanted = wanted.reshape([-1] + [1] * (wide.ndim - 1))
        return (wide - _within(wide, rows) + wanted * rows[0]).to(tensor.dtype)

    put.__name__ = "set_coordinate"
    return put


@checks_arguments
def interchange(directions: Float[Tensor, "*k width"], source: Tensor | Mapping[str, Tensor]) -> HookFunction:
    """Put another run's part along a direction, or in a subspace, in place of this run's: `x + P (source - x)`.

    Args:
        directions: What spans the subspace.
        source: A cache of the other run, or a tensor, as for `lens.edits.replace`: position p gets row p.

    Raises:
        ArgumentError: As for `orthonormal` and `lens.edits.replace`; at the hook, another width.

    Example:
        >>> from types import SimpleNamespace
        >>> hook = SimpleNamespace(name="blocks.0.hook_resid_post", positions=torch.arange(1))
        >>> other = torch.tensor([[[7.0, 8.0]]])
        >>> interchange(torch.tensor([0.0, 2.0]), other)(torch.tensor([[[3.0, 4.0]]]), hook=hook)
        tensor([[[3., 8.]]])
    """
    basis, replace = orthonormal(directions), edits.replace(source)

    def exchange(tensor: Tensor, hook: Any) -> Tensor:
        wide, rows = _wide(tensor, basis, hook)
        other = replace(tensor, hook=hook).to(wide.dtype)
        return (wide + _within(other - wide, rows)).to(tensor.dtype)

    exchange.__name__ = "interchange"
    return exchange


def _wide(tensor: Tensor, basis: Tensor, hook: Any) -> tuple[Tensor, Tensor]:
    """Give activation and basis in one dtype, at least float32, on one device."""
    if tensor.shape[-1] != basis.shape[-1]:
        raise ArgumentError(
            f"the directions are {basis.shape[-1]} wide, and {hook.name!r} is {tensor.shape[-1]} wide; "
            "take directions from this hook point"
        )
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(dtype), basis.to(dtype=dtype, device=tensor.device)


def _within(wide: Tensor, basis: Tensor) -> Tensor:
    return (wide @ basis.T) @ basis
