"""TransformerLens' setters: functions that write one piece of a clean activation into a corrupted one, by an index."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core._extras import need
from lens_core.errors import ArgumentError

__all__ = [
    "SETTER_AXES",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "make_df_from_ranges",
]

Activation = Float[Tensor, "batch ..."]


def _indices(index: Sequence[int], count: int, names: str) -> list[int]:
    listed = [int(number) for number in index]
    if len(listed) != count:
        raise ArgumentError(f"this setter's index is [{names}]; got {list(index)!r}")
    return listed


@checks_arguments
def layer_pos_patch_setter(
    corrupted_activation: Activation, index: Sequence[int], clean_activation: Activation
) -> Activation:
    """Write the clean value at one position, `index = [layer, pos]`; for the residual stream and layers' outputs.

    Example:
        >>> import torch
        >>> int(layer_pos_patch_setter(torch.zeros(1, 2, 3), [0, 1], torch.ones(1, 2, 3)).sum())
        3
    """
    _, pos = _indices(index, 2, "layer, pos")
    corrupted_activation[:, pos, ...] = clean_activation[:, pos, ...]
    return corrupted_activation


@checks_arguments
def layer_pos_head_vector_patch_setter(
    corrupted_activation: Activation, index: Sequence[int], clean_activation: Activation
) -> Activation:
    """Write one head's clean vector at one position, `index = [layer, pos, head]`; for q, k, v, z and result.

    Example:
        >>> import torch
        >>> int(layer_pos_head_vector_patch_setter(torch.zeros(1, 2, 2, 3), [0, 1, 0], torch.ones(1, 2, 2, 3)).sum())
        3
    """
    _, pos, head = _indices(index, 3, "layer, pos, head")
    corrupted_activation[:, pos, head] = clean_activation[:, pos, head]
    return corrupted_activation


@checks_arguments
def layer_head_vector_patch_setter(
    corrupted_activation: Activation, index: Sequence[int], clean_activation: Activation
) -> Activation:
    """Write one head's clean vectors at all positions, `index = [layer, head]`; for q, k, v, z and result.

    Example:
        >>> import torch
        >>> int(layer_head_vector_patch_setter(torch.zeros(1, 2, 2, 3), [0, 1], torch.ones(1, 2, 2, 3)).sum())
        6
    """
    _, head = _indices(index, 2, "layer, head")
    corrupted_activation[:, :, head] = clean_activation[:, :, head]
    return corrupted_activation


@checks_arguments
def layer_head_pattern_patch_setter(
    corrupted_activation: Activation, index: Sequence[int], clean_activation: Activation
) -> Activation:
    """Write one head's clean attention, `index = [layer, head]`; for the pattern and the scores.

    Example:
        >>> import torch
        >>> int(layer_head_pattern_patch_setter(torch.zeros(1, 2, 3, 3), [0, 1], torch.ones(1, 2, 3, 3)).sum())
        9
    """
    _, head = _indices(index, 2, "layer, head")
    corrupted_activation[:, head, :, :] = clean_activation[:, head, :, :]
    return corrupted_activation


@checks_arguments
def layer_head_pos_pattern_patch_setter(
    corrupted_activation: Activation, index: Sequence[int], clean_activation: Activation
) -> Activation:
    """Write one head's clean attention from one position, `index = [layer, head, dest_pos]`.

    Example:
        >>> import torch
        >>> int(layer_head_pos_pattern_patch_setter(torch.zeros(1, 2, 3, 3), [0, 1, 2], torch.ones(1, 2, 3, 3)).sum())
        3
    """
    _, head, dest_pos = _indices(index, 3, "layer, head, dest_pos")
    corrupted_activation[:, head, dest_pos, :] = clean_activation[:, head, dest_pos, :]
    return corrupted_activation


@checks_arguments
def layer_head_dest_src_pos_pattern_patch_setter(
    corrupted_activation: Activation, index: Sequence[int], clean_activation: Activation
) -> Activation:
    """Write one clean weight of one head's attention, `index = [layer, head, dest_pos, src_pos]`.

    Example:
        >>> import torch
        >>> zeros, ones = torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)
        >>> int(layer_head_dest_src_pos_pattern_patch_setter(zeros, [0, 1, 2, 0], ones).sum())
        1
    """
    _, head, dest_pos, src_pos = _indices(index, 4, "layer, head, dest_pos, src_pos")
    corrupted_activation[:, head, dest_pos, src_pos] = clean_activation[:, head, dest_pos, src_pos]
    return corrupted_activation


SETTER_AXES: dict[Callable[..., Any], tuple[str, ...]] = {
    layer_pos_patch_setter: ("layer", "position"),
    layer_pos_head_vector_patch_setter: ("layer", "position", "head"),
    layer_head_vector_patch_setter: ("layer", "head"),
    layer_head_pattern_patch_setter: ("layer", "head"),
    layer_head_pos_pattern_patch_setter: ("layer", "head", "destination"),
    layer_head_dest_src_pos_pattern_patch_setter: ("layer", "head", "destination", "source"),
}
"""What each setter does, as the axes of a sweep."""


@checks_arguments
def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> Any:
    """Give a pandas DataFrame with a line for every combination of indices, the last column running fastest.

    Args:
        column_max_ranges: How many indices each column has: 0 to one less.
        column_names: What the columns are called.

    Raises:
        MissingPackageError: pandas is not installed.

    Example:
        >>> make_df_from_ranges([2, 3], ["layer", "pos"]).shape
        (6, 2)
    """
    pandas: Any = need("pandas", "a data frame of indices")
    rows = itertools.product(*(range(size) for size in column_max_ranges))
    return pandas.DataFrame(rows, columns=list(column_names))
