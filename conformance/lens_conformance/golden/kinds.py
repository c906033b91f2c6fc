"""What each decoder type of the Llama family computes, said in the terms of the golden forward.

Read off the models' papers and off `modeling_<type>.py` of transformers; nothing here is lens'. `config` is HF's.
"""

from collections.abc import Callable
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


@attrs.frozen(kw_only=True)
class Kind:
    """The equations of one type; the defaults are Llama's."""

    norm: str = "rms"
    """`rms` (gain w), `rms_offset` (gain 1 + w) or `layer` (centred, gain and bias)."""
    eps: str = "rms_norm_eps"
    before: bool = True
    """Whether a norm stands before attention (`ln1`) and before the MLP (`ln2`)."""
    ln2: str = "post_attention_layernorm"
    after: tuple[str, str] | None = None
    """The norms after attention (`ln1_post`) and after the MLP (`ln2_post`)."""
    qk_norm: Callable[[Any], str | None] = lambda config: None
    """`head` (one gain for every head), `each` (LayerNorm, a gain per head) or `all` (over all heads at once)."""
    fused_qkv: bool = False
    mlp: str = "gated"
    """`gated`, `fused` (gate and up in one matrix) or `plain`."""
    parallel: Callable[[Any], bool] = lambda config: False
    """Whether the MLP reads ln1 of what enters the block."""
    window: Callable[[Any, int], int | None] = no_window
    rotary: Callable[[Any, int], bool] = lambda config, layer: True
    rope: Callable[[Any, int], Any] = lambda config, layer: config.rope_parameters
    experts: Callable[[Any, int], bool] = lambda config, layer: False
    scale: Callable[[Any, int], float] = lambda config, d_head: d_head**-0.5
    attn_cap: str | None = None
    """Config field of the soft cap of the scores."""
    logit_cap: str | None = None
    embed_scale: Callable[[Any], float] = lambda config: 1.0
    scales_given_embeddings: bool = False
    """Whether embeddings that are given as input are scaled too."""
    branch_scale: Callable[[Any], float] = lambda config: 1.0
    logit_divisor: Callable[[Any], float] = lambda config: 1.0


def _is_sparse(config: Any, layer: int) -> bool:
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


GEMMA = Kind(norm="rms_offset", embed_scale=lambda c: c.hidden_size**0.5)
GEMMA2 = attrs.evolve(
    GEMMA,
    ln2="pre_feedforward_layernorm",
    after=("post_attention_layernorm", "post_feedforward_layernorm"),
    window=by_type,
    scale=lambda c, d_head: c.query_pre_attn_scalar**-0.5,
    attn_cap="attn_logit_softcapping",
    logit_cap="final_logit_softcapping",
)

KINDS = {
    "llama": Kind(),
    "mistral": Kind(window=always),
    "qwen2": Kind(window=by_type),
    "qwen3": Kind(window=by_type, qk_norm=lambda c: "head"),
    "phi3": Kind(window=always, fused_qkv=True, mlp="fused"),
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": attrs.evolve(
        GEMMA2,
        attn_cap=None,
        qk_norm=lambda c: "head",
        rope=lambda c, layer: c.rope_parameters[c.layer_types[layer]],
    ),
    "olmo2": Kind(
        before=False, after=("post_attention_layernorm", "post_feedforward_layernorm"), qk_norm=lambda c: "all"
    ),
    "granite": Kind(
        embed_scale=lambda c: c.embedding_multiplier,
        scales_given_embeddings=True,
        scale=lambda c, d_head: c.attention_multiplier,
        branch_scale=lambda c: c.residual_multiplier,
        logit_divisor=lambda c: c.logits_scaling,
    ),
    "smollm3": Kind(window=by_type, rotary=lambda c, layer: bool(c.no_rope_layers[layer])),
    "stablelm": Kind(
        norm="layer",
        eps="layer_norm_eps",
        parallel=lambda c: c.use_parallel_residual,
        qk_norm=lambda c: "each" if c.qk_layernorm else None,
    ),
    "starcoder2": Kind(norm="layer", eps="norm_epsilon", mlp="plain", window=always),
    "mixtral": Kind(window=always, experts=lambda c, layer: True),
    "qwen3_moe": Kind(window=always, qk_norm=lambda c: "head", experts=_is_sparse),
}
"""HF's `model_type` to its equations."""
