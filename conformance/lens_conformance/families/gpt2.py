"""GPT-2: 3 heads of 7, 3 layers, 37 neurons."""

from typing import Any

from lens_conformance.family import Family
from lens_conformance.golden import gpt2


def names(config: Any) -> list[str]:
    """List the contract's names."""
    return gpt2.names(config.n_layer)


FAMILIES = [
    Family(
        model_type="gpt2",
        config={
            "vocab_size": 29,
            "n_positions": 32,
            "n_embd": 21,
            "n_layer": 3,
            "n_head": 3,
            "n_inner": 37,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 28,
            "eos_token_id": 28,
        },
        axes={
            "n_head": (1, 3, 7),
            "scale_attn_weights": (True, False),
            "scale_attn_by_inverse_layer_idx": (False, True),
            "activation_function": ("gelu_new", "relu"),
            "tie_word_embeddings": (True, False),
        },
        golden=gpt2.golden,
        names=names,
        dropout={"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    )
]
