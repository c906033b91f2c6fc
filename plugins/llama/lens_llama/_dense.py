"""Llama's kin with dense MLPs: a row for each model type says how it differs from Llama.

Source: `models/TYPE/modeling_TYPE.py` of transformers.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from lens_core.plugin import (
    LAYER_NORM,
    RMS_NORM_GAIN_FIRST,
    RMS_NORM_OFFSET,
    Attn,
    Decoder,
    HookPoint,
    Mlp,
    QkNorm,
    point,
)
from lens_llama._norms import LAYER_NORM_OFFSET, LAYER_NORM_PLAIN, LAYER_NORM_UNBIASED
from lens_llama._twice import Turn

__all__ = ["DENSE", "granite", "sliding_layers"]

GEMMA = partial(Decoder, norm=RMS_NORM_OFFSET)
SANDWICH: dict[str, Any] = {
    "ln1_post": "post_attention_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "ln2_post": "post_feedforward_layernorm",
}
POST: dict[str, Any] = {
    "ln1": None,
    "ln1_post": "post_attention_layernorm",
    "ln2": None,
    "ln2_post": "post_feedforward_layernorm",
}
BY_HEAD = QkNorm(takes="heads")
HEADS_FIRST = QkNorm(takes="heads_first")
WHOLE = QkNorm(takes="whole")
AFTER_ROTARY = QkNorm(takes="heads_first", q="query_layernorm", k="key_layernorm", is_after_rotary=True)
LAYERNORMS = QkNorm(takes="heads_first", q="q_layernorm", k="k_layernorm")
PLAIN = Mlp(kind="plain")
FUSED = Mlp(kind="fused", up="gate_up_proj")


def sliding_layers(config: Any) -> tuple[int, ...]:
    """List the blocks that attend within a window."""
    return tuple(layer for layer, kind in enumerate(config.layer_types) if kind == "sliding_attention")


def granite(config: Any, **fields: Any) -> Decoder:
    """Give what Granite's types share: factors on embeddings and branches, a divisor of the logits."""
    scaled = {"embed_scale": config.embedding_multiplier, "embed_at": "block"}
    return Decoder(**scaled, branch_scale=config.residual_multiplier, logit_divisor=config.logits_scaling, **fields)


def _gemma3(config: Any, **fields: Any) -> Decoder:
    cap = config.final_logit_softcapping
    return GEMMA(**SANDWICH, logit_cap=cap, attn=Attn(qk_norm=HEADS_FIRST), **fields)


def _smollm3(config: Any) -> Decoder:
    return Decoder(attn=Attn(rotary=tuple(layer for layer, has in enumerate(config.no_rope_layers) if has)))


def _stablelm(config: Any) -> Decoder:
    return Decoder(
        norm=LAYER_NORM,
        ln2=None if config.use_parallel_residual else "post_attention_layernorm",
        is_parallel=config.use_parallel_residual,
        attn=Attn(qk_norm=LAYERNORMS if config.qk_layernorm else None),
        mlp=Mlp(added="dropout"),
    )


def _starcoder2(config: Any) -> Decoder:
    mlp = Mlp(kind="plain", up="c_fc", down="c_proj")
    return Decoder(norm=LAYER_NORM, mlp=mlp, embed_at="block" if config.embedding_dropout else "module")


def _phi3(config: Any) -> Decoder:
    return Decoder(
        attn=Attn(layout="blocks", added="resid_attn_dropout"),
        mlp=Mlp(kind="fused", up="gate_up_proj", added="resid_mlp_dropout"),
    )


def _hyperclovax(config: Any) -> Decoder:
    return Decoder(
        ln1_post="post_norm1" if config.use_post_norm else None,
        ln2_post="post_norm2" if config.use_post_norm else None,
        embed_scale=config.embedding_multiplier,
        embed_at="block",
        branch_scale=config.residual_multiplier,
        logit_scale=config.logits_scaling,
    )


def _exaone4(config: Any) -> Decoder:
    rotary = None if config.sliding_window is None else sliding_layers(config)
    return Decoder(**POST, attn=Attn(qk_norm=HEADS_FIRST, rotary=rotary))


def _phi(config: Any) -> Decoder:
    """One dropout ends both branches."""

    def own(layer: int) -> Iterator[HookPoint]:
        dropout, here = f"model.layers.{layer}.resid_dropout", partial(point, layer=layer)
        yield here("hook_attn_out", Turn(path=dropout, turn=1, of=2))
        yield here("hook_mlp_out", Turn(path=dropout, turn=2, of=2))

    return Decoder(
        final_norm="final_layernorm",
        norm=LAYER_NORM,
        ln2=None,
        is_parallel=True,
        attn=Attn(out="dense", qk_norm=LAYERNORMS if config.qk_layernorm else None),
        mlp=Mlp(kind="plain", up="fc1", down="fc2"),
        own=own,
        embed_at="block" if config.embd_pdrop else "module",
    )


def _persimmon(config: Any) -> Decoder:
    norms = QkNorm(takes="heads", q="q_layernorm", k="k_layernorm")
    return Decoder(
        final_norm="final_layernorm",
        norm=LAYER_NORM,
        attn=Attn(
            layout="per_head", fused="query_key_value", out="dense", qk_norm=norms if config.qk_layernorm else None
        ),
        mlp=Mlp(kind="plain", up="dense_h_to_4h", down="dense_4h_to_h", added="dropout"),
    )


def _cohere(config: Any, **attn: Any) -> Decoder:
    return Decoder(
        norm=LAYER_NORM_UNBIASED, ln2=None, is_parallel=True, logit_scale=config.logit_scale, attn=Attn(**attn)
    )


DENSE: Mapping[str, Callable[[Any], Decoder]] = {
    "llama": lambda config: Decoder(),
    "mistral": lambda config: Decoder(),
    "ministral": lambda config: Decoder(),
    "ministral3": lambda config: Decoder(),
    "internlm3": lambda config: Decoder(),
    "iquestcoder": lambda config: Decoder(),
    "cwm": lambda config: Decoder(),
    "ernie4_5": lambda config: Decoder(),
    "seed_oss": lambda config: Decoder(),
    "qwen2": lambda config: Decoder(),
    "qwen3": lambda config: Decoder(attn=Attn(qk_norm=BY_HEAD)),
    "smollm3": _smollm3,
    "helium": lambda config: Decoder(norm=RMS_NORM_GAIN_FIRST),
    "hunyuan_v1_dense": lambda config: Decoder(attn=Attn(qk_norm=AFTER_ROTARY)),
    "apertus": lambda config: Decoder(
        ln1="attention_layernorm", ln2="feedforward_layernorm", attn=Attn(qk_norm=HEADS_FIRST), mlp=PLAIN
    ),
    "gemma": lambda config: GEMMA(),
    "gemma2": lambda config: GEMMA(**SANDWICH, logit_cap=config.final_logit_softcapping),
    "gemma3_text": _gemma3,
    "gemma3": partial(
        _gemma3,
        layers="language_model.layers",
        embed="language_model.embed_tokens",
        final_norm="language_model.norm",
    ),
    "vaultgemma": lambda config: GEMMA(ln2="pre_feedforward_layernorm", logit_cap=config.final_logit_softcapping),
    "glm": lambda config: Decoder(mlp=FUSED),
    "glm4": lambda config: Decoder(ln1_post="post_self_attn_layernorm", ln2_post="post_mlp_layernorm", mlp=FUSED),
    "exaone4": _exaone4,
    "olmo": lambda config: Decoder(norm=LAYER_NORM_PLAIN),
    "olmo2": lambda config: Decoder(norm=RMS_NORM_GAIN_FIRST, **POST, attn=Attn(qk_norm=WHOLE)),
    "olmo3": lambda config: Decoder(norm=RMS_NORM_GAIN_FIRST, **POST, attn=Attn(qk_norm=WHOLE)),
    "phi": _phi,
    "phi3": _phi3,
    "persimmon": _persimmon,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
    "nemotron": lambda config: Decoder(norm=LAYER_NORM_OFFSET, mlp=PLAIN),
    "arcee": lambda config: Decoder(mlp=PLAIN),
    "jais2": lambda config: Decoder(norm=LAYER_NORM, mlp=PLAIN),
    "cohere": lambda config: _cohere(config, qk_norm=BY_HEAD if config.use_qk_norm else None),
    "cohere2": lambda config: _cohere(config, rotary=sliding_layers(config)),
    "granite": granite,
    "hyperclovax": _hyperclovax,
}
