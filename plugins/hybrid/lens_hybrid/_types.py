"""The hybrids: a row for each model type says where its mixers, attention and MLPs are.

Source: `models/TYPE/modeling_TYPE.py` of transformers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lens_core.plugin import RMS_NORM_GAIN_FIRST, Attn, Decoder, ExpertOutput, HookPoint, Mlp, Moe, point
from lens_hybrid._mixers import dual, selective

__all__ = ["TYPES"]

NO_LIMIT = (0.0, float("inf"))
JAMBA: dict[str, Any] = {
    "final_norm": "final_layernorm",
    "ln2": "pre_ff_layernorm",
    "mlp": Mlp(path="feed_forward"),
}


def _mixing(kinds: Sequence[str], mixer: str = "linear_attention") -> dict[str, Any]:
    """Give the branches of blocks that have either a mixer or attention, and an MLP; `kinds` are HF's words."""
    return {"branches": lambda layer: ("mixer" if kinds[layer] == mixer else "attn", "mlp")}


def _layers(kinds: Sequence[str], kind: str) -> tuple[int, ...]:
    return tuple(layer for layer, own in enumerate(kinds) if own == kind)


def _limit(config: Any) -> tuple[float, float]:
    low, high = config.time_step_limit
    return float(low), float(high)


def _bamba(config: Any) -> Decoder:
    kinds = config.layers_block_type
    layers = _layers(kinds, "linear_attention")
    mixer = dual(config, "mamba", layers, has_bias=config.mamba_proj_bias, limit=_limit(config))
    return Decoder(**JAMBA, **_mixing(kinds), **mixer, block_values=2)


def _jamba(config: Any) -> Decoder:
    kinds = config.layers_block_type
    sparse = tuple(layer for layer, count in enumerate(config.layers_num_experts) if count > 1)
    moe = Moe(
        layers=sparse,
        path="feed_forward",
        router="router",
        n_experts=config.num_experts,
        per_token=config.num_experts_per_tok,
    )
    mixer = selective(config, "mamba", _layers(kinds, "mamba"))
    return Decoder(**JAMBA, **_mixing(kinds, "mamba"), **mixer, moe=moe if sparse else None, attn=Attn(rotary=()))


def _granite(config: Any) -> Decoder:
    kinds = config.layers_block_type
    fields = dual(
        config,
        "mamba",
        _layers(kinds, "linear_attention"),
        has_bias=config.mamba_proj_bias,
        limit=_limit(config),
        has_attention="full_attention" in kinds,
    )
    moe = None
    if config.num_local_experts:
        moe = Moe(
            path="block_sparse_moe",
            router="router",
            n_experts=config.num_local_experts,
            per_token=config.num_experts_per_tok,
            beside="shared_mlp",
            logits_dtype="float32",
        )
    else:  # the experts' width is `intermediate_size`
        fields["sizes"]["d_mlp"] = config.shared_intermediate_size
    return Decoder(
        **_mixing(kinds),
        **fields,
        attn=Attn(rotary=None if config.position_embedding_type == "rope" else ()),
        mlp=Mlp(kind="fused", path="shared_mlp", up="input_linear", down="output_linear"),
        moe=moe,
        embed_scale=config.embedding_multiplier,
        embed_at="block",
        branch_scale=config.residual_multiplier,
        logit_divisor=config.logits_scaling,
    )


def _nemotron(config: Any) -> Decoder:
    """Blocks of one branch, which reads the block's one norm: `ln1`, or `ln2` before an MLP."""
    kinds = config.layers_block_type
    branches = {"linear_attention": ("mixer",), "full_attention": ("attn",)}
    sparse, latent = _layers(kinds, "moe"), config.moe_latent_size
    fields = dual(
        config,
        "mixer",
        _layers(kinds, "linear_attention"),
        sizes={
            "ssm_heads": config.mamba_num_heads,
            "head_dim": config.mamba_head_dim,
            "n_groups": config.n_groups,
            "d_state": config.ssm_state_size,
            "d_conv": config.conv_kernel,
            "chunk_size": config.chunk_size,
        },
        has_bias=config.use_bias,
        limit=NO_LIMIT,  # `time_step_min` is one, which HF ignores in decoding; see the page of the hybrids
        has_attention="full_attention" in kinds,
    )
    fields["sizes"]["ssm_act_fn"] = config.mamba_hidden_act
    moe = Moe(
        layers=sparse,
        path="mixer",
        expert_layout="plain",
        n_experts=config.n_routed_experts,
        per_token=config.num_experts_per_tok,
        reads=("experts.up_proj" if latent is None else "fc1_latent_proj", "shared_experts.up_proj"),
        writes=("experts.down_proj" if latent is None else "fc2_latent_proj", "shared_experts.down_proj"),
        weights_dtype="float32",
        logits_dtype="float32",
    )

    def own(layer: int) -> Iterator[HookPoint]:
        if latent is not None and layer in sparse:
            seam = ExpertOutput(path=f"model.layers.{layer}.mixer.experts")
            yield point("mlp.hook_expert_out", seam, layer=layer, shape=f"batch pos k {latent}")

    return Decoder(
        embed="embeddings",
        final_norm="norm_f",
        norm=RMS_NORM_GAIN_FIRST,
        ln1="norm",
        ln2="norm",
        branches=lambda layer: branches.get(kinds[layer], ("mlp",)),
        **fields,
        attn=Attn(path="mixer", rotary=()),
        mlp=Mlp(path="mixer", kind="plain"),
        moe=moe if sparse else None,
        logits_dtype="float32",
        own=own,
    )


TYPES: Mapping[str, Callable[[Any], Decoder]] = {
    "bamba": _bamba,
    "jamba": _jamba,
    "granitemoehybrid": _granite,
    "nemotron_h": _nemotron,
}
