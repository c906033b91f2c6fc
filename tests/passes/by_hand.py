"""Weight processing as TransformerLens writes it down, head by head, on copies of the raw weights: the slow reference.

`W_X` are `[head, d_model, d_head]`, as in that library; a norm's gain and bias are read from HF's own modules.
"""

import torch
from torch import Tensor


def folded_layer_norm(weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a LayerNorm into `[d_model, out]`, by column: b += sum_m W[m] shift[m]; W *= gain; W -= mean."""
    weight, bias = weight.clone(), bias.clone()
    for column in range(weight.shape[1]):
        bias[column] += sum(weight[m, column] * shift[m] for m in range(len(shift)))
        weight[:, column] = weight[:, column] * gain
        weight[:, column] = weight[:, column] - weight[:, column].sum() / len(gain)
    return weight, bias


def folded_rms_norm(weight: Tensor, gain: Tensor) -> Tensor:
    """Fold an RMSNorm into `[d_model, out]`: multiply each row, and centre nothing."""
    return torch.stack([weight[m] * gain[m] for m in range(len(gain))])


def processed_gpt2(model) -> dict[str, Tensor]:
    """Give what TransformerLens' defaults make of a GPT-2's weights, stacked over layers, from HF's raw parameters."""
    hf = model.hf_model.double()
    d, heads = hf.config.n_embd, hf.config.n_head
    e = d // heads
    found: dict[str, list[Tensor]] = {}
    for block in hf.transformer.h:
        one = _processed_block(block, heads, e)
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    final, head = hf.transformer.ln_f, hf.lm_head.weight.detach().T
    W_U, b_U = folded_layer_norm(head, torch.zeros(head.shape[1], dtype=head.dtype), final.weight, final.bias)
    W_E, W_pos = hf.transformer.wte.weight, hf.transformer.wpe.weight
    ends = {
        "W_E": torch.stack([row - row.mean() for row in W_E]),
        "W_pos": torch.stack([row - row.mean() for row in W_pos]),
        "W_U": torch.stack([row - row.mean() for row in W_U]),
        "b_U": b_U - b_U.mean(),
    }
    return {name: torch.stack(values) for name, values in found.items()} | ends


def _processed_block(block, heads: int, e: int) -> dict[str, Tensor]:
    d = heads * e
    fused, biases = block.attn.c_attn.weight, block.attn.c_attn.bias  # [d_model, 3 d_model]
    own: dict[str, Tensor] = {}
    for at, part in enumerate("QKV"):
        raw = fused[:, at * d : (at + 1) * d]
        weight, bias = folded_layer_norm(raw, biases[at * d : (at + 1) * d], block.ln_1.weight, block.ln_1.bias)
        own[f"W_{part}"] = torch.stack([weight[:, h * e : (h + 1) * e] for h in range(heads)])
        own[f"b_{part}"] = torch.stack([bias[h * e : (h + 1) * e] for h in range(heads)])
    output = block.attn.c_proj.weight  # [(head d_head), d_model]
    W_O = torch.stack([output[h * e : (h + 1) * e] for h in range(heads)])
    own["W_O"] = torch.stack([torch.stack([row - row.mean() for row in head]) for head in W_O])
    b_O = block.attn.c_proj.bias - block.attn.c_proj.bias.mean()
    for head in range(heads):
        b_O = b_O + own["b_V"][head] @ own["W_O"][head]
    own["b_O"], own["b_V"] = b_O - b_O.mean(), torch.zeros_like(own["b_V"])
    up, down = block.mlp.c_fc, block.mlp.c_proj
    own["W_in"], own["b_in"] = folded_layer_norm(up.weight, up.bias, block.ln_2.weight, block.ln_2.bias)
    own["W_out"] = torch.stack([row - row.mean() for row in down.weight])
    own["b_out"] = down.bias - down.bias.mean()
    return own
