"""What takes activations out of a forward, and ends it once it has them all."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lens_core._call import Call
from lens_core._plan import StopForward
from lens_core.errors import ArgumentError, StoreError, UnsupportedHookError
from lens_core.hook_points import HookPoint, NameFilter

__all__ = ["Take", "chosen_points", "fitting", "probed"]


class Take:
    """A sink for a plan: keeps chosen positions of each value, on its device, and stops the forward after the last."""

    is_optional = False
    exact = True
    keeps_graph = False
    wants_gradient = False

    def __init__(self, dtypes: Mapping[str, torch.dtype | None]) -> None:
        self.names = tuple(dtypes)
        self.pieces: dict[str, Tensor] = {}
        self._dtypes = dtypes
        self._at: tuple[Tensor, Tensor] | None = None
        self._indices: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def aim(self, kept: Bool[Tensor, "row pos"] | None) -> None:
        """Choose the positions of the next call; None for all."""
        self.pieces, self._indices = {}, {}
        where: Int[Tensor, "entry 2"] | None = None if kept is None else kept.nonzero()
        self._at = None if where is None else (where[:, 0], where[:, 1])

    def begin(self, call: Call) -> None:
        """Start a call."""

    def part(self, call: Call, n_heads: int) -> None:
        """Ask for the whole of a value."""

    def store(
        self,
        point: HookPoint,
        value: Tensor,
        call: Call,
        *,
        is_foreign: bool,
        by_position: bool = False,
        part: object = None,
    ) -> None:
        """Take a value; the last that was asked for ends the forward."""
        kept = value.detach()
        if self._at is None:
            kept = kept.flatten(0, 1)
        else:
            if kept.device not in self._indices:
                rows, positions = self._at
                self._indices[kept.device] = rows.to(kept.device), positions.to(kept.device)
            kept = kept[self._indices[kept.device]]
        kept = kept.to(self._dtypes[point.name] if kept.is_floating_point() else None)
        if kept.data_ptr() == value.data_ptr():
            kept = kept.clone()  # the model may write to it, and the writer comes later
        self.pieces[point.name] = kept
        if len(self.pieces) == len(self.names):
            raise StopForward(value[:0])

    def store_gradient(self, point: HookPoint, gradient: Tensor, call: Call, *, position: int | None = None) -> None:
        """Nobody asks for gradients."""


def chosen_points(model: Any, names: NameFilter) -> tuple[HookPoint, ...]:
    """Resolve the hook points of a store.

    Raises:
        ArgumentError: None; the default names are for a cache, and would fill a disk.
        UnsupportedHookError: A point that is not by position, such as a pattern.
    """
    if names is None:
        raise ArgumentError("names are hook points, such as ('resid_post', 6) or 'resid_post'; got None")
    points = tuple(model.table[name] for name in model.table.select(names).names)
    for point in points:
        if point.shape.split()[:2] != ["batch", "pos"] or point.name.endswith("hook_ssm_state"):
            raise UnsupportedHookError(
                f"{point.name!r} is {point.shape!r}, and a store holds an entry for each position: choose points whose "
                "axes begin with 'batch pos', states of a recurrence aside; cache the others"
            )
    return points


def fitting(name: str, value: Tensor) -> Tensor:
    """Give values on the CPU, after a look that none became infinite where float16 has no place for it.

    Raises:
        StoreError: One did.
    """
    found = value.to("cpu")
    if found.dtype == torch.float16 and bool(found.isinf().any()):
        raise StoreError(
            f"{name!r} has values beyond the 65504 of float16: store it with dtype='bfloat16' or 'float32'"
        )
    return found


def probed(model: Any, names: Sequence[str], dtype: torch.dtype | None) -> Mapping[str, Tensor]:
    """Run one token, to learn the sizes and dtypes of what is stored."""
    take = Take(dict.fromkeys(names, dtype))
    take.aim(None)
    with torch.no_grad(), model.running((), (take,)):
        model.forward(torch.tensor([[0]], device=model.input_device), return_type=None)
    return take.pieces
