"""One description of a decoder family: what a plugin fills in, and everything else is derived from.

A field has a meaning for at least two model types. What a single type needs beyond them it names itself, as hook
points of its own (`Decoder.own`). Rotary kinds, fractions and scaling, sliding windows, biases, soft caps of the
scores, attention sinks and head counts are no fields: HF's code does them, and the seams show the result.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

import attrs

from lens_core._declaration import CallInput
from lens_core._expert_weights import ExpertLayout
from lens_core._norms import RMS_NORM, NormKind
from lens_core.hook_points import HookPoint
from lens_core.weights import WeightView

__all__ = ["Attn", "Decoder", "Mixer", "Mlp", "Moe", "QkNorm"]


@attrs.frozen(kw_only=True)
class QkNorm:
    """Norms of queries and keys; modules of the attention module."""

    takes: Literal["heads", "heads_first", "whole"] = "heads"
    """What they are given: `[batch, pos, heads, d_head]`, `[batch, heads, pos, d_head]`, or all heads flat."""
    q: str = "q_norm"
    k: str = "k_norm"
    is_after_rotary: bool = False


@attrs.frozen(kw_only=True)
class Attn:
    """An attention module that calls HF's attention interface."""

    path: str = "self_attn"
    layout: Literal["separate", "blocks", "per_head"] = "separate"
    """Of q, k and v: three projections; one that gives all queries, then all keys, then all values; or one that gives
    the query, key and value of one head after the other."""
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    fused: str = "qkv_proj"
    """The one projection, in the other layouts."""
    out: str = "o_proj"
    added: str | None = None
    """The module of the block whose output is added to the stream, where that is not this one: a dropout."""
    qk_norm: QkNorm | None = None
    rotary: Collection[int] | None = None
    """The blocks whose queries and keys are rotated; None for all."""
    has_sinks: bool = False
    """Whether part of each row of the pattern goes to no position."""


@attrs.frozen(kw_only=True)
class Mlp:
    """A dense MLP."""

    path: str = "mlp"
    """Empty where its projections are modules of the block itself."""
    kind: Literal["gated", "fused", "plain"] = "gated"
    """`down(act(gate) * up)`, the same with `up` giving [gate | up], or `down(act(up))`."""
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    added: str | None = None
    """The module of the block whose output is added to the stream, where that is not this one."""


@attrs.frozen(kw_only=True)
class Moe:
    """A mixture of experts in the MLP's place: a router that returns (logits, weights, indices), and stacked experts.

    The module may hold, and add, a further expert that every position visits.
    """

    layers: Collection[int] | None = None
    """The blocks that have one; None for all, the others have the dense MLP."""
    path: str = "mlp"
    router: str = "gate"
    router_linear: str | None = None
    """The `nn.Linear` in the router; empty where the router is one itself, None where it has a bare weight."""
    experts: str = "experts"
    expert_layout: ExpertLayout | None = "gated"
    """How the experts' weights lie in HF's tensors: `[expert, gate | up, in]`; columns of gate and up by turns, with
    biases; or no gate. None gives no views of them."""
    n_experts: int
    per_token: int
    beside: str | None = None
    """A dense module of the block that reads what this one reads, and whose output is added to this one's by the block:
    then no module holds what the MLP returns, and there is no `mlp.hook_out`."""
    reads: tuple[str, ...] = ("experts.gate_up_proj",)
    """What reads the stream's norm besides the router: parameters and linear modules, below `path`."""
    writes: tuple[str, ...] = ("experts.down_proj",)
    """What the returned sum is made of, in the same way."""
    weights_dtype: str = "model"
    logits_dtype: str = "model"


@attrs.frozen(kw_only=True)
class Mixer:
    """A state-space mixer, in attention's place or beside it; `Decoder.branches` says in which blocks."""

    path: str
    kind: str
    """As `Declaration.mixer_kind`."""
    points: Callable[[int], Iterable[HookPoint]]
    """What is inside that of one block, 0-based: the names `mixer.*`."""
    aliases: Mapping[str, str] = attrs.field(factory=dict[str, str])
    """Further names of these places, both below the block."""
    weights: tuple[WeightView, ...] = ()
    reads: tuple[str, ...] = ("in_proj",)
    """The linear modules that read the stream's norm, below `path`."""
    writes: tuple[str, ...] = ("out_proj",)
    inner: NormKind | None = None
    """The kind of the norm `norm` below `path` that `writes` read, where there is one."""


@attrs.frozen(kw_only=True)
class Decoder:
    """How a family of decoders is built, at one config; paths of blocks are below the block.

    Defaults are Llama's.
    """

    base: str = "model"
    layers: str = "layers"
    embed: str = "embed_tokens"
    pos_embed: str | None = None
    """The embedding of positions, where there is one that is added."""
    final_norm: str = "norm"
    head: str = "lm_head"

    norm: NormKind = RMS_NORM
    ln1: str | None = "input_layernorm"
    ln1_post: str | None = None
    """The norm between attention and the sum."""
    ln2: str | None = "post_attention_layernorm"
    """The norm before the MLP; None in parallel blocks whose branches share ln1."""
    ln2_post: str | None = None
    is_parallel: bool = False
    """Whether the MLP reads what attention reads, not the sum."""

    attn: Attn = attrs.field(factory=Attn)
    mlp: Mlp = attrs.field(factory=Mlp)
    moe: Moe | None = None
    mixer: Mixer | None = None
    branches: Callable[[int], Collection[str]] = lambda layer: ("attn", "mlp")
    """What a block has: "attn" or "mixer", or both side by side, and "mlp"; or one of them alone."""

    embed_scale: float = 1.0
    """A factor on the embeddings, outside of any module."""
    embed_at: Literal["module", "block"] = "module"
    """Where what the embeddings contribute is whole: where the embedding hands it on, or where the first block takes
    it: behind a factor, a dropout or a norm."""
    branch_scale: float = 1.0
    """A factor on what every branch returns, outside of any module."""
    logit_scale: float = 1.0
    logit_divisor: float = 1.0
    """What the unembedding's output is divided by; in half precision that is not `logit_scale` of its inverse."""
    logit_cap: float | None = None
    """`cap * tanh(logits / cap)`, after the factor."""
    logits_dtype: str = "model"

    block_values: int | None = None
    """As `Declaration.block_values`."""
    own: Callable[[int], Iterable[HookPoint]] = lambda layer: ()
    """Hook points of one block, 0-based, in place of the derived ones of the same name, or besides them."""
    sizes: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    """Fields of `LensConfig` that the config gives under other names than HF's usual ones."""
    read_call: Callable[[CallInput], Any] | None = None
    """As `Declaration.read_call`."""

    @property
    def block(self) -> str:
        """The path of a block, with `{layer}`."""
        return f"{self.base}.{self.layers}.{{layer}}"

    def is_sparse(self, layer: int) -> bool:
        """Whether a block's MLP is a mixture of experts."""
        return self.moe is not None and (self.moe.layers is None or layer in self.moe.layers)

    def has_rotary(self, layer: int) -> bool:
        """Whether a block's queries and keys are rotated."""
        return self.attn.rotary is None or layer in self.attn.rotary
