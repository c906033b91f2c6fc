"""Makes transformers compute in float64 where its code asks for float32, so that wrong by 1e-8 is visible.

HF's norms, rotary embeddings, softmaxes, routers and scans cast to float32 whatever the model's dtype is. Inside
`true_float64()` every request for float32 is a request for float64: casts, factories, the `dtype` of reductions, and
torch's default dtype.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Wide(TorchFunctionMode):
    """The part of `true_float64()` that belongs to one thread: for threads that run inside it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        for arg in args:
            if arg is torch.float32:
                args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
                break
        if not kwargs:
            return func(*args)
        return func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()})


@contextlib.contextmanager
def true_float64() -> Iterator[None]:
    """Let a request for float32 mean float64 until the block ends (in this thread; the default dtype is all threads').

    A float64 model must also be built inside it: buffers such as the rotary frequencies are computed then.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            yield
    finally:
        torch.set_default_dtype(before)
