"""From one description of a decoder to its declaration: dimensions, weights, and everything that lens derives."""

from collections.abc import Callable, Iterator
from typing import Any

from lens_core._declaration import Declaration, LensConfig
from lens_core._decoder import Decoder, Mixer
from lens_core._decoder_flow import decoder_readers, decoder_writing
from lens_core._decoder_points import decoder_norms, decoder_points, projections
from lens_core._expert_weights import expert_weights
from lens_core._rotary import rotary_reach
from lens_core._views import Columns
from lens_core.weights import WeightView, weight_and_bias

__all__ = ["declare"]

_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon", "norm_eps", "eps")
_ACT = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")
_D_MLP = ("intermediate_size", "ffn_dim", "n_inner")
_WRITERS = {"mixer": "hook_mixer_out", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}


def declare(decoder: Decoder, config: Any) -> Declaration:
    """Derive the declaration of a decoder at one HF config: hook points, norms, residual writers and weights.

    Example:
        >>> from transformers import MistralConfig
        >>> made = declare(Decoder(), MistralConfig(num_hidden_layers=2))
        >>> made.cfg.n_key_value_heads, made.points[-1].name, made.weights[0].name
        (8, 'hook_logits', 'W_E')
    """
    cfg = _lens_config(decoder, config)
    found = {branch for layer in range(cfg.n_layers) for branch in decoder.branches(layer)}
    mixer = decoder.mixer
    return Declaration(
        cfg=cfg,
        base=decoder.base,
        blocks=f"{decoder.base}.{decoder.layers}",
        embed=f"{decoder.base}.{decoder.embed}",
        embed_scale=decoder.embed_scale,
        unembed=decoder.head,
        norms=decoder_norms(decoder),
        points=tuple(decoder_points(decoder, cfg)),
        writers=tuple(writer for branch, writer in _WRITERS.items() if branch in found),
        branch_factor=decoder.branch_scale,
        logit_factor=decoder.logit_scale / decoder.logit_divisor,
        logit_cap=decoder.logit_cap,
        embeddings=("hook_embed",) if decoder.pos_embed is None else ("hook_embed", "hook_pos_embed"),
        readers=tuple(decoder_readers(decoder, cfg)),
        writing_weights=tuple(decoder_writing(decoder, cfg)),
        rows_sum_to_one=not decoder.attn.has_sinks,
        weights=tuple(_weights(decoder, cfg)),
        mixer_kind="mixer" if mixer is None else mixer.kind,
        aliases={} if mixer is None else _aliases(decoder, mixer, cfg),
        read_call=decoder.read_call,
        block_values=decoder.block_values,
        has_absolute_positions=True,  # a rotation by a common offset is exact on paper only
    )


def _aliases(decoder: Decoder, mixer: Mixer, cfg: LensConfig) -> dict[str, str]:
    layers = [layer for layer in range(cfg.n_layers) if "mixer" in decoder.branches(layer)]
    return {f"blocks.{at}.{alias}": f"blocks.{at}.{name}" for at in layers for alias, name in mixer.aliases.items()}


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _reach(config: Any) -> int:
    """Give the most positions: some checkpoints say more than their rotary embeddings' own number."""
    return max(rotary_reach(config), getattr(config, "model_max_length", None) or 0)


def _lens_config(decoder: Decoder, config: Any) -> LensConfig:
    heads, moe = config.num_attention_heads, decoder.moe
    has_rotary = decoder.pos_embed is None and decoder.attn.rotary != ()
    sizes: dict[str, Any] = {
        "model_type": config.model_type,
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": heads,
        "d_head": getattr(config, "head_dim", None) or config.hidden_size // heads,
        # Where one projection gives each head's query, key and value, heads share none, whatever else a config holds.
        "n_key_value_heads": None
        if decoder.attn.layout == "per_head"
        else getattr(config, "num_key_value_heads", None),
        "d_mlp": _first(config, _D_MLP),
        "d_vocab": config.vocab_size,
        "n_ctx": _reach(config) if has_rotary else config.max_position_embeddings if decoder.pos_embed else None,
        "act_fn": _first(config, _ACT),
        "eps": _first(config, _EPS),
        "normalization_type": decoder.norm.name,
        "positional_embedding_type": "rotary" if has_rotary else "standard" if decoder.pos_embed else "none",
        "gated_mlp": decoder.mlp.kind != "plain",
        "parallel_attn_mlp": decoder.is_parallel,
        "n_experts": None if moe is None else moe.n_experts,
        "experts_per_token": None if moe is None else moe.per_token,
    }
    return LensConfig(**{**sizes, **decoder.sizes})


def _weights(decoder: Decoder, cfg: LensConfig) -> Iterator[WeightView]:
    block, attn = decoder.block, decoder.attn
    yield WeightView(name="W_E", path=f"{decoder.base}.{decoder.embed}")
    if decoder.pos_embed is not None:
        yield WeightView(name="W_pos", path=f"{decoder.base}.{decoder.pos_embed}")
    yield from weight_and_bias("U", decoder.head)
    own = _layers(cfg, lambda layer: "attn" in decoder.branches(layer))
    if own != ():
        path, heads = f"{block}.{attn.path}", {"h": cfg.n_heads or 0}
        for part, projection in projections(attn, cfg, path).items():
            yield from weight_and_bias(part.upper(), projection.path, columns=projection.columns, layers=own)
        yield from weight_and_bias("O", f"{path}.{attn.out}", pattern="(h e) d -> h e d", sizes=heads, layers=own)
    if decoder.moe is not None:
        moe = decoder.moe
        path = ".".join(name for name in (block, moe.path, moe.router, moe.router_linear) if name)
        sparse = _layers(cfg, lambda layer: "mlp" in decoder.branches(layer) and decoder.is_sparse(layer))
        if sparse != ():
            pattern = "expert d -> d expert" if moe.router_linear is None else None
            yield from weight_and_bias("router", path, pattern=pattern, layers=sparse)
            experts = ".".join(name for name in (block, moe.path, moe.experts) if name)
            if moe.expert_layout is not None:
                yield from expert_weights(experts, moe.expert_layout, sparse)
    yield from _mlp(decoder, cfg)
    if decoder.mixer is not None and any("mixer" in decoder.branches(layer) for layer in range(cfg.n_layers)):
        yield from decoder.mixer.weights


def _mlp(decoder: Decoder, cfg: LensConfig) -> Iterator[WeightView]:
    dense = _layers(cfg, lambda layer: "mlp" in decoder.branches(layer) and not decoder.is_sparse(layer))
    if dense == ():
        return
    d, mlp = cfg.d_mlp or 0, decoder.mlp
    places = {"in": mlp.up, "gate": mlp.gate, "out": mlp.down}
    columns: dict[str, Columns] = {}
    if mlp.kind == "fused":
        places["gate"] = mlp.up
        columns = {"gate": Columns(stop=d), "in": Columns(start=d)}
    elif mlp.kind == "plain":
        del places["gate"]
    for name, module in places.items():
        path = ".".join(part for part in (decoder.block, mlp.path, module) if part)
        yield from weight_and_bias(name, path, columns=columns.get(name), layers=dense)


def _layers(cfg: LensConfig, has: Callable[[int], bool]) -> tuple[int, ...] | None:
    """List the blocks that have something; None for all."""
    found = tuple(layer for layer in range(cfg.n_layers) if has(layer))
    return None if len(found) == cfg.n_layers else found
