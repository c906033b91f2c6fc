"""Parts of the residual stream at one place, each measured in the same linear way, so that they sum to the whole."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from lens_core._declaration import Declaration, NormPlace
from lens_core._pass_log import applied_passes
from lens_core._positions import Positions, read_positions
from lens_core.errors import ArgumentError, CacheError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache
    from lens_core.model import LensModel

__all__ = [
    "Decomposition",
    "Measure",
    "declaration_of",
    "model_of",
    "norm_at",
    "read_layer",
    "read_values",
    "sliced",
    "stream_name",
]


class Decomposition:
    """Parts of the residual stream at one place, while they are collected: each measured in the same linear way."""

    def __init__(
        self,
        cache: "ActivationCache",
        layer: Any,
        *,
        mlp_input: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        project_output_onto: Any = None,
    ) -> None:
        """Find the place and how parts are measured there: `apply_ln` as its norm did, then onto directions."""
        self.cache = cache
        self.layer, self.mlp_input = read_layer(cache, layer, mlp_input=mlp_input), mlp_input
        self.pos_slice = pos_slice
        self._onto = _directions(project_output_onto, declaration_of(cache).cfg.d_model)
        self._tensors: list[Tensor] = []
        self._labels: list[str] = []
        centres, scale, device = False, None, cache.device
        if apply_ln:
            prefix, place = norm_at(cache, self.layer, mlp_input=mlp_input)
            centres, scale = place.kind.centres, self.values(f"{prefix}.hook_scale")[0]
        self.measure = Measure(centres=centres, scale=scale, onto=self._onto, device=device)

    def values(self, *names: str, axis: int = -2) -> list[Tensor]:
        """Give cached values at the positions asked for; `axis` is their axis of positions."""
        return [sliced(value, axis, self.pos_slice) for value in read_values(self.cache, names)]

    def writes(self) -> list[tuple[int, str]]:
        """List what wrote to the stream before the place, as layer and hook name below the block, in order."""
        table, writers = self.cache.table, declaration_of(self.cache).writers
        done = [(at, writer) for at in range(self.layer) for writer in writers if f"blocks.{at}.{writer}" in table]
        middle = f"blocks.{self.layer}.hook_resid_mid"
        if self.mlp_input and middle in table:
            before = set(list(table)[: list(table).index(middle)])
            done += [(self.layer, writer) for writer in writers if f"blocks.{self.layer}.{writer}" in before]
        return done

    def add(self, parts: Tensor, labels: Sequence[str]) -> None:
        """Take measured parts `[entry, ...]`."""
        self._tensors.append(parts)
        self._labels.extend(labels)

    def add_writes(self, writes: Sequence[tuple[int, str]]) -> None:
        """Take what these added, each as one part."""
        values = self.values(*(f"blocks.{at}.{writer}" for at, writer in writes))
        for (at, writer), value in zip(writes, values, strict=True):
            self.add(self.measure.part(value)[None], [f"{at}_{writer.removeprefix('hook_')}"])

    def add_embeddings(self) -> None:
        """Take the embeddings, each as one part."""
        names = declaration_of(self.cache).embeddings
        for name, value in zip(names, self.values(*names), strict=True):
            self.add(self.measure.part(value)[None], [name.removeprefix("hook_")])

    def add_constant(self, measured: Tensor, label: str) -> None:
        """Take what was added at every position, measured; it broadcasts to a part."""
        shape = self._tensors[0].shape[1:]
        self.add(measured.expand(shape)[None], [label])

    def stacked(self, *, incl_remainder: bool, return_labels: bool) -> Any:
        """Give the stack, perhaps with what the parts leave of the stream, perhaps with labels."""
        if incl_remainder or not self._tensors:
            (stream,) = self.values(stream_name(self.cache, self.layer, mlp_input=self.mlp_input))
            whole = self.measure.part(stream)
            rest = whole - sum(parts.sum(0) for parts in self._tensors)
            self.add(rest[None] if incl_remainder else rest[None][:0], ["remainder"][: int(incl_remainder)])
        stack = torch.cat(self._tensors)
        if self._onto is not None and self._onto.ndim == 1:
            stack = stack.squeeze(-1)
        return (stack, self._labels) if return_labels else stack


@attrs.frozen(kw_only=True, eq=False)
class Measure:
    """The linear map that every part of one decomposition goes through: centre, project, divide by a scale."""

    centres: bool = False
    scale: Tensor | None = None
    onto: Tensor | None = None
    """Directions, `[d_model]` or `[d_model, k]`; the result's last axis then has length 1 or k."""
    device: torch.device

    def rows(self, vectors: Tensor) -> Tensor:
        """Centre and project vectors `[..., d_model]`, the scale left for later."""
        vectors = vectors.to(self.device, torch.promote_types(vectors.dtype, torch.float32))
        if self.centres:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        if self.onto is None:
            return vectors
        onto = self.onto if self.onto.ndim == 2 else self.onto[:, None]
        dtype = torch.promote_types(vectors.dtype, onto.dtype)
        return vectors.to(dtype) @ onto.to(vectors.device, dtype)

    def scaled(self, parts: Tensor) -> Tensor:
        """Divide by the scale, which broadcasts to `[..., batch, pos, x]`."""
        return parts if self.scale is None else parts / self.scale.to(parts.device)

    def part(self, vectors: Tensor) -> Tensor:
        """Measure parts `[..., batch, pos, d_model]`."""
        return self.scaled(self.rows(vectors))


def sliced(tensor: Tensor, axis: int, given: Any) -> Tensor:
    """Take positions (or rows, or neurons) of one axis: an int drops the axis, a slice or ints keep it, None takes all.

    Raises:
        ArgumentError: Not such a thing, or outside the axis.
    """
    chosen: Positions = read_positions(given)
    if chosen is None:
        return tensor
    axis %= tensor.ndim
    length = tensor.shape[axis]
    if isinstance(chosen, slice):
        index = range(*chosen.indices(length))
        if index.step > 0:
            return tensor[(slice(None),) * axis + (slice(index.start, index.stop, index.step),)]
        chosen = tuple(index)
    listed = (chosen,) if isinstance(chosen, int) else chosen
    outside = [index for index in listed if not -length <= index < length]
    if outside:
        raise ArgumentError(f"{outside[0]} is outside an axis of length {length}, whose indices are 0 to {length - 1}")
    if isinstance(chosen, int):
        return tensor.select(axis, chosen)
    return tensor.index_select(axis, torch.tensor([index % length for index in listed], device=tensor.device))


def read_layer(cache: "ActivationCache", layer: Any, *, mlp_input: bool = False) -> int:
    """Resolve a layer that the stream enters: None and -1 stand for `n_layers`, the final norm."""
    n_layers = cache.table.n_layers
    if layer is None or layer == -1:
        layer = n_layers
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= n_layers:
        raise ArgumentError(
            f"layer is 0 to {n_layers}, where {n_layers}, -1 and None are the final norm; got {layer!r}"
        )
    if mlp_input and layer == n_layers:
        raise ArgumentError(f"mlp_input is about one block: give its layer, 0 to {n_layers - 1}")
    return layer


def read_values(cache: "ActivationCache", names: Sequence[str]) -> list[Tensor]:
    """Give cached values by canonical name.

    Raises:
        CacheError: Some were not cached; names them.
    """
    missing = [name for name in names if name not in cache]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CacheError(
            f"this needs {', '.join(map(repr, missing[:3]))}{more}, which the cache does not hold; "
            "put them in names_filter of the run"
        )
    return [cache[name] for name in names]


def model_of(cache: "ActivationCache") -> "LensModel":
    """Give the model of a cache.

    Raises:
        CacheError: It has none, or one whose weights went through other passes than when it was run.
    """
    if cache.model is None:
        raise CacheError(
            "this needs the model, and the cache has none: ActivationCache.load(path, model=model) gives it"
        )
    passes = applied_passes(cache.model.bare_model)
    if passes != cache.passes:
        raise CacheError(
            f"the cache is of weights after {', '.join(cache.passes) or 'no pass'}, and the model's are now after "
            f"{', '.join(passes) or 'no pass'}: run it again"
        )
    return cache.model


def declaration_of(cache: "ActivationCache") -> Declaration:
    """Give what the architecture of the cache's model declares."""
    return model_of(cache).declaration


def stream_name(cache: "ActivationCache | LensModel", layer: int, *, mlp_input: bool = False) -> str:
    """Name the hook point of the stream that enters a block, its MLP, or the final norm."""
    if layer == cache.table.n_layers:
        return f"blocks.{layer - 1}.hook_resid_post"
    middle = f"blocks.{layer}.hook_resid_mid"
    return middle if mlp_input and middle in cache.table else f"blocks.{layer}.hook_resid_pre"


def norm_at(cache: "ActivationCache", layer: int, *, mlp_input: bool) -> tuple[str, NormPlace]:
    """Find the norm that reads the stream at a place: its hook name and its record."""
    norms = declaration_of(cache).norms
    if layer == cache.table.n_layers:
        return "ln_final", norms["ln_final"]
    # A parallel block's MLP may share attention's norm, and a block of an MLP alone has no other than ln2.
    for name in ("ln2", "ln1") if mlp_input else ("ln1", "norm", "ln2"):
        if f"blocks.{layer}.{name}.hook_scale" in cache.table and name in norms:
            return f"blocks.{layer}.{name}", norms[name]
    raise CacheError(f"no norm reads the residual stream where it enters block {layer}; leave out apply_ln")


def _directions(given: Any, d_model: int) -> Tensor | None:
    if given is None:
        return None
    if not isinstance(given, Tensor) or given.ndim not in (1, 2) or given.shape[0] != d_model:
        shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ArgumentError(
            f"project_output_onto is a tensor [{d_model}] or [{d_model}, k] (d_model first); got {shape}"
        )
    return given
