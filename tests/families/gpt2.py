"""GPT-2 as a subject: the suite is proven on the family whose laws `tests/laws` tests at length."""

from typing import Any

from families.subject import Subject
from golden import tiny
from lens_conformance.golden import gpt2


def names(config: Any) -> list[str]:
    """List the contract's names."""
    return gpt2.names(config.n_layer)


def sizes(config: Any) -> dict[str, int]:
    """Give the size of every axis."""
    return {
        "d_model": 21,
        "n_heads": config.n_head,
        "n_kv_heads": config.n_head,
        "d_head": 21 // config.n_head,
        "d_mlp": config.n_inner,
        "d_vocab": config.vocab_size,
    }


SUBJECTS = [
    Subject(
        name="gpt2",
        plugin="lens_gpt2",
        build=tiny.tiny_gpt2,
        golden=gpt2.golden,
        names=names,
        is_starred=gpt2.is_starred,
        sizes=sizes,
        head_axis=lambda name: (
            1
            if name.endswith(("scores", "pattern"))
            else 2
            if name.endswith(("_input", "attn_in", "hook_q", "hook_k", "hook_v", "hook_z", "result"))
            else None
        ),
        dropout={"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    )
]
