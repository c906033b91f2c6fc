"""Llama and its kin as tables: where each hook point and norm is in HF's causal language models.

Glossary: `input_layernorm` is ln1; `q_proj k_proj v_proj` (or the fused `qkv_proj` = [q | k | v]) are W_Q, W_K, W_V and
`o_proj` is W_O; `gate_proj` (or the first half of `gate_up_proj`) is W_gate, `up_proj` W_in, `down_proj` W_out; a
mixture's `gate` is its router. `_decoder.py` says how the types differ.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from lens_core.plugin import (
    Attention,
    BranchInput,
    Columns,
    Declaration,
    Embedding,
    ExpertOutput,
    HeadResult,
    HeadsFirst,
    HookPoint,
    LensConfig,
    ModuleInput,
    ModuleOutput,
    NormPlace,
    Router,
    ScaledBranch,
    Seam,
    Tokens,
    Whole,
    head_input_points,
    norm_points,
    point,
    projection_points,
    rotary_reach,
    unembedding_points,
)
from lens_llama._decoder import DECODERS, Decoder, eps, finish, has_rotary, is_parallel, is_sparse, qk_norm
from lens_llama._weights import projections, weights


def Llama(config: Any) -> Declaration:
    """Declare one of the types in `DECODERS` at one HF config."""
    decoder = DECODERS[config.model_type]
    cfg = _lens_config(config, decoder)
    norms = _norms(config, decoder)
    return Declaration(
        cfg=cfg,
        base="model",
        blocks="model.layers",
        embed="model.embed_tokens",
        embed_scale=getattr(config, decoder.embedding_factor) if decoder.embedding_factor else 1.0,
        unembed="lm_head",
        norms=norms,
        points=tuple(_points(config, cfg, norms)),
        writers=("hook_attn_out", "hook_mlp_out"),
        branch_factor=getattr(config, decoder.branch_factor) if decoder.branch_factor else 1.0,
        logit_factor=1.0 / getattr(config, "logits_scaling", 1.0),
        embeddings=("hook_embed",),
        weights=tuple(weights(config, cfg, decoder)),
        has_absolute_positions=True,  # a rotation by a common offset is exact on paper only
    )


def _lens_config(config: Any, decoder: Decoder) -> LensConfig:
    heads = config.num_attention_heads
    sparse = [is_sparse(config, layer) for layer in range(config.num_hidden_layers)]
    return LensConfig(
        model_type=config.model_type,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=heads,
        d_head=getattr(config, "head_dim", None) or config.hidden_size // heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=rotary_reach(config),
        act_fn=getattr(config, "hidden_act", None) or config.hidden_activation,
        eps=eps(config),
        normalization_type=decoder.norm.name,
        positional_embedding_type="rotary",
        gated_mlp=decoder.mlp != "plain",
        parallel_attn_mlp=is_parallel(config),
        n_experts=config.num_experts if any(sparse) else None,
        experts_per_token=config.num_experts_per_tok if any(sparse) else None,
    )


def _norms(config: Any, decoder: Decoder) -> Mapping[str, NormPlace]:
    block = "model.layers.{layer}"
    paths = {"ln1": f"{block}.input_layernorm", "ln2": f"{block}.{decoder.ln2}"}
    if decoder.norms != "pre":
        after = {
            "ln1_post": f"{block}.post_attention_layernorm",
            "ln2_post": f"{block}.post_feedforward_layernorm",
        }
        paths = after if decoder.norms == "post" else paths | after
    if is_parallel(config):
        del paths["ln2"]
    return {
        name: NormPlace(path=path, kind=decoder.norm) for name, path in (*paths.items(), ("ln_final", "model.norm"))
    }


def _points(config: Any, cfg: LensConfig, norms: Mapping[str, NormPlace]) -> Iterator[HookPoint]:
    yield point("hook_tokens", Tokens(path="model"))
    embedding: Seam = Embedding(base="model", path="model.embed_tokens")
    if DECODERS[config.model_type].embedding_factor or getattr(config, "embedding_dropout", 0.0):
        embedding = ModuleInput(path="model.layers.0")  # both stand between embedding and first block
    yield point("hook_embed", embedding, equation="W_E[tokens], scale and dropout included; blocks.0.hook_resid_pre")
    for layer in range(cfg.n_layers):
        yield from _Block(config, cfg, norms, layer).points()
    yield from norm_points("ln_final", norms["ln_final"])
    yield from unembedding_points("model", "lm_head", finish=finish(config))


class _Block:
    """The hook points of one block."""

    def __init__(self, config: Any, cfg: LensConfig, norms: Mapping[str, NormPlace], layer: int) -> None:
        self.config, self.cfg, self.layer = config, cfg, layer
        self.decoder = DECODERS[config.model_type]
        self.hf = f"model.layers.{layer}"
        self.attn, self.mlp = f"{self.hf}.self_attn", f"{self.hf}.mlp"
        self.norms = norms
        self.paths = {name: place.path.format(layer=layer) for name, place in norms.items()}
        self.is_parallel, self.qk_norm = is_parallel(config), qk_norm(config)
        self.projections = projections(config, cfg, self.attn)
        self.heads = cfg.n_heads or 0
        self.point = partial(point, layer=layer)

    def norm(self, name: str) -> Iterator[HookPoint]:
        """Give the points of one norm, where there is one."""
        if name in self.norms:
            yield from norm_points(name, self.norms[name], layer=self.layer)

    def points(self) -> Iterator[HookPoint]:
        """Give all points, in the order of computation."""
        yield self.point("hook_resid_pre", ModuleInput(path=self.hf))
        yield from head_input_points(
            self.attn,
            self.projections,
            layer=self.layer,
            norm=self.norms.get("ln1"),
            has_rotary=has_rotary(self.config, self.layer),
        )
        yield from self.norm("ln1")
        yield from self.queries_and_keys()
        yield from self.attention()
        yield from self.middle()
        yield from self.norm("ln2")
        read = ModuleInput(path=self.mlp, is_copy=self.decoder.norms == "post")  # then the MLP reads the stream itself
        yield self.point("mlp.hook_in", read)
        yield from self.experts() if is_sparse(self.config, self.layer) else self.neurons()
        yield from self.added("ln2_post", "hook_mlp_out", f"{self.hf}.{self.decoder.mlp_added}")
        yield self.point("hook_resid_post", ModuleOutput(path=self.hf))

    # ------------------------------------------------------------------ attention

    def queries_and_keys(self) -> Iterator[HookPoint]:
        """Give q, k, v as projected, normed, and rotated."""
        read = "ln1" if "ln1" in self.norms else "resid_pre"
        yield from projection_points(self.projections, layer=self.layer, read=read)
        if self.qk_norm is not None:
            for part in ("q", "k"):
                views = {
                    "heads": Whole(),
                    "heads_first": HeadsFirst(),
                    "whole": Columns(heads=self.projections[part].columns.heads),
                }
                path = f"{self.attn}.{part}_{self.qk_norm.suffix}"
                yield self.point(f"attn.hook_{part}_normed", ModuleOutput(path=path, view=views[self.qk_norm.takes]))
        if has_rotary(self.config, self.layer):
            part: Any
            for part in ("q", "k"):
                source = part if self.qk_norm is None else f"{part}_normed"
                seam = Attention(path=self.attn, part=part)
                yield self.point(f"attn.hook_rot_{part}", seam, equation=f"{source}, rotated by position")

    def attention(self) -> Iterator[HookPoint]:
        """Give what attention computes from queries, keys and values."""
        if self.heads != self.projections["k"].columns.heads:
            yield self.point("attn.hook_k_rep", Attention(path=self.attn, part="k_rep"))
            yield self.point("attn.hook_v_rep", Attention(path=self.attn, part="v_rep"))
        equation = "q . k times the scale, soft-capped where the type caps, masked cells -inf"
        yield self.point("attn.hook_attn_scores", Attention(path=self.attn, part="scores"), equation=equation)
        yield self.point("attn.hook_pattern", Attention(path=self.attn, part="pattern"))
        out = f"{self.attn}.o_proj"
        z = ModuleInput(path=out, view=Columns(heads=self.heads))
        yield self.point("attn.hook_z", z, equation="pattern v of the head's group")
        yield self.point("attn.hook_result", HeadResult(path=out, heads=self.heads))
        yield self.point("attn.hook_out", ModuleOutput(path=out))
        yield from self.added("ln1_post", "hook_attn_out", f"{self.hf}.{self.decoder.attn_added}")

    # ------------------------------------------------------------------ the residual stream

    def added(self, norm: str, name: str, path: str) -> Iterator[HookPoint]:
        """Give what a branch adds to the stream, after its post-norm or factor."""
        is_attention = name == "hook_attn_out"
        seam: Seam = ModuleOutput(path=path)
        if norm in self.norms:
            yield from self.norm(norm)
            seam = ModuleOutput(path=self.paths[norm])
        elif self.decoder.branch_factor:
            seam = ScaledBranch(
                path=path,
                factor=getattr(self.config, self.decoder.branch_factor),
                block=self.hf,
                base=self.hf if is_attention else self.paths["ln2"],
                sum_at=self.paths["ln2"] if is_attention else None,
            )
        yield self.point(name, seam)

    def middle(self) -> Iterator[HookPoint]:
        """Give the stream between the branches, and the MLP's copy of what it reads."""
        if self.is_parallel:
            seam: Seam = BranchInput(norm=self.paths["ln1"], path=self.mlp)
            yield self.point("hook_mlp_in", seam, equation="a copy of resid_pre, before the MLP")
            return
        reader = self.paths.get("ln2", self.mlp)
        yield self.point("hook_resid_mid", ModuleInput(path=reader, reaches="all"))
        equation = "a copy of resid_mid, before the MLP" if reader == self.mlp else None
        yield self.point("hook_mlp_in", ModuleInput(path=reader, is_copy=True), equation=equation)

    # ------------------------------------------------------------------ MLP

    def neurons(self) -> Iterator[HookPoint]:
        """Give the inside of an MLP."""
        d = self.cfg.d_mlp or 0
        if self.decoder.mlp == "plain":
            down = f"{self.mlp}.c_proj"
            yield self.point("mlp.hook_pre", ModuleOutput(path=f"{self.mlp}.c_fc"))
            yield self.point("mlp.hook_post", ModuleInput(path=down))
        else:
            down = f"{self.mlp}.down_proj"
            gate, up = ModuleOutput(path=f"{self.mlp}.gate_proj"), ModuleOutput(path=f"{self.mlp}.up_proj")
            if self.decoder.mlp == "fused":
                fused = f"{self.mlp}.gate_up_proj"
                gate = ModuleOutput(path=fused, view=Columns(stop=d))
                up = ModuleOutput(path=fused, view=Columns(start=d))
            yield self.point("mlp.hook_pre", gate, equation="mlp.in W_gate + b_gate")
            yield self.point("mlp.hook_pre_linear", up)
            yield self.point("mlp.hook_post", ModuleInput(path=down), equation="act(pre) * pre_linear")
        yield self.point("mlp.hook_out", ModuleOutput(path=down))

    def experts(self) -> Iterator[HookPoint]:
        """Give the inside of a mixture of experts."""
        router, weights_dtype = f"{self.mlp}.gate", self.decoder.expert_weights_dtype
        yield self.point("mlp.hook_router_logits", Router(path=router, part="logits"))
        yield self.point("mlp.hook_expert_weights", Router(path=router, part="weights"), dtype=weights_dtype)
        yield self.point("mlp.hook_expert_indices", Router(path=router, part="indices"))
        yield self.point("mlp.hook_expert_out", ExpertOutput(path=f"{self.mlp}.experts"))
        out = ModuleOutput(path=self.mlp)
        yield self.point("mlp.hook_out", out, equation="sum of expert_weights * expert_out")
