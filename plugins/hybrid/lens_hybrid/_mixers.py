"""The mixers of the hybrids: lens-mamba's and lens-mamba2's, at their paths and sizes, and the calls they refuse."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Literal

from lens_mamba import mixer as mamba
from lens_mamba2 import mixer as mamba2
from torch import Tensor

from lens_core.plugin import RMS_NORM, CallInput, Mixer, MixerKernel

__all__ = ["Sizes", "dual", "selective"]

Sizes = Mapping[str, int]


def selective(config: Any, path: str, layers: Collection[int], block: str = "model.layers.{layer}") -> dict[str, Any]:
    """Give the fields of a `Decoder` that Mamba mixers with normed dt, B and C fill in.

    Args:
        config: HF's, with its fields `mamba_*`.
        path: The mixer, below the block.
        layers: The blocks that have one.
        block: The block.
    """
    own = {
        "d_inner": config.mamba_expand * config.hidden_size,
        "d_state": config.mamba_d_state,
        "dt_rank": config.mamba_dt_rank,
    }

    def read_call(call: CallInput) -> Tensor | None:
        mamba.check_call(call, has_bias=config.mamba_proj_bias)
        return call.mask

    return {
        "mixer": Mixer(
            path=path,
            kind="mamba",
            points=partial(mamba.mixer_points, path=f"{block}.{path}", norm=RMS_NORM, **own),
            weights=tuple(mamba.mixer_weights(f"{block}.{path}", layers=tuple(layers), has_norms=True)),
        ),
        "sizes": {**own, "d_conv": config.mamba_d_conv},
        "read_call": read_call,
    }


def dual(
    config: Any,
    path: str,
    layers: Collection[int],
    *,
    sizes: Sizes | None = None,
    has_bias: bool,
    limit: tuple[float, float],
    norm: Literal["after", "before", "none"] = "after",
    kernel: MixerKernel = mamba2.KERNEL,
    block: str = "model.layers.{layer}",
) -> dict[str, Any]:
    """Give the fields of a `Decoder` that Mamba-2 mixers fill in.

    Args:
        config: HF's.
        path: The mixer, below the block.
        layers: The blocks that have one.
        sizes: `ssm_heads`, `head_dim`, `n_groups`, `d_state`, `d_conv` and `chunk_size`; None for the fields `mamba_*`.
        has_bias: Whether in_proj has a bias.
        limit: Of the step size.
        norm: Whether a norm of groups comes after the gate, before it, or not at all.
        kernel: What serves the places.
        block: The block.
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
    whole, layers = f"{block}.{path}", tuple(layers)

    def read_call(call: CallInput) -> Tensor | None:
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
        ),
        "sizes": {**sizes, "d_inner": sizes["ssm_heads"] * sizes["head_dim"]},
        "read_call": read_call,
    }
