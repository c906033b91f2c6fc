"""Numbers of a tensor as Python's own, with a type that torch's stubs do not give."""

from typing import Any

__all__ = ["listed"]


def listed(values: Any) -> list[Any]:
    """Give a tensor's numbers as (nested) lists.

    Example:
        >>> import torch
        >>> listed(torch.eye(2))
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return values.tolist()
