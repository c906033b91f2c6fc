"""Llama and its kin as tables: where each hook point and norm is in HF's causal language models.

Glossary: `input_layernorm` is ln1; `q_proj k_proj v_proj` (or the fused `qkv_proj` = [q | k | v]) are W_Q, W_K, W_V and
`o_proj` is W_O; `gate_proj` (or the first half of `gate_up_proj`) is W_gate, `up_proj` W_in, `down_proj` W_out; a
mixture's `gate` is its router. `_decoder.py` says how the types differ.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lens_core.plugin import (
    LAYER_NORM,
    RMS_NORM_OFFSET,
    Attention,
    BranchInput,
    Columns,
    Declaration,
    Embedding,
    ExpertOutput,
    HeadInput,
    HeadResult,
    HeadsFirst,
    HookPoint,
    LensConfig,
    ModuleInput,
    ModuleOutput,
    NormInside,
    NormPlace,
    Projection,
    Router,
    ScaledBranch,
    Seam,
    Tokens,
    Unembedding,
    Whole,
)
from lens_llama._decoder import DECODERS, Decoder, eps, finish, has_rotary, is_parallel, is_sparse, n_ctx, qk_norm
from lens_llama._weights import weights

RESIDUAL = "batch pos d_model"
QUERIES, KEYS = "batch pos n_heads d_head", "batch pos n_kv_heads d_head"
QUERY_INPUTS, KEY_INPUTS = "batch pos n_heads d_model", "batch pos n_kv_heads d_model"
REPEATED = "batch key n_heads d_head"
QUERY_KEY = "batch n_heads query key"
HIDDEN = "batch pos d_mlp"


def Llama(config: Any) -> Declaration:
    """Declare one of the types in `DECODERS` at one HF config."""
    decoder = DECODERS[config.model_type]
    cfg = _lens_config(config, decoder)
    blocks = (point for layer in range(cfg.n_layers) for point in _Block(config, cfg, layer).points())
    return Declaration(
        cfg=cfg,
        base="model",
        blocks="model.layers",
        embed="model.embed_tokens",
        embed_scale=getattr(config, decoder.embedding_factor) if decoder.embedding_factor else 1.0,
        unembed="lm_head",
        norms=_norms(config, decoder),
        points=(*_before(config, decoder), *blocks, *_after(config, decoder)),
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
        n_ctx=n_ctx(config),
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


def _before(config: Any, decoder: Decoder) -> Iterator[HookPoint]:
    yield HookPoint(
        name="hook_tokens", shape="batch pos", dtype="int64", equation="token ids", seam=Tokens(path="model")
    )
    embedding: Seam = Embedding(base="model", path="model.embed_tokens")
    if decoder.embedding_factor or getattr(config, "embedding_dropout", 0.0):  # between embedding and first block
        embedding = ModuleInput(path="model.layers.0")
    yield HookPoint(
        name="hook_embed",
        shape=RESIDUAL,
        equation="W_E[tokens], scale and dropout included; blocks.0.hook_resid_pre",
        seam=embedding,
    )


def _norm(name: str, path: str, decoder: Decoder, layer: int | None) -> Iterator[HookPoint]:
    scale = NormInside(path=path, part="scale", kind=decoder.norm)
    normalized = NormInside(path=path, part="normalized", kind=decoder.norm)
    if decoder.norm is LAYER_NORM:
        equations = ("sqrt(var(x) + eps)", "(x - mean(x)) / scale", "normalized * gain + bias")
    else:
        gain = "(1 + gain)" if decoder.norm is RMS_NORM_OFFSET else "gain"
        equations = ("sqrt(mean(x^2) + eps)", "x / scale", f"normalized * {gain}")
    shapes = ("batch pos 1", RESIDUAL, RESIDUAL)
    parts = zip(
        ("scale", "normalized", "out"), shapes, equations, (scale, normalized, ModuleOutput(path=path)), strict=True
    )
    for part, shape, equation, seam in parts:
        yield HookPoint(name=f"{name}.hook_{part}", layer=layer, shape=shape, equation=equation, seam=seam)


class _Block:
    """The hook points of one block."""

    def __init__(self, config: Any, cfg: LensConfig, layer: int) -> None:
        self.config, self.cfg, self.layer = config, cfg, layer
        self.decoder = DECODERS[config.model_type]
        self.hf = f"model.layers.{layer}"
        self.attn, self.mlp = f"{self.hf}.self_attn", f"{self.hf}.mlp"
        self.ln1 = None if self.decoder.norms == "post" else f"{self.hf}.input_layernorm"
        self.is_parallel, self.qk_norm = is_parallel(config), qk_norm(config)
        self.ln2 = None if self.decoder.norms == "post" or self.is_parallel else f"{self.hf}.{self.decoder.ln2}"
        self.heads = cfg.n_heads or 0
        self.kv_heads = cfg.n_key_value_heads or self.heads

    def point(self, name: str, shape: str, equation: str, seam: Seam, **options: Any) -> HookPoint:
        """Give one point of this block."""
        name = f"blocks.{self.layer}.{name}"
        return HookPoint(name=name, layer=self.layer, shape=shape, equation=equation, seam=seam, **options)

    def norm(self, name: str, path: str | None) -> Iterator[HookPoint]:
        """Give the points of one norm, where there is one."""
        if path is not None:
            yield from _norm(f"blocks.{self.layer}.{name}", path, self.decoder, self.layer)

    def points(self) -> Iterator[HookPoint]:
        """Give all points, in the order of computation."""
        yield self.point("hook_resid_pre", RESIDUAL, "what enters the block", ModuleInput(path=self.hf))
        yield from self.head_inputs()
        yield from self.norm("ln1", self.ln1)
        yield from self.queries_and_keys()
        yield from self.attention()
        yield from self.middle()
        yield from self.norm("ln2", self.ln2)
        read = ModuleInput(path=self.mlp, is_copy=self.decoder.norms == "post")  # then the MLP reads the stream itself
        yield self.point("mlp.hook_in", RESIDUAL, "what the MLP receives", read)
        yield from self.experts() if is_sparse(self.config, self.layer) else self.neurons()
        yield from self.added("ln2_post", "hook_mlp_out", "the MLP", f"{self.hf}.{self.decoder.mlp_added}")
        equation = "resid_pre + attn_out + mlp_out"
        yield self.point("hook_resid_post", RESIDUAL, equation, ModuleOutput(path=self.hf))

    # ------------------------------------------------------------------ attention

    def projections(self) -> dict[str, Projection]:
        """Say where q, k and v are computed."""
        d, q, kv = self.cfg.d_head or 0, self.heads, self.kv_heads
        starts = {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}
        norm: dict[str, Any] = {}
        if self.qk_norm is not None:
            norm = {"norm": f"{self.attn}.k_{self.qk_norm.suffix}", "norm_takes": self.qk_norm.takes}
        found: dict[str, Projection] = {}
        for part, (start, heads) in starts.items():
            first = start * d if self.decoder.is_qkv_fused else 0
            path = f"{self.attn}.qkv_proj" if self.decoder.is_qkv_fused else f"{self.attn}.{part}_proj"
            columns = Columns(start=first, stop=first + heads * d, heads=heads)
            found[part] = Projection(path=path, columns=columns, **(norm if part == "k" else {}))
        return found

    def head_inputs(self) -> Iterator[HookPoint]:
        """Give the copies of the stream that single heads read."""
        projections = self.projections()
        rows: list[tuple[Any, str, str]]
        rows = [("q", QUERY_INPUTS, "a copy of resid_pre, for the query of each head")]
        if self.heads == self.kv_heads:
            rows = [
                ("attn", QUERY_INPUTS, "a copy of resid_pre for each head, before ln1"),
                ("q", QUERY_INPUTS, "attn_in, for the query of each head"),
                ("k", KEY_INPUTS, "attn_in, for the key of each head"),
                ("v", KEY_INPUTS, "attn_in, for the value of each head"),
            ]
        else:
            rows += [
                ("k", KEY_INPUTS, "a copy of resid_pre, for the key of each key-value head"),
                ("v", KEY_INPUTS, "a copy of resid_pre, for the value of each key-value head"),
                ("k_rep", QUERY_INPUTS, "k_input of the group, for the key that each query head sees"),
                ("v_rep", QUERY_INPUTS, "v_input of the group, for the value that each query head sees"),
            ]
        for part, shape, equation in rows:
            name = "hook_attn_in" if part == "attn" else f"hook_{part[0]}_input{part[1:]}"
            seam = HeadInput(
                part=part,
                attention=self.attn,
                norm=self.ln1,
                projections=projections,
                has_rotary=has_rotary(self.config, self.layer),
            )
            yield self.point(name, shape, equation, seam, default=False)

    def queries_and_keys(self) -> Iterator[HookPoint]:
        """Give q, k, v as projected, normed, and rotated."""
        shapes = {"q": QUERIES, "k": KEYS, "v": KEYS}
        projections = self.projections()
        for part, projection in projections.items():
            seam = ModuleOutput(path=projection.path, view=projection.columns)
            equation = f"{'ln1' if self.ln1 else 'resid_pre'} W_{part.upper()} + b_{part.upper()}"
            yield self.point(f"attn.hook_{part}", shapes[part], equation, seam)
        if self.qk_norm is not None:
            for part, heads in (("q", self.heads), ("k", self.kv_heads)):
                width = heads * (self.cfg.d_head or 0)
                views = {
                    "heads": Whole(),
                    "heads_first": HeadsFirst(),
                    "whole": Columns(start=0, stop=width, heads=heads),
                }
                path = f"{self.attn}.{part}_{self.qk_norm.suffix}"
                seam = ModuleOutput(path=path, view=views[self.qk_norm.takes])
                yield self.point(f"attn.hook_{part}_normed", shapes[part], f"{part}_norm({part})", seam)
        if has_rotary(self.config, self.layer):
            part: Any
            for part in ("q", "k"):
                source = part if self.qk_norm is None else f"{part}_normed"
                seam = Attention(path=self.attn, part=part)
                yield self.point(f"attn.hook_rot_{part}", shapes[part], f"{source}, rotated by position", seam)

    def attention(self) -> Iterator[HookPoint]:
        """Give what attention computes from queries, keys and values."""
        if self.heads != self.kv_heads:
            equation = "{} as each query head sees them, over all positions so far that the layer's window has"
            keys, values = Attention(path=self.attn, part="k_rep"), Attention(path=self.attn, part="v_rep")
            yield self.point("attn.hook_k_rep", REPEATED, equation.format("keys"), keys, default=False)
            yield self.point("attn.hook_v_rep", REPEATED, equation.format("values"), values, default=False)
        equation = "q . k times the scale, soft-capped where the type caps, masked cells -inf"
        scores, pattern = Attention(path=self.attn, part="scores"), Attention(path=self.attn, part="pattern")
        yield self.point("attn.hook_attn_scores", QUERY_KEY, equation, scores)
        yield self.point("attn.hook_pattern", QUERY_KEY, "softmax(attn_scores) over keys", pattern)
        out = f"{self.attn}.o_proj"
        z = ModuleInput(path=out, view=Columns(start=0, stop=self.heads * (self.cfg.d_head or 0), heads=self.heads))
        yield self.point("attn.hook_z", QUERIES, "pattern v of the head's group", z)
        result = HeadResult(path=out, heads=self.heads)
        yield self.point("attn.hook_result", QUERY_INPUTS, "z W_O of each head", result, default=False)
        yield self.point("attn.hook_out", RESIDUAL, "sum of the results + b_O", ModuleOutput(path=out))
        yield from self.added("ln1_post", "hook_attn_out", "attention", f"{self.hf}.{self.decoder.attn_added}")

    # ------------------------------------------------------------------ the residual stream

    def added(self, norm: str, name: str, what: str, path: str) -> Iterator[HookPoint]:
        """Give what a branch adds to the stream, after its post-norm or factor."""
        equation = f"what {what} adds to the residual stream"
        is_attention = name == "hook_attn_out"
        seam: Seam = ModuleOutput(path=path)
        if self.decoder.norms != "pre":
            after = "post_attention_layernorm" if is_attention else "post_feedforward_layernorm"
            yield from self.norm(norm, f"{self.hf}.{after}")
            seam = ModuleOutput(path=f"{self.hf}.{after}")
        elif self.decoder.branch_factor:
            seam = ScaledBranch(
                path=path,
                factor=getattr(self.config, self.decoder.branch_factor),
                block=self.hf,
                base=self.hf if is_attention else f"{self.hf}.{self.decoder.ln2}",
                sum_at=f"{self.hf}.{self.decoder.ln2}" if is_attention else None,
            )
        yield self.point(name, RESIDUAL, equation, seam)

    def middle(self) -> Iterator[HookPoint]:
        """Give the stream between the branches, and the MLP's copy of what it reads."""
        copied = "a copy of {}, before the MLP" if self.ln2 is None else "a copy of {}, before the MLP's norm"
        if self.is_parallel:
            seam: Seam = BranchInput(norm=self.ln1 or "", path=self.mlp)
            yield self.point("hook_mlp_in", RESIDUAL, copied.format("resid_pre"), seam, default=False)
            return
        reader = self.ln2 or self.mlp
        mid = ModuleInput(path=reader, reaches="all")
        yield self.point("hook_resid_mid", RESIDUAL, "resid_pre + attn_out", mid)
        seam = ModuleInput(path=reader, is_copy=True)
        yield self.point("hook_mlp_in", RESIDUAL, copied.format("resid_mid"), seam, default=False)

    # ------------------------------------------------------------------ MLP

    def neurons(self) -> Iterator[HookPoint]:
        """Give the inside of an MLP."""
        d = self.cfg.d_mlp or 0
        if self.decoder.mlp == "plain":
            down = f"{self.mlp}.c_proj"
            yield self.point("mlp.hook_pre", HIDDEN, "mlp.in W_in + b_in", ModuleOutput(path=f"{self.mlp}.c_fc"))
            yield self.point("mlp.hook_post", HIDDEN, "act(pre)", ModuleInput(path=down))
        else:
            down = f"{self.mlp}.down_proj"
            gate, up = ModuleOutput(path=f"{self.mlp}.gate_proj"), ModuleOutput(path=f"{self.mlp}.up_proj")
            if self.decoder.mlp == "fused":
                fused = f"{self.mlp}.gate_up_proj"
                gate = ModuleOutput(path=fused, view=Columns(start=0, stop=d))
                up = ModuleOutput(path=fused, view=Columns(start=d, stop=2 * d))
            yield self.point("mlp.hook_pre", HIDDEN, "mlp.in W_gate + b_gate", gate)
            yield self.point("mlp.hook_pre_linear", HIDDEN, "mlp.in W_in + b_in", up)
            yield self.point("mlp.hook_post", HIDDEN, "act(pre) * pre_linear", ModuleInput(path=down))
        yield self.point("mlp.hook_out", RESIDUAL, "post W_out + b_out", ModuleOutput(path=down))

    def experts(self) -> Iterator[HookPoint]:
        """Give the inside of a mixture of experts."""
        router, experts = f"{self.mlp}.gate", f"{self.mlp}.experts"
        rows: tuple[tuple[str, str, str, str, Any], ...] = (
            ("router_logits", "n_experts", "model", "mlp.in W_router; an edit reroutes", "logits"),
            ("expert_weights", "k", self.decoder.expert_weights_dtype, "weights of the chosen experts", "weights"),
            ("expert_indices", "k", "int64", "which experts are chosen, likeliest first", "indices"),
        )
        for name, axis, dtype, equation, part in rows:
            seam = Router(path=router, part=part)
            yield self.point(f"mlp.hook_{name}", f"batch pos {axis}", equation, seam, dtype=dtype)
        equation = "what each chosen expert returns, before its weight"
        outputs = ExpertOutput(path=experts)
        yield self.point("mlp.hook_expert_out", "batch pos k d_model", equation, outputs, default=False)
        yield self.point("mlp.hook_out", RESIDUAL, "sum of expert_weights * expert_out", ModuleOutput(path=self.mlp))


def _after(config: Any, decoder: Decoder) -> Iterator[HookPoint]:
    yield from _norm("ln_final", "model.norm", decoder, None)
    makes_logits = finish(config)
    part: Any
    for name, shape, equation, part in (
        ("unembed.hook_in", RESIDUAL, "what the unembedding receives", "in"),
        ("unembed.hook_out", "batch pos d_vocab", "unembed.in W_U + b_U", "out"),
        ("hook_logits", "batch pos d_vocab", "the logits", "logits" if makes_logits else "out"),
    ):
        seam = Unembedding(base="model", path="lm_head", part=part, finish=makes_logits)
        yield HookPoint(name=name, shape=shape, equation=equation, seam=seam)
