"""Everything about an HF model, its class, its module and torch that a run must leave as it was."""

import inspect
import zlib
from typing import Any

import torch
from torch import nn
from transformers import cache_utils, masking_utils, modeling_utils
from transformers.integrations import moe, sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SHARED = (cache_utils, masking_utils, modeling_utils, moe, sdpa_attention, torch.nn.functional)
"""Modules that every model of transformers goes through."""

HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Describe a model so that two descriptions are equal only if nothing was left behind between them."""
    found: dict[str, Any] = {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "config": repr(model.config.to_dict()),
        "attn_implementation": model.config._attn_implementation,
        "attention_functions": {key: id(value) for key, value in ALL_ATTENTION_FUNCTIONS.items()},
        "global_hooks": [
            len(getattr(nn.modules.module, name))
            for name in dir(nn.modules.module)
            if "global_" in name and isinstance(getattr(nn.modules.module, name), dict)
        ],
    }
    for scope in SHARED:
        found[f"globals of {scope.__name__}"] = {key: id(value) for key, value in vars(scope).items()}
    for cls in (value for value in vars(cache_utils).values() if inspect.isclass(value)):
        found[f"{cls.__module__}.{cls.__qualname__}"] = {key: id(value) for key, value in vars(cls).items()}
    for path, module in model.named_modules():
        for name in HOOK_DICTS:
            found[f"{path}:{name}"] = [id(value) for value in getattr(module, name).values()]
        found[f"{path}:class"] = id(type(module))
        found[f"{path}:training"] = module.training
        found[f"{path}:dict"] = {key: id(value) for key, value in module.__dict__.items()}
        for cls in type(module).__mro__[:-1]:
            found[f"{cls.__module__}.{cls.__qualname__}"] = {key: id(value) for key, value in vars(cls).items()}
        scope = inspect.getmodule(inspect.unwrap(type(module).forward))
        found[f"globals of {scope.__name__}"] = {key: id(value) for key, value in vars(scope).items()}
    for path, parameter in model.named_parameters():
        found[f"{path}:data"] = (id(parameter), parameter.data_ptr(), parameter.dtype, parameter.requires_grad)
        found[f"{path}:bits"] = _checksum(parameter)
        found[f"{path}:tensor_hooks"] = len(parameter._backward_hooks or {})
    for path, buffer in model.named_buffers():
        found[f"{path}:buffer"] = (id(buffer), buffer.dtype, _checksum(buffer))
    return found


def _checksum(tensor: torch.Tensor) -> int:
    """Sum up the bits of a tensor, where it is, without a copy of it."""
    if tensor.is_meta:
        return 0
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name what differs between two fingerprints."""
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
