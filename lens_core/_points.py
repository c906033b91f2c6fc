"""Hook points that most architectures have alike: of a norm, of the heads' own inputs, and of the end of the model."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lens_core._contract import STREAM, point
from lens_core._declaration import NormPlace
from lens_core._heads import HeadInput, Projection
from lens_core._unembedding import Unembedding
from lens_core.hook_points import HookPoint
from lens_core.seams import ModuleOutput, NormInside

__all__ = ["head_input_points", "norm_points", "projection_points", "unembedding_points"]


def norm_points(name: str, place: NormPlace, *, layer: int | None = None, dtype: str = "model") -> Iterator[HookPoint]:
    """Give scale, normalized input and output of a norm.

    Args:
        name: `ln1`, `ln_final`, ...
        place: Where it is, and its kind.
        layer: The block, 0-based; None outside of the blocks.
        dtype: Of the stream that it reads, where that is not the model's own.

    Example:
        >>> from lens_core.plugin import RMS_NORM, NormPlace
        >>> place = NormPlace(path="model.layers.{layer}.input_layernorm", kind=RMS_NORM)
        >>> for one in norm_points("ln1", place, layer=2):
        ...     print(one.name, "=", one.equation)
        blocks.2.ln1.hook_scale = sqrt(mean(x^2) + eps)
        blocks.2.ln1.hook_normalized = x / scale
        blocks.2.ln1.hook_out = normalized * gain
    """
    path, kind = place.path.format(layer=layer), place.kind
    scale = "sqrt(var(x) + eps)" if kind.centres else "sqrt(mean(x^2) + eps)"
    normalized = "(x - mean(x)) / scale" if kind.centres else "x / scale"
    for part, shape, equation, seam in (
        ("scale", "batch pos 1", scale, NormInside(path=path, part="scale", kind=kind)),
        ("normalized", STREAM, normalized, NormInside(path=path, part="normalized", kind=kind)),
        ("out", STREAM, kind.equation, ModuleOutput(path=path)),
    ):
        yield point(f"{name}.hook_{part}", seam, layer=layer, shape=shape, equation=equation, dtype=dtype)


def head_input_points(
    attention: str,
    projections: Mapping[str, Projection],
    *,
    layer: int,
    norm: NormPlace | None = None,
    has_rotary: bool = False,
) -> Iterator[HookPoint]:
    """Give the copies of the residual stream that single heads read: those that the contract has for this many heads.

    Args:
        attention: The path of the attention module.
        projections: Where `"q"`, `"k"` and `"v"` are computed.
        layer: The block, 0-based.
        norm: The norm before attention; None where attention reads the stream itself.
        has_rotary: Whether the layer's keys are rotated.

    Example:
        >>> from lens_core.plugin import Columns, Projection
        >>> heads = {"q": 4, "k": 2, "v": 2}  # grouped queries
        >>> projections = {x: Projection(path=f"h.0.{x}_proj", columns=Columns(heads=n)) for x, n in heads.items()}
        >>> [one.part for one in head_input_points("h.0", projections, layer=0)]
        ['hook_q_input', 'hook_k_input', 'hook_v_input', 'hook_k_input_rep', 'hook_v_input_rep']
    """
    is_grouped = projections["q"].columns.heads != projections["k"].columns.heads
    before = None if norm is None else norm.path.format(layer=layer)
    parts: Any = ("q", "k", "v", "k_rep", "v_rep") if is_grouped else ("attn", "q", "k", "v")
    for part in parts:
        name = "hook_attn_in" if part == "attn" else f"hook_{part[0]}_input{part[1:]}"
        what = {"q": "query", "k": "key", "v": "value"}.get(part)
        equation = None if is_grouped or what is None else f"attn_in, for the {what} of each head"
        seam = HeadInput(part=part, attention=attention, norm=before, projections=projections, has_rotary=has_rotary)
        yield point(name, seam, layer=layer, equation=equation)


def projection_points(projections: Mapping[str, Projection], *, layer: int, read: str = "ln1") -> Iterator[HookPoint]:
    """Give queries, keys and values as projected.

    Args:
        projections: Where `"q"`, `"k"` and `"v"` are computed.
        layer: The block, 0-based.
        read: What they are computed from, for the equation.

    Example:
        >>> from lens_core.plugin import Columns, Projection
        >>> fused = {
        ...     part: Projection(path="h.0.qkv", columns=Columns(start=8 * i, stop=8 * i + 8, heads=2))
        ...     for i, part in enumerate("qkv")
        ... }
        >>> [(one.part, one.equation) for one in projection_points(fused, layer=0)][1]
        ('attn.hook_k', 'ln1 W_K + b_K')
    """
    for part, projection in projections.items():
        equation = f"{read} W_{part.upper()} + b_{part.upper()}"
        seam = ModuleOutput(path=projection.path, view=projection.columns)
        yield point(f"attn.hook_{part}", seam, layer=layer, equation=equation)


def unembedding_points(
    base: str, path: str, *, finish: Callable[[Tensor], Tensor] | None = None, dtype: str = "model"
) -> Iterator[HookPoint]:
    """Give what the unembedding receives and returns, and the logits.

    Args:
        base: The path of the base model, whose output the unembedding receives.
        path: The path of the unembedding.
        finish: What makes logits of what the unembedding returns: a cap, a factor, a cast.
        dtype: Of the logits, where that is not the model's own.

    Example:
        >>> [one.name for one in unembedding_points("model", "lm_head")]
        ['unembed.hook_in', 'unembed.hook_out', 'hook_logits']
    """
    read = Unembedding(base=base, path=path, part="in", finish=finish)
    made = Unembedding(base=base, path=path, part="out", finish=finish)
    logits = made if finish is None else Unembedding(base=base, path=path, part="logits", finish=finish)
    yield point("unembed.hook_in", read)
    yield point("unembed.hook_out", made)
    equation = None if dtype == "model" else f"the logits, in {dtype}"
    yield point("hook_logits", logits, equation=equation, dtype=dtype)
