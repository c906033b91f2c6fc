"""The hook points of a decoder: what `Decoder` says, as places that seams reach."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from lens_core._contract import point
from lens_core._declaration import LensConfig, NormPlace
from lens_core._decoder import Attn, Decoder, Moe
from lens_core._points import head_input_points, norm_points, projection_points, unembedding_points
from lens_core.hook_points import HookPoint
from lens_core.seams import (
    Attention,
    BranchInput,
    Columns,
    Embedding,
    ExpertOutput,
    HeadResult,
    HeadsFirst,
    ModuleInput,
    ModuleOutput,
    Projection,
    Router,
    ScaledBranch,
    Seam,
    Tokens,
    Whole,
)

__all__ = ["decoder_norms", "decoder_points", "finish", "projections"]


def decoder_norms(decoder: Decoder) -> Mapping[str, NormPlace]:
    """Give the norms by hook name."""
    paths = {"ln1": decoder.ln1, "ln2": decoder.ln2, "ln1_post": decoder.ln1_post, "ln2_post": decoder.ln2_post}
    found = {name: f"{decoder.block}.{path}" for name, path in paths.items() if path is not None}
    found["ln_final"] = f"{decoder.base}.{decoder.final_norm}"
    return {name: NormPlace(path=path, kind=decoder.norm) for name, path in found.items()}


def decoder_points(decoder: Decoder, cfg: LensConfig) -> Iterator[HookPoint]:
    """Give all points, in the order of computation."""
    base, first = decoder.base, decoder.block.format(layer=0)
    yield point("hook_tokens", Tokens(path=base))
    if decoder.embed_at == "block":
        equation = "W_E[tokens], scale and dropout included; blocks.0.hook_resid_pre"
        yield point("hook_embed", ModuleInput(path=first), equation=equation)
    else:
        equation = None if decoder.pos_embed else "W_E[tokens] = blocks.0.hook_resid_pre"
        yield point("hook_embed", Embedding(base=base, path=f"{base}.{decoder.embed}"), equation=equation)
    if decoder.pos_embed is not None:
        yield point("hook_pos_embed", ModuleOutput(path=f"{base}.{decoder.pos_embed}"))
    norms = decoder_norms(decoder)
    for layer in range(cfg.n_layers):
        own = {one.name: one for one in decoder.own(layer)}
        for derived in _Block(decoder, cfg, norms, layer).points():
            yield own.pop(derived.name, derived)
        yield from own.values()
    yield from norm_points("ln_final", norms["ln_final"])
    yield from unembedding_points(base, decoder.head, finish=finish(decoder), dtype=decoder.logits_dtype)


def finish(decoder: Decoder) -> Any:
    """Give what makes logits of the unembedding's output; None where nothing does."""
    scale, divisor, cap = decoder.logit_scale, decoder.logit_divisor, decoder.logit_cap
    is_cast = decoder.logits_dtype == "float32"
    if scale == 1 and divisor == 1 and cap is None and not is_cast:
        return None

    def logits(out: Tensor) -> Tensor:
        out = out if scale == 1 else out * scale
        out = out if divisor == 1 else out / divisor
        out = out if cap is None else (out / cap).tanh() * cap
        return out.float() if is_cast else out

    return logits


def projections(attn: Attn, cfg: LensConfig, path: str) -> dict[str, Projection]:
    """Say where q, k and v of one attention module are computed."""
    d, heads = cfg.d_head or 0, cfg.n_heads or 0
    kv = cfg.n_key_value_heads or heads
    if attn.layout == "separate":
        columns = {"q": Columns(heads=heads), "k": Columns(heads=kv), "v": Columns(heads=kv)}
    elif attn.layout == "blocks":
        ends = {"q": (0, heads), "k": (heads, heads + kv), "v": (heads + kv, heads + 2 * kv)}
        columns = {p: Columns(start=a * d, stop=b * d, heads=b - a) for p, (a, b) in ends.items()}
    else:
        starts = {"q": 0, "k": d, "v": 2 * d}
        columns = {p: Columns(start=at, stop=at + d, heads=heads, groups=heads) for p, at in starts.items()}
    names = {"q": attn.q, "k": attn.k, "v": attn.v} if attn.layout == "separate" else dict.fromkeys("qkv", attn.fused)
    norm: dict[str, Any] = {}
    if attn.qk_norm is not None:
        own = attn.qk_norm
        norm = {"norm": f"{path}.{own.k}", "norm_takes": own.takes, "norm_is_after_rotary": own.is_after_rotary}
    return {
        part: Projection(path=f"{path}.{names[part]}", columns=columns[part], **(norm if part == "k" else {}))
        for part in "qkv"
    }


class _Block:
    """The hook points of one block."""

    def __init__(self, decoder: Decoder, cfg: LensConfig, norms: Mapping[str, NormPlace], layer: int) -> None:
        self.decoder, self.cfg, self.layer = decoder, cfg, layer
        self.hf = decoder.block.format(layer=layer)
        self.attn, self.mlp = f"{self.hf}.{decoder.attn.path}", f"{self.hf}.{decoder.mlp.path}".removesuffix(".")
        self.branches = decoder.branches(layer)
        self.moe = decoder.moe if decoder.is_sparse(layer) else None
        if self.moe is not None:
            self.mlp = f"{self.hf}.{self.moe.path}"
        self.norms = norms
        self.paths = {name: place.path.format(layer=layer) for name, place in norms.items()}
        self.has_mid = "mlp" in self.branches and len(self.branches) > 1 and not decoder.is_parallel
        self.has_rotary = decoder.has_rotary(layer)
        self.point = partial(point, layer=layer)

    def norm(self, name: str) -> Iterator[HookPoint]:
        """Give the points of one norm, where there is one."""
        if name in self.norms:
            yield from norm_points(name, self.norms[name], layer=self.layer)

    def points(self) -> Iterator[HookPoint]:
        """Give all points, in the order of computation."""
        yield self.point("hook_resid_pre", ModuleInput(path=self.hf))
        places = projections(self.decoder.attn, self.cfg, self.attn)
        if "mixer" in self.branches:
            yield self.mixer_input()
        if "attn" in self.branches:
            yield from head_input_points(
                self.attn, places, layer=self.layer, norm=self.norms.get("ln1"), has_rotary=self.has_rotary
            )
        if "mixer" in self.branches or "attn" in self.branches:
            yield from self.norm("ln1")
        if "mixer" in self.branches:
            yield from self.mixer()
        if "attn" in self.branches:
            yield from self.attention(places)
        if self.has_mid:
            reader = self.paths.get("ln2", self.feed)
            equation = self._sum("mixer", "attn")
            yield self.point("hook_resid_mid", ModuleInput(path=reader, reaches="all"), equation=equation)
        if "mlp" in self.branches:
            yield from self.feedforward()
        yield self.point("hook_resid_post", ModuleOutput(path=self.hf), equation=self._sum("mixer", "attn", "mlp"))

    def _sum(self, *branches: str) -> str:
        return " + ".join(("resid_pre", *(f"{branch}_out" for branch in branches if branch in self.branches)))

    # ------------------------------------------------------------------ attention

    def attention(self, places: Mapping[str, Projection]) -> Iterator[HookPoint]:
        """Give attention, from its projections to what it adds."""
        attn = self.decoder.attn
        yield from projection_points(places, layer=self.layer, read="ln1" if "ln1" in self.norms else "resid_pre")
        yield from self.queries_and_keys(places)
        yield from self.kernel(places)
        yield from self.added("ln1_post", "hook_attn_out", attn.added or attn.path)

    def queries_and_keys(self, places: Mapping[str, Projection]) -> Iterator[HookPoint]:
        """Give queries and keys as normed and as rotated, in the order of the type."""
        own = self.decoder.attn.qk_norm
        is_after = own is not None and own.is_after_rotary
        if is_after:
            yield from self.rotated()
        if own is not None:
            for part, path in (("q", own.q), ("k", own.k)):
                heads = Columns(heads=places[part].columns.heads)
                views: dict[str, Any] = {"heads": Whole(), "heads_first": HeadsFirst(), "whole": heads}
                source = f"rot_{part}" if is_after and self.has_rotary else part
                seam = ModuleOutput(path=f"{self.attn}.{path}", view=views[own.takes])
                yield self.point(f"attn.hook_{part}_normed", seam, equation=f"{part}_norm({source})")
        if not is_after:
            yield from self.rotated()

    def rotated(self) -> Iterator[HookPoint]:
        """Give rotated queries and keys: what the norm after them reads, or what the kernel and the cache do."""
        if not self.has_rotary:
            return
        own = self.decoder.attn.qk_norm
        part: Any
        for part in ("q", "k"):
            seam: Seam = Attention(path=self.attn, part=part)
            source = part if own is None else f"{part}_normed"
            if own is not None and own.is_after_rotary:
                source = part
                seam = ModuleInput(path=f"{self.attn}.{own.q if part == 'q' else own.k}", view=HeadsFirst())
            yield self.point(f"attn.hook_rot_{part}", seam, equation=f"{source}, rotated by position")

    def kernel(self, places: Mapping[str, Projection]) -> Iterator[HookPoint]:
        """Give what attention computes from queries, keys and values."""
        heads = self.cfg.n_heads or 0
        if heads != places["k"].columns.heads:
            yield self.point("attn.hook_k_rep", Attention(path=self.attn, part="k_rep"))
            yield self.point("attn.hook_v_rep", Attention(path=self.attn, part="v_rep"))
        equation = "q . k times the scale, soft-capped where the type caps, masked cells -inf"
        yield self.point("attn.hook_attn_scores", Attention(path=self.attn, part="scores"), equation=equation)
        yield self.point("attn.hook_pattern", Attention(path=self.attn, part="pattern"))
        out = f"{self.attn}.{self.decoder.attn.out}"
        z = ModuleInput(path=out, view=Columns(heads=heads))
        yield self.point("attn.hook_z", z, equation="pattern v of the head's group")
        yield self.point("attn.hook_result", HeadResult(path=out, heads=heads))
        yield self.point("attn.hook_out", ModuleOutput(path=out))

    # ------------------------------------------------------------------ the residual stream

    def added(self, norm: str, name: str, path: str) -> Iterator[HookPoint]:
        """Give what a branch adds to the stream, after its post-norm and factor."""
        whole = f"{self.hf}.{path}"
        if norm in self.norms:
            yield from self.norm(norm)
            whole = self.paths[norm]
        seam: Seam = ModuleOutput(path=whole)
        beside = None
        if name == "hook_mlp_out" and self.moe is not None and self.moe.beside is not None:
            whole, beside = f"{self.hf}.{self.moe.beside}", self.mlp
        if self.decoder.branch_scale != 1 or beside is not None:
            is_last = name == "hook_mlp_out" or not self.has_mid
            reader = self.paths.get("ln2", self.feed)
            seam = ScaledBranch(
                path=whole,
                factor=self.decoder.branch_scale,
                block=self.hf,
                base=reader if name == "hook_mlp_out" and self.has_mid else self.hf,
                sum_at=None if is_last else reader,
                beside=beside,
            )
        yield self.point(name, seam)

    def mixer_input(self) -> HookPoint:
        """Give a mixer's copy of the stream; where attention reads the same norm, it is the mixer's alone."""
        mixer = self.decoder.mixer
        assert mixer is not None
        path = f"{self.hf}.{mixer.path}"
        seam: Seam = ModuleInput(path=self.paths.get("ln1", path), is_copy=True)
        if "attn" in self.branches:
            seam = BranchInput(norm=self.paths["ln1"], path=path)
        return self.point("hook_mixer_in", seam)

    def mixer(self) -> Iterator[HookPoint]:
        """Give a mixer, from its projection to what it adds."""
        mixer = self.decoder.mixer
        assert mixer is not None
        yield from mixer.points(self.layer)
        yield from self.added("ln1_post", "hook_mixer_out", mixer.path)

    # ------------------------------------------------------------------ MLP

    @property
    def feed(self) -> str:
        """The module that receives the MLP's input."""
        return self.mlp if self.mlp != self.hf else f"{self.hf}.{self.decoder.mlp.up}"

    def feedforward(self) -> Iterator[HookPoint]:
        """Give the MLP or the experts, from its copy of the stream to what it adds."""
        read = "resid_mid" if self.has_mid else "resid_pre"
        has_norm, is_alone = "ln2" in self.norms, "ln2" not in self.norms and self.decoder.is_parallel
        if is_alone:
            seam: Seam = BranchInput(norm=self.paths["ln1"], path=self.feed)
        else:
            seam = ModuleInput(path=self.paths.get("ln2", self.feed), is_copy=True)
        equation = f"a copy of {read}, before {'ln2' if has_norm else 'the MLP'}"
        yield self.point("hook_mlp_in", seam, equation=equation)
        yield from self.norm("ln2")
        is_stream = not has_norm and not self.decoder.is_parallel  # then the MLP reads the stream itself
        if self.moe is None or self.moe.beside is None:
            yield self.point("mlp.hook_in", ModuleInput(path=self.feed, is_copy=is_stream))
        else:
            yield self.point("mlp.hook_in", ModuleOutput(path=self.paths["ln2"]))
        yield from self.neurons() if self.moe is None else self.experts(self.moe)
        path = self.decoder.mlp.added or self.mlp.removeprefix(f"{self.hf}.")
        if self.mlp == self.hf and self.decoder.mlp.added is None:
            path = self.decoder.mlp.down
        yield from self.added("ln2_post", "hook_mlp_out", path)

    def neurons(self) -> Iterator[HookPoint]:
        """Give the inside of a dense MLP."""
        d, mlp = self.cfg.d_mlp or 0, self.decoder.mlp
        up, down = f"{self.mlp}.{mlp.up}", f"{self.mlp}.{mlp.down}"
        if mlp.kind == "plain":
            yield self.point("mlp.hook_pre", ModuleOutput(path=up))
            yield self.point("mlp.hook_post", ModuleInput(path=down))
        else:
            gate, linear = ModuleOutput(path=f"{self.mlp}.{mlp.gate}"), ModuleOutput(path=up)
            if mlp.kind == "fused":
                gate = ModuleOutput(path=up, view=Columns(stop=d))
                linear = ModuleOutput(path=up, view=Columns(start=d))
            yield self.point("mlp.hook_pre", gate, equation="mlp.in W_gate + b_gate")
            yield self.point("mlp.hook_pre_linear", linear)
            yield self.point("mlp.hook_post", ModuleInput(path=down), equation="act(pre) * pre_linear")
        yield self.point("mlp.hook_out", ModuleOutput(path=down))

    def experts(self, moe: Moe) -> Iterator[HookPoint]:
        """Give the inside of a mixture of experts."""
        router = f"{self.mlp}.{moe.router}"
        yield self.point("mlp.hook_router_logits", Router(path=router, part="logits"), dtype=moe.logits_dtype)
        yield self.point("mlp.hook_expert_weights", Router(path=router, part="weights"), dtype=moe.weights_dtype)
        yield self.point("mlp.hook_expert_indices", Router(path=router, part="indices"))
        yield self.point("mlp.hook_expert_out", ExpertOutput(path=f"{self.mlp}.{moe.experts}"))
        if moe.beside is None:
            equation = "sum of expert_weights * expert_out, plus a shared expert where there is one"
            yield self.point("mlp.hook_out", ModuleOutput(path=self.mlp), equation=equation)
