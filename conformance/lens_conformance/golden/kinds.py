"""What each decoder type of the Llama family computes, said in the terms of `golden.kind`.

Read off the models' papers and off `modeling_<type>.py` of transformers; nothing here is lens'. `config` is HF's.
"""

from typing import Any

import attrs

from lens_conformance.golden.kind import Kind, always, by_type, every, head, rope_by_type

__all__ = ["KINDS", "Kind"]

AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
CORRECTION = {"mlp.e_score_correction_bias": "mlp.gate.e_score_correction_bias"}
QK = {"self_attn.q_layernorm": "self_attn.q_norm", "self_attn.k_layernorm": "self_attn.k_norm"}
LATE_QK = {"self_attn.query_layernorm": "self_attn.q_norm", "self_attn.key_layernorm": "self_attn.k_norm"}


def _is_sparse(config: Any, layer: int) -> bool:
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def _is_called_sparse(config: Any, layer: int) -> bool:
    return config.mlp_layer_types[layer] == "sparse"


def _after_the_first(config: Any, layer: int) -> bool:
    return layer >= config.first_k_dense_replace


def _in_interval(config: Any, layer: int) -> bool:
    first, last = config.moe_layer_start_index, config.moe_layer_end_index
    return first <= layer <= last and (layer + 1) % config.moe_layer_interval == 0


def _where_windowed(config: Any, layer: int) -> bool:
    return config.layer_types[layer] == "sliding_attention"


def _where_windowed_if_any(config: Any, layer: int) -> bool:
    return config.sliding_window is None or _where_windowed(config, layer)


GEMMA = Kind(norm="rms_offset", embed_scale=lambda c: c.hidden_size**0.5)
VAULTGEMMA = attrs.evolve(
    GEMMA,
    ln2="pre_feedforward_layernorm",
    window=by_type,
    scale=lambda c, d_head: c.query_pre_attn_scalar**-0.5,
    attn_cap="attn_logit_softcapping",
    logit_cap="final_logit_softcapping",
)
GEMMA2 = attrs.evolve(VAULTGEMMA, after=lambda c: AFTER)
OLMO2 = Kind(before=False, after=lambda c: AFTER, qk_norm=lambda c: "all")
GRANITE = Kind(
    embed_scale=lambda c: c.embedding_multiplier,
    scales_given_embeddings=True,
    scale=lambda c, d_head: c.attention_multiplier,
    branch_scale=lambda c: c.residual_multiplier,
    logit_scale=lambda c: 1 / c.logits_scaling,
)
GRANITEMOE = attrs.evolve(
    GRANITE,
    renamed={
        "block_sparse_moe.router": "mlp.gate",
        "block_sparse_moe": "mlp",
        "shared_mlp.input_linear": "mlp.shared_experts.gate_up_proj",
        "shared_mlp.output_linear": "mlp.shared_experts.down_proj",
    },
    experts=every,
    routing="softmax_of_chosen",
)
GLM = Kind(mlp="fused", interleaved=True)
COHERE = Kind(
    norm="layer",
    eps="layer_norm_eps",
    parallel=lambda c: True,
    qk_norm=lambda c: "head" if c.use_qk_norm else None,
    interleaved=True,
    logit_scale=lambda c: c.logit_scale,
)
HUNYUAN = Kind(renamed=LATE_QK, qk_norm=head, late_qk_norm=True)
PHI = Kind(
    renamed={
        "final_layernorm": "norm",
        "self_attn.dense": "self_attn.o_proj",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
        **QK,
    },
    norm="layer",
    eps="layer_norm_eps",
    qk_norm=lambda c: "head" if c.qk_layernorm else None,
    mlp="plain",
    parallel=lambda c: True,
)
DENSE = {
    "llama": Kind(),
    "mistral": Kind(window=always),
    "ministral": Kind(window=by_type),
    "ministral3": Kind(window=always, scales_queries=True),
    "internlm3": Kind(),
    "iquestcoder": Kind(),
    "cwm": Kind(window=by_type),
    "ernie4_5": Kind(interleaved=True),
    "seed_oss": Kind(),
    "helium": Kind(interleaved=True),
    "qwen2": Kind(window=by_type),
    "qwen3": Kind(window=by_type, qk_norm=head),
    "phi3": Kind(window=always, qkv="blocks", mlp="fused"),
    "phi": PHI,
    "persimmon": attrs.evolve(
        PHI,
        renamed={
            **PHI.renamed,
            "self_attn.query_key_value": "self_attn.qkv_proj",
            "mlp.dense_h_to_4h": "mlp.up_proj",
            "mlp.dense_4h_to_h": "mlp.down_proj",
        },
        qkv="per_head",
        parallel=lambda c: False,
    ),
    "gemma": GEMMA,
    "vaultgemma": VAULTGEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": attrs.evolve(GEMMA2, attn_cap=None, qk_norm=head, rope=rope_by_type),
    "olmo": Kind(norm="layer", eps=1e-5),
    "olmo2": OLMO2,
    "olmo3": attrs.evolve(OLMO2, window=by_type, rope=rope_by_type),
    "exaone4": attrs.evolve(OLMO2, qk_norm=head, window=by_type, rotary=_where_windowed_if_any),
    "granite": GRANITE,
    "hyperclovax": attrs.evolve(
        GRANITE,
        after=lambda c: ("post_norm1", "post_norm2") if c.use_post_norm else None,
        logit_scale=lambda c: c.logits_scaling,
    ),
    "smollm3": Kind(window=by_type, rotary=lambda c, layer: bool(c.no_rope_layers[layer])),
    "glm": GLM,
    "glm4": attrs.evolve(GLM, after=lambda c: ("post_self_attn_layernorm", "post_mlp_layernorm")),
    "arcee": Kind(mlp="plain"),
    "nemotron": Kind(norm="layer_offset", eps="norm_eps", mlp="plain"),
    "jais2": Kind(norm="layer", eps="layer_norm_eps", mlp="plain"),
    "apertus": Kind(
        renamed={"attention_layernorm": "input_layernorm", "feedforward_layernorm": "post_attention_layernorm"},
        qk_norm=head,
        mlp="plain",
    ),
    "cohere": COHERE,
    "cohere2": attrs.evolve(COHERE, qk_norm=lambda c: None, window=by_type, rotary=_where_windowed),
    "hunyuan_v1_dense": HUNYUAN,
    "bitnet": Kind(renamed={"self_attn.attn_sub_norm": "self_attn.sub_norm", "mlp.ffn_sub_norm": "mlp.sub_norm"}),
    "stablelm": Kind(
        norm="layer",
        eps="layer_norm_eps",
        parallel=lambda c: c.use_parallel_residual,
        qk_norm=lambda c: "each" if c.qk_layernorm else None,
    ),
    "starcoder2": Kind(
        renamed={"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"},
        norm="layer",
        eps="norm_epsilon",
        mlp="plain",
        window=always,
    ),
}
SPARSE = {
    "mixtral": Kind(window=always, experts=every),
    "qwen2_moe": Kind(renamed={"mlp.shared_expert": "mlp.shared_experts"}, window=by_type, experts=_is_sparse),
    "qwen3_moe": Kind(window=always, qk_norm=head, experts=_is_sparse),
    "mellum": Kind(window=by_type, rope=rope_by_type, qk_norm=head, experts=_is_called_sparse),
    "olmoe": Kind(qk_norm=lambda c: "all", experts=every),
    "flex_olmo": attrs.evolve(OLMO2, experts=every),
    "granitemoe": GRANITEMOE,
    "granitemoeshared": attrs.evolve(GRANITEMOE, splits_mlp=lambda c: c.shared_intermediate_size > 0),
    "hunyuan_v1_moe": attrs.evolve(
        HUNYUAN,
        renamed={**LATE_QK, "mlp.gate.wg": "mlp.gate", "mlp.shared_mlp": "mlp.shared_experts"},
        experts=every,
    ),
    "glm4_moe": Kind(
        qk_norm=lambda c: "head" if c.use_qk_norm else None, experts=_after_the_first, routing="sigmoid_in_groups"
    ),
    "dots1": Kind(window=by_type, qk_norm=head, experts=_after_the_first, routing="sigmoid_in_groups"),
    "solar_open": Kind(experts=every, routing="sigmoid_in_groups"),
    "exaone_moe": Kind(
        window=by_type,
        rotary=_where_windowed_if_any,
        qk_norm=head,
        experts=_is_called_sparse,
        routing="sigmoid_in_groups",
    ),
    "minimax_m2": Kind(renamed=CORRECTION, qk_norm=lambda c: "all", experts=every, routing="sigmoid"),
    "hy_v3": Kind(renamed=CORRECTION, qk_norm=head, experts=_is_called_sparse, routing="sigmoid"),
    "ernie4_5_moe": Kind(
        renamed={"mlp.gate.moe_statics": "mlp.gate"},
        interleaved=True,
        experts=_in_interval,
        routing="softmax_corrected",
    ),
    "phimoe": Kind(
        renamed={"mlp.router": "mlp.gate"}, norm="layer", window=always, experts=every, routing="sparse_mixer"
    ),
    "gpt_oss": Kind(
        renamed={"mlp.router": "mlp.gate"},
        window=by_type,
        sinks=True,
        experts=every,
        routing="softmax_of_chosen",
        clamped=True,
    ),
}
KINDS = DENSE | SPARSE
"""HF's `model_type` to its equations."""
