"""Llama's kin with mixtures of experts: a row for each model type says how it differs from Llama.

Source: `models/TYPE/modeling_TYPE.py` of transformers. Experts that every position visits are inside the MLP's module,
but for Granite's.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lens_core.errors import InputError, UnsupportedConfigError
from lens_core.plugin import LAYER_NORM, RMS_NORM_GAIN_FIRST, Attn, CallInput, Decoder, Mlp, Moe
from lens_llama._dense import AFTER_ROTARY, BY_HEAD, HEADS_FIRST, POST, WHOLE, granite, sliding_layers

__all__ = ["SPARSE"]


def _moe(config: Any, *, n_experts: str = "num_experts", per_token: str = "num_experts_per_tok", **fields: Any) -> Moe:
    return Moe(n_experts=getattr(config, n_experts), per_token=getattr(config, per_token), **fields)


def _shared(name: str, *gate: str) -> dict[str, Any]:
    """Say that the mixture's module holds an MLP that every position visits, and perhaps a gate of what it gives."""
    return {
        "reads": ("experts.gate_up_proj", f"{name}.gate_proj", f"{name}.up_proj", *gate),
        "writes": ("experts.down_proj", f"{name}.down_proj"),
    }


SHARED = _shared("shared_experts")


def _wide(config: Any, **fields: Any) -> Moe:
    """Give a mixture that routes in float32."""
    return _moe(config, weights_dtype="float32", logits_dtype="float32", **fields)


def _stepped(config: Any, shared: Mapping[str, Any] = {}, **attn: Any) -> Decoder:
    """Give Qwen's: every `decoder_sparse_step`-th block, but for some."""
    step, dense = config.decoder_sparse_step, config.mlp_only_layers
    layers = tuple(
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in dense and config.num_experts > 0 and (layer + 1) % step == 0
    )
    return Decoder(attn=Attn(**attn), moe=_moe(config, layers=layers, **shared) if layers else None)


def _after_dense(config: Any, **attn: Any) -> Decoder:
    """Give DeepSeek's, with common attention: dense blocks first."""
    layers = tuple(range(config.first_k_dense_replace, config.num_hidden_layers))
    return Decoder(attn=Attn(**attn), moe=_wide(config, n_experts="n_routed_experts", layers=layers, **SHARED))


def _by_layer(config: Any, moe: Callable[..., Moe] = _wide, **attn: Any) -> Decoder:
    layers = tuple(layer for layer, kind in enumerate(config.mlp_layer_types) if kind == "sparse")
    return Decoder(attn=Attn(**attn), moe=moe(config, layers=layers))


def _exaone_moe(config: Any) -> Decoder:
    rotary = None if config.sliding_window is None else sliding_layers(config)
    return _by_layer(config, partial(_wide, **SHARED), qk_norm=HEADS_FIRST, rotary=rotary)


def _ernie4_5_moe(config: Any) -> Decoder:
    layers = tuple(
        layer
        for layer in range(config.moe_layer_start_index, config.num_hidden_layers)
        if (layer + 1) % config.moe_layer_interval == 0 and layer <= config.moe_layer_end_index
    )
    names = {"n_experts": "moe_num_experts", "per_token": "moe_k"}
    shared = SHARED if config.moe_num_shared_experts > 0 else {}
    return Decoder(moe=_moe(config, layers=layers, logits_dtype="float32", **names, **shared))


def _granite_moe(config: Any, beside: str | None = None) -> Decoder:
    moe = _moe(
        config,
        n_experts="num_local_experts",
        path="block_sparse_moe",
        router="router",
        beside=beside,
        logits_dtype="float32",
    )
    shared = Mlp(kind="fused", path="shared_mlp", up="input_linear", down="output_linear")
    return granite(config, moe=moe, mlp=Mlp() if beside is None else shared)


def _hunyuan_v1_moe(config: Any) -> Decoder:
    sizes = {}
    for name in ("num_experts", "moe_topk"):
        given = getattr(config, name)
        each = {given} if isinstance(given, int) else set(given)
        if len(each) > 1:
            raise UnsupportedConfigError(f"{name}={given}: lens serves one number for all blocks")
        sizes[name] = each.pop()
    moe = Moe(n_experts=sizes["num_experts"], per_token=sizes["moe_topk"], router_linear="wg", **_shared("shared_mlp"))
    return Decoder(attn=Attn(qk_norm=AFTER_ROTARY), moe=moe)


def _gpt_oss(config: Any) -> Decoder:
    given: Any = getattr(config, "quantization_config", None) or {}
    quantised = given if isinstance(given, dict) else given.to_dict()
    if quantised.get("quant_method") == "mxfp4" and not quantised.get("dequantize") and torch.cuda.is_available():
        raise UnsupportedConfigError(
            "with weights in MXFP4, HF runs an MLP that calls neither router nor experts; load them dequantised: "
            "lens.load(..., quantization_config=transformers.Mxfp4Config(dequantize=True))"
        )
    return Decoder(
        norm=RMS_NORM_GAIN_FIRST,
        attn=Attn(has_sinks=True),
        moe=LOCAL(config, router="router", expert_layout="interleaved"),
    )


def _jittered(config: Any, field: str, **fields: Any) -> Decoder:
    """Give a decoder whose experts' input HF multiplies with noise in training, in place: there it refuses."""

    def read_call(call: CallInput) -> Tensor | None:
        if call.training and getattr(config, field):
            raise InputError(
                f"{field}={getattr(config, field)}: in training HF writes noise into what hook points hold; call "
                "model.eval(), or set it to 0"
            )
        return call.mask

    return Decoder(read_call=read_call, **fields)


LOCAL = partial(_moe, n_experts="num_local_experts")

SPARSE: Mapping[str, Callable[[Any], Decoder]] = {
    "mixtral": lambda config: _jittered(config, "router_jitter_noise", moe=LOCAL(config, weights_dtype="float32")),
    "qwen2_moe": lambda config: _stepped(config, _shared("shared_expert", "shared_expert_gate")),
    "qwen3_moe": lambda config: _stepped(config, qk_norm=BY_HEAD),
    "olmoe": lambda config: Decoder(attn=Attn(qk_norm=WHOLE), moe=_moe(config)),
    "flex_olmo": lambda config: Decoder(norm=RMS_NORM_GAIN_FIRST, **POST, attn=Attn(qk_norm=WHOLE), moe=_moe(config)),
    "granitemoe": _granite_moe,
    "granitemoeshared": lambda config: _granite_moe(config, "shared_mlp" if config.shared_intermediate_size else None),
    "gpt_oss": _gpt_oss,
    "glm4_moe": lambda config: _after_dense(config, qk_norm=BY_HEAD if config.use_qk_norm else None),
    "dots1": lambda config: _after_dense(config, qk_norm=BY_HEAD),
    "solar_open": lambda config: Decoder(moe=_wide(config, n_experts="n_routed_experts", **SHARED)),
    "exaone_moe": _exaone_moe,
    "ernie4_5_moe": _ernie4_5_moe,
    "hunyuan_v1_moe": _hunyuan_v1_moe,
    "minimax_m2": lambda config: _jittered(
        config, "router_jitter_noise", attn=Attn(qk_norm=WHOLE), moe=LOCAL(config, weights_dtype="float32")
    ),
    "phimoe": lambda config: _jittered(
        config, "input_jitter_noise", norm=LAYER_NORM, moe=LOCAL(config, router="router", router_linear="")
    ),
    "hy_v3": lambda config: _by_layer(config, partial(_wide, **SHARED), qk_norm=HEADS_FIRST),
    "mellum": lambda config: _by_layer(config, _moe, qk_norm=BY_HEAD),
}
