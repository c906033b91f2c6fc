"""Compiled models: compiled code does not see hooks, so a hooked run is eager, and says so.

Nothing is compiled anew by that: the switch is torch's own, and calls without hooks find their compiled code as it was.
"""

import threading
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch

from lens_core.errors import CompileWarning

__all__ = ["eager", "is_compiled", "tell_once", "with_parents"]

_lock = threading.RLock()  # reentrant: the garbage collector may end a block of another generator inside of it
_users: list[object] = []
_switch: list[Any] = []
"""torch's switch while it is on: it knows what to go back to."""


@contextmanager
def eager() -> Generator[None, None, None]:
    """Run compiled code eagerly inside the block.

    torch's switch holds for the whole process, so it stays on until the last of several blocks ends, whatever their
    order and thread.
    """
    user = object()
    try:
        with _lock:
            _users.append(user)
            if not _switch:
                _switch.append(torch.compiler.set_stance("force_eager"))
        yield
    finally:
        with _lock:
            if user in _users:
                _users.remove(user)
            if _switch and not _users:
                _switch.pop().__exit__(None, None, None)


def is_compiled(module: Any) -> bool:
    """Whether somebody compiled this module: `torch.compile(module)`, `module.compile()`, or its `forward` replaced."""
    own: dict[str, Any] = module.__dict__
    if hasattr(own.get("forward"), "_torchdynamo_orig_callable"):
        return True
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def with_parents(paths: Iterable[str]) -> set[str]:
    """Give the paths of modules with those of the modules that they are in, the model itself (`""`) included."""
    found = {""}
    for path in paths:
        inner = path
        while inner not in found:
            found.add(inner)
            inner = inner.rpartition(".")[0]
    return found


def tell_once(notices: set[str]) -> None:
    """Warn that a compiled model runs eagerly, unless `notices`, the model's own, has it."""
    from lens_core._boundary import frames_to_the_user

    if "compiled" not in notices:
        notices.add("compiled")
        warnings.warn(
            "this model is compiled, and compiled code does not see hooks: calls that lens looks into run eagerly, at "
            "the speed and with the last bits of the model before compiling; other calls stay compiled (said once for "
            "each model)",
            CompileWarning,
            stacklevel=frames_to_the_user(),
        )
