"""Mamba, Falcon-Mamba and Mamba-2 as subjects of the law suite."""

from typing import Any

import pytest
from families.subject import Subject
from golden.tiny_ssm import tiny_ssm
from lens_conformance.golden import mamba, mamba2

KINDS = ("mamba", "falcon_mamba", "mamba2")
WHOLE = ("hook_in_proj", "hook_gate", "hook_conv_in", "hook_conv", "hook_x_proj", "hook_gated", "inner_norm.hook_scale")


def builder(kind: str, **given: Any) -> Any:
    """Give the builder of a kind; nothing in an SSM asks how attention is implemented."""

    def build(*, attn: str = "eager", seed: int = 0, **config: Any) -> Any:
        return tiny_ssm(kind, seed=seed, **{**given, **config})

    return build


def selective_sizes(config: Any) -> dict[str, int]:
    """Give the size of every axis of a Mamba."""
    return {
        "d_model": config.hidden_size,
        "d_inner": config.intermediate_size,
        "d_state": config.state_size,
        "dt_rank": config.time_step_rank,
        "d_vocab": config.vocab_size,
    }


def dual_sizes(config: Any) -> dict[str, int]:
    """Give the size of every axis of a Mamba-2."""
    return {
        "d_model": config.hidden_size,
        "d_inner": config.num_heads * config.head_dim,
        "d_state": config.state_size,
        "n_heads": config.num_heads,
        "head_dim": config.head_dim,
        "n_groups": config.n_groups,
        "d_vocab": config.vocab_size,
    }


def is_state(name: str) -> bool:
    """Tell whether a name's function is called once per position."""
    return name.endswith("hook_ssm_state")


def channel_axis(name: str) -> int | None:
    """Give the axis of channels (Mamba) or heads and groups (Mamba-2) of what a scan reads and gives."""
    return 2 if ".mixer." in name and not name.endswith(WHOLE) else None


def subject(
    name: str, oracle: Any, kind: str, plugin: str, *, paddings: tuple[str, ...] = ("left", "right"), **given: Any
) -> Subject:
    """Make the record of a model type, or of a variant of it."""
    light = given.pop("light", False)
    return Subject(
        name=name,
        plugin=plugin,
        build=builder(kind, **given),
        light=light,
        golden=oracle.golden,
        names=oracle.names,
        is_starred=oracle.is_starred,
        sizes=dual_sizes if kind == "mamba2" else selective_sizes,
        implementations=("eager",),
        full=name == kind,
        per_position=is_state,
        head_axis=channel_axis,
        chunks=kind == "mamba2",  # HF's Mamba starts its scan from zero in every call of several positions
        paddings=paddings,
    )


SUBJECTS = [
    subject("mamba", mamba, "mamba", "lens_mamba"),
    subject("falcon_mamba", mamba, "falcon_mamba", "lens_mamba"),
    subject("mamba2", mamba2, "mamba2", "lens_mamba2"),
    # Biases in every projection, none in the convolution, width 3; one group for all heads, steps within limits.
    # HF lets a bias of in_proj in at padding, and leaves limits out of decoding: lens refuses both.
    subject(
        "mamba-biased",
        mamba,
        "mamba",
        "lens_mamba",
        paddings=(),
        use_bias=True,
        use_conv_bias=False,
        conv_kernel=3,
    ),
    subject(
        "mamba2-limited",
        mamba2,
        "mamba2",
        "lens_mamba2",
        light=True,
        paddings=(),
        use_bias=True,
        n_groups=1,
        time_step_limit=(0.3, 0.9),
    ),
]

ssm = pytest.mark.subjects.with_args(lambda one: one.name in KINDS)
"""For tests of what only state space models have: every kind of them."""
brief_ssm = pytest.mark.subjects.with_args(lambda one: one.name in ("mamba", "mamba2"))
"""The same for tests that take long: Falcon-Mamba differs from Mamba in three norms only."""
dual = pytest.mark.subjects.with_args(lambda one: one.name == "mamba2")
