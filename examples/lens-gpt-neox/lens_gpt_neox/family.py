"""What the conformance kit needs to try GPT-NeoX: a tiny config, what checkpoints vary, and the golden forward.

Only the kit imports this module, so `lens-conformance` is no requirement of the plugin.
"""

from typing import Any

from lens_conformance import Family

from lens_gpt_neox.golden import golden, names


def _rope(kind: str, share: float, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 100.0, "partial_rotary_factor": share, **fields}


FAMILY = Family(
    model_type="gpt_neox",
    # 3 heads of 8, 2 layers, 29 tokens, 37 neurons: a swapped axis cannot broadcast.
    config={
        "vocab_size": 29,
        "hidden_size": 24,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 64,
        "bos_token_id": 28,
        "eos_token_id": 28,
        "pad_token_id": 28,
        "tie_word_embeddings": False,
    },
    axes={
        "use_parallel_residual": (True, False),
        "attention_bias": (True, False),
        "tie_word_embeddings": (False, True),
        "num_attention_heads": (3, 1),
        "hidden_act": ("gelu", "gelu_new"),
        "rope_parameters": (
            _rope("default", 0.5),
            _rope("default", 1.0),
            _rope("linear", 0.25, factor=3.0),
            _rope("yarn", 0.5, factor=4.0, original_max_position_embeddings=16),
        ),
    },
    golden=golden,
    names=names,
    dropout={"attention_dropout": 0.2, "hidden_dropout": 0.2},
)
