"""All that the author of an architecture plugin imports.

A plugin's top module is its descriptor: it implements `lens_architectures`, and importing it must import neither torch
nor transformers. Hence the names that the implementation needs, and that need torch, are loaded when they are touched.

Example:
    >>> from lens_core.plugin import Architecture, Capability, Support, hookimpl
    >>> @hookimpl
    ... def lens_architectures():
    ...     return [
    ...         Architecture(
    ...             name="Foo",
    ...             model_types=("foo",),
    ...             api_version=1,
    ...             transformers=">=5.20,<6",
    ...             implementation="lens_foo._architecture:Foo",
    ...             capabilities=dict.fromkeys(Capability, Support.FULL),
    ...             config_handled=("vocab_size", "hidden_size"),
    ...         )
    ...     ]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lens_core._descriptor import API_VERSION, Architecture, Capability, CapabilitySupport, Support
from lens_core._hookspecs import hookimpl

if TYPE_CHECKING:
    from lens_core._call import ModuleCall
    from lens_core._contract import point
    from lens_core._convolution import convolution, convolution_step
    from lens_core._declaration import CallInput, Declaration, LensConfig, NormPlace, NormReaders, WritingWeight
    from lens_core._decoder import Attn, Decoder, Mixer, Mlp, Moe, QkNorm
    from lens_core._decoder_weights import declare
    from lens_core._functions import Slot, function_slot
    from lens_core._graph import with_gradient_of
    from lens_core._mixer import InsideMixer, MixerCall, MixerKernel
    from lens_core._norms import LAYER_NORM, RMS_NORM, RMS_NORM_GAIN_FIRST, RMS_NORM_OFFSET, Gain, NormKind
    from lens_core._offload import loaded
    from lens_core._plan import ModuleStep, Run, SlotStep
    from lens_core._points import head_input_points, norm_points, projection_points, unembedding_points
    from lens_core._rotary import rotary_reach
    from lens_core._scan import INSIDE_SCAN, Scan, run_scan
    from lens_core._watch import Watch
    from lens_core.hook_points import HookPoint
    from lens_core.seams import (
        Attention,
        BranchInput,
        Columns,
        Embedding,
        ExpertOutput,
        HeadInput,
        HeadResult,
        HeadsFirst,
        ModuleInput,
        ModuleOutput,
        NormInside,
        Projection,
        Router,
        ScaledBranch,
        Seam,
        Tokens,
        Unembedding,
        View,
        Whole,
    )
    from lens_core.weights import WeightView, weight_and_bias

__all__ = [
    "API_VERSION",
    "INSIDE_SCAN",
    "LAYER_NORM",
    "RMS_NORM",
    "RMS_NORM_GAIN_FIRST",
    "RMS_NORM_OFFSET",
    "Architecture",
    "Attention",
    "Attn",
    "BranchInput",
    "CallInput",
    "Capability",
    "CapabilitySupport",
    "Columns",
    "Declaration",
    "Decoder",
    "Embedding",
    "ExpertOutput",
    "Gain",
    "HeadInput",
    "HeadResult",
    "HeadsFirst",
    "HookPoint",
    "InsideMixer",
    "LensConfig",
    "Mixer",
    "MixerCall",
    "MixerKernel",
    "Mlp",
    "ModuleCall",
    "ModuleInput",
    "ModuleOutput",
    "ModuleStep",
    "Moe",
    "NormInside",
    "NormKind",
    "NormPlace",
    "NormReaders",
    "Projection",
    "QkNorm",
    "Router",
    "Run",
    "ScaledBranch",
    "Scan",
    "Seam",
    "Slot",
    "SlotStep",
    "Support",
    "Tokens",
    "Unembedding",
    "View",
    "Watch",
    "WeightView",
    "Whole",
    "WritingWeight",
    "convolution",
    "convolution_step",
    "declare",
    "function_slot",
    "head_input_points",
    "hookimpl",
    "loaded",
    "norm_points",
    "point",
    "projection_points",
    "rotary_reach",
    "run_scan",
    "unembedding_points",
    "weight_and_bias",
    "with_gradient_of",
]

_LAZY = {  # name -> the module that defines it
    **dict.fromkeys(("Attn", "Decoder", "Mixer", "Mlp", "Moe", "QkNorm"), "lens_core._decoder"),
    "declare": "lens_core._decoder_weights",
    **dict.fromkeys(
        ("CallInput", "Declaration", "LensConfig", "NormPlace", "NormReaders", "WritingWeight"),
        "lens_core._declaration",
    ),
    **dict.fromkeys(
        ("LAYER_NORM", "RMS_NORM", "RMS_NORM_GAIN_FIRST", "RMS_NORM_OFFSET", "Gain", "NormKind"), "lens_core._norms"
    ),
    # For a seam of a plugin's own: an object with `group` and `steps`, as those of `lens_core.seams`.
    **dict.fromkeys(("ModuleStep", "Run", "SlotStep"), "lens_core._plan"),
    **dict.fromkeys(("Slot", "function_slot"), "lens_core._functions"),
    **dict.fromkeys(("InsideMixer", "MixerCall", "MixerKernel"), "lens_core._mixer"),
    **dict.fromkeys(("convolution", "convolution_step"), "lens_core._convolution"),
    **dict.fromkeys(("INSIDE_SCAN", "Scan", "run_scan"), "lens_core._scan"),
    "loaded": "lens_core._offload",
    "ModuleCall": "lens_core._call",
    "Watch": "lens_core._watch",
    "with_gradient_of": "lens_core._graph",
    **dict.fromkeys(
        (
            "Attention",
            "BranchInput",
            "Columns",
            "Embedding",
            "ExpertOutput",
            "HeadInput",
            "HeadResult",
            "HeadsFirst",
            "ModuleInput",
            "ModuleOutput",
            "NormInside",
            "Projection",
            "Router",
            "ScaledBranch",
            "Seam",
            "Tokens",
            "Unembedding",
            "View",
            "Whole",
        ),
        "lens_core.seams",
    ),
    "HookPoint": "lens_core.hook_points",
    "point": "lens_core._contract",
    "rotary_reach": "lens_core._rotary",
    **dict.fromkeys(
        ("head_input_points", "norm_points", "projection_points", "unembedding_points"), "lens_core._points"
    ),
    **dict.fromkeys(("WeightView", "weight_and_bias"), "lens_core.weights"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
