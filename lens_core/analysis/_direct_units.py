"""The units of direct logit attribution: what the parts are, and how each is measured along one direction."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens_core._components import onward_of
from lens_core._decomposition import Decomposition, model_of, norm_at, read_values
from lens_core.analysis.ssm_tokens import mixer_tokens
from lens_core.errors import ArgumentError, CacheError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache
    from lens_core.model import LensModel

__all__ = ["UNITS", "check_unit", "read_parts", "unit_names"]

UNITS = ("component", "layer", "head", "neuron", "expert", "source")
_HEAD, _MIXER = re.compile(r"L\d+H\d+"), re.compile(r"(\d+)_mixer_out")
_EXPERTS = ("mlp.hook_expert_weights", "mlp.hook_expert_indices", "mlp.hook_expert_out")
_PARTS = {
    "head": ("attn.hook_z", "attention heads", "source"),
    "neuron": ("mlp.hook_post", "an MLP of single neurons", "component"),
    "expert": (_EXPERTS[-1], "experts", "component"),
}
"""What a unit is about: its hook point, in words, and what to take where no block has it."""
_NEEDS = {
    "head": ("attn.hook_z", "ln1_post.hook_scale"),
    "neuron": ("attn.hook_z", "ln1_post.hook_scale", "mlp.hook_post", "ln2_post.hook_scale"),
    "expert": (*_EXPERTS, "ln2_post.hook_scale"),
    "source": ("attn.hook_z", "ln1_post.hook_scale", "attn.hook_pattern", "attn.hook_v"),
}


def check_unit(model: "LensModel", unit: str) -> None:
    """See that there is such a unit, and that some block of the model has its parts.

    Raises:
        ArgumentError: There is not, or none has.
    """
    if unit not in UNITS:
        raise ArgumentError(f"unit is one of {', '.join(map(repr, UNITS))}; got {unit!r}")
    part, what, other = _PARTS.get(unit, ("", "", ""))
    if part and not any(point.part == part for point in model.table.values()):
        raise ArgumentError(f"no block of {model.architecture.name} has {what}; take unit={other!r}")


def unit_names(model: "LensModel", unit: str) -> list[str]:
    """Name the hook points that a unit needs, of those the model has."""
    declaration = model.declaration
    outside = {"hook_tokens", "ln_final.hook_scale", "unembed.hook_in", *declaration.embeddings}
    parts = {*declaration.writers, *_NEEDS.get(unit, ())}
    return [
        name
        for name, point in model.table.items()
        if (name in outside if point.layer is None else point.part in parts)
        or (unit == "source" and point.default and point.part.startswith("mixer."))
    ]


def read_parts(cache: "ActivationCache", onto: Tensor, unit: str, pos: list[int]) -> tuple[Tensor, list[str]]:
    """Measure the parts of the stream that enters the final norm, normalised as it did, along a direction.

    Args:
        cache: With a batch axis.
        onto: `[d_model]`, as `logit_directions` gives.
        unit: One of `UNITS`.
        pos: Indices along the cached axis.

    Returns:
        `[entry, batch, pos]`, by source `[entry, batch, source]`; and labels.
    """
    if unit in ("head", "neuron"):
        return _expanded(cache, onto, pos, neurons=unit == "neuron")
    if unit == "source":
        return _sources(cache, onto, pos[0])
    parts = Decomposition(cache, None, apply_ln=True, pos_slice=pos, project_output_onto=onto)
    parts.add_embeddings()
    if unit == "expert":
        _add_experts(parts)
    else:
        parts.add_writes(parts.writes())
    values, labels = parts.stacked(incl_remainder=False, return_labels=True)
    return _by_layer(values, labels) if unit == "layer" else (values, labels)


def _expanded(cache: "ActivationCache", onto: Tensor, pos: list[int], *, neurons: bool) -> tuple[Tensor, list[str]]:
    return cache.get_full_resid_decomposition(
        expand_neurons=neurons, apply_ln=True, pos_slice=pos, return_labels=True, project_output_onto=onto
    )


def _by_layer(values: Tensor, labels: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Sum what each block added."""
    groups = [f"L{label.partition('_')[0]}" if label[0].isdigit() else label for label in labels]
    names = list(dict.fromkeys(groups))
    index = torch.tensor([names.index(group) for group in groups], device=values.device)
    return values.new_zeros(len(names), *values.shape[1:]).index_add(0, index, values), names


def _add_experts(parts: Decomposition) -> None:
    """Take everything that was written, with mixtures as their experts and what is left of them."""
    table = parts.cache.table
    for layer, writer in parts.writes():
        names = [f"blocks.{layer}.{name}" for name in _EXPERTS]
        if writer != "hook_mlp_out" or any(name not in table for name in names):
            parts.add_writes([(layer, writer)])
            continue
        weights, indices = parts.values(*names[:2])
        (out,) = parts.values(names[2], axis=-3)
        onward = onward_of(parts, layer, "hook_mlp_out")
        chosen = parts.measure.part(onward.rows(out).movedim(-2, 0))  # k batch pos 1
        chosen = onward.scaled(chosen) * weights.movedim(-1, 0)[..., None].to(chosen)
        n_experts = model_of(parts.cache).cfg.n_experts or int(indices.max()) + 1
        experts = chosen.new_zeros(n_experts, *chosen.shape[1:])
        experts.scatter_add_(0, indices.long().movedim(-1, 0)[..., None].to(chosen.device), chosen)
        (whole,) = parts.values(f"blocks.{layer}.{writer}")
        parts.add(experts, [f"L{layer}E{expert}" for expert in range(n_experts)])
        parts.add((parts.measure.part(whole) - experts.sum(0))[None], [f"{layer}_mlp_rest"])


def _sources(cache: "ActivationCache", onto: Tensor, target: int) -> tuple[Tensor, list[str]]:
    """Take heads and mixers apart by the position that they read from; the rest stands at the target."""
    whole, names = _expanded(cache, onto, [target], neurons=False)
    values, labels, at_target = list[Tensor](), list[str](), list[tuple[Tensor, str]]()
    parts = Decomposition(cache, None, apply_ln=True, pos_slice=[target], project_output_onto=onto)
    n_pos = cache["unembed.hook_in" if "unembed.hook_in" in cache else "ln_final.hook_out"].shape[1]
    for layer in range(cache.table.n_layers):
        if f"blocks.{layer}.attn.hook_z" in cache.table:
            heads = _head_sources(parts, layer, target)
            values.append(heads)
            labels += [f"L{layer}H{head}" for head in range(len(heads))]
    for value, name in zip(whole, names, strict=True):
        mixer = _MIXER.fullmatch(name)
        if mixer is not None:
            tokens = mixer_tokens(cache, int(mixer[1]), target, project_output_onto=_at_norm(cache, onto, target))
            values.append(tokens.values[None])
            labels.append(f"L{mixer[1]}")
            at_target.append((tokens.constant[:, None], f"{mixer[1]}_mixer_bias"))
        elif _HEAD.fullmatch(name) is None:
            at_target.append((value, name))
    others = whole.new_zeros(len(at_target), whole.shape[1], n_pos)
    for index, (value, name) in enumerate(at_target):
        others[index, :, target] = value[:, 0].to(others)
        labels.append(name)
    return torch.cat([*(value.to(others) for value in values), others]), labels


def _head_sources(parts: Decomposition, layer: int, target: int) -> Tensor:
    """Give what each head brought from each position, `[head, batch, source]`."""
    cache, prefix = parts.cache, f"blocks.{layer}.attn.hook_"
    given = "v_rep" if f"{prefix}v_rep" in cache else "v"
    pattern, v = read_values(cache, [f"{prefix}pattern", f"{prefix}{given}"])
    if pattern.shape[3] != v.shape[1] or pattern.shape[2] != pattern.shape[3]:
        raise CacheError(
            f"by source, the cache must hold all positions from the first on: the pattern of block {layer} has "
            f"{pattern.shape[2]} queries and {pattern.shape[3]} keys, and there are {v.shape[1]} values"
        )
    if cache.heads is not None:
        raise CacheError(f"by source, all heads are needed, and this cache has the patterns of heads {cache.heads}")
    onward = onward_of(parts, layer, "hook_attn_out")
    rows = parts.measure.rows(onward.rows(model_of(cache).weight("W_O", layer).detach()))  # head d_head 1
    v = v.repeat_interleave(len(rows) // v.shape[2], dim=2).to(rows)
    written = torch.einsum("bshe,hex->hbsx", v, rows)
    moved = written * pattern[:, :, target].movedim(1, 0)[..., None].to(rows)
    return onward.scaled(parts.measure.scaled(moved))[..., 0]


def _at_norm(cache: "ActivationCache", onto: Tensor, target: int) -> Tensor:
    """Give the direction whose dot product with a part is the part's share, for each row: centred, over the scale."""
    name, place = norm_at(cache, cache.table.n_layers, mlp_input=False)
    (scale,) = read_values(cache, [f"{name}.hook_scale"])
    onto = onto - onto.mean() if place.kind.centres else onto  # centring is symmetric: the same, done to the direction
    return onto / scale[:, target].to(onto)
