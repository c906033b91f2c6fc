"""What a config says about rotary embeddings."""

from typing import Any

__all__ = ["rotary_reach"]


def rotary_reach(config: Any) -> int:
    """Give the most positions that rotary embeddings reach: stretched ones go beyond what the config says.

    `linear` and `dynamic` ones reach a multiple of it. Kinds that keep the length before stretching reach a multiple of
    that one, which the config may also have as its own.

    Example:
        >>> from transformers import LlamaConfig
        >>> stretched = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
        >>> rotary_reach(LlamaConfig(max_position_embeddings=32, rope_parameters=stretched))
        64
    """
    rope: Any = config.rope_parameters or {}
    factor = rope.get("factor") or 1.0
    if rope.get("rope_type") in ("linear", "dynamic"):
        return int(config.max_position_embeddings * factor)
    stretched = rope.get("original_max_position_embeddings", 0) * factor
    return max(config.max_position_embeddings, int(stretched))
