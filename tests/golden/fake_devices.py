"""Devices that do not exist, on a machine that has none: CPU tensors with a label, which no function may mix.

`FakeDevices()` lets `xla:0`, `xla:1`, ... stand for devices inside its block: tensors moved or made there are ordinary
CPU tensors of the class `Placed`, whose `device` says so. A function that is given tensors of two devices raises, with
the exceptions that torch makes: copies, tensors without axes, and indices on the CPU.
"""

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

CPU = torch.device("cpu")
KIND = "xla"  # any kind that torch knows and does not try to start


class MixedDevicesError(RuntimeError):
    """A function was given tensors of two devices."""


class Placed(Tensor):
    """A CPU tensor that says it is elsewhere."""

    label: torch.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function on the CPU, and give its results the device of what it was given."""
        with torch._C.DisableTorchFunctionSubclass():
            return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    if func == Tensor.device.__get__:
        return where(args[0])
    if func is Tensor.register_hook:
        device = where(args[0])
        return args[0].register_hook(lambda gradient: args[1](place(gradient, device)))
    if func is torch.autograd.grad:
        inputs = kwargs.get("inputs", args[1] if len(args) > 1 else ())
        inputs = [inputs] if isinstance(inputs, Tensor) else inputs
        return tuple(place(one, where(at)) for one, at in zip(func(*args, **kwargs), inputs, strict=True))
    asked, args, kwargs = _asked(func, args, kwargs)
    own = _common(func, args, kwargs)
    result = func(*args, **kwargs)
    target = own if asked is None else asked
    given = {id(one) for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)}
    return tree_map(lambda one: one if id(one) in given and asked is None else place(one, target), result)


class FakeDevices(TorchFunctionMode):
    """Let tensors be made on and moved to `xla:N` inside the block."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See factories and moves of plain tensors; the rest is `Placed`'s."""
        return (
            Placed.__torch_function__(func, types, args, kwargs)
            if _names_device(args, kwargs)
            else func(*args, **(kwargs or {}))
        )


def where(tensor: Tensor) -> torch.device:
    """Give the device that a tensor says it is on."""
    return getattr(tensor, "label", CPU)


def place(tensor: Any, device: torch.device) -> Any:
    """Put a label on a tensor; anything else is given back."""
    if not isinstance(tensor, Tensor):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        if device.type != KIND:
            return tensor.as_subclass(Tensor) if isinstance(tensor, Placed) else tensor
        new = tensor.as_subclass(Placed)
    new.label = device
    return new


def spread(model: nn.Module, device_map: dict[str, int]) -> nn.Module:
    """Put the parts of a model on devices as accelerate's `dispatch_model` does: parameters moved, hooks for inputs."""
    for path, number in device_map.items():
        device = torch.device(KIND, number)
        for module in model.get_submodule(path).modules():
            for group in (module._parameters, module._buffers):
                group.update({name: _moved(one, device) for name, one in group.items() if one is not None})
        add_hook_to_module(model.get_submodule(path), _Align(execution_device=device))
    add_hook_to_module(model, _Align(execution_device=torch.device(KIND, 0), io_same_device=True), append=True)
    return model


class _Align(AlignDevicesHook):
    """Accelerate's hook that moves inputs, for a module whose parameters are in their place."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    moved = place(tensor.detach(), device)
    return nn.Parameter(moved, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def _names_device(args: Any, kwargs: Any) -> bool:
    return any(
        isinstance(one, torch.device | str) and str(one).startswith(KIND)
        for one in (*args, (kwargs or {}).get("device"))
    )


def _asked(func: Any, args: Any, kwargs: Any) -> tuple[torch.device | None, Any, Any]:
    """Find the device that a call asks for, and have it run on the CPU."""
    kwargs = dict(kwargs)
    asked = kwargs.pop("device", None)
    if func is Tensor.cpu:
        return CPU, args, kwargs
    if func is Tensor.to:
        others = [one for one in args[1:] if isinstance(one, Tensor)]
        named = [one for one in args[1:] if isinstance(one, torch.device | str)]
        asked = named[0] if named else where(others[0]) if others else asked
        args = (args[0], *(one for one in args[1:] if not isinstance(one, torch.device | str)))
        args = tuple(place(one, CPU) if index and isinstance(one, Tensor) else one for index, one in enumerate(args))
        if asked is not None and len(args) == 1 and not kwargs:
            kwargs = {"dtype": args[0].dtype}
    elif asked is not None and torch.device(asked).type != KIND:
        kwargs["device"] = asked
    return None if asked is None else torch.device(asked), args, kwargs


MAY_MIX = (Tensor.copy_, Tensor.to, Tensor.type_as)
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


def _common(func: Any, args: Any, kwargs: Any) -> torch.device:
    """Give the one device of all tensors that a function is given."""
    if func in MAY_MIX:
        return where(args[0])
    tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
    devices = {where(one) for one in tensors if one.ndim} or {where(one) for one in tensors}
    others = devices - {CPU} if func in INDEXING and where(args[0]) != CPU else devices
    if len(others) > 1:
        raise MixedDevicesError(f"{getattr(func, '__name__', func)} was given tensors on {sorted(map(str, others))}")
    return next(iter(others), CPU)
