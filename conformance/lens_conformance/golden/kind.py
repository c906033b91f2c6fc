"""What a decoder type of the Llama family may compute, in the terms of the golden forward; `golden.kinds` is the table.

`config` is HF's throughout. What the weights themselves tell (biases, shared experts, fused gate and up) has no field.
"""

from collections.abc import Callable, Mapping
from typing import Any

import attrs


def always(config: Any, layer: int) -> int | None:
    """Give one window for all layers."""
    return config.sliding_window


def by_type(config: Any, layer: int) -> int | None:
    """Give the window of the layers that `layer_types` calls sliding."""
    return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None


def no_window(config: Any, layer: int) -> int | None:
    """Let every layer see all of the past."""
    return None


def rope_by_type(config: Any, layer: int) -> Any:
    """Give the rotary parameters of the layer's type."""
    return config.rope_parameters[config.layer_types[layer]]


def every(config: Any, layer: int) -> bool:
    """Choose all layers."""
    return True


def head(config: Any) -> str:
    """Norm queries and keys head by head, one gain for all heads (or, by its shape, one for each)."""
    return "head"


@attrs.frozen(kw_only=True)
class Kind:
    """The equations of one type; the defaults are Llama's."""

    renamed: Mapping[str, str] = attrs.field(factory=dict)
    """Paths of the type's own to the golden forward's name for the same weights; the first that fits counts."""
    norm: str = "rms"
    """`rms` (gain w), `rms_offset` (gain 1 + w), `layer` (centred, gain and bias) or `layer_offset`."""
    eps: str | float = "rms_norm_eps"
    """Config field, or the number itself."""
    before: bool = True
    """Whether a norm stands before attention (`ln1`) and before the MLP (`ln2`)."""
    ln2: str = "post_attention_layernorm"
    after: Callable[[Any], tuple[str, str] | None] = lambda config: None
    """The norms after attention (`ln1_post`) and after the MLP (`ln2_post`)."""
    qk_norm: Callable[[Any], str | None] = lambda config: None
    """`head` (one gain for every head, or `[head, d_head]`), `each` (a module per head) or `all` (over all heads)."""
    late_qk_norm: bool = False
    """Whether queries and keys are normed after they are rotated."""
    qkv: str = "separate"
    """`separate`, `blocks` (one matrix q, k, v) or `per_head` (one matrix, q, k, v of each head)."""
    mlp: str = "gated"
    """`gated`, `fused` (gate and up in one matrix) or `plain`."""
    parallel: Callable[[Any], bool] = lambda config: False
    """Whether the MLP reads ln1 of what enters the block."""
    window: Callable[[Any, int], int | None] = no_window
    rotary: Callable[[Any, int], bool] = every
    rope: Callable[[Any, int], Any] = lambda config, layer: config.rope_parameters
    interleaved: bool = False
    """Whether a rotated pair is two neighbours."""
    scales_queries: bool = False
    """Whether rotated queries are multiplied by a factor of their position."""
    scale: Callable[[Any, int], float] = lambda config, d_head: d_head**-0.5
    sinks: bool = False
    """Whether each head has one more score, of no key, in its softmax."""
    attn_cap: str | None = None
    """Config field of the soft cap of the scores."""
    logit_cap: str | None = None
    embed_scale: Callable[[Any], float] = lambda config: 1.0
    scales_given_embeddings: bool = False
    """Whether embeddings that are given as input are scaled too."""
    branch_scale: Callable[[Any], float] = lambda config: 1.0
    logit_scale: Callable[[Any], float] = lambda config: 1.0
    experts: Callable[[Any, int], bool] = lambda config, layer: False
    """Whether the layer has experts in place of an MLP."""
    routing: str = "softmax"
    """A rule of `golden.routing`."""
    clamped: bool = False
    """Whether experts are `(up + 1) * gate * sigmoid(alpha * gate)` of clamped, interleaved, biased gate and up."""
    splits_mlp: Callable[[Any], bool] = lambda config: False
    """Whether no module returns the sum of experts and shared MLP, so that `mlp.hook_out` is not a name."""
