"""What every hook point of a Llama must hold, from HF's own tensors and from the formulas; nothing of lens.

`captured` reads a plain HF model by torch hooks. `equations` computes every hook point of the contract by its defining
equation, in any precision, each either from the values above it or from HF's own where they are given: so a small error
at one place is not blamed on the next.

Sources: Touvron et al. 2023 (the model), Zhang and Sennrich 2019 (RMSNorm), Su et al. 2021 (rotary embedding), Ainslie
et al. 2023 (grouped-query attention), Shazeer 2020 (the gated MLP).

Does not: attention biases, rotary variants, windows, padding, decoding. SmolLM2 has no biases and default rotary.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["captured", "equations", "explicit_attention", "rotated", "weights_of"]

Place = Callable[[str, Tensor], Tensor]


@torch.no_grad()
def captured(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Run a plain HF Llama and give those of its own tensors that are hook points, by hook name.

    Rotated keys come from HF's key-value cache; all others from torch hooks on modules.
    """
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    found: dict[str, Tensor] = {"hook_tokens": tokens}
    with _recording(model, found, *heads):
        output = model(tokens, use_cache=True)
    for layer, kept in enumerate(output.past_key_values.layers):
        found[f"blocks.{layer}.attn.hook_rot_k"] = kept.keys.transpose(1, 2)  # batch pos n_kv_heads d_head
        repeats = heads[0] // heads[1]
        found[f"blocks.{layer}.attn.hook_k_rep"] = kept.keys.transpose(1, 2).repeat_interleave(repeats, dim=2)
        found[f"blocks.{layer}.attn.hook_v_rep"] = kept.values.transpose(1, 2).repeat_interleave(repeats, dim=2)
        before, middle = (found[f"blocks.{layer}.hook_resid_{place}"] for place in ("pre", "mid"))
        inputs = {"q_input": heads[0], "k_input": heads[1], "v_input": heads[1]}
        for name, count in {**inputs, "k_input_rep": heads[0], "v_input_rep": heads[0]}.items():
            found[f"blocks.{layer}.hook_{name}"] = before[:, :, None].expand(-1, -1, count, -1)
        found[f"blocks.{layer}.hook_mlp_in"] = middle
    found["unembed.hook_out"] = found["hook_logits"] = output.logits
    return found


@contextmanager
def _recording(model: Any, found: dict[str, Tensor], n_heads: int, n_kv_heads: int) -> Iterator[None]:
    """Record inputs and outputs of HF's modules under their hook names."""
    handles = []

    def on(module: Any, names: str, *, is_input: bool = False, heads: int | None = None) -> None:
        def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            value = (args[0] if args else kwargs["hidden_states"]) if is_input else output
            value = value.clone() if heads is None else value.clone().unflatten(-1, (heads, -1))
            found.update(dict.fromkeys(names.split(), value))

        handles.append(module.register_forward_hook(keep, with_kwargs=True))

    base = model.model
    on(base.embed_tokens, "hook_embed")
    on(base.norm, "ln_final.hook_out unembed.hook_in")
    for layer, block in enumerate(base.layers):
        at, attn, mlp = f"blocks.{layer}.", block.self_attn, block.mlp
        on(block, f"{at}hook_resid_pre", is_input=True)
        on(block, f"{at}hook_resid_post")
        on(block.input_layernorm, f"{at}ln1.hook_out")
        on(attn.q_proj, f"{at}attn.hook_q", heads=n_heads)
        on(attn.k_proj, f"{at}attn.hook_k", heads=n_kv_heads)
        on(attn.v_proj, f"{at}attn.hook_v", heads=n_kv_heads)
        on(attn.o_proj, f"{at}attn.hook_z", is_input=True, heads=n_heads)
        on(attn.o_proj, f"{at}attn.hook_out {at}hook_attn_out")
        on(block.post_attention_layernorm, f"{at}hook_resid_mid", is_input=True)
        on(block.post_attention_layernorm, f"{at}ln2.hook_out {at}mlp.hook_in")
        on(mlp.gate_proj, f"{at}mlp.hook_pre")
        on(mlp.up_proj, f"{at}mlp.hook_pre_linear")
        on(mlp.down_proj, f"{at}mlp.hook_post", is_input=True)
        on(mlp.down_proj, f"{at}mlp.hook_out {at}hook_mlp_out")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weights_of(model: Any, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Give HF's weights by their own names, in another precision."""
    return {name: value.detach().to(dtype) for name, value in model.state_dict().items()}


def equations(
    weights: Mapping[str, Tensor], config: Any, tokens: Tensor, given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Compute every hook point of a Llama, in the weights' precision.

    Args:
        weights: By HF's names.
        config: HF's LlamaConfig.
        tokens: Ids `[batch, pos]`.
        given: Values by hook name which later equations start from instead of their own results.

    Returns:
        The result of each hook point's own equation, by name. A masked score is -inf.
    """
    given, values = given or {}, {}

    def place(name: str, value: Tensor) -> Tensor:
        values[name] = value
        return given[name].to(value.dtype) if name in given else value

    values["hook_tokens"] = tokens
    x = place("hook_embed", weights["model.embed_tokens.weight"][tokens])
    for layer in range(config.num_hidden_layers):
        prefix, at = f"model.layers.{layer}.", f"blocks.{layer}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        x = _block(own, config, place(f"{at}hook_resid_pre", x), lambda name, value, at=at: place(at + name, value))
    x = _norm(weights["model.norm.weight"], config, x, "ln_final", place)
    out = place("unembed.hook_out", place("unembed.hook_in", x) @ weights["lm_head.weight"].T)
    place("hook_logits", out)
    return values


def _block(own: Mapping[str, Tensor], config: Any, x: Tensor, place: Place) -> Tensor:
    n_heads, n_kv_heads = config.num_attention_heads, config.num_key_value_heads
    for name, count in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads)):
        place(f"hook_{name}_input", x[:, :, None].expand(-1, -1, count, -1))
    for name in ("k", "v"):
        place(f"hook_{name}_input_rep", x[:, :, None].expand(-1, -1, n_heads, -1))
    z = _attention(own, config, _norm(own["input_layernorm.weight"], config, x, "ln1", place), place)
    w_o = own["self_attn.o_proj.weight"].T.unflatten(0, (n_heads, -1))  # n_heads d_head d_model
    result = place("attn.hook_result", torch.einsum("bphe,hed->bphd", z, w_o))
    attn_out = place("hook_attn_out", place("attn.hook_out", result.sum(2)))
    x = place("hook_resid_mid", x + attn_out)
    place("hook_mlp_in", x)
    normed = place("mlp.hook_in", _norm(own["post_attention_layernorm.weight"], config, x, "ln2", place))
    gate = place("mlp.hook_pre", normed @ own["mlp.gate_proj.weight"].T)
    up = place("mlp.hook_pre_linear", normed @ own["mlp.up_proj.weight"].T)
    post = place("mlp.hook_post", F.silu(gate) * up)
    mlp_out = place("hook_mlp_out", place("mlp.hook_out", post @ own["mlp.down_proj.weight"].T))
    return place("hook_resid_post", x + mlp_out)


def _norm(gain: Tensor, config: Any, x: Tensor, name: str, place: Place) -> Tensor:
    scale = place(f"{name}.hook_scale", (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt())
    return place(f"{name}.hook_out", place(f"{name}.hook_normalized", x / scale) * gain)


def _attention(own: Mapping[str, Tensor], config: Any, normed: Tensor, place: Place) -> Tensor:
    n_heads, n_kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, k, v = (
        place(f"attn.hook_{name}", (normed @ own[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (count, -1)))
        for name, count in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads))
    )
    base = config.rope_parameters["rope_theta"]
    rot_q, rot_k = place("attn.hook_rot_q", rotated(q, base)), place("attn.hook_rot_k", rotated(k, base))
    k_rep = place("attn.hook_k_rep", rot_k.repeat_interleave(n_heads // n_kv_heads, dim=2))
    v_rep = place("attn.hook_v_rep", v.repeat_interleave(n_heads // n_kv_heads, dim=2))
    scores = place("attn.hook_attn_scores", masked_scores(rot_q, k_rep))
    pattern = place("attn.hook_pattern", scores.softmax(-1))
    return place("attn.hook_z", torch.einsum("bhqk,bkhe->bqhe", pattern, v_rep))


def rotated(x: Tensor, base: float) -> Tensor:
    """Turn each pair (i, i + d_head/2) of `x` [batch pos n_heads d_head] by pos * base^(-2i / d_head) radians."""
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = (torch.arange(x.shape[1], dtype=x.dtype)[:, None] * rates)[:, None]  # pos 1 d_head/2
    first, second = x[..., :half], x[..., half:]
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.cat(turned, dim=-1)


def masked_scores(rot_q: Tensor, k_rep: Tensor) -> Tensor:
    """Give the scaled scores [batch n_heads query key]; later keys get -inf."""
    scores = torch.einsum("bqhe,bkhe->bhqk", rot_q, k_rep) / math.sqrt(rot_q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf)


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, config: Any, edit: Callable[[Tensor], Tensor] = lambda pattern: pattern
) -> Tensor:
    """Compute z [batch pos n_heads d_head] from projections before rotary, with an edit of the pattern."""
    repeats, base = q.shape[2] // k.shape[2], config.rope_parameters["rope_theta"]
    scores = masked_scores(rotated(q, base), rotated(k, base).repeat_interleave(repeats, dim=2))
    return torch.einsum("bhqk,bkhe->bqhe", edit(scores.softmax(-1)), v.repeat_interleave(repeats, dim=2))
