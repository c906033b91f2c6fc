"""Hook points at any module of HF's: `hf.PATH.input` and `hf.PATH.output`."""

from torch import nn

from lens_core.hook_points import HookPoint
from lens_core.seams import ModuleInput, ModuleOutput

__all__ = ["hf_point"]


def hf_point(hf_model: nn.Module, name: str) -> HookPoint | None:
    """Make the hook point of an `hf.` name, or None where HF has no such module."""
    path, _, side = name.removeprefix("hf.").rpartition(".")
    if side not in ("input", "output") or not path:
        return None
    try:
        hf_model.get_submodule(path)
    except AttributeError:
        return None
    seam = ModuleInput(path=path) if side == "input" else ModuleOutput(path=path)
    return HookPoint(name=name, shape="HF's own", equation=f"{side} of the HF module {path}", seam=seam, default=False)
