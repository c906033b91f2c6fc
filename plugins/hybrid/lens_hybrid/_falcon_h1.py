"""Falcon-H1: attention and a Mamba-2 mixer side by side, and factors outside of modules nearly everywhere.

Source: transformers `models/falcon_h1/modeling_falcon_h1.py`. Weights are given with the factors that HF applies to
what they are given or give (`W_Q` with `attention_in_multiplier`, `W_in_proj` with `ssm_in_multiplier` and
`ssm_multipliers`, `W_gate` with `mlp_multipliers`), so that the contract's equations hold with them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from lens_mamba2.mixer import KERNEL, SCAN, in_columns, scan_step
from torch import Tensor

from lens_core.errors import UnsupportedHookError
from lens_core.plugin import (
    RMS_NORM,
    Attention,
    Columns,
    Declaration,
    Decoder,
    HookPoint,
    MixerCall,
    MixerKernel,
    Mlp,
    ModuleCall,
    ModuleInput,
    NormPlace,
    Projection,
    WeightView,
    declare,
    head_input_points,
    loaded,
    point,
    with_gradient_of,
)
from lens_hybrid._mixers import dual
from lens_hybrid._side_by_side import SideBySide

__all__ = ["FalconH1"]

BLOCK = "model.layers.{layer}"


def FalconH1(config: Any) -> Declaration:
    """Declare Falcon-H1 at one HF config."""
    declared = declare(_decoder(config), config)
    factors = {
        "hook_mixer_out": config.ssm_out_multiplier,
        "hook_attn_out": config.attention_out_multiplier,
        "hook_mlp_out": config.mlp_multipliers[1],
    }
    weights = tuple(_with_factors(view, config) for view in declared.weights)
    return attrs.evolve(declared, branch_factor=factors, weights=weights)


def _decoder(config: Any) -> Decoder:
    low, high = config.time_step_limit
    norm = "none" if not config.mamba_rms_norm else "before" if config.mamba_norm_before_gate else "after"
    mixer = dual(
        config,
        "mamba",
        range(config.num_hidden_layers),
        has_bias=config.mamba_proj_bias,
        limit=(float(low), float(high)),
        norm=norm,
        kernel=FALCON,
    )
    return Decoder(
        **mixer,
        final_norm="final_layernorm",
        ln2="pre_ff_layernorm",
        mlp=Mlp(path="feed_forward"),
        branches=lambda layer: ("mixer", "attn", "mlp"),
        embed_scale=config.embedding_multiplier,
        embed_at="block",
        logit_scale=config.lm_head_multiplier,
        block_values=1,
        own=partial(_own, config),
    )


def _own(config: Any, layer: int) -> Iterator[HookPoint]:
    """Give the places that a factor outside of any module moves."""
    block, here = BLOCK.format(layer=layer), partial(point, layer=layer)
    attention, keys = f"{block}.self_attn", config.key_multiplier
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    places = {
        part: Projection(
            path=f"{attention}.{part}_proj",
            columns=Columns(heads=count),
            in_scale=config.attention_in_multiplier,
            out_scale=keys if part == "k" else 1.0,
        )
        for part, count in heads.items()
    }
    norm = NormPlace(path=f"{BLOCK}.input_layernorm", kind=RMS_NORM)
    yield from head_input_points(attention, places, layer=layer, norm=norm, has_rotary=True)
    equation = "k times key_multiplier, rotated by position"
    yield here("attn.hook_rot_k", Attention(path=attention, part="k"), equation=equation)
    branches = (
        ("hook_mixer_out", f"{block}.mamba", config.ssm_out_multiplier),
        ("hook_attn_out", attention, config.attention_out_multiplier),
    )
    parts = tuple((path, factor) for _, path, factor in branches)
    for index, (name, _, _) in enumerate(branches):
        seam = SideBySide(parts=parts, index=index, block=block, sum_at=f"{block}.pre_ff_layernorm")
        yield here(name, seam)
    pre = ModuleInput(path=f"{block}.feed_forward.act_fn")
    yield here("mlp.hook_pre", pre, equation="mlp.in W_gate + b_gate")


# ---------------------------------------------------------------------- weights


def _with_factors(view: WeightView, config: Any) -> WeightView:
    """Give a view with the factors that HF applies to what the module is given or gives."""
    if view.name in ("W_Q", "W_K", "W_V"):
        return attrs.evolve(view, function=_times(config.attention_in_multiplier))
    if view.name in ("W_gate", "b_gate"):
        return attrs.evolve(view, function=_times(config.mlp_multipliers[0]))
    if view.name in ("W_in_proj", "b_in_proj"):
        on_input = config.ssm_in_multiplier if view.name == "W_in_proj" else 1.0
        return attrs.evolve(view, function=_times(_of_columns(config) * on_input))
    return view


def _times(factor: float | Tensor) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight * (factor if isinstance(factor, float | int) else factor.to(weight))


def _of_columns(config: Any) -> Tensor:
    """Give `ssm_multipliers` for each column of in_proj: z, x, B, C and dt."""
    inner, shared = config.mamba_n_heads * config.mamba_d_head, config.mamba_n_groups * config.mamba_d_state
    widths = torch.tensor([inner, inner, shared, shared, config.mamba_n_heads])
    return torch.tensor(config.ssm_multipliers, dtype=torch.float64).repeat_interleave(widths)


# ---------------------------------------------------------------------- the mixer


def in_projection(call: MixerCall, module: ModuleCall) -> None:
    """After in_proj: `[z | xBC | dt]` times `ssm_multipliers`, which HF applies after the module.

    What a function replaced goes back over the factor, so in half precision its last bit may differ.
    """
    if not call.watched("in_proj", "gate", "conv_in"):
        return
    own, factors = module.result, call.module.mup_vector
    scaled = own * factors
    new = call.passed_columns(scaled, in_columns(call.module))
    if new is scaled:
        return
    if call.edited("in_proj", "gate", "conv_in") and bool((factors == 0).any()):
        raise UnsupportedHookError("one of this checkpoint's ssm_multipliers is 0: nothing before it can be replaced")
    back = (new / factors).to(own.dtype)
    module.result = with_gradient_of(back, torch.where(new == scaled, own, back))


def gated_norm(call: MixerCall, module: ModuleCall) -> None:
    """After the norm of groups, which comes before the gate or after it."""
    if not call.watched("inner_norm"):
        return
    norm: Any = module.module
    x, gate = module.args
    with torch.set_grad_enabled(call.needs_graph("inner_norm")), loaded(norm):
        gates = F.silu(gate.float())
        read = x.float() if norm.norm_before_gate else x.float() * gates
        grouped = read.unflatten(-1, (norm.n_groups, -1))
        scale = call.fire("inner_norm", (grouped.pow(2).mean(-1) + norm.variance_epsilon).sqrt())
        if not call.changed("inner_norm"):
            return
        explicit = norm.weight.to(x.device) * (grouped / scale[..., None]).flatten(-2)
        explicit = (explicit * gates if norm.norm_before_gate else explicit).to(x.dtype)
    module.result = explicit if call.edited("inner_norm") else with_gradient_of(explicit, module.result)


def step(call: MixerCall, original: Any, *args: Any, z: Tensor | None, **options: Any) -> Tensor:
    """mamba2_selective_state_update: without a norm HF gates inside of it, and outside of the chunk scan."""
    if z is None or not call.watched(*SCAN):
        return scan_step(call, original, *args, z=z, **options)
    return scan_step(call, original, *args, z=None, **options) * F.silu(z)


FALCON = MixerKernel(
    functions={**KERNEL.functions, "mamba2_selective_state_update": step},
    modules={**KERNEL.modules, ("in_proj", "post"): in_projection, ("norm", "post"): gated_norm},
)
