"""The inside of one attention module: where q, k and v come from, what norms them, and whether they are rotated."""

from collections.abc import Callable, Iterator

import attrs
import torch
from torch import Tensor

from lens_conformance.doctor.trace import Call, Kernel, Trace, Unfit, coefficients, same

__all__ = ["Attention", "linear_calls", "read_attention"]


_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


@attrs.frozen(kw_only=True)
class Attention:
    """Names below the attention module; sizes as seen at the kernel."""

    layout: str
    q: str
    k: str
    v: str
    out: str
    norm: tuple[str, str, str] | None
    """What the norms of queries and keys take, and their names."""
    norm_is_after_rotary: bool
    has_rotary: bool
    heads: int
    kv_heads: int
    width: int


def read_attention(path: str, trace: Trace) -> Attention:
    """Read one attention module that calls HF's interface.

    Raises:
        Unfit: It does not call it once, or something stands where `Attn` has no word for it.
    """
    kernels = [kernel for kernel in trace.kernels if kernel.path == path]
    if len(kernels) != 1:
        raise Unfit(f"{path} calls HF's attention interface {len(kernels)} times a pass; lens' places are of one call")
    return _Reader(path, trace, kernels[0]).read()


class _Reader:
    """The kernel's call, and the linear maps beside it."""

    def __init__(self, path: str, trace: Trace, kernel: Kernel) -> None:
        self.path, self.kernel = path, kernel
        self.inside = trace.below(path)
        self.own = trace.of(path)[0]
        self.linear = [call for call in self.inside if _is_linear(call)]

    def name(self, call: Call) -> str:
        """Give a path below the attention module."""
        return call.path.removeprefix(f"{self.path}.")

    def read(self) -> Attention:
        """Find the values first, since nothing rotates or norms them."""
        heads, width = self.kernel.q.shape[1], self.kernel.q.shape[3]
        kv_heads = self.kernel.k.shape[1]
        if self.kernel.v.shape[3] != width:
            raise Unfit(
                f"{self.path}: values are {self.kernel.v.shape[3]} wide and queries {width}: "
                "hook_v has the width of hook_q in Attn"
            )
        layout, v, places = self._layout()
        out = self._out()
        q, q_norm, q_late, q_rotary = self._source("q", self.kernel.q, places)
        k, k_norm, k_late, k_rotary = self._source("k", self.kernel.k, places)
        if (q_norm is None) != (k_norm is None) or q_late != k_late or q_rotary != k_rotary:
            raise Unfit(f"{self.path} norms or rotates queries and keys each in its own way")
        norm = None
        if q_norm is not None and k_norm is not None:
            takes = _takes(q_norm, self.kernel.q)
            if takes is None or takes != _takes(k_norm, self.kernel.k):
                raise Unfit(f"{q_norm.path} takes heads in a shape that QkNorm does not know: {q_norm.inputs[0].shape}")
            norm = (takes, self.name(q_norm), self.name(k_norm))
        return Attention(
            layout=layout,
            q=q,
            k=k,
            v=v,
            out=out,
            norm=norm,
            norm_is_after_rotary=q_late,
            has_rotary=q_rotary,
            heads=heads,
            kv_heads=kv_heads,
            width=width,
        )

    # ------------------------------------------------------------------ projections

    def _layout(self) -> tuple[str, str, dict[str, list[tuple[Call, Tensor]]]]:
        """Find the module and the columns that give the values; then those of queries and keys."""
        target = self.kernel.v.transpose(1, 2)
        for call in self.linear:
            for layout, parts in self._cuts(call).items():
                if same(parts["v"], target):
                    return layout, self.name(call), self._candidates(layout, call)
        if any(same(call.outputs[0].reshape(target.shape), target) for call in self.inside
               if call.outputs and call.outputs[0].numel() == target.numel()):  # fmt: skip
            raise Unfit(
                f"{self.path}: values are normed, or made of more than one linear map; Attn has them as projected"
            )
        names = ", ".join(self.name(call) for call in self.linear)
        if "kv_b_proj" in names:
            raise Unfit(f"{self.path}: keys and values are made of one compressed vector (latent attention, {names})")
        raise Unfit(f"{self.path}: no linear map ({names}) gives the kernel's values, in any layout that Attn knows")

    def _cuts(self, call: Call) -> dict[str, dict[str, Tensor]]:
        """Cut a linear map's output as each layout does; parts are `[batch, pos, heads, width]`."""
        y = call.outputs[0].reshape(*self.own_shape, -1)
        h, g, e = self.kernel.q.shape[1], self.kernel.k.shape[1], self.kernel.q.shape[3]
        found: dict[str, dict[str, Tensor]] = {}
        if y.shape[-1] == g * e:
            found["separate"] = {"v": y.unflatten(-1, (g, e))}
        if y.shape[-1] == (h + 2 * g) * e:
            parts = y.split([h * e, g * e, g * e], dim=-1)
            cut = zip("qkv", parts, strict=True)
            found["blocks"] = {part: one.unflatten(-1, (-1, e)) for part, one in cut}
        if y.shape[-1] == 3 * h * e:
            parts = y.unflatten(-1, (h, 3, e)).unbind(-2)
            found["per_head"] = dict(zip("qkv", parts, strict=True))
        return found

    @property
    def own_shape(self) -> tuple[int, int]:
        """Batch and positions."""
        return self.kernel.q.shape[0], self.kernel.q.shape[2]

    def _candidates(self, layout: str, fused: Call) -> dict[str, list[tuple[Call, Tensor]]]:
        """Give the linear outputs that may be queries or keys."""
        if layout != "separate":
            parts = self._cuts(fused)[layout]
            return {part: [(fused, parts[part])] for part in "qk"}
        found: dict[str, list[tuple[Call, Tensor]]] = {"q": [], "k": []}
        for part, tensor in (("q", self.kernel.q), ("k", self.kernel.k)):
            heads, width = tensor.shape[1], tensor.shape[3]
            for call in self.linear:
                if call is not fused and call.outputs[0].shape[-1] == heads * width and call.start < self.kernel.at:
                    y = call.outputs[0].reshape(*self.own_shape, heads, width)
                    found[part].append((call, y))
        return found

    def _source(
        self, part: str, seen: Tensor, places: dict[str, list[tuple[Call, Tensor]]]
    ) -> tuple[str, Call | None, bool, bool]:
        """Say where queries or keys come from: the projection, its norm, whether that is late, and rotary or not.

        A rotation by position 0 is none, so there the kernel sees what was projected, or normed.
        """
        seen = seen.transpose(1, 2)
        for call, y in places[part]:
            if same(y, seen) or coefficients(seen, [y]) is not None:  # OPT's queries come scaled
                return self.name(call), None, False, False
            if _is_rotation(y, seen):
                return self.name(call), None, False, True
            for norm in self.inside:
                made = _as_heads(norm.outputs[0], seen) if norm.outputs else None
                given = _as_heads(norm.inputs[0], seen) if norm.inputs else None
                if made is None or given is None or norm.start < call.end or _is_linear(norm):
                    continue
                is_early = same(given, y)
                if is_early and (same(made, seen) or _is_rotation(made, seen)):
                    return self.name(call), norm, False, not same(made, seen)
                if same(made, seen) and _is_rotation(y, given):
                    return self.name(call), norm, True, True
        raise Unfit(
            f"{self.path}: the kernel's {'queries' if part == 'q' else 'keys'} are no rotation of a projection, nor of "
            "one norm of it"
        )

    def _out(self) -> str:
        """Find the output projection, which reads what the kernel gave and gives what the module returns."""
        z = self.kernel.out.reshape(*self.own_shape, -1)
        after = [call for call in self.linear if call.end > self.kernel.at]
        for call in after:
            if same(call.inputs[0].reshape(*self.own_shape, -1), z):
                return self.name(call)
        if after:
            told = self._between(z, after[-1].inputs[0].reshape(*self.own_shape, -1))
            raise Unfit(f"{after[-1].path} does not read the kernel's output: {told} stands between (hook_z)")
        raise Unfit(f"{self.path} has no output projection after the kernel")

    def _between(self, z: Tensor, read: Tensor) -> str:
        """Say what makes the output projection's input of the kernel's output."""
        for call in self.inside:
            given, made = (_flat(one[0], z) if one else None for one in (call.inputs, call.outputs))
            if same(given, z) and same(made, read):
                return f"the module {self.name(call)}"
        width = self.kernel.q.shape[3]
        for call in self.linear:
            gate = call.outputs[0].reshape(*self.own_shape, -1)
            gate = gate.repeat_interleave(width, -1) if gate.shape[-1] * width == z.shape[-1] else gate
            for name, make in _GATES.items():
                if gate.shape == z.shape and coefficients(read, [z * make(gate)]) is not None:
                    return f"a gate, z * {name}({self.name(call)}),"
        return "something else"


def _flat(x: Tensor, like: Tensor) -> Tensor | None:
    return x.reshape(like.shape) if x.numel() == like.numel() else None


def _is_linear(call: Call) -> bool:
    weight = getattr(call.module, "weight", None)
    is_leaf = not any(True for _ in call.module.children())
    return isinstance(weight, Tensor) and weight.ndim == 2 and is_leaf and bool(call.outputs) and _is_affine(call)


def _is_affine(call: Call) -> bool:
    return type(call.module).__name__ in ("Linear", "Conv1D") or hasattr(call.module, "in_features")


def _is_rotation(before: Tensor, after: Tensor) -> bool:
    """Whether one value is the other, turned by position: equal at position 0, of the same length everywhere."""
    factor = coefficients(after[:, 0], [before[:, 0]])
    if factor is None or same(before, after):
        return False
    return same(before.square().sum(-1) * factor[0] ** 2, after.square().sum(-1)) or same(after[:, 0], before[:, 0])


def _as_heads(x: Tensor, like: Tensor) -> Tensor | None:
    """See `[batch, pos, heads, width]` in one of the three shapes that norms take."""
    batch, pos, heads, width = like.shape
    if x.shape == like.shape:
        return x
    if x.shape == (batch, heads, pos, width):
        return x.transpose(1, 2)
    return x.unflatten(-1, (heads, width)) if x.shape == (batch, pos, heads * width) else None


def _takes(norm: Call, kernel: Tensor) -> str | None:
    batch, heads, pos, width = kernel.shape
    shapes = {
        (batch, pos, heads, width): "heads",
        (batch, heads, pos, width): "heads_first",
        (batch, pos, heads * width): "whole",
    }
    return shapes.get(tuple(norm.inputs[0].shape))


def linear_calls(calls: list[Call]) -> Iterator[Call]:
    """Give the calls of linear maps."""
    yield from (call for call in calls if _is_linear(call))
