"""Activations by name: a mapping that knows the hook points' short forms and the residual stream's algebra."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lens_core import _cache_file, _components, _logit_attrs, _residual
from lens_core._arguments import checks_arguments
from lens_core._cache_sink import CacheSink, moved
from lens_core._decomposition import sliced
from lens_core._entries import Entries, Gradients
from lens_core._pass_log import applied_passes
from lens_core._positions import leaves_gaps, read_positions
from lens_core.analysis import ssm_attention
from lens_core.errors import ArgumentError, CacheError, NotCachedError
from lens_core.hook_points import HookTable

if TYPE_CHECKING:
    from lens_core.analysis.logit_lens import LogitLens
    from lens_core.model import LensModel

__all__ = ["ActivationCache", "CacheSink", "Gradients"]


class ActivationCache(Entries):
    """The activations of one run by canonical hook name.

    `cache["blocks.3.attn.hook_q"]`, `cache["q", 3]` and `cache["q3"]` are one entry; `cache["q"]` stacks what is cached
    of all layers along a new first axis (a copy). Calls that continue a sequence append their positions; a call that
    starts one replaces what was there. Entries may share storage with each other; nothing else writes to them.

    Attributes:
        model: The model that was run; None for a cache read from a file without one.
        passes: Names of the passes that the model's weights had gone through then.
        table: The hook points that names are resolved by.
        grad: Gradients at the same hook points, where they were asked for.
        has_batch_dim: False after `remove_batch_dim`.
        has_gaps: Whether `pos_slice` left out positions between those that are here.
        heads: Which heads scores and patterns have, where a run chose some; None for all.
        metadata: What a file said of the run: model id, plugin and versions; empty for a cache of this process.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> _, cache = model.run_with_cache("the cat sat")
        >>> parts, labels = cache.decompose_resid(return_labels=True)
        >>> bool(torch.allclose(parts.sum(0), cache["resid_post", -1], atol=1e-4))
        True
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        table: HookTable,
        model: "LensModel | None" = None,
        has_batch_dim: bool = True,
        gradients: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Hold tensors by canonical name; `table` resolves other forms of the names."""
        self._pieces: dict[str, list[Tensor]] = {name: [value] for name, value in (tensors or {}).items()}
        self._derived: set[str] = set()
        self.table = table
        self.model = model
        self.passes = () if model is None else applied_passes(model.bare_model)
        self.has_batch_dim = has_batch_dim
        self.has_gaps = False
        self.heads: tuple[int, ...] | None = None
        self.grad = Gradients(gradients or {}, table=table, has_batch_dim=has_batch_dim, is_from_file=model is None)
        self.metadata: Mapping[str, str] = dict(metadata or {})

    # ------------------------------------------------------------------ a mapping

    @property
    def is_from_file(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the names known are only those of a file."""
        return self.model is None

    def _names(self) -> Mapping[str, Any]:
        return self._pieces

    def _joined(self, name: str) -> Tensor:
        pieces = self._pieces[name]
        if len(pieces) > 1:  # keys that came later are masked in the scores of earlier positions
            pieces[:] = [self.join(name, pieces, fill=-torch.inf if name.endswith("hook_attn_scores") else 0.0)]
        return pieces[0]

    def _absence(self, key: object) -> str:
        kept = ", ".join(list(self._pieces)[:4])
        what = f"{len(self)} hook points were: {kept}{', ...' if len(self) > 4 else ''}" if kept else "nothing was"
        return f"{key!r} was not cached; {what}. Name it in names_filter"

    def __getitem__(self, key: Any) -> Tensor:
        """Give one activation, or the stack over layers of a short form without a layer.

        `cache[name + "_grad"]` is `cache.grad[name]`.

        Raises:
            UnknownHookError: No such hook point in the model.
            CacheError: The hook point exists and was not cached.
            ArgumentError: Not a name: a filter, or something else.
        """
        if isinstance(key, str) and key.endswith("_grad"):
            return self.grad[key.removesuffix("_grad")]
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        """Whether a name or short form is cached, on some layer; nothing is stacked."""
        if isinstance(key, str) and key.endswith("_grad"):
            return key.removesuffix("_grad") in self.grad
        return super().__contains__(key)

    def __delitem__(self, key: Any) -> None:
        """Forget an entry, to free its memory; a short form without a layer forgets all layers'."""
        if key not in self:
            raise NotCachedError(f"{key!r} is not cached")
        for name in self.resolve(key):
            self._pieces.pop(name, None)
            self.grad.drop(name)

    def __repr__(self) -> str:
        """Show how many entries of what size."""
        size = sum(piece.numel() * piece.element_size() for pieces in self._pieces.values() for piece in pieces)
        return f"ActivationCache({len(self)} entries, {size / 2**20:.1f} MiB)"

    @property
    def device(self) -> torch.device:
        """Where the first entry is, and what is computed from the cache will be."""
        return next((pieces[0].device for pieces in self._pieces.values()), torch.device("cpu"))

    # ------------------------------------------------------------------ moving and slicing

    @checks_arguments
    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "ActivationCache":
        """Move the entries, in place, to a device; floating ones also to a dtype. Returns the cache."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise ArgumentError(f"activations are kept in a floating dtype; got {dtype}")
        device = None if device is None else _device(device)
        for pieces in self._pieces.values():
            pieces[:] = [moved(piece, device, dtype) for piece in pieces]

        def move(piece: Tensor) -> Tensor:
            return moved(piece, device, dtype)

        self.grad.change(move)
        return self

    def remove_batch_dim(self) -> "ActivationCache":
        """Drop the batch axis of every entry, in place. Returns the cache.

        Raises:
            CacheError: The batch has more than one row.
        """
        if self.has_batch_dim:
            sizes = {name: self._joined(name).shape[:1] for name in self}
            wrong = [name for name in self if self._is_ours(name) and sizes[name] != (1,)]
            if wrong:
                raise CacheError(f"{wrong[0]!r} has {sizes[wrong[0]][0]} rows; remove_batch_dim is for a batch of one")
            for name, pieces in self._pieces.items():
                pieces[:] = [piece[0] if sizes[name] == (1,) else piece for piece in pieces]

            def drop(piece: Tensor) -> Tensor:
                return piece[0] if piece.shape[:1] == (1,) else piece

            self.grad.change(drop)
            self.has_batch_dim = self.grad.has_batch_dim = False
        return self

    @checks_arguments
    def apply_slice_to_batch_dim(self, batch_slice: int | slice | Sequence[int] | Tensor) -> "ActivationCache":
        """Give a new cache with some rows (an int drops the batch axis); entries are views where slicing gives views.

        An entry of an `hf.` name is sliced where its first axis is as long as the batch.

        Raises:
            CacheError: The cache has no batch axis any more.
            ArgumentError: No such row.
        """
        if not self.has_batch_dim:
            raise CacheError("this cache has no batch axis any more")
        rows = next((self[name].shape[0] for name in self if self._is_ours(name)), None)

        def take(name: str, value: Tensor) -> Tensor:
            fits = self._is_ours(name) or (value.ndim > 0 and rows in (None, value.shape[0]))
            return sliced(value, 0, batch_slice) if fits else value

        return self._new(take, has_batch_dim=not isinstance(batch_slice, int))

    @checks_arguments
    def slice_pos(self, pos_slice: int | slice | Sequence[int] | Tensor) -> "ActivationCache":
        """Give a new cache with some positions of every entry; the axis stays, as with `pos_slice` of a run.

        Positions are indices into the cached axis; in scores and patterns, of those that attend: all keys stay. Entries
        are views where slicing gives views.
        """
        chosen = read_positions(pos_slice)
        kept = (chosen,) if isinstance(chosen, int) else chosen

        def take(name: str, value: Tensor) -> Tensor:
            axis = self.position_axis(name)
            return value if axis is None else sliced(value, axis, kept)

        new = self._new(take, has_batch_dim=self.has_batch_dim)
        new.has_gaps = self.has_gaps or leaves_gaps(kept)
        return new

    def _new(self, take: Callable[[str, Tensor], Tensor], *, has_batch_dim: bool) -> "ActivationCache":
        new = ActivationCache(
            {name: take(name, self[name]) for name in self},
            table=self.table,
            model=self.model,
            has_batch_dim=has_batch_dim,
            gradients={name: take(name, self.grad[name]) for name in self.grad},
            metadata=self.metadata,
        )
        new.has_gaps, new.heads, new.passes = self.has_gaps, self.heads, self.passes
        return new

    def _is_ours(self, name: str) -> bool:
        """Whether the entry's axes are known, the batch first; HF's own modules may have any."""
        return not name.startswith("hf.")

    # ------------------------------------------------------------------ the residual stream's algebra

    accumulated_resid = _residual.accumulated_resid
    decompose_resid = _residual.decompose_resid
    apply_ln_to_stack = _residual.apply_ln_to_stack
    stack_activation = _residual.stack_activation
    compute_head_results = _components.compute_head_results
    stack_head_results = _components.stack_head_results
    get_neuron_results = _components.get_neuron_results
    stack_neuron_results = _components.stack_neuron_results
    get_full_resid_decomposition = _components.get_full_resid_decomposition
    logit_attrs = _logit_attrs.logit_attrs
    logit_directions = _logit_attrs.logit_directions

    def logit_lens(self, **options: Any) -> "LogitLens":
        """Read the residual stream at each layer as a distribution; see `lens_core.analysis.logit_lens.logit_lens`."""
        from lens_core.analysis.logit_lens import logit_lens

        return logit_lens(self, **options)

    # ------------------------------------------------------------------ state-space layers

    effective_attention = ssm_attention.effective_attention

    # ------------------------------------------------------------------ files

    @checks_arguments
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the entries and gradients to a safetensors file, with what is needed to read them without the model.

        The file appears complete or not at all. Nothing is pickled.

        Args:
            path: Where; an existing file is replaced.

        Raises:
            CacheFileError: The file cannot be written there, or an entry cannot be stored.
        """
        _cache_file.write(self, path)

    @classmethod
    @checks_arguments
    def load(cls, path: str | os.PathLike[str], model: Any = None, device: Any = None) -> "ActivationCache":
        """Read a file that `save` wrote. Without a device the tensors are mapped from the file, and read when touched.

        Args:
            path: The file. Replace it rather than write into it while the cache is in use.
            model: A `LensModel` of the same shape, for what needs weights; None for the entries alone.
            device: Where to put the tensors.

        Raises:
            CacheFileError: Not a cache file of ours, damaged, of another format version, unsafe, or of another model.
        """
        saved = _cache_file.read(path, None if device is None else _device(device))
        if model is not None:
            _cache_file.check_fit(saved, model, path)
        return cls.from_saved(saved, model)

    @classmethod
    def from_saved(cls, saved: _cache_file.SavedCache, model: "LensModel | None" = None) -> "ActivationCache":
        """Make the cache of what a file, or a pickle, holds."""
        cache = cls(
            saved.tensors,
            table=saved.table if model is None else model.table,
            model=model,
            has_batch_dim=saved.has_batch_dim,
            gradients=saved.gradients,
            metadata=saved.metadata,
        )
        cache.has_gaps, cache.heads = saved.has_gaps, saved.heads
        return cache

    # ------------------------------------------------------------------ copies

    def __copy__(self) -> "ActivationCache":
        """Give a new cache with the same tensors; the model is shared."""
        return self._new(lambda _, value: value, has_batch_dim=self.has_batch_dim)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ActivationCache":
        """Give a new cache with copied tensors, in the graph that they are in; the model is shared."""
        return self._new(lambda _, value: value.clone(), has_batch_dim=self.has_batch_dim)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle what `save` writes: a cache that comes back knows no model, as one that is loaded without."""
        tensors, metadata = _cache_file.parts(self)
        return _from_pickle, ({name: value.detach() for name, value in tensors.items()}, metadata)

    # ------------------------------------------------------------------ being filled

    def restart(self) -> None:
        """Forget everything: a new sequence begins."""
        self._pieces.clear()
        self._derived.clear()
        self.grad.clear()
        self.has_batch_dim = self.grad.has_batch_dim = True

    def append(self, name: str, value: Tensor) -> None:
        """Take the value of one call."""
        self._pieces.setdefault(name, []).append(value if self.has_batch_dim else value[0])

    def derive(self, name: str, value: Tensor) -> None:
        """Take a value that was computed from other entries; it goes when they change."""
        self._pieces[name] = [value]
        self._derived.add(name)

    def forget_derived(self) -> None:
        """Drop what was computed from other entries, since these change."""
        for name in self._derived:
            self._pieces.pop(name, None)
        self._derived.clear()


def _from_pickle(tensors: dict[str, Tensor], metadata: dict[str, str]) -> ActivationCache:
    return ActivationCache.from_saved(_cache_file.read_parts(tensors, metadata, "a pickle"))


def _device(given: Any) -> torch.device:
    try:
        return torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"no such device: {given!r}") from error
