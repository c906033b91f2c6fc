"""Edges cut by hand: sums over writers, written out on the golden forwards in float64."""

import torch
from analysis.circuit_subject import OTHER, TOKENS

from lens_core.analysis.graph import graph

GOLDEN = ("gpt2", "llama", "stablelm-parallel", "granite", "gemma2", "olmo2", "mamba", "mamba2")
KIT = ("phi", "falcon_h1", "jamba", "nemotron_h")


def random_mask(found, seed=0, share=0.5):
    """Keep about this share of the edges."""
    draw = torch.rand(found.mask.shape, generator=torch.Generator().manual_seed(seed))
    return (draw < share) & found.mask


# ---------------------------------------------------------------------- the oracle


def written(one, label, values):
    """Say what a writer, or a bias behind a post-norm, adds, from a golden forward's values so far."""
    if label in ("embed", "pos_embed"):
        return values[f"hook_{label}"]
    layer = int(label[1])
    block = f"blocks.{layer}."
    if label.endswith((".mlp", ".mixer")):
        return values[f"{block}hook_{label.split('.')[1]}_out"]
    weights = one.hf.state_dict()
    if one.name == "mamba2":
        head = slice(11 * int(label[3:]), 11 * int(label[3:]) + 11)
        rows = weights[f"backbone.layers.{layer}.mixer.out_proj.weight"].T[head]
        return values[f"{block}mixer.hook_gated"][..., head] @ rows
    if label.endswith("bias"):
        result = weights[f"model.layers.{layer}.self_attn.o_proj.bias"]
    else:
        result = values[f"{block}attn.hook_result"][:, :, int(label[3:])]
    if one.name in ("gemma2", "olmo2"):
        gain = weights[f"model.layers.{layer}.post_attention_layernorm.weight"]
        return result / values[f"{block}ln1_post.hook_scale"] * (gain + (one.name == "gemma2"))
    return result * getattr(one.hf.config, "residual_multiplier", 1.0)


def by_hand(one, keep, source, tokens=TOKENS):
    """Run the golden forward with each cut edge's writer swapped at each reader, one edge after the other.

    `source` gives what stands for a writer, by label; None leaves a bias as it is.
    """
    found = graph(one.model)
    values, edits = {}, {}

    def record(x, hook):
        values[hook.name] = x.clone()

    for name in found.writer_names:
        edits[name.replace("hook_z", "hook_result")] = record
    scaled = one.name in ("gemma2", "olmo2")
    biased = scaled and "model.layers.0.self_attn.o_proj.bias" in one.hf.state_dict()

    def read(x, hook):
        for column, reader in enumerate(found.readers):
            if reader.hook != hook.name:
                continue
            view = x if reader.head is None else x[:, :, reader.head]
            change = torch.zeros_like(view)
            for row, writer in enumerate(found.before(reader)):
                cut = 1 - float(keep[row, column])
                if cut:
                    change = change + cut * (source(writer.label) - written(one, writer.label, values))
            for layer in {writer.layer for writer in found.before(reader) if biased and writer.kind == "attn"}:
                rows = [row for row, w in enumerate(found.writers) if w.layer == layer and w.kind == "attn"]
                cut = sum(1 - float(keep[row, column]) for row in rows) / len(rows)
                label = f"L{layer}.attn.bias"
                if source(label) is not None:
                    change = change + cut * (source(label) - written(one, label, values))
            view += change
        return x

    edits |= dict.fromkeys(found.reader_names, read)
    return one.golden(tokens, edits)[0]


def resampled(one, tokens=OTHER):
    """Give the source of resampling."""
    _, values = one.golden(tokens)
    return lambda label: written(one, label, values)
