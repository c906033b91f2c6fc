"""How a hook point's value is found in a module's tensor, and put back."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor

from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["WHOLE", "Columns", "HeadsFirst", "View", "Whole"]


@runtime_checkable
class View(Protocol):
    """How a hook point's value is found in a module's tensor, and put back."""

    def read(self, tensor: Tensor, run: "Run") -> Tensor:
        """Show the value in a module's tensor."""
        ...

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Give the module's tensor with another value in it."""
        ...


@attrs.frozen(kw_only=True)
class Whole:
    """The module's tensor itself, with a batch axis of one expanded to the call's batch."""

    def read(self, tensor: Tensor, run: "Run") -> Tensor:
        """Show the tensor."""
        batch = run.now.batch
        return tensor.expand(batch, *tensor.shape[1:]) if tensor.shape[0] == 1 != batch else tensor

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Replace the tensor."""
        return value


@attrs.frozen(kw_only=True)
class Columns:
    """Columns `start` to `stop` of the last axis, or of each of its `groups` equal parts; cut into `heads` if given.

    The queries of a fused projection, of `h` heads of width `e`, and of `g` key heads, are for instance

    - `Columns(stop=h * e, heads=h)` where all queries stand before all keys and values (GPT-2, Phi-3),
    - `Columns(stop=e, heads=h, groups=h)` where each head has its query, key and value together (GPT-NeoX, BLOOM),
    - `Columns(stop=h // g * e, heads=h, groups=g)` where each key head has its queries, key and value together
      (Falcon).

    The value is a view of the tensor, except where a group has several heads and other columns besides.

    Example:
        >>> fused = torch.arange(12).view(1, 1, 12)  # two heads of width 2: q q k k v v, twice
        >>> Columns(start=2, stop=4, heads=2, groups=2).pick(fused).tolist()
        [[[[2, 3], [8, 9]]]]
    """

    start: int = 0
    stop: int | None = None
    """None for all that follow."""
    heads: int | None = None
    """How many heads the columns of all groups together are: the value is `[..., heads, width]`."""
    groups: int = 1

    def pick(self, tensor: Tensor) -> Tensor:
        """Show the columns of a tensor, or of a weight `[in, out]`.

        Raises:
            ArgumentError: They cannot be cut into that many parts.
        """
        own = _parts(tensor, self.groups)[..., self.start : self.stop]
        return own.flatten(-2) if self.heads is None else _parts(own, self.heads // self.groups).flatten(-3, -2)

    def read(self, tensor: Tensor, run: "Run") -> Tensor:
        """Show the columns."""
        return self.pick(tensor)

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Put new columns beside the old ones, in a new tensor."""
        flat = value if self.heads is None else value.flatten(-2)
        own, old = _parts(flat, self.groups), _parts(tensor, self.groups)
        if own.shape[-1] == old.shape[-1]:
            return flat
        return torch.cat([old[..., : self.start], own, old[..., self.start + own.shape[-1] :]], dim=-1).flatten(-2)


@attrs.frozen(kw_only=True)
class HeadsFirst:
    """A tensor `[batch, heads, pos, d_head]`, shown as `[batch, pos, heads, d_head]`."""

    def read(self, tensor: Tensor, run: "Run") -> Tensor:
        """Show positions first, as a view."""
        return tensor.transpose(1, 2)

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Put the heads first again, in the layout that the tensor had."""
        return torch.empty_like(tensor).copy_(value.transpose(1, 2))


WHOLE = Whole()


def _parts(tensor: Tensor, count: int) -> Tensor:
    """See the last axis as equal parts: `[..., count * width]` as `[..., count, width]`."""
    width, rest = divmod(tensor.shape[-1], count)
    if rest:
        raise ArgumentError(f"{tensor.shape[-1]} columns cannot be cut into {count} equal parts: see `heads`, `groups`")
    return tensor.view(*tensor.shape[:-1], count, width)
