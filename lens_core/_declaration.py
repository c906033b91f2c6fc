"""What an architecture declares about one HF config: where everything is, and what it means."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from torch import Tensor

from lens_core._norms import NormKind
from lens_core.hook_points import HookPoint
from lens_core.weights import WeightView

__all__ = ["CallInput", "Declaration", "LensConfig", "NormPlace", "NormReaders", "WritingWeight"]


@attrs.frozen(kw_only=True)
class LensConfig:
    """A model's dimensions and kinds, under TransformerLens' names; read-only."""

    model_name: str = ""
    model_type: str
    n_layers: int
    d_model: int
    n_heads: int | None = None
    """None where nothing has heads, as in Mamba; Mamba-2 has heads of `head_dim`, and no `d_head`."""
    d_head: int | None = None
    n_key_value_heads: int | None = None
    d_mlp: int | None = None
    d_vocab: int
    n_ctx: int | None = None
    """The most positions the model takes; None for no limit."""
    act_fn: str | None = None
    eps: float
    normalization_type: str
    """`LN` or `RMS`; `LNPre` or `RMSPre` once gains and biases are folded into the weights that read them."""
    positional_embedding_type: str
    attn_only: bool = False
    gated_mlp: bool = False
    parallel_attn_mlp: bool = False
    d_inner: int | None = None
    """Channels of an SSM mixer."""
    ssm_heads: int | None = None
    """Heads of an SSM mixer, where `n_heads` are attention's."""
    ssm_act_fn: str | None = None
    """The activation after an SSM mixer's convolution, where it is another than `act_fn`."""
    d_state: int | None = None
    d_conv: int | None = None
    """Width of an SSM mixer's convolution."""
    dt_rank: int | None = None
    n_groups: int | None = None
    """Groups of SSM heads that share B and C."""
    head_dim: int | None = None
    """Width of an SSM head."""
    chunk_size: int | None = None
    n_experts: int | None = None
    experts_per_token: int | None = None
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
        sizes = {
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_key_value_heads or self.n_heads,
            "d_head": self.d_head,
            "d_mlp": self.d_mlp,
            "d_vocab": self.d_vocab,
            "d_inner": self.d_inner,
            "d_state": self.d_state,
            "dt_rank": self.dt_rank,
            "n_groups": self.n_groups,
            "ssm_heads": self.ssm_heads,
            "head_dim": self.head_dim,
            "n_experts": self.n_experts,
            "k": self.experts_per_token,
        }
        return {axis: size or 0 for axis, size in sizes.items()}


@attrs.frozen(kw_only=True)
class NormPlace:
    """A norm: its module (`{layer}` stands for the block) and its kind."""

    path: str
    kind: NormKind


@attrs.frozen(kw_only=True)
class NormReaders:
    """A norm and every weight that reads what it hands on, so that its gain can go into them.

    A reader is the path of a linear module (`nn.Linear`, HF's `Conv1D`, a router with a bare weight), or of a parameter
    that stacks experts, whose bias, if there is one, is called `NAME_bias`.
    """

    norm: NormPlace | None
    """Its own path: no `{layer}`. None where these read the residual stream itself."""
    readers: tuple[str, ...]
    layer: int | None = None
    """The block; None for the final norm."""


@attrs.frozen(kw_only=True)
class WritingWeight:
    """A weight whose output is added to the residual stream, its bias with it; `path` as a reader of `NormReaders`."""

    path: str
    layer: int | None = None
    """The block; None for an embedding."""


@attrs.frozen(kw_only=True, eq=False)
class CallInput:
    """What one call of the HF model is about to be given, for the architecture to read."""

    mask: Tensor | None
    """1 for real tokens `[batch, past + n_pos]`; None where nothing is padding."""
    past: int
    """Positions before this call's, in the model's cache."""
    n_pos: int
    continues: bool
    """Whether a cache is filled, from which later calls go on."""
    training: bool = False
    """Whether the model is in training mode."""


@attrs.frozen(kw_only=True, eq=False)
class Declaration:
    """An architecture at one config: paths into the HF model, hook points, norms, residual writers and weights."""

    cfg: LensConfig
    base: str
    """The module whose forward is one call: it holds embeddings, blocks and final norm."""
    blocks: str
    """The list of blocks."""
    embed: str
    embed_scale: float = 1.0
    """A factor on the embedding module's output, outside of it."""
    unembed: str
    norms: Mapping[str, NormPlace]
    """By hook name: `ln1`, `ln2`, `ln_final`, ..."""
    points: tuple[HookPoint, ...]
    """In the order of computation."""
    writers: tuple[str, ...]
    """What a block adds to the residual stream, in order: hook names below `blocks.L.`"""
    branch_factor: float | Mapping[str, float] = 1.0
    """A factor on what the writers' modules return, before it is added to the residual stream; by writer, if they
    differ."""
    logit_factor: float = 1.0
    """What the unembedding's output is multiplied by to give the logits (Granite's `1 / logits_scaling`)."""
    logit_cap: float | None = None
    """The soft cap of the logits, `cap * tanh(logits / cap)`; None where there is none."""
    embeddings: tuple[str, ...]
    """Hook points that sum to the first block's input."""
    readers: tuple[NormReaders, ...] = ()
    """What reads each norm before a branch or the unembedding; passes over weights refuse a norm that is left out."""
    writing_weights: tuple[WritingWeight, ...] = ()
    """Every weight that writes to the residual stream: embeddings, and the last of each branch."""
    rows_sum_to_one: bool = True
    """Whether a row of the attention pattern sums to 1; not where there are sinks."""
    weights: tuple[WeightView, ...]
    mixer_kind: str = "mixer"
    """What the blocks' state-space mixers are, if there are any: `mamba` or `mamba2`."""
    aliases: Mapping[str, str] = attrs.field(factory=dict[str, str])
    read_call: Callable[[CallInput], Tensor | None] | None = None
    """Gives the padding mask that HF is to have, or raises an `InputError` for a call that HF would compute wrongly;
    None hands every mask on."""
    has_absolute_positions: bool = False
    """Whether position ids must be derived from a padding mask."""
    restarts_positions: bool = False
    """Whether HF counts positions from 0 in every call, so that they must be given where a cache is continued."""
    block_values: int | None = None
    """How many values a block returns in a tuple, the stream first; None where it returns the stream itself."""

    def factor_of(self, writer: str) -> float:
        """Give the factor on what a writer's module returns."""
        given = self.branch_factor
        return given.get(writer, 1.0) if isinstance(given, Mapping) else given

    def layer_types(self) -> tuple[str, ...]:
        """Say for each block what mixes its positions, by its hook points; `mlp` where nothing does."""
        found: list[set[str]] = [set() for _ in range(self.cfg.n_layers)]
        for one in self.points:
            if one.layer is not None:
                found[one.layer].add(one.part.partition(".")[0])
        kinds = {"attn": "attention", "mixer": self.mixer_kind}
        return tuple("+".join(told for part, told in kinds.items() if part in parts) or "mlp" for parts in found)
