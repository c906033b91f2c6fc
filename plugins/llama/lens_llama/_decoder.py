"""What differs between Llama and its kin: one row for each model type, and Llama is the default.

Source: `models/TYPE/modeling_TYPE.py` of transformers. Every type has q, k, v and an output projection in `self_attn`
that calls HF's attention interface, an `mlp`, `input_layernorm` unless it norms after, and rotary embeddings. Rotary
kind, base, scaling and rotated fraction, sliding windows, biases, soft caps of the scores and head counts are no
fields: HF's own code does them, and the seams show the result.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import attrs
import torch
from torch import Tensor

from lens_core.plugin import LAYER_NORM, RMS_NORM, RMS_NORM_GAIN_FIRST, RMS_NORM_OFFSET, NormKind

__all__ = ["DECODERS", "Decoder", "eps", "finish", "has_rotary", "is_parallel", "is_sparse", "qk_norm"]

Norms: TypeAlias = Literal["pre", "sandwich", "post"]


@attrs.frozen(kw_only=True)
class QkNorm:
    """Norms of queries and keys, between projection and rotation."""

    takes: Literal["heads", "heads_first", "whole"]
    """What they are given: `[batch, pos, heads, d_head]`, `[batch, heads, pos, d_head]`, or all heads flat."""
    suffix: str = "norm"
    """Of the module's name: `q_norm`, `k_norm`."""
    field: str | None = None
    """The config field that switches them on; None where they are always there."""


@attrs.frozen(kw_only=True)
class Decoder:
    """How one model type differs from Llama."""

    norm: NormKind = RMS_NORM
    norms: Norms = "pre"
    """Before each branch, before and after it, or after it only."""
    ln2: str = "post_attention_layernorm"
    qk_norm: QkNorm | None = None
    mlp: Literal["gated", "fused", "plain"] = "gated"
    """`down(act(gate) * up)`, the same with gate and up in one projection, or `c_proj(act(c_fc))`."""
    is_qkv_fused: bool = False
    attn_added: str = "self_attn"
    """The module whose output is what attention adds: a dropout in some types."""
    mlp_added: str = "mlp"
    expert_weights_dtype: str = "model"
    embedding_factor: str | None = None
    """The config field of a factor on embeddings, outside of any module."""
    branch_factor: str | None = None
    """The config field of a factor on both branches, outside of any module."""


DECODERS: Mapping[str, Decoder] = {
    "llama": Decoder(),
    "mistral": Decoder(),
    "qwen2": Decoder(),
    "qwen3": Decoder(qk_norm=QkNorm(takes="heads")),
    "phi3": Decoder(is_qkv_fused=True, mlp="fused", attn_added="resid_attn_dropout", mlp_added="resid_mlp_dropout"),
    "gemma": Decoder(norm=RMS_NORM_OFFSET),
    "gemma2": Decoder(norm=RMS_NORM_OFFSET, norms="sandwich", ln2="pre_feedforward_layernorm"),
    "gemma3_text": Decoder(
        norm=RMS_NORM_OFFSET,
        norms="sandwich",
        ln2="pre_feedforward_layernorm",
        qk_norm=QkNorm(takes="heads_first"),
    ),
    "olmo2": Decoder(norm=RMS_NORM_GAIN_FIRST, norms="post", qk_norm=QkNorm(takes="whole")),
    "granite": Decoder(embedding_factor="embedding_multiplier", branch_factor="residual_multiplier"),
    "smollm3": Decoder(),
    "stablelm": Decoder(
        norm=LAYER_NORM,
        mlp_added="dropout",
        qk_norm=QkNorm(takes="heads_first", suffix="layernorm", field="qk_layernorm"),
    ),
    "starcoder2": Decoder(norm=LAYER_NORM, mlp="plain"),
    "mixtral": Decoder(expert_weights_dtype="float32"),
    "qwen3_moe": Decoder(qk_norm=QkNorm(takes="heads")),
}


def eps(config: Any) -> float:
    """Give the norms' epsilon, under whichever name the type has it."""
    names = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon")
    return next(getattr(config, name) for name in names if hasattr(config, name))


def qk_norm(config: Any) -> QkNorm | None:
    """Give the norms of queries and keys, where the config has them."""
    norm = DECODERS[config.model_type].qk_norm
    return norm if norm is None or norm.field is None or getattr(config, norm.field) else None


def is_parallel(config: Any) -> bool:
    """Whether attention and MLP read the same normed stream (StableLM, where its config says so)."""
    return getattr(config, "use_parallel_residual", False)


def is_sparse(config: Any, layer: int) -> bool:
    """Whether a layer's MLP is a mixture of experts (`Qwen3MoeDecoderLayer`; every layer of Mixtral)."""
    if config.model_type == "mixtral":
        return True
    if config.model_type != "qwen3_moe" or layer in config.mlp_only_layers or config.num_experts == 0:
        return False
    return (layer + 1) % config.decoder_sparse_step == 0


def has_rotary(config: Any, layer: int) -> bool:
    """Whether a layer's queries and keys are rotated (SmolLM3 leaves some out)."""
    chosen = getattr(config, "no_rope_layers", None)
    return chosen is None or bool(chosen[layer])


def finish(config: Any) -> Callable[[Tensor], Tensor] | None:
    """Give what makes logits of the unembedding's output; None where nothing does.

    Source: `Gemma2ForCausalLM.forward` (soft cap), `GraniteForCausalLM.forward` (divisor).
    """
    cap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None)
    if cap is not None:
        return lambda logits: torch.tanh(logits / cap) * cap
    return None if divisor is None else lambda logits: logits / divisor
