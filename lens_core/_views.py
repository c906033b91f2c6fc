"""How a hook point's value is found in a module's tensor, and put back."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor

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
    """Columns `start` to `stop` of the last axis, cut into heads where `heads` is given."""

    start: int
    stop: int
    heads: int | None = None

    def read(self, tensor: Tensor, run: "Run") -> Tensor:
        """Show the columns, as a view."""
        shown = tensor[..., self.start : self.stop]
        return shown if self.heads is None else split_heads(shown, self.heads)

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Put new columns beside the old ones, in a new tensor."""
        flat = value if self.heads is None else value.flatten(-2)
        if self.start == 0 and self.stop == tensor.shape[-1]:
            return flat
        return torch.cat([tensor[..., : self.start], flat, tensor[..., self.stop :]], dim=-1)


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


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """See the last axis as heads: `[..., heads * width]` as `[..., heads, width]`."""
    return tensor.view(*tensor.shape[:-1], heads, tensor.shape[-1] // heads)
