"""A GPT-2 forward written from the formulas, with every hook point of the contract as a cut point.

It is the oracle of the law tests: it shares no code with lens and calls nothing of transformers. Sources: Radford et
al. 2019 (the model), Ba et al. 2016 (LayerNorm), Vaswani et al. 2017 (attention), Hendrycks and Gimpel 2016 (GELU).

Glossary: x the residual stream, c = x - mean(x), s = sqrt(mean(c^2) + eps), n = c / s, g and b a norm's gain and bias;
q k v the projections, S = scale * q k^T the scores, A = softmax(S) the pattern, z = A v.

At a cut point the value is (1) handed to the edit of that name, if there is one, (2) cloned, so that the clone's
gradient is the gradient at the hook point. Everything is float64; a masked score is -inf.

Does not: dropout, cross-attention, key-value caches (a decode step is compared with the whole run), half precision.
"""

import math
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Edit = Callable[..., Tensor | None]

TOP = (
    "hook_tokens",
    "hook_embed",
    "hook_pos_embed",
    "ln_final.hook_scale",
    "ln_final.hook_normalized",
    "ln_final.hook_out",
    "unembed.hook_in",
    "unembed.hook_out",
    "hook_logits",
)
BLOCK = (
    "hook_resid_pre",
    "hook_attn_in",
    "hook_q_input",
    "hook_k_input",
    "hook_v_input",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "ln1.hook_out",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "attn.hook_result",
    "attn.hook_out",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_in",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "ln2.hook_out",
    "mlp.hook_in",
    "mlp.hook_pre",
    "mlp.hook_post",
    "mlp.hook_out",
    "hook_mlp_out",
    "hook_resid_post",
)
STARRED = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "attn.hook_result", "hook_mlp_in")


def names(n_layers: int) -> list[str]:
    """List every hook point that the contract gives a GPT-2 of this depth, in no promised order."""
    return [*TOP, *(f"blocks.{layer}.{name}" for layer in range(n_layers) for name in BLOCK)]


def names_at(layer: int) -> list[str]:
    """List the names outside the blocks and those of one block: enough where every layer would only take longer."""
    return [*TOP, *(f"blocks.{layer}.{name}" for name in BLOCK)]


def is_starred(name: str) -> bool:
    """Tell whether the contract keeps a name out of the default cache."""
    return name.endswith(STARRED)


def positions_from(mask: Tensor) -> Tensor:
    """Number the real tokens of each row from 0; padding gets some valid position that nothing real reads."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def golden(
    state_dict: Mapping[str, Tensor],
    config: Any,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    edits: Mapping[str, Edit] | None = None,
    record: bool = True,
    through: Collection[str] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run GPT-2 in float64 from the formulas.

    Args:
        state_dict: of HF's GPT2LMHeadModel, any floating dtype.
        config: HF's GPT2Config, or anything with its fields.
        tokens: ids `[batch, pos]`, or floating embeddings `[batch, pos, d_model]`.
        attention_mask: 1 for real tokens, `[batch, pos]`.
        position_ids: `[batch, pos]` or `[1, pos]`; by default counted from the mask.
        edits: name to function, called as `fn(value, hook=hook)` with `hook.name`, `hook.layer()` and
            `hook.positions`. What it returns, or wrote into its argument, stands for everything downstream.
        record: whether to keep the value at each cut (after its edit) with `retain_grad`.
        through: names of per-head inputs whose gradient is wanted: those layers' projections are then computed from
            the copies even where nothing edited them, so `ln1` is no longer on their way.

    Returns:
        The logits and the values by name. The logits are the value at `hook_logits`.

    Raises:
        KeyError: an edit or a name in `through` that no hook point has.
    """
    edits = dict(edits or {})
    known = set(names(config.n_layer))
    if unknown := (set(edits) | set(through)) - known:
        raise KeyError(sorted(unknown))
    values: dict[str, Tensor] = {}
    cut = cutter(edits, values, record, torch.arange(tokens.shape[1]))
    weights = {name: tensor.to(torch.float64) for name, tensor in state_dict.items() if tensor.is_floating_point()}
    if tokens.is_floating_point():
        embedded = tokens.to(torch.float64)
    else:
        embedded = weights["transformer.wte.weight"][cut("hook_tokens", tokens)]
    if attention_mask is None:
        attention_mask = torch.ones(embedded.shape[:2], dtype=torch.long)
    if position_ids is None:
        position_ids = positions_from(attention_mask)
    embed = cut("hook_embed", embedded)
    pos_rows = weights["transformer.wpe.weight"][position_ids].expand(embed.shape)
    x = embed + cut("hook_pos_embed", pos_rows)
    hidden = _hidden_cells(attention_mask)
    for layer in range(config.n_layer):
        own = {key.removeprefix(f"transformer.h.{layer}."): weight for key, weight in weights.items()}
        x = _block(own, config, layer, x, hidden, cut, edits.keys() | set(through), set(through))
    x = _norm(weights, "transformer.ln_f", "ln_final", config.layer_norm_epsilon, x, cut)
    x = cut("unembed.hook_in", x)
    w_u = weights.get("lm_head.weight", weights["transformer.wte.weight"])  # d_vocab d_model
    logits = cut("unembed.hook_out", x @ w_u.T)
    return cut("hook_logits", logits), values


def cutter(
    edits: Mapping[str, Edit], values: dict[str, Tensor], record: bool, positions: Tensor
) -> Callable[[str, Tensor], Tensor]:
    """Make the function that a forward calls at each hook point."""

    def cut(name: str, value: Tensor) -> Tensor:
        if name in edits:
            layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
            hook = SimpleNamespace(name=name, positions=positions, step=0, is_prefill=True, layer=lambda: layer)
            given = value.clone()
            returned = edits[name](given, hook=hook)
            value = given if returned is None else returned.to(value.dtype)
        value = value.clone()
        if torch.is_grad_enabled() and value.is_floating_point():
            if not value.requires_grad:
                value.requires_grad_()
            value.retain_grad()
        if record:
            values[name] = value
        return value

    return cut


def _hidden_cells(attention_mask: Tensor) -> Tensor:
    """Mark what a query may not see: later positions and padding, `[batch, 1, query, key]`."""
    n = attention_mask.shape[1]
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    return later[None, None] | (attention_mask == 0)[:, None, None, :]


def _layer_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain + bias


def _norm(
    weights: Mapping[str, Tensor], key: str, name: str, eps: float, x: Tensor, cut: Callable[[str, Tensor], Tensor]
) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = cut(f"{name}.hook_scale", (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt())
    normalized = cut(f"{name}.hook_normalized", centred / scale)
    return cut(f"{name}.hook_out", normalized * weights[f"{key}.weight"] + weights[f"{key}.bias"])


def _block(
    weights: Mapping[str, Tensor],
    config: Any,
    layer: int,
    x: Tensor,
    hidden: Tensor,
    cut: Callable[[str, Tensor], Tensor],
    touched: Collection[str],
    through: Collection[str],
) -> Tensor:
    at = f"blocks.{layer}."
    eps = config.layer_norm_epsilon
    x = cut(at + "hook_resid_pre", x)
    q, k, v = _projections(weights, config, at, x, cut, touched, through)
    z = _attend(config, layer, at, q, k, v, hidden, cut)
    heads, d_head = config.n_head, config.n_embd // config.n_head
    w_o = weights["attn.c_proj.weight"].view(heads, d_head, config.n_embd)
    result = cut(at + "attn.hook_result", torch.einsum("bphe,hed->bphd", z, w_o))
    out = cut(at + "attn.hook_out", result.sum(2) + weights["attn.c_proj.bias"])
    mid = cut(at + "hook_resid_mid", x + cut(at + "hook_attn_out", out))
    mlp_in = cut(at + "hook_mlp_in", mid)
    normed = cut(at + "mlp.hook_in", _norm(weights, "ln_2", at + "ln2", eps, mlp_in, cut))
    pre = cut(at + "mlp.hook_pre", normed @ weights["mlp.c_fc.weight"] + weights["mlp.c_fc.bias"])
    post = cut(at + "mlp.hook_post", activation(config.activation_function, pre))
    mlp = cut(at + "mlp.hook_out", post @ weights["mlp.c_proj.weight"] + weights["mlp.c_proj.bias"])
    return cut(at + "hook_resid_post", mid + cut(at + "hook_mlp_out", mlp))


def _projections(
    weights: Mapping[str, Tensor],
    config: Any,
    at: str,
    x: Tensor,
    cut: Callable[[str, Tensor], Tensor],
    touched: Collection[str],
    through: Collection[str],
) -> list[Tensor]:
    """Compute q, k and v: where a head's input was edited through its own norm, elsewhere through `ln1`."""
    heads, d_head, eps = config.n_head, config.n_embd // config.n_head, config.layer_norm_epsilon
    copies = x[:, :, None, :].expand(-1, -1, heads, -1)  # batch pos head d_model
    attn_in = cut(at + "hook_attn_in", copies)
    normed = _norm(weights, "ln_1", at + "ln1", eps, x, cut)
    w_all = weights["attn.c_attn.weight"].view(config.n_embd, 3, heads, d_head)
    b_all = weights["attn.c_attn.bias"].view(3, heads, d_head)
    projected = []
    for index, which in enumerate("qkv"):
        name = f"{at}hook_{which}_input"
        own = cut(name, attn_in)
        shared = torch.einsum("bpd,dhe->bphe", normed, w_all[:, index]) + b_all[index]
        if name in touched or at + "hook_attn_in" in touched:
            forced = name in through or at + "hook_attn_in" in through
            edited = (own != copies).any(-1, keepdim=True) | forced  # batch pos head 1
            norm = _layer_norm(own, weights["ln_1.weight"], weights["ln_1.bias"], eps)
            apart = torch.einsum("bphd,dhe->bphe", norm, w_all[:, index]) + b_all[index]
            shared = torch.where(edited, apart, shared)
        projected.append(cut(f"{at}attn.hook_{which}", shared))
    return projected


def _attend(
    config: Any,
    layer: int,
    at: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    cut: Callable[[str, Tensor], Tensor],
) -> Tensor:
    scale = (q.shape[-1] ** -0.5) if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= layer + 1
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * scale
    scores = cut(at + "attn.hook_attn_scores", scores.masked_fill(hidden, -math.inf))
    # HF's eager path masks with a finite number: a query that may see nothing then spreads evenly over all keys.
    finite = scores.masked_fill(scores == -math.inf, torch.finfo(scores.dtype).min)
    weight = (finite - finite.amax(-1, keepdim=True).detach()).exp()
    pattern = cut(at + "attn.hook_pattern", weight / weight.sum(-1, keepdim=True))
    return cut(at + "attn.hook_z", torch.einsum("bhqk,bkhe->bqhe", pattern, v))


def activation(name: str, x: Tensor) -> Tensor:
    """Apply an activation function by HF's name for it, from its formula."""
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if name == "relu":
        return x.clamp(min=0)
    if name in ("silu", "swish"):
        return x / (1 + torch.exp(-x))
    if name == "tanh":
        return torch.tanh(x)
    raise ValueError(f"no formula for the activation function {name!r}")
