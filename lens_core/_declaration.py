"""What an architecture declares about one HF config: where everything is, and what it means."""

from collections.abc import Mapping
from typing import Any

import attrs

from lens_core._norms import NormKind
from lens_core.hook_points import HookPoint
from lens_core.weights import WeightView

__all__ = ["Declaration", "LensConfig", "NormPlace"]


@attrs.frozen(kw_only=True)
class LensConfig:
    """A model's dimensions and kinds, under TransformerLens' names; read-only."""

    model_name: str = ""
    model_type: str
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    n_key_value_heads: int | None = None
    d_mlp: int | None = None
    d_vocab: int
    n_ctx: int
    act_fn: str | None = None
    eps: float
    normalization_type: str
    """`LN` or `RMS`; the weights are the checkpoint's own, with nothing folded."""
    positional_embedding_type: str
    attn_only: bool = False
    gated_mlp: bool = False
    parallel_attn_mlp: bool = False
    dtype: Any = None
    """The checkpoint's own dtype unless another was asked for."""
    device: Any = None

    @property
    def d_vocab_out(self) -> int:
        """Size of the output vocabulary."""
        return self.d_vocab

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes of the axes that do not depend on the input, in the words of `lens_core.shapes`."""
        return {
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_key_value_heads or self.n_heads,
            "d_head": self.d_head,
            "d_mlp": self.d_mlp or 0,
            "d_vocab": self.d_vocab,
        }


@attrs.frozen(kw_only=True)
class NormPlace:
    """A norm: its module (`{layer}` stands for the block) and its kind."""

    path: str
    kind: NormKind


@attrs.frozen(kw_only=True, eq=False)
class Declaration:
    """An architecture at one config: paths into the HF model, hook points, norms, residual writers and weights."""

    cfg: LensConfig
    base: str
    """The module whose forward is one call: it holds embeddings, blocks and final norm."""
    blocks: str
    """The list of blocks."""
    embed: str
    unembed: str
    norms: Mapping[str, NormPlace]
    """By hook name: `ln1`, `ln2`, `ln_final`, ..."""
    points: tuple[HookPoint, ...]
    """In the order of computation."""
    writers: tuple[str, ...]
    """What a block adds to the residual stream, in order: hook names below `blocks.L.`"""
    embeddings: tuple[str, ...]
    """Hook points that sum to the first block's input."""
    weights: tuple[WeightView, ...]
    aliases: Mapping[str, str] = attrs.field(factory=dict[str, str])
    has_absolute_positions: bool = False
    """Whether position ids must be derived from a padding mask."""
