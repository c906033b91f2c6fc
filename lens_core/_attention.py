"""Inside HF's attention, whatever kernel runs: rotated queries and keys, repeated keys and values, scores, pattern.

For a run, the name `ALL_ATTENTION_FUNCTIONS` in the globals of the attention class' file is a dispatcher: it asks
HF's own registry for the kernel that HF would have called, and wraps the call on the layers asked for. Config,
implementation name and masks stay as they are, since HF's code tests all three.

The transparent kernel is the model's own eager function, run with its one softmax intercepted (`_softmax.py`). It runs
beside the fused kernel and takes its place only where a function changed a value; where gradients are wanted, the fused
value keeps its bits.

HF updates its cache with the rotated keys before it calls the kernel, so those are tapped where they are handed to the
cache: an edit is in the cache for later steps. Keys and values as each query head sees them are seen at the kernel, and
an edit there holds for this call only.
"""

import copy
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lens_core._attention_part import fire_part
from lens_core._call import ModuleCall
from lens_core._choice import together
from lens_core._context import active_runs
from lens_core._functions import Slot, function_slot
from lens_core._graph import during, explicit_where, gradients, with_gradient_of
from lens_core._plan import ModuleStep, SlotStep
from lens_core._softmax import Enough, InsideSoftmax, additive_mask, masked_cells
from lens_core._watch import Watch
from lens_core.errors import UnsupportedHookError

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["Attention", "AttentionPart", "Override", "attention_steps", "rotated"]

AttentionPart: TypeAlias = Literal["q", "k", "k_rep", "v_rep", "scores", "pattern"]
"""Rotated queries and keys `[batch, pos, heads, d_head]`, keys and values as each query head sees them
`[batch, key, n_heads, d_head]`, scores and pattern `[batch, n_heads, query, key]`."""


@attrs.frozen(kw_only=True)
class Attention:
    """A place inside one attention module that calls HF's attention interface."""

    path: str
    part: AttentionPart
    method: str | None = None
    """A method of the module that HF calls in place of the registered kernel, in some configurations."""

    @property
    def group(self) -> Hashable:
        """All places of one module belong together."""
        return self.path

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep | SlotStep]:
        """Handle this module's calls of the attention kernel, and the keys that it gives to the cache."""
        by_part = {watch.point.seam.part: watch for watch in watches}
        if "k" in by_part:
            yield ModuleStep(path=self.path, when="pre", act=lambda call, w=by_part["k"]: _tap_cache(w, call))
        yield from attention_steps(self.path, by_part, run, method=self.method)


def attention_steps(
    path: str, watches: dict[str, Watch], run: "Run", *, method: str | None = None
) -> Iterator[SlotStep]:
    """Handle one module's calls of the attention kernel; nothing to do where the `Attention` seam does it already."""
    taken = not watches and any(
        isinstance(watch.point.seam, Attention) and watch.point.seam.path == path for watch in run.watches
    )
    if taken:
        return
    module = run.module(path)
    handler = _Handler(path, run, watches)
    if method is not None:

        def handle_method(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def kernel(_: nn.Module, *arguments: Any, **options: Any) -> Any:
                return original(*arguments, **options)

            return handler(kernel, None, module, *args, **kwargs)

        slot = function_slot(vars(module), method, original=getattr(module, method))
        yield SlotStep(path=path, slot=slot, key=slot.key, handler=handle_method)
    namespace = inspect.unwrap(type(module).forward).__globals__
    if "ALL_ATTENTION_FUNCTIONS" not in namespace:
        raise UnsupportedHookError(
            f"{type(module).__name__} does not use HF's attention interface; its inside cannot be reached"
        )
    slot = Slot(namespace=namespace, name="ALL_ATTENTION_FUNCTIONS", make=lambda _, original: _Dispatcher(original))
    yield SlotStep(path=path, slot=slot, key=("attention", id(module)), handler=handler)


class _Dispatcher:
    """Stands for HF's registry of attention kernels while some run looks inside attention."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry

    def get_interface(self, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """Give what HF would call, wrapped where a run of this context watches the calling module."""
        kernel = self._registry.get_interface(implementation, default)
        runs = active_runs()
        if not runs:
            return kernel

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            for run in runs:
                handler = run.handlers.get(("attention", id(module)))
                if handler is not None:
                    return handler(kernel, default, module, *args, **kwargs)
            return kernel(module, *args, **kwargs)

        return call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)

    def __getitem__(self, name: str) -> Any:
        return self._registry[name]

    def __contains__(self, name: object) -> bool:
        return name in self._registry


# ---------------------------------------------------------------------- rotated keys, on their way to the cache


class _TappedCache:
    """Stands for HF's cache in one attention module's call, and shows the keys that it is given."""

    def __init__(self, cache: Any, watch: Watch, path: str) -> None:
        self._cache, self._watch, self._path = cache, watch, path

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Fire, and hand on to the cache."""
        self._watch.run.now.scratch[self._path, "k"] = True
        return self._cache.update(_fire_heads(self._watch, key), value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _tap_cache(watch: Watch, call: ModuleCall) -> None:
    """Stand for the cache, whatever HF's attention calls that argument (`past_key_values`, `layer_past`)."""
    for name, cache in call.kwargs.items():
        if hasattr(cache, "get_seq_length"):  # a cache of HF's, or one that another run has tapped
            call.kwargs = {**call.kwargs, name: _TappedCache(cache, watch, watch.point.seam.path)}
            call.input_changed = True
            return


def _fire_heads(watch: Watch, tensor: Float[Tensor, "batch heads pos d_head"]) -> Tensor:
    """Fire on `[batch, pos, heads, d_head]`; what goes on has the layout that HF's tensor had, as kernels may look."""
    shown = tensor.transpose(1, 2)
    value = watch.fire(shown)
    if value is shown and not watch.rerouted:
        return tensor
    new = value.transpose(1, 2)
    return new if new.stride() == tensor.stride() else torch.empty_like(tensor).copy_(new)


# ---------------------------------------------------------------------- the kernel's call


@attrs.frozen(kw_only=True, eq=False)
class Override:
    """Keys or values of this call's positions for some query heads, computed from those heads' own inputs.

    `part` `"k"` is not rotated yet.
    """

    heads: Sequence[int]
    values: Float[Tensor, "batch pos some d_head"]
    changed: Bool[Tensor, "batch pos some"]
    """Where their inputs were changed; elsewhere the model's own bits stay."""
    edited: bool
    rotary: Any = None
    """Cosines and sines of this call's positions; None where the layer has no rotary embedding."""
    norm: nn.Module | None = None
    """What norms them once they are rotated."""


def rotated(module: nn.Module, x: Float[Tensor, "batch heads pos d_head"], cos_sin: Any) -> Tensor:
    """Rotate the leading part of each head by the function of the module's own file.

    That part is as long as the cosines are, or twice: a file without `rotate_half` has one for each pair of channels.
    """
    names = inspect.unwrap(type(module).forward).__globals__
    width = cos_sin[0].shape[-1] * (1 if "rotate_half" in names else 2)
    turned = names["apply_rotary_pos_emb"](x[..., :width], x[..., :width], *cos_sin)[1]
    return torch.cat([turned, x[..., width:]], dim=-1)


@attrs.frozen(eq=False)
class _Handler:
    """Serves the watches of one attention module."""

    path: str
    run: "Run"
    watches: dict[str, Watch]

    def __call__(
        self,
        kernel: Callable[..., Any],
        eager: Callable[..., Any] | None,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Fire on what the kernel receives; run HF's kernel, the transparent one beside it, or that one alone."""
        if "q" in self.watches:
            query = _fire_heads(self.watches["q"], query)
        if "k" in self.watches and not self.run.now.scratch.pop((self.path, "k"), False):
            if key.shape[2] != self.run.now.n_pos:
                raise UnsupportedHookError(
                    f"{type(module).__name__} was given a cache that lens does not recognise, so its new keys cannot "
                    "be told from the old ones"
                )
            key = _fire_heads(self.watches["k"], key)
        repeated = self._repeated(module, query, key, value)
        if repeated is None:
            return self._attend(kernel, eager, module, query, key, value, mask, kwargs)
        own_module, keys, values, is_edited = repeated
        if is_edited:
            return self._attend(kernel, eager, own_module, query, keys, values, mask, kwargs)
        # Both draw the same dropout, and the generator moves on once.
        random: Any = torch.random
        with random.fork_rng(enabled=bool(kwargs.get("dropout"))):
            output, *rest = self._attend(kernel, eager, own_module, query, keys, values, mask, kwargs)
        own, *rest = kernel(module, query, key, value, mask, **kwargs)
        changed = any(watch.edited for part, watch in self.watches.items() if part in ("scores", "pattern"))
        return (output if changed else with_gradient_of(output, own), *rest)

    def _attend(
        self,
        kernel: Callable[..., Any],
        eager: Callable[..., Any] | None,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the kernel, with scores and pattern looked at where they are asked for."""
        scores, pattern = self.watches.get("scores"), self.watches.get("pattern")
        watches = [watch for watch in (scores, pattern) if watch is not None]
        if not watches:
            return kernel(module, query, key, value, mask, **kwargs)
        if eager is None or kernel is eager:  # HF runs the transparent kernel itself
            with during(InsideSoftmax(scores, pattern, is_real=True, masked=masked_cells(mask))) as inside:
                result = kernel(module, query, key, value, mask, **kwargs)
            inside.check(module)
            return result
        part = together([watch.part_asked(query.shape[1]) for watch in watches])
        if part is not None:
            fire_part(part, scores, pattern, eager, module, query, key, value, mask, kwargs)
            return kernel(module, query, key, value, mask, **kwargs)
        additive, length = additive_mask(module, query, key, mask, kwargs, past=self.run.now.past)
        functions = any(watch.entries for watch in watches)
        needs_graph = any(watch.needs_graph for watch in watches)
        explicit = None
        inside = InsideSoftmax(
            scores, pattern, is_real=False, masked=masked_cells(additive), stops=not (functions or needs_graph)
        )
        with gradients(needs_graph), suppress(Enough), during(inside):
            explicit = eager(module, query, key[:, :, :length], value[:, :, :length], additive, **kwargs)[0]
        inside.check(module)
        if explicit is None or not (inside.is_edited or inside.is_rerouted):
            return kernel(module, query, key, value, mask, **kwargs)
        if kwargs.get("dropout", 0.0):
            return explicit.contiguous(), None  # the kernel would draw another dropout
        output, *rest = kernel(module, query, key, value, mask, **kwargs)
        if inside.changed is None:
            return (with_gradient_of(explicit, output), *rest)
        return (explicit_where(inside.changed[:, :, None, None], explicit, output), *rest)

    def _repeated(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[nn.Module, Tensor, Tensor, bool] | None:
        """Give keys and values for each query head and a module that does not repeat them; None where nothing asks."""
        scratch = self.run.now.scratch
        overrides = {part: scratch.pop((self.path, f"{part}_rep"), None) for part in "kv"}
        if not any(overrides.values()) and not self.watches.keys() & {"k_rep", "v_rep"}:
            return None
        is_edited = is_rerouted = False
        new: list[Tensor] = []
        for part, tensor in (("k", key), ("v", value)):
            groups = query.shape[1] // tensor.shape[1]
            repeated = tensor.repeat_interleave(groups, dim=1)
            override, watch = overrides[part], self.watches.get(f"{part}_rep")
            if override is not None:
                repeated = self._overridden(module, repeated, override)
                is_edited, is_rerouted = is_edited or override.edited, True
            if watch is not None:
                repeated = self._fire_repeated(watch, repeated)
                is_edited, is_rerouted = is_edited or watch.edited, is_rerouted or watch.rerouted
            new.append(repeated)
        if not is_edited and not is_rerouted:
            return None
        own: Any = copy.copy(module)
        own.num_key_value_groups = 1
        return own, new[0], new[1], is_edited

    def _overridden(self, module: nn.Module, repeated: Tensor, override: Override) -> Tensor:
        """Put some heads' own keys or values there; heads are counted over all processes that share the model."""
        shards, n_heads = self.run.shards, self.run.sizes["n_heads"]
        if shards is None or repeated.shape[1] == n_heads:
            return _overridden(module, repeated, override, total=self.run.now.total)
        whole = shards.whole(repeated, axis=1, length=n_heads)
        return shards.part(_overridden(module, whole, override, total=self.run.now.total), axis=1)

    def _fire_repeated(self, watch: Watch, repeated: Float[Tensor, "batch n_heads slots d_head"]) -> Tensor:
        """Fire on the keys that are real, `[batch, key, n_heads, d_head]`; a static cache has unused slots."""
        n_keys = min(repeated.shape[2], self.run.now.total)
        shown = repeated[:, :, :n_keys].transpose(1, 2)
        value = watch.fire(shown, beside=True)
        if not watch.edited and not watch.rerouted:
            return repeated
        return torch.cat([value.transpose(1, 2), repeated[:, :, n_keys:]], dim=2)


def _overridden(module: nn.Module, repeated: Tensor, override: Override, *, total: int) -> Tensor:
    """Put some heads' own keys or values at this call's positions, which are the last real ones."""
    values = override.values.transpose(1, 2)  # batch some pos d_head
    if override.rotary is not None:
        values = rotated(module, values, override.rotary)
    if override.norm is not None:
        values = override.norm.forward(values)
    end = min(repeated.shape[2], total)
    start = end - values.shape[2]
    middle = repeated[:, :, start:end].clone()
    changed = override.changed.transpose(1, 2)[..., None]
    middle[:, list(override.heads)] = explicit_where(changed, values, middle[:, list(override.heads)])
    return torch.cat([repeated[:, :, :start], middle, repeated[:, :, end:]], dim=2)
