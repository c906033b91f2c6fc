"""Which model a store is of."""

import hashlib
from typing import Any

import torch

from lens_core._shards import is_cut
from lens_core._tensor_file import origin

__all__ = ["origin_of", "weights_digest"]

_LOOKED_AT = 16


def origin_of(model: Any) -> dict[str, str]:
    """Say what model, revision, passes, plugin and versions the values come from, with a digest of the weights."""
    commit = getattr(model.bare_model.config, "_commit_hash", None)
    return {
        **origin(model),
        "revision": str(commit or ""),
        "dtype": str(model.cfg.dtype),
        "weights": weights_digest(model),
    }


def weights_digest(model: Any) -> str:
    """Give a digest of some numbers of each weight: it tells models apart, and costs no pass over them.

    Weights that are offloaded are told by name and shape alone; of those that are cut over processes, this one's part.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.bare_model.state_dict().items()):
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        weight = parameter.to_local() if is_cut(parameter) else parameter
        if weight.is_meta or not weight.numel():
            continue
        flat = weight.detach().reshape(-1) if weight.is_contiguous() else weight.detach().flatten()
        step = max(flat.numel() // _LOOKED_AT, 1)
        digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
