"""The mixers of the hybrids: lens-mamba's and lens-mamba2's, at their paths and sizes, and the calls they refuse."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Literal

from lens_mamba import mixer as mamba
from lens_mamba2 import mixer as mamba2
from torch import Tensor

from lens_core.errors import InputError
from lens_core.plugin import RMS_NORM, CallInput, Mixer, MixerKernel

__all__ = ["Sizes", "dual", "selective"]

BLOCK = "model.layers.{layer}"
Sizes = Mapping[str, int]


def selective(config: Any, path: str, layers: Collection[int]) -> dict[str, Any]:
    """Give the fields of a `Decoder` that Mamba mixers with normed dt, B and C fill in.

    Args:
        config: HF's, with its fields `mamba_*`.
        path: The mixer, below the block.
        layers: The blocks that have one; the others have attention.
    """
    own = {
        "d_inner": config.mamba_expand * config.hidden_size,
        "d_state": config.mamba_d_state,
        "dt_rank": config.mamba_dt_rank,
    }

    def read_call(call: CallInput) -> Tensor | None:
        _check_attention(call, is_there=len(layers) < config.num_hidden_layers)
        mamba.check_call(call, has_bias=config.mamba_proj_bias)
        return call.mask

    return {
        "mixer": Mixer(
            path=path,
            kind="mamba",
            points=partial(mamba.mixer_points, path=f"{BLOCK}.{path}", norm=RMS_NORM, **own),
            weights=tuple(mamba.mixer_weights(f"{BLOCK}.{path}", layers=tuple(layers), has_norms=True)),
        ),
        "sizes": {**own, "d_conv": config.mamba_d_conv},
        "read_call": read_call if layers else None,
    }


def dual(
    config: Any,
    path: str,
    layers: Collection[int],
    *,
    sizes: Sizes | None = None,
    has_bias: bool,
    limit: tuple[float, float],
    has_attention: bool = True,
    norm: Literal["after", "before", "none"] = "after",
    kernel: MixerKernel = mamba2.KERNEL,
) -> dict[str, Any]:
    """Give the fields of a `Decoder` that Mamba-2 mixers fill in.

    Args:
        config: HF's.
        path: The mixer, below the block.
        layers: The blocks that have one.
        sizes: `ssm_heads`, `head_dim`, `n_groups`, `d_state`, `d_conv` and `chunk_size`; None for the fields `mamba_*`.
        has_bias: Whether in_proj has a bias.
        limit: Of the step size.
        has_attention: Whether any block has attention, or HF needs none to go on from a cache.
        norm: Whether a norm of groups comes after the gate, before it, or not at all.
        kernel: What serves the places.
    """
    sizes = sizes or {
        "ssm_heads": config.mamba_n_heads,
        "head_dim": config.mamba_d_head,
        "n_groups": config.mamba_n_groups,
        "d_state": config.mamba_d_state,
        "d_conv": config.mamba_d_conv,
        "chunk_size": config.mamba_chunk_size,
    }
    shape = {name: sizes[name] for name in ("head_dim", "n_groups", "d_state")}
    whole, layers = f"{BLOCK}.{path}", tuple(layers)

    def read_call(call: CallInput) -> Tensor | None:
        _check_attention(call, is_there=has_attention)
        mamba2.check_call(call, has_bias=has_bias, limit=limit)
        return call.mask

    return {
        "mixer": Mixer(
            path=path,
            kind="mamba2",
            points=partial(
                mamba2.mixer_points,
                path=whole,
                n_heads=sizes["ssm_heads"],
                heads="ssm_heads",
                norm=norm,
                kernel=kernel,
                **shape,
            ),
            aliases={} if norm == "none" else mamba2.ALIASES,
            weights=tuple(mamba2.mixer_weights(whole, layers=layers, has_norm=norm != "none")),
            inner=None if norm == "none" else RMS_NORM,
        ),
        "sizes": {**sizes, "d_inner": sizes["ssm_heads"] * sizes["head_dim"]},
        "read_call": read_call if layers else None,
    }


def _check_attention(call: CallInput, *, is_there: bool) -> None:
    if not is_there and (call.continues or call.past):
        raise InputError(
            "HF counts the positions in a cache by its attention layers, and this model has none; run without a cache "
            "(use_cache=False, use_past_kv_cache=False)"
        )
