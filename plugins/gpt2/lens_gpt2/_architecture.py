"""GPT-2 and GPT-BigCode as descriptions of a decoder.

Sources: transformers `models/gpt2/modeling_gpt2.py`, `models/gpt_bigcode/modeling_gpt_bigcode.py`. Glossary: `c_attn`
is the fused projection, `c_proj` the output projection (of attention and of the MLP), `c_fc` the MLP's input
projection; GPT-2's are `Conv1D`, stored `[in, out]`.
"""

from collections.abc import Iterator
from typing import Any

from lens_core.plugin import LAYER_NORM, Attention, Attn, Declaration, Decoder, HookPoint, Mlp, declare, point


def GPT2(config: Any) -> Declaration:
    """Declare GPT-2 at one HF `GPT2Config`."""

    def own(layer: int) -> Iterator[HookPoint]:
        """With reorder_and_upcast_attn in eager, HF calls a method instead of its registry, in float32."""
        path, upcast = f"transformer.h.{layer}.attn", "_upcast_and_reordered_attn"
        is_upcast = config.reorder_and_upcast_attn and config._attn_implementation == "eager"
        dtype = "float32" if is_upcast else "model"
        scores = Attention(path=path, part="scores", method=upcast)
        yield point("attn.hook_attn_scores", scores, layer=layer, dtype=dtype)
        pattern = Attention(path=path, part="pattern", method=upcast)
        yield point("attn.hook_pattern", pattern, layer=layer, dtype=dtype)

    return declare(_decoder(config, layout="blocks", own=own), config)


def GPTBigCode(config: Any) -> Declaration:
    """Declare GPT-BigCode (StarCoder, SantaCoder) at one HF `GPTBigCodeConfig`."""
    layout = "blocks" if config.multi_query else "per_head"
    return declare(_decoder(config, layout=layout), config)


def _decoder(config: Any, *, layout: Any, own: Any = lambda layer: ()) -> Decoder:
    return Decoder(
        base="transformer",
        layers="h",
        embed="wte",
        pos_embed="wpe",
        final_norm="ln_f",
        norm=LAYER_NORM,
        ln1="ln_1",
        ln2="ln_2",
        attn=Attn(path="attn", layout=layout, fused="c_attn", out="c_proj", rotary=()),
        mlp=Mlp(kind="plain", up="c_fc", down="c_proj"),
        sizes={"d_mlp": config.n_inner or 4 * config.n_embd},
        own=own,
    )
