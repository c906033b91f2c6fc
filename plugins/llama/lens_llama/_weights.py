"""Where each weight of Llama and its kin is, in TransformerLens' layout."""

from collections.abc import Iterator
from typing import Any

from lens_core.plugin import LensConfig, WeightView
from lens_llama._decoder import Decoder, is_sparse

__all__ = ["weights"]

BLOCK = "model.layers.{layer}"


def weights(config: Any, cfg: LensConfig, decoder: Decoder) -> Iterator[WeightView]:
    """Give the views; those of an MLP for the layers with a dense one."""
    yield WeightView(name="W_E", path="model.embed_tokens")
    yield WeightView(name="W_U", path="lm_head")
    yield WeightView(name="b_U", path="lm_head", part="bias", width=cfg.d_vocab)
    yield from _attention(cfg, decoder)
    sparse = tuple(layer for layer in range(cfg.n_layers) if is_sparse(config, layer))
    dense = tuple(layer for layer in range(cfg.n_layers) if layer not in sparse)
    if sparse:
        pattern = "expert d -> d expert"
        yield WeightView(name="W_router", path=f"{BLOCK}.mlp.gate", pattern=pattern, layers=sparse)
    if dense:
        yield from _mlp(cfg, decoder, dense)


def _attention(cfg: LensConfig, decoder: Decoder) -> Iterator[WeightView]:
    heads, d = cfg.n_heads or 0, cfg.d_head or 0
    kv_heads = cfg.n_key_value_heads or heads
    starts = {"Q": (0, heads), "K": (heads, kv_heads), "V": (heads + kv_heads, kv_heads)}
    for letter, (start, own) in starts.items():
        path = f"{BLOCK}.self_attn.{letter.lower()}_proj"
        columns = None
        if decoder.is_qkv_fused:
            path, columns = f"{BLOCK}.self_attn.qkv_proj", (start * d, (start + own) * d)
        sizes = {"h": own}
        yield WeightView(name=f"W_{letter}", path=path, columns=columns, pattern="d (h e) -> h d e", sizes=sizes)
        yield WeightView(
            name=f"b_{letter}",
            path=path,
            part="bias",
            columns=columns,
            pattern="(h e) -> h e",
            sizes=sizes,
            width=own * d,
        )
    out = f"{BLOCK}.self_attn.o_proj"
    yield WeightView(name="W_O", path=out, pattern="(h e) d -> h e d", sizes={"h": heads})
    yield WeightView(name="b_O", path=out, part="bias", width=cfg.d_model)


def _mlp(cfg: LensConfig, decoder: Decoder, layers: tuple[int, ...]) -> Iterator[WeightView]:
    d = cfg.d_mlp or 0
    places = {"in": ("up_proj", None), "gate": ("gate_proj", None), "out": ("down_proj", None)}
    if decoder.mlp == "fused":
        places |= {"in": ("gate_up_proj", (d, 2 * d)), "gate": ("gate_up_proj", (0, d))}
    elif decoder.mlp == "plain":
        places = {"in": ("c_fc", None), "out": ("c_proj", None)}
    for name, (module, columns) in places.items():
        path = f"{BLOCK}.mlp.{module}"
        width = cfg.d_model if name == "out" else d
        yield WeightView(name=f"W_{name}", path=path, columns=columns, layers=layers)
        yield WeightView(name=f"b_{name}", path=path, part="bias", columns=columns, width=width, layers=layers)
