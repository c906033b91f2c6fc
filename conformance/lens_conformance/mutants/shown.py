"""Breaks of what a place shows: the model runs as it should, and the value at a name is another one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_conformance.family import Family
from lens_conformance.mutants import mutant
from lens_conformance.mutants.core import around
from lens_core import _softmax
from lens_core._watch import Watch

Patch = pytest.MonkeyPatch


def shows(patch: Patch, ends: str | tuple[str, ...], change: Callable[[Tensor], Tensor]) -> None:
    """Show another value at some names; where no function edits it, the model goes on with its own."""

    def other(fire: Any, self: Any, value: Tensor, **options: Any) -> Tensor:
        if not self.name.endswith(ends):
            return fire(self, value, **options)
        shown = change(value)
        new = fire(self, shown, **options)
        return value if new is shown else new

    around(patch, Watch, "fire", other)


@mutant("heads are shown in the reverse order", killers=("values", "equations"), needs=("attn.hook_z",))
def heads_are_reversed(patch: Patch, family: Family) -> None:
    shows(patch, "attn.hook_z", lambda z: z.flip(2) * torch.linspace(1, 1.5, z.shape[2], dtype=z.dtype)[:, None])


@mutant("keys and values are repeated group after group", killers=("values",), needs=("attn.hook_v_rep",))
def groups_are_repeated_in_the_wrong_order(patch: Patch, family: Family) -> None:
    def other(values: Tensor) -> Tensor:
        kept = [values[:, :, 0]]
        for head in values.unbind(2):
            if not torch.equal(head, kept[-1]):
                kept.append(head)
        return torch.stack(kept, dim=2).repeat(1, 1, values.shape[2] // len(kept), 1)

    shows(patch, ("attn.hook_v_rep", "attn.hook_k_rep"), other)


@mutant("rotated queries are those of the position before", killers=("values",), needs=("attn.hook_rot_q",))
def rotation_is_off_by_one(patch: Patch, family: Family) -> None:
    shows(patch, "attn.hook_rot_q", lambda q: q.roll(1, dims=1) * 1.01)


@mutant("the pattern is shifted by a key", killers=("values", "equations"), needs=("attn.hook_pattern",))
def the_pattern_is_shifted(patch: Patch, family: Family) -> None:
    around(
        patch,
        _softmax,
        "_fire_pattern",
        lambda fire, watch, pattern, *rest: fire(watch, pattern.roll(1, -1) * 0.9, *rest),
    )


@mutant("a nonlinearity is shown bent", killers=("values", "equations"), needs=("mlp.hook_post",))
def activations_are_linear(patch: Patch, family: Family) -> None:
    shows(patch, "mlp.hook_post", lambda x: x + 0.05 * x.abs())


@mutant(
    "what a branch adds is shown a little larger",
    killers=("residual", "decompositions", "values"),
    needs=("hook_mlp_out", "hook_mixer_out"),
)
def branches_are_scaled(patch: Patch, family: Family) -> None:
    shows(patch, ("hook_mlp_out", "hook_mixer_out"), lambda x: x * 1.01)


@mutant(
    "a norm's output is shown before its gain",
    killers=("values", "equations", "weights"),
    needs=("ln1.hook_out", "norm.hook_out"),
)
def norms_lack_their_gain(patch: Patch, family: Family) -> None:
    shows(patch, ("ln1.hook_out", "norm.hook_out"), lambda x: x / x.square().mean(-1, keepdim=True).sqrt())


@mutant("the convolution is shown shifted by a position", killers=("values",), needs=("mixer.hook_conv",))
def the_convolution_is_shifted(patch: Patch, family: Family) -> None:
    shows(patch, "mixer.hook_conv", lambda x: x.roll(1, dims=1) * 1.01)


@mutant("step sizes are shown without the bias of dt", killers=("values",), needs=("mixer.hook_delta",))
def steps_lack_their_bias(patch: Patch, family: Family) -> None:
    shows(patch, "mixer.hook_delta", lambda x: torch.nn.functional.softplus(torch.special.expm1(x).log() - 0.3))


@mutant("C is shown without its scale", killers=("effective_attention", "values"), needs=("mixer.hook_C",))
def C_is_scaled(patch: Patch, family: Family) -> None:
    shows(patch, "mixer.hook_C", lambda x: x * 1.1)


@mutant("the output of the scan is shown without the skip D", killers=("values",), needs=("mixer.hook_ssm_output",))
def the_skip_is_dropped(patch: Patch, family: Family) -> None:
    shows(patch, "mixer.hook_ssm_output", lambda x: x * 0.8)


@mutant("all values are noise, edits do nothing, and the logits are HF's own", killers=("values", "liveness"))
def a_plugin_that_lies(patch: Patch, family: Family) -> None:
    def lie(fire: Any, self: Any, value: Tensor, **options: Any) -> Tensor:
        noise = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape)
        fire(self, noise.to(value.dtype) if value.is_floating_point() else value, **options)
        self.edited = self.rerouted = False
        return value

    around(patch, Watch, "fire", lie)
    patch.setattr(Watch, "fire_position", lambda self, position, value, **options: value)
