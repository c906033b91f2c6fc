"""One input, read once and run in many rows: what sweeps over cells of patches share."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_core._inputs import Inputs, read_input
from lens_core._positions import local_positions, outside_positions, read_positions
from lens_core.cache import ActivationCache
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["Metric", "Prompt", "position_mask"]

Metric = Callable[[Tensor], Tensor]
"""From the logits `[batch, pos, d_vocab]` of one run to one number for each row `[batch]`."""
_READING = ("prepend_bos", "padding_side", "attention_mask", "position_ids")


@attrs.frozen(kw_only=True, eq=False)
class Prompt:
    """An input that has been read: the rows of one run, to be repeated."""

    model: "LensModel"
    inputs: Inputs

    @classmethod
    def read(cls, model: "LensModel", input: Any, options: Mapping[str, Any] | None = None) -> "Prompt":
        """Read an input, as `forward` does.

        Raises:
            ArgumentError: An option that is not about reading the input.
            InputError: What the model cannot take.
        """
        options = options or {}
        unknown = sorted(options.keys() - set(_READING))
        if unknown:
            raise ArgumentError(f"inputs that are run again and again take {', '.join(_READING)}; got {unknown[0]!r}")
        if model.bare_model.training:
            raise ArgumentError("the model is in training mode, where dropout draws; call model.eval() first")
        return cls(model=model, inputs=read_input(model, input, **options))

    @property
    def given(self) -> Tensor:
        """Token ids `[batch, pos]`, or embeddings."""
        tensor = self.inputs.tokens if self.inputs.tokens is not None else self.inputs.embeddings
        assert tensor is not None
        return tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and positions."""
        return self.given.shape[0], self.given.shape[1]

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """Where the tokens are that are no padding."""
        mask = self.inputs.whole_mask
        return torch.ones(self.shape, dtype=torch.bool, device=self.given.device) if mask is None else mask.bool()

    def run(
        self,
        hooks: Sequence[Any] = (),
        *,
        copies: int = 1,
        start: int | None = None,
        residual: Tensor | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """Run the rows, all of them `copies` times: row `c * batch + b` is copy c of row b.

        Args:
            hooks: As `fwd_hooks` of `run_with_hooks`.
            copies: How many times.
            start: The block to begin with, at `residual` `[copies * batch, pos, d_model]`.
            residual: The stream that enters it.
            stop: The block to stop before.
        """
        given = _repeated(self.given, copies) if residual is None else residual
        options: dict[str, Any] = {
            "attention_mask": _repeated(self.inputs.whole_mask, copies),
            "position_ids": _repeated(self._position_ids(), copies),
            "start_at_layer": None if residual is None else start,
            "stop_at_layer": stop,
        }
        return self.model.run_with_hooks(given, fwd_hooks=hooks, **options)

    def cached(self, names: Sequence[str], hooks: Sequence[Any] = ()) -> tuple[Tensor, ActivationCache]:
        """Run once and cache; gives the logits too."""
        with self.model.hooks(fwd_hooks=hooks):
            return self.model.run_with_cache(
                self.given,
                names_filter=list(names),
                attention_mask=self.inputs.whole_mask,
                position_ids=self._position_ids(),
            )

    def _position_ids(self) -> Tensor | None:
        ids = self.inputs.position_ids
        return ids if ids is None else ids.expand(self.shape)

    def measured(self, metric: Metric, logits: Tensor, copies: int = 1) -> Float[Tensor, "copies batch"]:
        """Measure each copy by itself, in at least float32.

        Raises:
            ArgumentError: The metric gives something else than one number for each row.
        """
        batch = self.shape[0]
        rows = logits.reshape(copies, batch, *logits.shape[1:])
        return torch.stack([_one_each(metric(rows[copy]), batch) for copy in range(copies)])


def _repeated(tensor: Tensor | None, copies: int) -> Tensor | None:
    return tensor if tensor is None or copies == 1 else tensor.repeat(copies, *[1] * (tensor.ndim - 1))


def _one_each(value: Any, batch: int) -> Float[Tensor, " batch"]:
    if not isinstance(value, Tensor) or value.shape != (batch,):
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(
            f"the metric gives one number for each of the {batch} rows, a tensor [{batch}]; got {got}. "
            "Leave out the mean over the batch, and name the position: logits[:, -1, token]"
        )
    return value.to(torch.promote_types(value.dtype, torch.float32))


def position_mask(given: Any, prompt: Prompt) -> Bool[Tensor, "batch pos"] | None:
    """Read positions: as hook entries name them, or a mask `[batch, pos]` of each row's own; None for all.

    Raises:
        ArgumentError: Not such a thing, or none of this input.
    """
    if given is None:
        return None
    batch, pos = prompt.shape
    device = prompt.given.device
    if isinstance(given, Tensor) and given.ndim == 2:
        if given.dtype != torch.bool or given.shape != (batch, pos):
            raise ArgumentError(
                f"positions of each row are a mask of bools {[batch, pos]}; got {given.dtype} {list(given.shape)}"
            )
        return given.to(device)
    positions = read_positions(given)
    outside = outside_positions(positions, total=pos)
    found = local_positions(positions, first=0, total=pos)
    if outside or not found:
        raise ArgumentError(f"the input has positions 0 to {pos - 1}; got {outside[0] if outside else given!r}")
    mask = torch.zeros(batch, pos, dtype=torch.bool, device=device)
    mask[:, found] = True
    return mask
