"""What an architecture plugin says about itself, before any of its heavy code is imported.

A plugin's top module builds `Architecture` records and nothing else. Building one checks nothing: whether the record
holds what it should is asked by `find_problems`, after the versions have been compared, so that a plugin written for
another version of this protocol is told so, and not that some field is odd.
"""

import enum
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import TypeAlias

import attrs
from packaging.specifiers import InvalidSpecifier, SpecifierSet

API_VERSION = 1
"""Version of the plugin protocol that this core speaks.

One integer. It grows when a plugin written for the old protocol would no longer work, a new member of `Capability`
included, and a plugin serves only if its own number equals it. What is added compatibly does not change it: a plugin
that needs the addition asks for a newer lens-core among its distribution's requirements.
"""


class Support(enum.Enum):
    """How far an architecture has a capability."""

    FULL = "full"
    PARTIAL = "partial"
    ABSENT = "absent"


class Capability(enum.Enum):
    """What an architecture may be able to do; a plugin gives every member a value."""

    ATTENTION_PATTERN = "attention_pattern"
    """Attention scores and patterns can be read and edited."""
    SSM_STATE = "ssm_state"
    """The states of a state-space layer can be read and edited at every position."""
    POSITION_EMBEDDING = "position_embedding"
    """Positions are embedded and added to the residual stream (`hook_pos_embed`)."""
    PER_HEAD = "per_head"
    """Each head's query, key and value inputs and its result can be read and edited on their own."""
    GENERATE = "generate"
    """Text is generated with hooks live at every step."""
    LEFT_PADDING = "left_padding"
    """Padding on the left changes no value at a valid position."""
    WEIGHT_VIEWS = "weight_views"
    """Weights are given in TransformerLens' layout (`W_Q`, `W_in`, ...)."""
    DEVICE_MAP = "device_map"
    """Hooks work when accelerate spreads the model over devices or offloads it."""
    GRADIENTS = "gradients"
    """Gradients at hook points are true, and backward hooks fire."""
    GRADIENT_CHECKPOINTING = "gradient_checkpointing"
    """Hooks work while the blocks are recomputed during backward."""
    TORCH_COMPILE = "torch_compile"
    """Hooks work on a model that went through `torch.compile`."""


@attrs.frozen
class CapabilitySupport:
    """How far a capability is there, and why it is not there in full.

    Attributes:
        support: The extent.
        reason: Why not `Support.FULL`; empty when it is.
    """

    support: Support
    reason: str = ""


Declared: TypeAlias = Support | tuple[Support, str] | CapabilitySupport
"""What a plugin writes for a capability: `Support.FULL`, or `(Support.ABSENT, "why")`."""


def _to_capabilities(declared: Mapping[Capability, Declared]) -> Mapping[Capability, CapabilitySupport]:
    def to_record(value: Declared) -> CapabilitySupport:
        if isinstance(value, tuple):
            return CapabilitySupport(*value)
        return value if isinstance(value, CapabilitySupport) else CapabilitySupport(value)

    return MappingProxyType({capability: to_record(value) for capability, value in declared.items()})


def _to_names(names: Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


@attrs.frozen(kw_only=True)
class Architecture:
    """What a plugin provides for some HF model types.

    Attributes:
        name: What people call the architecture, for example `GPT-2`.
        model_types: The HF `model_type`s it serves.
        api_version: The `API_VERSION` it was written for. Write the number: a plugin that passes `API_VERSION` on would
            claim to fit every core.
        transformers: The transformers releases it was tested with, as a version specifier: `">=5.20,<6"`.
        implementation: `"package.module:attribute"`, imported when a model of this architecture is first loaded.
        capabilities: A value for every `Capability`: `Support.FULL`, or the support and the reason why it is not full.
        config_handled: Fields of the HF config class that the implementation takes into account.
        config_ignored: Fields that change nothing in what it declares. A field in neither, at another value than its
            default, refuses to load.
        toy: The toy checkpoint's folder, relative to the plugin's top package; None where there is none.
    """

    name: str
    model_types: tuple[str, ...] = attrs.field(converter=_to_names)
    api_version: int
    transformers: str
    implementation: str
    # Not hashable, so left out of the hash that a frozen record has.
    capabilities: Mapping[Capability, CapabilitySupport] = attrs.field(converter=_to_capabilities, hash=False)
    config_handled: tuple[str, ...] = attrs.field(converter=_to_names)
    config_ignored: tuple[str, ...] = attrs.field(converter=_to_names, default=())
    toy: str | None = None


def find_problems(architecture: Architecture) -> list[str]:
    """Say everything that is wrong with a descriptor; nothing when it is sound.

    Versions are not looked at: they are compared before.
    """
    return [
        *_problems_of_names(architecture),
        *_problems_of_capabilities(architecture.capabilities),
        *_problems_of_config(architecture),
    ]


def _problems_of_names(architecture: Architecture) -> Iterator[str]:
    if not architecture.model_types or not all(architecture.model_types):
        yield f"model_types is {architecture.model_types!r}; name at least one HF model type"
    if not re.fullmatch(r"[\w.]+:\w+", architecture.implementation):
        yield f"implementation is {architecture.implementation!r}; write it as 'package.module:attribute'"
    try:
        SpecifierSet(architecture.transformers)
    except InvalidSpecifier:
        yield f"transformers is {architecture.transformers!r}; write a version specifier such as '>=5.20,<6'"
    if architecture.toy is not None:
        toy = PurePosixPath(architecture.toy)
        if toy.is_absolute() or ".." in toy.parts:
            yield f"toy is {architecture.toy!r}; name a folder inside the plugin's package"


def _problems_of_capabilities(capabilities: Mapping[Capability, CapabilitySupport]) -> Iterator[str]:
    missing = [capability.name for capability in Capability if capability not in capabilities]
    if missing:
        yield f"capabilities has no value for {', '.join(missing)}"
    for capability, given in capabilities.items():
        if given.support is not Support.FULL and not given.reason:
            yield f"capability {capability.name} is {given.support.name} without a reason"


def _problems_of_config(architecture: Architecture) -> Iterator[str]:
    both = sorted(set(architecture.config_handled) & set(architecture.config_ignored))
    if both:
        yield f"config fields {', '.join(both)} are both handled and ignored"
