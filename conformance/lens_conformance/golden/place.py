"""One block of one run of the golden forward, or the model's end: its weights, its cuts and its norms."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from torch import Tensor

from lens_conformance.golden.kind import Kind


@attrs.frozen(kw_only=True, eq=False)
class Place:
    """Weights by their path in the block, and what every step of it needs."""

    weights: Mapping[str, Tensor]
    config: Any
    kind: Kind
    layer: int
    cut: Callable[[str, Tensor], Tensor]
    touched: frozenset[str] = frozenset()
    through: frozenset[str] = frozenset()

    def name(self, name: str) -> str:
        """Give the full name of a hook point of this block."""
        return f"blocks.{self.layer}.{name}"

    def at(self, name: str, value: Tensor) -> Tensor:
        """Cut at a name of this block."""
        return self.cut(self.name(name), value)

    def is_touched(self, name: str) -> bool:
        """Tell whether a copy of this block is edited, or its gradient wanted."""
        return self.name(name) in self.touched

    def norm(self, path: str, name: str, x: Tensor) -> Tensor:
        """Normalise with a cut at the scale, the normalised value and the output."""
        centred = self._centred(x)
        scale = self.cut(f"{name}.hook_scale", self._size(centred))
        normalized = self.cut(f"{name}.hook_normalized", centred / scale)
        return self.cut(f"{name}.hook_out", self._gained(path, normalized))

    def plain_norm(self, path: str, x: Tensor) -> Tensor:
        """Normalise without cuts: the norm of a copy, of queries and keys, or before a second matrix."""
        centred = self._centred(x)
        return self._gained(path, centred / self._size(centred))

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.kind.norm.startswith("layer") else x

    def _size(self, x: Tensor) -> Tensor:
        eps = getattr(self.config, self.kind.eps) if isinstance(self.kind.eps, str) else self.kind.eps
        return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def _gained(self, path: str, x: Tensor) -> Tensor:
        """Apply gain and bias, where the type's norm has them."""
        if f"{path}.weight" in self.weights:
            gain = self.weights[f"{path}.weight"]
            x = x * (1 + gain if self.kind.norm.endswith("offset") else gain)
        return x + self.weights[f"{path}.bias"] if f"{path}.bias" in self.weights else x
