"""Where each weight of Llama and its kin is, in TransformerLens' layout, and which of them make q, k and v."""

from collections.abc import Iterator
from typing import Any

import attrs

from lens_core.plugin import Columns, LensConfig, Projection, WeightView, weight_and_bias
from lens_llama._decoder import DECODERS, Decoder, is_sparse, qk_norm

__all__ = ["projections", "weights"]

BLOCK = "model.layers.{layer}"


def weights(config: Any, cfg: LensConfig, decoder: Decoder) -> Iterator[WeightView]:
    """Give the views; those of an MLP for the layers with a dense one."""
    yield WeightView(name="W_E", path="model.embed_tokens")
    yield from weight_and_bias("U", "lm_head")
    for part, projection in projections(config, cfg, f"{BLOCK}.self_attn").items():
        yield from weight_and_bias(part.upper(), projection.path, columns=projection.columns)
    heads = {"h": cfg.n_heads or 0}
    yield from weight_and_bias("O", f"{BLOCK}.self_attn.o_proj", pattern="(h e) d -> h e d", sizes=heads)
    sparse = tuple(layer for layer in range(cfg.n_layers) if is_sparse(config, layer))
    dense = tuple(layer for layer in range(cfg.n_layers) if layer not in sparse)
    if sparse:
        pattern = "expert d -> d expert"
        yield WeightView(name="W_router", path=f"{BLOCK}.mlp.gate", pattern=pattern, layers=sparse)
    if dense:
        yield from _mlp(cfg, decoder, dense)


def projections(config: Any, cfg: LensConfig, attention: str) -> dict[str, Projection]:
    """Say where q, k and v of one attention module are computed."""
    decoder, d, q = DECODERS[config.model_type], cfg.d_head or 0, cfg.n_heads or 0
    kv = cfg.n_key_value_heads or q
    places = {part: (f"{attention}.{part}_proj", Columns(heads=q if part == "q" else kv)) for part in "qkv"}
    if decoder.is_qkv_fused:
        ends = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
        places = {
            part: (f"{attention}.qkv_proj", Columns(start=first * d, stop=last * d, heads=last - first))
            for part, (first, last) in ends.items()
        }
    found = {part: Projection(path=path, columns=columns) for part, (path, columns) in places.items()}
    norm = qk_norm(config)
    if norm is not None:
        found["k"] = attrs.evolve(found["k"], norm=f"{attention}.k_{norm.suffix}", norm_takes=norm.takes)
    return found


def _mlp(cfg: LensConfig, decoder: Decoder, layers: tuple[int, ...]) -> Iterator[WeightView]:
    d, places = cfg.d_mlp or 0, {"in": "up_proj", "gate": "gate_proj", "out": "down_proj"}
    columns: dict[str, Columns] = {}
    if decoder.mlp == "fused":
        places |= {"in": "gate_up_proj", "gate": "gate_up_proj"}
        columns = {"gate": Columns(stop=d), "in": Columns(start=d)}
    elif decoder.mlp == "plain":
        places = {"in": "c_fc", "out": "c_proj"}
    for name, module in places.items():
        yield from weight_and_bias(name, f"{BLOCK}.mlp.{module}", columns=columns.get(name), layers=layers)
