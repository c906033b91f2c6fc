"""The Llama family as subjects of the law suite: one record per model type, and variants of some."""

import functools
from typing import Any

from families.subject import Subject
from golden.tiny_llama import KIN, VARIANTS, tiny_llama
from lens_conformance import edits
from lens_conformance.golden import llama
from lens_conformance.golden.kinds import KINDS

REPEATED = ("attn.hook_k_rep", "attn.hook_v_rep")
LIGHT = {
    "llama-biases",
    "llama-tied",
    "llama-linear",
    "llama-yarn",
    "llama-llama3",
    "phi3-longrope",
    "qwen3_moe-sparse",
}
STATEFUL = {"llama-dynamic"}  # its rotation hangs on what the model ran before; `test_rotary.py` has it
HEADED = ("_input", "_input_rep", "attn_in", "hook_q", "hook_k", "hook_v", "_normed", "rot_q", "rot_k", "_rep")
DROPOUT = dict.fromkeys(
    ("attention_dropout", "resid_pdrop", "residual_dropout", "hidden_dropout", "embedding_dropout"), 0.2
)


def sizes(config: Any) -> dict[str, int]:
    """Give the size of every axis."""
    heads, kv_heads, d_head = llama.heads_of(config, KINDS[config.model_type])
    found = {
        "d_model": config.hidden_size,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "d_head": d_head,
        "d_mlp": config.intermediate_size,
        "d_vocab": config.vocab_size,
    }
    if hasattr(config, "num_experts_per_tok"):
        found |= {"n_experts": config.num_local_experts, "k": config.num_experts_per_tok}
    return found


def edit_at(name: str, *, causal: bool = False) -> edits.Edit:
    """Choose the edit for a name: the next expert for chosen ones, else the common one."""
    if name.endswith("expert_indices"):
        return lambda x, hook=None: (x + 1) % 5
    return edits.edit_at(name, causal=causal)


def pos_axis(name: str) -> int | None:
    """Give the axis of positions; keys and values as query heads see them have keys only."""
    return None if name.endswith(REPEATED) else edits.pos_axis(name)


def key_axis(name: str) -> int | None:
    """Give the axis of keys."""
    return 1 if name.endswith(REPEATED) else 3 if edits.pos_axis(name) == 2 else None


def head_axis(name: str) -> int | None:
    """Give the axis of heads, or of the chosen experts."""
    if edits.pos_axis(name) == 2:
        return 1
    return 2 if name.endswith((*HEADED, "hook_z", "hook_result", "expert_out")) else None


def subject(variant: str) -> Subject:
    """Make the record of a variant."""
    config = tiny_llama(variant, attn="eager").config
    parallel = getattr(config, "use_parallel_residual", False)
    copies = (*llama.COPIES, *(["hook_mlp_in"] if parallel else []))
    return Subject(
        name=variant,
        plugin="lens_llama",
        build=functools.partial(tiny_llama, variant),
        golden=llama.golden,
        names=llama.names,
        is_starred=llama.is_starred,
        sizes=sizes,
        implementations=("eager",) if variant == "gemma2" else ("sdpa", "eager"),
        full=variant == "llama",
        light=variant in LIGHT,
        edit_at=edit_at,
        apart=lambda name: name.endswith(copies),
        head_axis=head_axis,
        pos_axis=pos_axis,
        key_axis=key_axis,
        dropout={key: value for key, value in DROPOUT.items() if hasattr(config, key)},
    )


SUBJECTS = [subject(variant) for variant in VARIANTS if variant not in (*STATEFUL, *KIN)]
