"""Tensors that tensor parallelism cuts over processes: gathered where lens reads, cut again where it writes.

HF's plan gives each process some rows or columns of the linear maps inside attention and MLP, so that queries, keys,
values, patterns and hidden layers are in parts there, while the residual stream is whole on every process. What is
whole is never asked of a plan: a linear module says how many features it has, and a hook point's axes how long they are
(`LensConfig.sizes`). What is shorter is one process' part, cut as `torch.chunk` does; any other difference refuses.

Every process runs the same hook functions on the same whole tensors and takes its own part of what they return. The
gradient of a whole tensor is whole, too: gathering's gradient is one's own part, and taking a part's gradient gathers.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from lens_core.errors import UnsupportedHookError
from lens_core.hook_points import HookPoint

__all__ = ["Shards", "check_whole", "find_shards", "is_cut", "whole_parameter"]


CUT = ("n_heads", "n_kv_heads", "d_mlp")
"""The axes that the parts of attention and MLP lie along."""


@attrs.frozen(kw_only=True, eq=False, slots=False)
class Shards:
    """How one model is cut over processes."""

    hf_model: Any
    group: Any
    rank: int
    count: int

    def whole(self, part: Tensor, *, axis: int, length: int) -> Tensor:
        """Gather an axis of which each process has a part; all of them must call this together."""
        return _Gather.apply(part, self, axis % part.ndim, length)  # type: ignore[no-any-return]

    def part(self, whole: Tensor, *, axis: int) -> Tensor:
        """Give this process' part of a tensor that every process has whole, in storage of its own."""
        return _Cut.apply(whole, self, axis % whole.ndim)  # type: ignore[no-any-return]

    def span(self, length: int, rank: int) -> tuple[int, int]:
        """Say where a process' part of an axis begins and ends."""
        step = -(-length // self.count)
        return min(rank * step, length), min((rank + 1) * step, length)

    def cut_axis(self, point: HookPoint, value: Tensor, sizes: Mapping[str, int]) -> int | None:
        """Find the axis of a hook point's value that is in parts; None for a whole value.

        Raises:
            UnsupportedHookError: The value differs from what is declared otherwise than by one axis in equal parts.
        """
        axes = point.shape.split()
        if point.name.startswith("hf.") or len(axes) != value.ndim:
            return None
        known = [(at, int(axis) if axis.isdigit() else sizes.get(axis)) for at, axis in enumerate(axes)]
        wrong = [(at, length) for at, length in known if length and value.shape[at] != length]
        if not wrong:
            return None
        at, length = wrong[0]
        begin, end = self.span(length, self.rank)
        if len(wrong) > 1 or axes[at] not in CUT or value.shape[at] != end - begin:
            raise UnsupportedHookError(
                f"{point.name!r} has shape {tuple(value.shape)} on process {self.rank} of {self.count} and is declared "
                f"{point.shape}, with {axes[at]} {length}: how the whole is cut cannot be told; load the model without "
                "tensor parallelism to hook this place"
            )
        return at

    def features(self, module: Any, tensor: Tensor, which: str) -> int | None:
        """Give the whole length of the last axis of what a linear module is given or gives, if this is a part of it.

        Args:
            module: The module.
            tensor: What it is given or gives here.
            which: `"in_features"` or `"out_features"`.

        Raises:
            UnsupportedHookError: It is cut in another way than into one stretch for each process.
        """
        length: Any = getattr(module, which, None)
        if not isinstance(length, int) or not is_cut(getattr(module, "weight", None)) or tensor.shape[-1] == length:
            return None
        begin, end = self.span(length, self.rank)
        if _cut_at(module.weight) != int(which == "in_features") or tensor.shape[-1] != end - begin:
            raise UnsupportedHookError(
                f"{type(module).__name__} has {which} {length} and {tensor.shape[-1]} on process {self.rank} of "
                f"{self.count}, and its weight lies as {module.weight.placements}: how the whole is cut cannot be "
                "told; load the model without tensor parallelism to hook this place"
            )
        return length

    @cached_property
    def regions(self) -> tuple[str, ...]:
        """The modules whose insides are cut: the lowest ones that hold both the first and the last linear map."""
        modules: dict[str, Any] = dict(self.hf_model.named_modules())
        ends = {path: _cut_at(module.weight) for path, module in modules.items() if _is_cut_linear(module)}
        firsts = [path for path, at in ends.items() if at == 0]
        found: list[str] = []
        for last in (path for path, at in ends.items() if at == 1):
            above = _ancestors(last)
            found += [next(one for one in above if any(first.startswith(f"{one}.") for first in firsts) or not one)]
        return tuple(dict.fromkeys(found))


def find_shards(hf_model: nn.Module) -> Shards | None:
    """Say how a model is cut over processes; None where it is not.

    Raises:
        UnsupportedHookError: It is cut by something else than tensor parallelism alone.
    """
    distributed: Any = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    parameters: Iterator[Any] = hf_model.parameters()
    meshes: list[Any] = list({id(one.device_mesh): one.device_mesh for one in parameters if is_cut(one)}.values())
    if not meshes:
        return None
    mesh = meshes[0]
    names = sorted({str(name) for one in meshes for name in (one.mesh_dim_names or ("without a name",))})
    groups = [one.get_group() for one in meshes if one.ndim == 1]
    if names not in (["tp"], ["without a name"]) or len(groups) < len(meshes) or any(g != groups[0] for g in groups):
        raise UnsupportedHookError(
            f"the model's parameters are cut over processes by {', '.join(names)}; hooks are for tensor parallelism "
            "(tp) alone. Load the model with tp_size alone, or on one process"
        )
    group = groups[0]
    return Shards(hf_model=hf_model, group=group, rank=mesh.get_local_rank(), count=mesh.size())


def check_whole(shards: Shards | None, name: str) -> None:
    """See that an `hf.` name, whose shape nobody declares, is not between the cut ends of attention or MLP.

    Raises:
        UnsupportedHookError: It is, and is of no linear map, which would say what is whole.
    """
    if shards is None or not name.startswith("hf."):
        return
    path = name.removeprefix("hf.").rpartition(".")[0]
    if hasattr(shards.hf_model.get_submodule(path), "in_features"):
        return
    region = next((region for region in shards.regions if path.startswith(f"{region}." if region else "")), None)
    if region is not None:
        raise UnsupportedHookError(
            f"{name!r} is inside {region!r}, whose tensors tensor parallelism cuts over {shards.count} processes, and "
            "nothing says what is whole there; use the hook points of the table, the linear modules or "
            f"'hf.{region}' itself, or load the model without tensor parallelism"
        )


def is_cut(tensor: object) -> bool:
    """Whether a tensor is one of torch's distributed ones (`DTensor`)."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "full_tensor")


def whole_parameter(parameter: Any) -> Any:
    """Gather a parameter that is cut over processes, on autograd's graph; give any other as it is.

    All processes must call this together.
    """
    return parameter.full_tensor() if is_cut(parameter) else parameter


def _cut_at(weight: Any) -> int | None:
    """Give the axis of a weight `[out, in]` that is cut into one stretch for each process; None for other layouts."""
    from torch.distributed.tensor import Shard

    placements: Any = weight.placements
    if len(placements) != 1 or type(placements[0]) is not Shard:
        return None
    axis: int = placements[0].dim % weight.ndim
    return axis


def _is_cut_linear(module: Any) -> bool:
    return hasattr(module, "in_features") and is_cut(getattr(module, "weight", None))


def _ancestors(path: str) -> list[str]:
    """List the modules that hold one, the nearest first; the model itself, with an empty path, is the last."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, shards: Shards, axis: int, length: int) -> Tensor:
        ctx.shards, ctx.axis = shards, axis
        ends = [shards.span(length, rank) for rank in range(shards.count)]
        longest = ends[0][1]
        padded = part.new_zeros((longest, *part.movedim(axis, 0).shape[1:]))
        padded[: part.shape[axis]] = part.movedim(axis, 0)
        parts = [torch.empty_like(padded) for _ in ends]
        distributed: Any = torch.distributed
        distributed.all_gather(parts, padded, group=shards.group)
        whole = torch.cat([one[: end - begin] for one, (begin, end) in zip(parts, ends, strict=True)])
        return whole.movedim(0, axis).contiguous()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return ctx.shards.part(grad_outputs[0], axis=ctx.axis), None, None, None


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, shards: Shards, axis: int) -> Tensor:
        ctx.shards, ctx.axis, ctx.length = shards, axis, whole.shape[axis]
        begin, end = shards.span(whole.shape[axis], shards.rank)
        return whole.narrow(axis, begin, end - begin).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return ctx.shards.whole(grad_outputs[0], axis=ctx.axis, length=ctx.length), None, None
