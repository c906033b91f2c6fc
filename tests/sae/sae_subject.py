"""Tiny models in float64 with their golden forwards, and sparse autoencoders written out by hand."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from lens_conformance.float64 import true_float64
from lens_conformance.golden import gpt2, llama, mamba, mamba2
from safetensors.torch import save_file
from torch import Tensor

import lens_core as lens

MAKERS: dict[str, Callable[..., Any]] = {
    "gpt2": tiny_gpt2,
    "llama": lambda **options: tiny_llama("llama", **options),
    "mamba": lambda **options: tiny_ssm("mamba", **options),
    "mamba2": lambda **options: tiny_ssm("mamba2", **options),
}
GOLDEN: dict[str, Any] = {"gpt2": gpt2, "llama": llama, "mamba": mamba, "mamba2": mamba2}
TOKENS = random_tokens(2, 6)


class Subject:
    """One tiny model in float64, in lens and as formulas."""

    def __init__(self, kind: str) -> None:
        with true_float64():
            self.hf = MAKERS[kind](dtype=torch.float64)
        self.kind, self.model = kind, lens.load(self.hf)

    def golden(self, edits: Mapping[str, Callable[..., Any]] | None = None, tokens: Tensor = TOKENS) -> Any:
        """Run the formulas with edits; give the logits and the values."""
        return GOLDEN[self.kind].golden(self.hf.state_dict(), self.hf.config, tokens, edits=edits)

    def width(self, name: str) -> int:
        """Measure how wide a hook point is, heads flattened."""
        _, cache = self.model.run_with_cache(TOKENS[:1, :1], names_filter=name)
        return cache[name].flatten(2).shape[-1]


def weights_of(kind: str, d_in: int, d_sae: int, *, d_out: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Draw the weights of an SAE of some architecture; about half of the features are on."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, size: float = 0.4) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * size

    d_out = d_out or d_in
    weights = {"W_enc": drawn(d_in, d_sae), "W_dec": drawn(d_sae, d_out), "b_dec": drawn(d_out)}
    if kind == "gated":
        return weights | {"b_gate": drawn(d_sae), "r_mag": drawn(d_sae), "b_mag": drawn(d_sae)}
    weights["b_enc"] = drawn(d_sae)
    if "jumprelu" in kind:
        weights["threshold"] = drawn(d_sae).abs()
    if "skip" in kind:
        weights["W_skip"] = drawn(d_out, d_in)
    return weights


def by_hand(fields: Mapping[str, Any], weights: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Compute an SAE at each vector on its own, from the papers' formulas."""
    rows = [_one(fields, weights, row) for row in x.reshape(-1, x.shape[-1])]
    return {name: torch.stack([row[name] for row in rows]).view(*x.shape[:-1], -1) for name in rows[0]}


def _one(fields: Mapping[str, Any], w: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    kind, shift, scale = fields["architecture"], torch.zeros(()), torch.ones(())
    if fields.get("normalize_activations") == "constant_norm_rescale":
        scale = (x @ x).sqrt() / len(x) ** 0.5
    if fields.get("normalize_activations") == "layer_norm":
        shift = x.sum() / len(x)
        scale = ((x - shift).pow(2).sum() / (len(x) - 1)).sqrt()
    eps = 1e-5 if fields.get("normalize_activations") == "layer_norm" else 0.0  # SAELens adds it on the way in only
    read = (x - shift) / (scale + eps)
    if fields.get("apply_b_dec_to_input", True):
        read = read - w["b_dec"]
    norms = torch.ones(len(w["W_dec"]), dtype=x.dtype)
    if fields.get("rescale_acts_by_decoder_norm"):
        norms = w["W_dec"].pow(2).sum(1).sqrt()
    pre, acts = _features(fields, w, read, norms)
    made = w["b_dec"]
    for feature, row in enumerate(w["W_dec"]):
        factor = w["finetuning_scaling_factor"][feature] if "finetuning_scaling_factor" in w else 1
        made = made + acts[feature] / norms[feature] * factor * row
    if "skip" in kind:
        made = made + w["W_skip"] @ x
    if "transcoder" not in kind:
        made = made * scale + shift
    return {"acts_pre": pre, "acts_post": acts, "recons": made}


def _features(fields: Mapping[str, Any], w: Mapping[str, Tensor], read: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    kind = fields["architecture"]
    projected = torch.stack([read @ column for column in w["W_enc"].T])
    pre = projected * w["r_mag"].exp() + w["b_mag"] if kind == "gated" else projected + w["b_enc"]
    magnitudes = pre * norms
    is_on = magnitudes > 0
    if kind == "gated":
        is_on = is_on & (projected + w["b_gate"] > 0)
    if "jumprelu" in kind:
        is_on = is_on & (magnitudes > w["threshold"])
    if kind == "topk":
        is_on = is_on & (magnitudes >= magnitudes.sort(descending=True).values[fields["k"] - 1])
    acts = torch.where(is_on, magnitudes, torch.zeros_like(magnitudes))
    return pre, acts.tanh() if fields.get("activation_fn_str") == "tanh-relu" else acts


def write(folder: Path, fields: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
    """Write a folder in SAELens' layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(fields))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "sae_weights.safetensors")
    return folder


def new_fields(kind: str, d_in: int, d_sae: int, *, hook_name: str, **own: Any) -> dict[str, Any]:
    """Give a `cfg.json` as SAELens 6 writes it."""
    metadata = {
        "sae_lens_version": "6.21.0",
        "model_name": "tiny",
        "model_class_name": "HookedTransformer",
        "hook_name": hook_name,
        "hook_head_index": own.pop("hook_head_index", None),
        "context_size": 128,
        "seqpos_slice": [None],
        "model_from_pretrained_kwargs": own.pop("model_from_pretrained_kwargs", {"center_writing_weights": False}),
        "prepend_bos": own.pop("prepend_bos", True),
        "dataset_path": "none",
    } | ({"hook_name_out": own.pop("hook_name_out")} if "hook_name_out" in own else {})
    return {
        "architecture": kind,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float64",
        "device": "cuda:3",
        "apply_b_dec_to_input": "transcoder" not in kind,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if hook_name.endswith("hook_z") else "none",
        "metadata": metadata,
        **own,
    }


def made(kind: str, d_in: int, d_sae: int = 23, *, seed: int = 0, **fields: Any) -> Any:
    """Make an SAE with drawn weights; give it and its weights."""
    weights = weights_of(kind, d_in, d_sae, d_out=fields.get("d_out"), seed=seed)
    cfg = lens.saes.SaeConfig(architecture=kind, d_in=d_in, d_sae=d_sae, dtype=torch.float64, **fields)
    return lens.saes.SparseAutoencoder(cfg, weights), weights


def handmade(
    sae: Any, weights: dict[str, Tensor], kept: dict[str, Tensor] | None = None, *, error: bool = False
) -> Any:
    """Give an edit for a golden forward: the SAE by hand; `kept` gets its values, with their gradients."""
    fields = {"architecture": sae.cfg.architecture, "k": sae.cfg.k}

    def edit(value: Tensor, hook: Any) -> Tensor:
        flat = value.flatten(2)
        parts = by_hand(fields, weights, flat)
        acts = parts["acts_post"] * 1
        recons = acts @ weights["W_dec"] + weights["b_dec"]
        result = recons + (flat - parts["recons"]) if error else recons
        if kept is not None:
            kept.update(parts, acts_post=acts, recons=recons)
            for one in kept.values():
                if one.requires_grad:
                    one.retain_grad()
        return result.view(value.shape)

    return edit
