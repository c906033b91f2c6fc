"""Before all others: the tiny model runs, lens loads it, and the tables say what the module tree is."""

from typing import Any

import torch

from lens_conformance.case import Case
from lens_conformance.checks import check
from lens_conformance.oracle import Pair, new_pair, tiny_model
from lens_conformance.report import place_of
from lens_core._contract import CONTRACT
from lens_core._registry import active_registry
from lens_core.plugin import Capability, Support


@check(0, "HF's own model runs at the tiny config, lens loads it, and every name can be read", judge="hf", share=0.05)
def runs(case: Case) -> None:
    """The first thing to mend: without it, every other check would fail for the same reason."""
    family, ids = case.family, case.tokens(min_pos=3)
    try:
        hf = tiny_model(family, {})
        with torch.no_grad():
            hf(ids, use_cache=False)
    except Exception as error:
        raise AssertionError(
            f"HF's own {family.model_type} does not run at this config, without lens: {type(error).__name__}: {error}; "
            f"see Family.config: {dict(family.config)}"
        ) from error
    try:
        one = new_pair(family)
        with torch.no_grad():
            one.model.run_with_cache(ids, names_filter=list(one.model.table))
    except Exception as error:
        raise AssertionError(
            f"HF's model runs, and lens does not load it or read it: {type(error).__name__}: {error}{place_of(error)}"
        ) from error


@check(0, "the declaration says what the module tree is", judge="hf", share=0.2)
def declaration(case: Case) -> None:
    """Sizes, norms, writers, weights, and which names a block of its kind must have."""
    one = case.pair(is_own=True)
    declared, cfg, table = one.model.declaration, one.model.cfg, one.model.table
    embedding = one.hf.get_submodule(declared.embed).weight
    for size, is_there in (("d_vocab", embedding.shape[0]), ("d_model", embedding.shape[1])):
        assert getattr(cfg, size) == is_there, (
            f"cfg.{size} is {getattr(cfg, size)}, and {declared.embed} has {is_there}"
        )
    for name in declared.embeddings:
        assert name in table, f"embeddings name {name!r}, and the table does not"
    for layer in range(cfg.n_layers):
        _block_is_whole(one, layer)
    for name, place in declared.norms.items():
        for layer in range(cfg.n_layers) if "{layer}" in place.path else (None,):
            _norm_is(one, name, place.kind, place.path.format(layer=layer))
    for view in declared.weights:
        layers = (view.layers or range(cfg.n_layers)) if view.per_layer else (None,)
        for layer in layers:
            assert one.model.weight(view.name, layer).numel(), f"{view.name} of block {layer} is empty"


# what every block has that has the name which shows its kind
_WHOLE = {
    "hook_attn_out": ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern", "attn.hook_z", "attn.hook_out"),
    "hook_mlp_out": ("mlp.hook_in", "mlp.hook_out"),
    "hook_mixer_out": (
        *("mixer.hook_in_proj", "mixer.hook_gate", "mixer.hook_conv_in", "mixer.hook_conv", "mixer.hook_ssm_input"),
        *("mixer.hook_B", "mixer.hook_C", "mixer.hook_delta_pre", "mixer.hook_delta", "mixer.hook_decay"),
        *("mixer.hook_ssm_write", "mixer.hook_ssm_state", "mixer.hook_y", "mixer.hook_ssm_output", "mixer.hook_gated"),
    ),
    "mlp.hook_router_logits": ("mlp.hook_expert_weights", "mlp.hook_expert_indices"),
}
_DENSE = ("mlp.hook_pre", "mlp.hook_post")


def _lacks(one: Pair, own: set[str], at: str) -> list[str]:
    """List the names of the contract that a block of this kind must have and has not."""
    wanted = [name for shows, names in _WHOLE.items() if shows in own for name in names]
    if "hook_mlp_out" in own and "mlp.hook_router_logits" not in own:
        wanted += [*_DENSE, *(["mlp.hook_pre_linear"] if one.model.cfg.gated_mlp else [])]
    if "hook_mlp_out" in own and getattr(one.model.table[f"{at}hook_mlp_out"].seam, "beside", None) is not None:
        wanted.remove("mlp.hook_out")  # the block sums two modules, and none returns what the MLP does
    branch = {"ln1": "hook_attn_out", "ln2": "hook_mlp_out", "norm": "hook_mixer_out"}
    for norm, place in one.model.declaration.norms.items():
        parts = {f"{norm}.hook_{part}" for part in ("scale", "normalized", "out")}
        if "{layer}" in place.path and (own & parts or branch.get(norm) in own):
            wanted += sorted(parts)
    declared = active_registry().resolve(one.family.model_type).capabilities
    if declared[Capability.ATTENTION_PATTERN].support is Support.ABSENT:
        wanted = [name for name in wanted if name != "attn.hook_pattern"]
    if declared[Capability.SSM_STATE].support is Support.ABSENT:
        wanted = [name for name in wanted if not name.startswith("mixer.")]
    return [name for name in wanted if name not in own]


def _block_is_whole(one: Pair, layer: int) -> None:
    cfg, at = one.model.cfg, f"blocks.{layer}."
    own = {name.removeprefix(at) for name in one.model.table if name.startswith(at)}
    missing = sorted(set(one.model.declaration.writers) - own)
    is_mixer = "hook_mixer_out" in own
    assert len(missing) < len(one.model.declaration.writers), f"block {layer} has none of its writers {missing}"
    assert {"hook_resid_pre", "hook_resid_post"} <= own, f"block {layer} lacks hook_resid_pre or hook_resid_post"
    lacks = _lacks(one, own, at)
    assert not lacks, f"block {layer} lacks {', '.join(lacks)}, which the contract gives every block of its kind"
    if not is_mixer and "hook_mlp_out" in own and "hook_attn_out" in own:
        is_parallel = "hook_resid_mid" not in own
        assert is_parallel == cfg.parallel_attn_mlp, (
            f"cfg.parallel_attn_mlp is {cfg.parallel_attn_mlp}, and block {layer} has "
            f"{'no ' if is_parallel else ''}hook_resid_mid"
        )
    is_grouped = cfg.n_key_value_heads not in (None, cfg.n_heads)
    if is_grouped and "attn.hook_k" in own:
        wanted = {"attn.hook_k_rep", "attn.hook_v_rep"}
        assert wanted <= own, f"block {layer} has grouped heads and lacks {sorted(wanted - own)}"
    inside = (*(f"{norm}.hook_" for norm in one.model.declaration.norms), "mixer.", "attn.q_norm", "attn.k_norm")
    odd = sorted(name for name in own if name not in CONTRACT and not name.startswith(inside))
    assert not odd, f"block {layer} has names that the contract does not know and no declared norm explains: {odd[:5]}"


def _norm_is(one: Pair, name: str, kind: Any, path: str) -> None:
    module = one.hf.get_submodule(path)
    x = torch.randn(3, one.model.cfg.d_model, dtype=one.dtype)
    with torch.no_grad():
        centres = torch.allclose(module.forward(x + 3), module.forward(x), rtol=0, atol=0.1)
    assert kind.centres == centres, f"{name} is declared {kind.name}, and {path} is {type(module).__name__}"
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    gain = getattr(module, "weight", None)
    if eps is not None and (gain is None or tuple(gain.shape) == (one.model.cfg.d_model,)):
        assert eps == one.model.cfg.eps, f"cfg.eps is {one.model.cfg.eps}, and {path}, the norm {name}, has {eps}"
