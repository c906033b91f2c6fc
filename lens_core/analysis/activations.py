"""Activations of many texts at chosen hook points and positions: what probes and steering vectors are made from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core._positions import read_positions
from lens_core.analysis._batches import Batch, batches, run_through
from lens_core.errors import ArgumentError, InputError, UnsupportedHookError
from lens_core.hook_points import HookTable, NameFilter

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["Activations", "collect_activations"]

Where: TypeAlias = int | Sequence[Any] | Tensor | Literal["all", "mean"]


@attrs.frozen(kw_only=True, eq=False)
class Activations:
    """Activations of examples at hook points: each a text, or with `positions="all"` each a token.

    Attributes:
        values: By canonical hook name; axes of a hook point beyond `batch pos` are flattened into the width.
        positions: What the position axis is: what was asked for, such as `(-1,)`, or `("mean",)`, or `("each",)`.
        tokens: The token id at each position; -1 for a mean.
        texts: Which text an example is of. Tokens of one text are not independent: probes keep them together.
        ids: The ids of each text.
        at: The absolute position of each; -1 for a mean.
    """

    values: Mapping[str, Float[Tensor, "example position width"]] = attrs.field(
        repr=lambda values: str({name: list(value.shape) for name, value in values.items()})
    )
    positions: tuple[Any, ...]
    tokens: Int[Tensor, "example position"] = attrs.field(repr=False)
    texts: Int[Tensor, " example"] = attrs.field(repr=False)
    ids: tuple[Int[Tensor, " pos"], ...] = attrs.field(repr=False)
    at: Int[Tensor, "example position"] = attrs.field(repr=False)
    table: HookTable = attrs.field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The canonical hook names, in the order of computation."""
        return tuple(self.values)

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.texts)

    def __getitem__(self, name: Any) -> Float[Tensor, "example position width"]:
        """Give the values at a name or short form.

        Raises:
            UnknownHookError: No such hook point.
            ArgumentError: It was not collected.
        """
        canonical = self.table.canonical(name)
        if canonical not in self.values:
            raise ArgumentError(f"{canonical!r} was not collected; there are {', '.join(self.values)}")
        return self.values[canonical]


@checks_arguments
def collect_activations(
    model: "LensModel",
    texts: Any,
    names: NameFilter = "resid_post",
    *,
    positions: Where = -1,
    batch_size: int = 16,
    prepend_bos: bool | None = None,
    device: Any = "cpu",
) -> Activations:
    """Run texts and keep what is at some hook points and positions, and nothing else.

    Texts may come from an iterator; a batch at a time is run, up to the last block that is needed, and only the chosen
    positions are kept. `examples x positions x width x names` numbers are.

    Args:
        model: The model.
        texts: Texts, or rows of ids.
        names: Hook points whose axes begin with `batch pos`: names, short forms, a glob, ...; the residual stream after
            every block unless said.
        positions: Which of each text: an int or several, absolute or negative from the text's end (padding left out);
            as many for each text, in a list of lists or a tensor `[text, position]`; `"mean"` of all tokens of a text;
            or `"all"`, each token an example.
        batch_size: Texts at a time.
        prepend_bos: As in `forward`; not with ids.
        device: Where to keep them.

    Returns:
        Values in the model's dtype, but at least float32 for means.

    Raises:
        UnsupportedHookError: A hook point without positions, such as a pattern.
        InputError: A text that has no such position.
        ArgumentError: Positions of another kind, or not for each text.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> found = collect_activations(model, ["the cat sat", "the big dog"], positions=[1, -1])
        >>> found
        Activations(values={'blocks.0.hook_resid_post': [2, 2, 96], 'blocks.1.hook_resid_post': [2, 2, 96]},
            positions=(1, -1))
        >>> model.to_str_tokens(found.tokens[:, 1])
        ['sat', ' dog']
    """
    chosen = _names(model, names)
    depth = max(model.table.depth(name) or 0 for name in chosen)
    kept: dict[str, list[Tensor]] = {name: [] for name in chosen}
    tokens, at, owners, ids = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    labels = _labels(positions)
    listed = _listed(positions)
    for batch in batches(model, texts, batch_size, prepend_bos=prepend_bos):
        rows, places = _places(batch, positions if listed is None else listed)
        hooks = [(name, _keep(kept[name], rows, places, device)) for name in chosen]
        run_through(model, batch.tokens, depth, hooks, **batch.call)
        ids.extend(row[:length].cpu() for row, length in zip(batch.tokens, batch.lengths, strict=True))
        if positions == "mean":
            at.append(torch.full((len(rows), 1), -1))
            tokens.append(at[-1])
        else:
            at.append(places.cpu())
            tokens.append(batch.tokens[rows[:, None], places].cpu())
        owners.append(batch.first + rows.cpu())
    if listed is not None and len(listed) != len(ids):
        raise ArgumentError(f"positions name {len(listed)} texts, and there are {len(ids)}")
    return Activations(
        values={name: torch.cat(kept[name]) for name in chosen},
        positions=labels if labels else tuple(range(tokens[0].shape[1])),
        tokens=torch.cat(tokens),
        texts=torch.cat(owners),
        ids=tuple(ids),
        at=torch.cat(at),
        table=model.table,
    )


def _names(model: "LensModel", names: NameFilter) -> tuple[str, ...]:
    if names is None:
        raise ArgumentError("names are hook points, such as 'resid_post' or ('resid_post', 3); got None")
    chosen = model.table.select(names).names
    for name in chosen:
        shape = model.table[name].shape
        if shape.split()[:2] != ["batch", "pos"]:
            raise UnsupportedHookError(f"{name!r} is {shape!r}, and examples need axes that begin with 'batch pos'")
        if name.endswith("hook_ssm_state"):
            raise UnsupportedHookError(f"{name!r} is computed a position at a time; cache it and slice the positions")
    return chosen


def _keep(pieces: list[Tensor], rows: Tensor, places: Tensor, device: Any) -> Callable[..., None]:
    """Give the hook function that keeps the chosen positions of a batch; a mask as places means their mean."""

    def keep(value: Tensor, hook: Any) -> None:
        flat = value.detach().flatten(2)
        if places.dtype == torch.bool:
            wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
            real = places.to(wide.device)[..., None]
            found = (wide * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        else:
            found = flat[rows.to(flat.device)[:, None], places.to(flat.device)]
        pieces.append(found.to(device))

    return keep


def _labels(positions: Any) -> tuple[Any, ...]:
    """Say what the position axis is; nothing where each text has its own."""
    if isinstance(positions, str):
        if positions not in ("all", "mean"):
            raise ArgumentError(f"positions are ints, 'mean' or 'all'; got {positions!r}")
        return ("each",) if positions == "all" else ("mean",)
    if _listed(positions) is not None:
        return ()
    return tuple(_ints(positions))


def _listed(positions: Any) -> list[list[int]] | None:
    """Read positions that are given for each text."""
    if isinstance(positions, Tensor) and positions.ndim == 2:
        return cast("Any", positions).tolist()
    if isinstance(positions, str | Tensor) or not isinstance(positions, Iterable):
        return None
    rows = list(cast("Iterable[Any]", positions))
    if not rows or not isinstance(rows[0], list | tuple | Tensor):
        return None
    found = [_ints(row) for row in rows]
    if len({len(row) for row in found}) != 1:
        raise ArgumentError("positions for each text are as many for each; got lists of different lengths")
    return found


def _ints(positions: Any) -> list[int]:
    read = read_positions(positions)
    if read is None or isinstance(read, slice):
        raise ArgumentError(f"positions are ints, 'mean' or 'all'; got {positions!r}")
    return [read] if isinstance(read, int) else list(read)


def _places(batch: Batch, positions: Any) -> tuple[Tensor, Tensor]:
    """Give the row of each example and its positions `[example, position]`; for a mean the mask."""
    device = batch.tokens.device
    rows = torch.arange(len(batch.tokens), device=device)
    if isinstance(positions, str):
        if positions == "mean":
            return rows, batch.attention_mask.bool()
        where = batch.attention_mask.nonzero()
        return where[:, 0], where[:, 1:]
    found: list[list[int]] = []
    listed = _listed(positions)
    for row, length in enumerate(batch.lengths):
        text = batch.first + row
        if listed is not None and text >= len(listed):
            raise ArgumentError(f"positions name {len(listed)} texts, and there are more")
        own = _ints(positions) if listed is None else listed[text]
        outside = [one for one in own if not -length <= one < length]
        if outside:
            raise InputError(f"text {text} has {length} tokens, and no position {outside[0]}")
        found.append([one % length for one in own])
    return rows, torch.tensor(found, device=device)
