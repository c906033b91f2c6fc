"""One forward of HF's model, told by its modules: what each was given and gave, in order."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from lens_conformance.doctor.tiny import Subject, build, quiet
from lens_conformance.float64 import true_float64

__all__ = ["Call", "Kernel", "Trace", "Unfit", "coefficients", "dropouts", "same", "traced"]

EXACT = 1e-9
"""Of a value's scale, in true float64."""


class Unfit(Exception):  # noqa: N818 - it is a finding, not an error
    """Something of a model that `Decoder` has no word for; says what."""


@attrs.frozen(kw_only=True, eq=False)
class Call:
    """One call of a module: copies of the floating tensors that it was given and gave, and when."""

    path: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    start: int
    end: int

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition(".")[2]

    def input_like(self, x: Tensor) -> Tensor | None:
        """Give the first input of the stream's shape, whose rows may be flat."""
        return next((found for one in self.inputs if (found := _shaped(one, x)) is not None), None)

    def output_like(self, x: Tensor) -> Tensor | None:
        """Give the first output, if it has the stream's shape."""
        return _shaped(self.outputs[0], x) if self.outputs else None


@attrs.frozen(kw_only=True, eq=False)
class Kernel:
    """One call of HF's attention interface."""

    path: str
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    at: int


@attrs.define(kw_only=True, eq=False)
class Trace:
    """What one forward showed."""

    model: Any
    calls: list[Call] = attrs.field(factory=list)
    kernels: list[Kernel] = attrs.field(factory=list)
    ids: Tensor
    logits: Tensor | None = None

    def of(self, path: str) -> list[Call]:
        """List the calls of one module."""
        return [call for call in self.calls if call.path == path]

    def below(self, path: str) -> list[Call]:
        """List the calls of the modules below one, in the order in which they began."""
        return [call for call in self.calls if call.path.startswith(f"{path}.")]


def same(a: Tensor | None, b: Tensor | None, bound: float = EXACT) -> bool:
    """Whether two values agree but for rounding; not where one is missing, or both are zero."""
    if a is None or b is None or a.shape != b.shape:
        return False
    scale = float(b.double().square().mean().sqrt())
    return scale > 0 and float((a.double() - b.double()).abs().max()) <= bound * max(scale, 1e-3)


def coefficients(target: Tensor, parts: list[Tensor]) -> list[float] | None:
    """Give the factors by which some values sum to another; None where none do."""
    x = torch.stack([part.double().flatten() for part in parts], dim=1)
    y = target.double().flatten()[:, None]
    found = torch.linalg.lstsq(x, y, driver="gelsd").solution
    off, scale = float((x @ found - y).abs().max()), float(y.square().mean().sqrt())
    if scale == 0 or not off <= EXACT * scale:
        return None
    return [float(one) for one in found.flatten()]


def _shaped(x: Tensor, like: Tensor) -> Tensor | None:
    if x.shape == like.shape:
        return x
    is_flat = x.ndim == 2 and x.shape[-1] == like.shape[-1] and x.numel() == like.numel()
    return x.reshape(like.shape) if is_flat else None


# ---------------------------------------------------------------------- running


def traced(
    subject: Subject, *, dtype: torch.dtype = torch.float64, in_training: bool = False, **overrides: Any
) -> Trace:
    """Build the tiny model and run it once on three rows of seven tokens."""
    with true_float64() if dtype == torch.float64 else _nothing():
        model = build(subject, dtype=dtype, **overrides)
        model.train(in_training)
        ids = torch.randint(0, 28, (3, 7), generator=torch.Generator().manual_seed(1))
        trace = Trace(model=model, ids=ids)
        with torch.no_grad(), torch.random.fork_rng(), quiet(), _recorded(model, trace):
            torch.manual_seed(0)
            trace.logits = model(ids, use_cache=False).logits.clone()
    trace.calls.sort(key=lambda call: call.start)
    return trace


def dropouts(subject: Subject) -> dict[str, float]:
    """Give the dropouts of the config class' own, switched on; none that drops whole layers."""
    found = [name for name in subject.fields if re.search(r"(dropout|pdrop|drop_prob|_drop$)", name)]
    return {name: 0.2 for name in found if "layer" not in name and isinstance(subject.fields[name], float)}


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _recorded(model: nn.Module, trace: Trace) -> Iterator[None]:
    clock, open_calls = iter(range(10**9)), dict[int, list[tuple[int, tuple[Tensor, ...]]]]()

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = tuple(one.detach().clone() for one in _tensors([*args, *kwargs.values()]))
        open_calls.setdefault(id(module), []).append((next(clock), given))

    def after(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        start, given = open_calls[id(module)].pop()
        gave = tuple(one.detach().clone() for one in _tensors([output]))
        trace.calls.append(Call(path=path, module=module, inputs=given, outputs=gave, start=start, end=next(clock)))

    paths = {id(module): path for path, module in model.named_modules()}
    with ExitStack() as stack:
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(after, path), with_kwargs=True).remove)
        for namespace in {id(found): found for found in map(_namespace, model.modules()) if found}.values():
            registry = namespace["ALL_ATTENTION_FUNCTIONS"]
            namespace["ALL_ATTENTION_FUNCTIONS"] = _Watched(registry, paths, trace, lambda: next(clock))
            stack.callback(namespace.__setitem__, "ALL_ATTENTION_FUNCTIONS", registry)
        yield


def _namespace(module: nn.Module) -> dict[str, Any] | None:
    found = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
    return found if "ALL_ATTENTION_FUNCTIONS" in found else None


def _tensors(given: Any) -> Iterator[Tensor]:
    """Give the floating tensors in arguments or outputs, and the integers of routers."""
    for one in given:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, list | tuple):
            yield from _tensors(one)


class _Watched:
    """Stands for HF's registry of attention kernels, and notes the calls."""

    def __init__(self, registry: Any, paths: dict[int, str], trace: Trace, now: Callable[[], int]) -> None:
        self._registry, self._paths, self._trace, self._now = registry, paths, trace, now

    def get_interface(self, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        kernel = self._registry.get_interface(implementation, default)

        def call(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = kernel(module, query, key, value, *args, **kwargs)
            values = [one.detach().clone() for one in (query, key, value, result[0])]
            q, k, v, out = values
            path = self._paths.get(id(module), "")
            self._trace.kernels.append(Kernel(path=path, q=q, k=k, v=v, out=out, at=self._now()))
            return result

        return call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)
