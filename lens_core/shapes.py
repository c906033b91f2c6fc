"""The one vocabulary of tensor axes, used verbatim in annotations, hook tables and docs."""

from collections.abc import Mapping
from math import prod

__all__ = ["AXES", "axis_index", "element_count"]

AXES: Mapping[str, str] = {
    "batch": "rows of the batch",
    "pos": "positions of this call",
    "query": "positions that attend (this call's)",
    "key": "positions attended to (all real positions so far)",
    "layer": "0-based block index",
    "d_model": "width of the residual stream",
    "n_heads": "query heads",
    "n_kv_heads": "key and value heads",
    "d_head": "width of one head",
    "d_mlp": "width of the MLP's hidden layer",
    "d_vocab": "vocabulary",
    "d_inner": "channels of an SSM mixer",
    "d_state": "states of an SSM channel",
    "n_groups": "groups of an SSM mixer that share B and C",
    "dt_rank": "width of the projection that step sizes come from",
    "ssm_heads": "heads of an SSM mixer beside attention, which has `n_heads`",
    "head_dim": "width of one SSM head",
    "n_experts": "experts of a mixture",
    "k": "experts chosen for a token",
    "d_in": "width of what a sparse autoencoder reads",
    "d_out": "width of what it gives",
    "d_sae": "its features",
}
"""Axis name to meaning."""


def axis_index(shape: str, *, name: str = "pos") -> int | None:
    """Find an axis in a shape such as `"batch pos d_model"`; None where it is absent.

    Example:
        >>> axis_index("batch n_heads query key", name="query")
        2
    """
    axes = shape.split()
    return axes.index(name) if name in axes else None


def element_count(shape: str, sizes: Mapping[str, int]) -> int:
    """Multiply the sizes of a shape's axes; digits in a shape stand for themselves.

    Example:
        >>> element_count("batch pos 1", {"batch": 2, "pos": 3})
        6
    """
    return prod(int(axis) if axis.isdigit() else sizes[axis] for axis in shape.split())
