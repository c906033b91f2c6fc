"""Which kind a norm is: by what it returns, not by what it is called."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lens_conformance.doctor import kinds
from lens_conformance.doctor.trace import Call, Trace, Unfit, same
from lens_core.plugin import LAYER_NORM, RMS_NORM, RMS_NORM_GAIN_FIRST, RMS_NORM_OFFSET, NormKind

__all__ = ["KINDS", "choose_kind", "holds", "is_norm"]

KINDS: Mapping[str, NormKind] = {
    "RMS_NORM": RMS_NORM,
    "RMS_NORM_GAIN_FIRST": RMS_NORM_GAIN_FIRST,
    "RMS_NORM_OFFSET": RMS_NORM_OFFSET,
    "RMS_NORM_PLAIN": kinds.RMS_NORM_PLAIN,
    "LAYER_NORM": LAYER_NORM,
    "LAYER_NORM_UNBIASED": kinds.LAYER_NORM_UNBIASED,
    "LAYER_NORM_OFFSET": kinds.LAYER_NORM_OFFSET,
    "LAYER_NORM_PLAIN": kinds.LAYER_NORM_PLAIN,
}


def _made(kind: NormKind, call: Call) -> Tensor | None:
    """Compute what a norm of this kind would have returned; None where the module has not what that takes."""
    try:
        centred, scale = kind.split(call.module, call.inputs[0])
        return kind.affine(call.module, (centred / scale).to(call.inputs[0].dtype))
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return None


def holds(call: Call) -> list[str]:
    """List the kinds whose equation a call obeys, in float64."""
    if not call.inputs or not call.outputs or call.inputs[0].shape != call.outputs[0].shape:
        return []
    if not call.inputs[0].is_floating_point() or same(call.inputs[0], call.outputs[0]):
        return []
    return [name for name, kind in KINDS.items() if same(_made(kind, call), call.outputs[0])]


def is_norm(call: Call) -> bool:
    """Whether a module is a norm: by a kind's equation, or by its name where no kind fits."""
    if any(True for _ in call.module.children()):
        return False
    return bool(holds(call)) or "norm" in type(call.module).__name__.lower()


def choose_kind(paths: Iterable[str], wide: Trace, half: Trace) -> tuple[str, list[str]]:
    """Choose the kind that all norms obey: in float64 by its equation, then by the most bits in bfloat16.

    Raises:
        Unfit: No kind fits, or norms of two kinds are there.
    """
    paths, fits = list(paths), dict[str, list[str]]()
    for path in paths:
        fits[path] = [name for name in KINDS if all(name in holds(call) for call in wide.of(path))]
    common = [name for name in KINDS if all(name in found for found in fits.values())]
    if not common:
        odd = next((path for path, found in fits.items() if not found), None)
        module = wide.of(odd)[0].module if odd else None
        if odd:
            told = "computes none of the known norms; it needs a NormKind of its own"
            raise Unfit(f"{odd} ({type(module).__name__}) {told}")
        told = "; ".join(f"{path}: {' or '.join(found)}" for path, found in fits.items())
        raise Unfit(f"norms of two kinds, where Decoder has one: {told}")
    off = {name: sum(_differing(name, call) for path in paths for call in half.of(path)) for name in common}
    best = min(common, key=lambda name: (off[name], list(KINDS).index(name)))
    total = sum(call.outputs[0].numel() for path in paths for call in half.of(path))
    remarks = [f"norms: {best}, " + ("bit for bit in bfloat16" if not off[best] else
               f"all but {off[best]} of {total} values bit for bit in bfloat16")]  # fmt: skip
    return best, remarks


def _differing(name: str, call: Call) -> int:
    """Count the values that a kind does not give bit for bit: Llama's rounds before the gain, all others after it."""
    x, kind = call.inputs[0], KINDS[name]
    centred, scale = kind.split(call.module, x)
    normalized = (centred / scale).to(x.dtype if name == "RMS_NORM" else torch.float32)
    made = kind.affine(call.module, normalized).to(x.dtype)
    return int((made != call.outputs[0]).sum())
