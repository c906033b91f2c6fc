"""GPT-NeoX as a description of a decoder: how HF's `GPTNeoXForCausalLM` differs from Llama.

Source: transformers `models/gpt_neox/modeling_gpt_neox.py`. Glossary: `query_key_value` gives q, k and v of one head
after the other; `dense` is W_O, `dense_h_to_4h` W_in, `dense_4h_to_h` W_out; dropouts end both branches; with
`use_parallel_residual` both branches read the stream, each through its own norm.
"""

from typing import Any

from lens_core.plugin import LAYER_NORM, Attn, Declaration, Decoder, Mlp, declare


def GPTNeoX(config: Any) -> Declaration:
    """Declare GPT-NeoX at one HF `GPTNeoXConfig`."""
    decoder = Decoder(
        base="gpt_neox",
        embed="embed_in",
        embed_at="block",  # behind a dropout
        final_norm="final_layer_norm",
        norm=LAYER_NORM,
        is_parallel=config.use_parallel_residual,
        attn=Attn(
            path="attention",
            layout="per_head",
            fused="query_key_value",
            out="dense",
            added="post_attention_dropout",
        ),
        mlp=Mlp(kind="plain", up="dense_h_to_4h", down="dense_4h_to_h", added="post_mlp_dropout"),
    )
    return declare(decoder, config)
