"""The names of the hook contract, with what a plugin need not repeat: shape, equation, type, and what is starred."""

from collections.abc import Mapping
from typing import Any

from lens_core.errors import ArgumentError
from lens_core.hook_points import HookPoint

__all__ = ["CONTRACT", "STARRED", "point"]

STREAM, LOGITS, SCORES = "batch pos d_model", "batch pos d_vocab", "batch n_heads query key"
QUERIES, KEYS, HIDDEN = "batch pos n_heads d_head", "batch pos n_kv_heads d_head", "batch pos d_mlp"
QUERY_INPUTS, KEY_INPUTS, SEEN = "batch pos n_heads d_model", "batch pos n_kv_heads d_model", "batch key n_heads d_head"

CONTRACT: Mapping[str, tuple[str, str]] = {
    "hook_tokens": ("batch pos", "token ids"),
    "hook_embed": (STREAM, "W_E[tokens]"),
    "hook_pos_embed": (STREAM, "W_pos[positions]; hook_embed + hook_pos_embed = blocks.0.hook_resid_pre"),
    "hook_resid_pre": (STREAM, "what enters the block"),
    "hook_attn_in": (QUERY_INPUTS, "a copy of resid_pre for each head, before the norm"),
    "hook_q_input": (QUERY_INPUTS, "a copy of resid_pre, for the query of each head"),
    "hook_k_input": (KEY_INPUTS, "a copy of resid_pre, for the key of each key-value head"),
    "hook_v_input": (KEY_INPUTS, "a copy of resid_pre, for the value of each key-value head"),
    "hook_k_input_rep": (QUERY_INPUTS, "k_input of the group, for the key that each query head sees"),
    "hook_v_input_rep": (QUERY_INPUTS, "v_input of the group, for the value that each query head sees"),
    "attn.hook_q": (QUERIES, "ln1 W_Q + b_Q"),
    "attn.hook_k": (KEYS, "ln1 W_K + b_K"),
    "attn.hook_v": (KEYS, "ln1 W_V + b_V"),
    "attn.hook_q_normed": (QUERIES, "q_norm(q)"),
    "attn.hook_k_normed": (KEYS, "k_norm(k)"),
    "attn.hook_rot_q": (QUERIES, "q, rotated by position"),
    "attn.hook_rot_k": (KEYS, "k, rotated by position"),
    "attn.hook_k_rep": (
        SEEN,
        "keys as each query head sees them, over all positions so far that the layer's window has",
    ),
    "attn.hook_v_rep": (
        SEEN,
        "values as each query head sees them, over all positions so far that the layer's window has",
    ),
    "attn.hook_attn_scores": (SCORES, "q . k / sqrt(d_head), masked cells -inf"),
    "attn.hook_pattern": (SCORES, "softmax(attn_scores) over keys"),
    "attn.hook_z": (QUERIES, "pattern v"),
    "attn.hook_result": (QUERY_INPUTS, "z W_O of each head"),
    "attn.hook_out": (STREAM, "sum of the results + b_O"),
    "hook_attn_out": (STREAM, "what attention adds to the residual stream"),
    "hook_resid_mid": (STREAM, "resid_pre + attn_out"),
    "hook_mlp_in": (STREAM, "a copy of resid_mid, before ln2"),
    "mlp.hook_in": (STREAM, "what the MLP receives"),
    "mlp.hook_pre": (HIDDEN, "mlp.in W_in + b_in"),
    "mlp.hook_pre_linear": (HIDDEN, "mlp.in W_in + b_in"),
    "mlp.hook_post": (HIDDEN, "act(pre)"),
    "mlp.hook_router_logits": ("batch pos n_experts", "mlp.in W_router; an edit reroutes"),
    "mlp.hook_expert_weights": ("batch pos k", "weights of the chosen experts"),
    "mlp.hook_expert_indices": ("batch pos k", "which experts are chosen, likeliest first"),
    "mlp.hook_expert_out": ("batch pos k d_model", "what each chosen expert returns, before its weight"),
    "mlp.hook_out": (STREAM, "post W_out + b_out"),
    "hook_mlp_out": (STREAM, "what the MLP adds to the residual stream"),
    "hook_mixer_in": (STREAM, "a copy of resid_pre, before the norm"),
    "hook_mixer_out": (STREAM, "what the mixer adds to the residual stream"),
    "hook_resid_post": (STREAM, "resid_pre + attn_out + mlp_out"),
    "unembed.hook_in": (STREAM, "what the unembedding receives"),
    "unembed.hook_out": (LOGITS, "unembed.in W_U + b_U"),
    "hook_logits": (LOGITS, "the logits"),
}
"""Name, in its block, to shape and equation; the mixers' insides are not here, since their shapes differ by type."""
STARRED = frozenset(
    (
        *("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_k_input_rep", "hook_v_input_rep"),
        *("attn.hook_k_rep", "attn.hook_v_rep", "attn.hook_result"),
        *("hook_mlp_in", "hook_mixer_in", "mlp.hook_expert_out"),
    )
)
"""Names that cost memory or time, so that they are not in the default cache."""
INTEGERS = frozenset(("hook_tokens", "mlp.hook_expert_indices"))


def point(
    name: str, seam: Any, *, layer: int | None = None, shape: str | None = None, equation: str | None = None, **own: Any
) -> HookPoint:
    """Give the hook point of a name of the contract: what is not said is what the contract says.

    Args:
        name: The name in its block, such as `attn.hook_q`, or a whole one outside of the blocks.
        seam: How the place is reached.
        layer: The block, 0-based.
        shape: The axes; needed for a name that the contract does not have, and inside mixers.
        equation: What the value is, where this architecture says it otherwise; needed as the shape is.
        **own: `dtype` and `default` of the `HookPoint`, where they differ.

    Raises:
        ArgumentError: A name that the contract does not have, without shape or equation.

    Example:
        >>> from lens_core.plugin import ModuleInput
        >>> place = point("hook_resid_pre", ModuleInput(path="model.layers.3"), layer=3)
        >>> place.name, place.shape, place.equation
        ('blocks.3.hook_resid_pre', 'batch pos d_model', 'what enters the block')
    """
    known = CONTRACT.get(name, (None, None))
    shape, equation = shape or known[0], equation or known[1]
    if shape is None or equation is None:
        raise ArgumentError(f"{name!r} is no name of the hook contract; give its shape and its equation")
    own = {"dtype": "int64" if name in INTEGERS else "model", "default": name not in STARRED} | own
    full = name if layer is None else f"blocks.{layer}.{name}"
    return HookPoint(name=full, layer=layer, shape=shape, equation=equation, seam=seam, **own)
