"""Scores and pattern inside HF's attention, whatever kernel runs.

For a run, the name `ALL_ATTENTION_FUNCTIONS` in the globals of the attention class' file is a dispatcher: it asks
HF's own registry for the kernel that HF would have called, and wraps the call on the layers asked for. Config,
implementation name and masks stay as they are, since HF's code tests all three.

The transparent kernel is the model's own eager function, run with its one softmax intercepted: the argument is the
scores, the result the pattern, and every cast, scale and soft cap is that model's. It runs beside the fused kernel and
takes its place only where a function changed a value; where gradients are wanted, the fused value keeps its bits.
"""

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lens_core._context import active_runs
from lens_core._functions import Slot, function_slot
from lens_core._graph import with_gradient_of
from lens_core._plan import SlotStep
from lens_core._watch import Watch
from lens_core.errors import UnsupportedHookError

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["Attention"]

SOFTMAXES = (nn.functional.softmax, torch.softmax, Tensor.softmax)
DROPOUTS = (nn.functional.dropout, torch.dropout)


@attrs.frozen(kw_only=True)
class Attention:
    """The scores or the pattern of one attention module."""

    path: str
    part: Literal["scores", "pattern"]
    method: str | None = None
    """A method of the module that HF calls in place of the registered kernel, in some configurations."""

    @property
    def group(self) -> Hashable:
        """Scores and pattern of one module belong together."""
        return self.path

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[SlotStep]:
        """Handle this module's calls of the attention kernel."""
        by_part = {watch.point.seam.part: watch for watch in watches}
        module = run.module(self.path)
        handler = _Handler(by_part.get("scores"), by_part.get("pattern"))
        if self.method is not None:

            def handle_method(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                def kernel(_: nn.Module, *arguments: Any, **options: Any) -> Any:
                    return original(*arguments, **options)

                return handler(kernel, None, module, *args, **kwargs)

            slot = function_slot(vars(module), self.method, original=getattr(module, self.method))
            yield SlotStep(path=self.path, slot=slot, key=slot.key, handler=handle_method)
        namespace = inspect.unwrap(type(module).forward).__globals__
        if "ALL_ATTENTION_FUNCTIONS" not in namespace:
            raise UnsupportedHookError(
                f"{type(module).__name__} does not use HF's attention interface; "
                "scores and pattern cannot be reached there"
            )
        slot = Slot(namespace=namespace, name="ALL_ATTENTION_FUNCTIONS", make=lambda _, original: _Dispatcher(original))
        yield SlotStep(path=self.path, slot=slot, key=("attention", id(module)), handler=handler)


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


class _Enough(Exception):  # noqa: N818 - not an error: leaves the eager function once the pattern is known
    pass


@attrs.frozen(eq=False)
class _Handler:
    """Serves the watches of one attention module."""

    scores: Watch | None
    pattern: Watch | None

    @property
    def watches(self) -> list[Watch]:
        return [watch for watch in (self.scores, self.pattern) if watch is not None]

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
        """Run HF's kernel, the transparent one beside it, or the transparent one alone."""
        if eager is None or kernel is eager:  # HF runs the transparent kernel itself
            with _Inside(self, is_real=True, masked=_masked_cells(mask)) as inside:
                result = kernel(module, query, key, value, mask, **kwargs)
            inside.check(module)
            return result
        additive, length = _additive_mask(module, query, key, mask, kwargs, past=self.watches[0].run.now.past)
        dropout = kwargs.get("dropout", 0.0)
        functions = any(watch.entries for watch in self.watches)
        needs_graph = any(watch.needs_graph for watch in self.watches)
        explicit = None
        inside = _Inside(
            self, is_real=False, masked=_masked_cells(additive), stop_at_pattern=not (functions or needs_graph)
        )
        with torch.set_grad_enabled(needs_graph), suppress(_Enough), inside:
            explicit = eager(module, query, key[:, :, :length], value[:, :, :length], additive, **kwargs)[0]
        inside.check(module)
        if explicit is not None and (inside.is_edited or (inside.is_rerouted and dropout)):
            return explicit.contiguous(), None
        output, *rest = kernel(module, query, key, value, mask, **kwargs)
        if explicit is not None and inside.is_rerouted:
            output = with_gradient_of(explicit, output)
        return (output, *rest)


class _Inside(TorchFunctionMode):
    """Intercept the one softmax of an eager attention function, and the dropout after it."""

    def __init__(
        self, handler: _Handler, *, is_real: bool, masked: Bool[Tensor, "..."] | None, stop_at_pattern: bool = False
    ) -> None:
        super().__init__()
        self.handler = handler
        self.is_real = is_real
        self.masked = masked
        self.stop_at_pattern = stop_at_pattern
        self.softmaxes = 0

    @property
    def is_edited(self) -> bool:
        return any(watch.edited for watch in self.handler.watches)

    @property
    def is_rerouted(self) -> bool:
        return any(watch.rerouted for watch in self.handler.watches)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SOFTMAXES:
            return self._softmax(func, args, kwargs)
        if func in DROPOUTS and not self.is_real and not self.is_edited and not self.is_rerouted:
            return args[0] if args else kwargs["input"]  # beside the model: draw no random numbers
        return func(*args, **kwargs)

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        self.softmaxes += 1
        scores, rest = args[0], args[1:]
        watch = self.handler.scores
        keys = scores.shape[-1]
        if watch is not None:
            keys = min(keys, watch.run.now.total)
            scores = _fire_scores(watch, scores, keys, self.masked)
        pattern = func(scores, *rest, **kwargs)
        watch = self.handler.pattern
        if watch is not None:
            keys = min(pattern.shape[-1], watch.run.now.total)
            shown = pattern if keys == pattern.shape[-1] else pattern[..., :keys]
            new = watch.fire(shown, beside=True)
            if new is not shown or (watch.rerouted and shown is not pattern):
                pattern = new if shown is pattern else torch.cat([new, pattern[..., keys:]], dim=-1)
        if self.stop_at_pattern:
            raise _Enough
        return pattern

    def check(self, module: nn.Module) -> None:
        """Raise when the eager function did not compute one softmax."""
        if self.softmaxes != 1:
            raise UnsupportedHookError(
                f"the eager attention of {type(module).__name__} computed {self.softmaxes} softmaxes where one was "
                "expected; scores and pattern cannot be told apart there"
            )


def _fire_scores(watch: Watch, scores: Tensor, keys: int, masked: Tensor | None) -> Tensor:
    """Show scores with -inf in masked cells; HF's own finite number goes back where a function left -inf."""
    real = scores if keys == scores.shape[-1] else scores[..., :keys]
    hidden = None if masked is None else masked[..., :keys].expand_as(real)
    shown = real if hidden is None else real.masked_fill(hidden, float("-inf"))
    new = watch.fire(shown, beside=True)
    if new is shown and not watch.rerouted:
        return scores
    # -inf is for show: HF's numbers are finite, so that a row which may see nothing is uniform and not NaN.
    lowest = torch.finfo(real.dtype).min
    finite = new.masked_fill(new.isneginf(), lowest)
    new = finite if hidden is None else torch.where(hidden & new.isneginf(), real.detach(), finite)
    return new if keys == scores.shape[-1] else torch.cat([new, scores[..., keys:]], dim=-1)


def _masked_cells(mask: Tensor | None) -> Bool[Tensor, "..."] | None:
    """Find the cells that an additive mask closes."""
    if mask is None:
        return None
    return ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2


def _additive_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any], *, past: int
) -> tuple[Float[Tensor, "batch heads query key"] | None, int]:
    """Bring the mask of any kernel to the additive form of the eager one; also give the number of keys it covers.

    SDPA's is additive, boolean or None, flash attention's a padding mask `[batch, key]` or None, flex attention's a
    `BlockMask`. None means causal where the module is and more than one position asks.
    """
    n_query, n_key = query.shape[2], key.shape[2]
    if mask is not None and not isinstance(mask, Tensor):
        from torch.nn.attention.flex_attention import create_mask

        mask = create_mask(mask.mask_mod, query.shape[0], None, n_query, n_key, device=str(query.device))
    if mask is not None and mask.ndim == 4 and mask.dtype != torch.bool:
        return mask, mask.shape[-1]
    if mask is not None and mask.ndim == 4:
        closed, length = ~mask, mask.shape[-1]
    else:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        length = min(n_key, past + n_query) if mask is None and causal else n_key
        keys = torch.arange(length, device=query.device)
        queries = torch.arange(n_query, device=query.device)[:, None] + (length - n_query)
        closed = (keys > queries)[None, None] if causal else torch.zeros_like(keys > queries)[None, None]
        if mask is not None:
            closed = closed | ~mask[:, None, None, :length].bool()
        elif n_query == 1 or not causal:
            return None, length if causal else n_key
    lowest = torch.finfo(query.dtype).min
    return torch.zeros_like(closed, dtype=query.dtype).masked_fill(closed, lowest), length
