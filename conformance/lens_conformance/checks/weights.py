"""Property 23: weight views are what they claim."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lens_conformance.case import Case
from lens_conformance.checks import check
from lens_core.errors import LensError
from lens_core.plugin import Capability

# name of an activation, what it is computed of, weight and bias, and how they go together
_PROJECTIONS = (
    ("attn.hook_q", ("ln1.hook_out", "hook_resid_pre"), "W_Q", "b_Q", "bpd,hde->bphe"),
    ("attn.hook_k", ("ln1.hook_out", "hook_resid_pre"), "W_K", "b_K", "bpd,hde->bphe"),
    ("attn.hook_v", ("ln1.hook_out", "hook_resid_pre"), "W_V", "b_V", "bpd,hde->bphe"),
    ("attn.hook_out", ("attn.hook_z",), "W_O", "b_O", "bphe,hed->bpd"),
    ("mlp.hook_pre_linear", ("mlp.hook_in",), "W_in", "b_in", "bpd,dm->bpm"),
    ("mlp.hook_router_logits", ("mlp.hook_in",), "W_router", "b_router", "bpd,de->bpe"),
    ("mlp.hook_out", ("mlp.hook_post",), "W_out", "b_out", "bpm,md->bpd"),
    ("mixer.hook_in_proj", ("norm.hook_out", "ln1.hook_out"), "W_in_proj", "b_in_proj", "bpd,dm->bpm"),
    ("mixer.hook_x_proj", ("mixer.hook_ssm_input",), "W_x", None, "bpm,mr->bpr"),
    ("hook_mixer_out", ("mixer.hook_gated",), "W_out_proj", "b_out_proj", "bpm,md->bpd"),
)
_BOUND = 1e-4
_NOT_RECOMPUTED: dict[str, str] = {}
"""Weight views that no activation can be recomputed from, with the reason."""


@check(23, "weight views recompute the activations that they claim", judge="law", needs=Capability.WEIGHT_VIEWS)
def weights(case: Case) -> None:
    """Projections with biases, embeddings, the unembedding, and a mixer's own; no view is left out."""
    one, ids = case.pair(), case.tokens()
    model = one.model
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, names_filter=[*one.names(), *_expert_inputs(model)])
        used: set[tuple[str, int | None]] = set()
        for told, made, expected, views in _outside(model, cache, ids):
            case.same(told, made, expected, _BOUND)
            used |= {(view, None) for view in views}
        layers = [at for at in range(model.cfg.n_layers) if f"blocks.{at}.hook_resid_pre" in cache]
        for layer in layers:
            for told, made, expected, views in _Views(model, cache, layer).equations():
                case.same(told, made, expected, _BOUND)
                used |= {(view, layer) for view in views}
    assert any(layer is not None for _, layer in used), "no weight of a block recomputes any activation"
    for view in model.declaration.weights:
        for layer in (view.layers or range(model.cfg.n_layers)) if view.per_layer else (None,):
            is_tried = layer is None or layer in layers
            where = "" if layer is None else f" of block {layer}"
            assert not is_tried or (view.name, layer) in used or view.name in _NOT_RECOMPUTED, (
                f"the weight view {view.name}{where} recomputes no activation: a hook point that its equation needs is "
                "not there, or the kit knows no equation of it"
            )


Recomputed = tuple[str, Tensor, Tensor, tuple[str, ...]]
"""What is recomputed and how, its value, what it should be, and the views in it."""


def _wide(x: Tensor) -> Tensor:
    """Half precision, and streams in another dtype than the weights, are compared in float32 or more."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def _outside(model: Any, cache: Any, ids: Tensor) -> Iterator[Recomputed]:
    """Embeddings and the unembedding."""
    names = set(model.weight_names)
    if "hook_embed" in cache:
        embedded, made = _wide(model.weight("W_E")[ids]), _wide(cache["hook_embed"])
        scale = (embedded * made).sum() / embedded.square().sum()  # some types scale embeddings
        yield "W_E[tokens], but for a scale, which is hook_embed,", embedded * scale, made, ("W_E",)
    if "hook_pos_embed" in cache and "W_pos" in names:
        made = _wide(cache["hook_pos_embed"])
        expected = _wide(model.weight("W_pos")[: ids.shape[1]]).expand_as(made)
        yield "hook_pos_embed, which is W_pos[positions],", made, expected, ("W_pos",)
    own = _wide(cache["unembed.hook_in"]) @ _wide(model.weight("W_U")) + _wide(model.weight("b_U"))
    yield "unembed.hook_out, which is unembed.in W_U + b_U,", _wide(cache["unembed.hook_out"]), own, ("W_U", "b_U")


def _expert_inputs(model: Any) -> list[str]:
    """Name what experts are given, which some types project first."""
    views = [view for view in model.declaration.weights if view.name == "W_expert_in"]
    layers = [(view, at) for view in views for at in (view.layers or range(model.cfg.n_layers))]
    return [f"hf.{view.path.format(layer=at)}.input" for view, at in layers]


class _Views:
    """The weights of one block, and the values that they should give."""

    def __init__(self, model: Any, cache: Any, layer: int) -> None:
        self.model, self.cache, self.layer = model, cache, layer
        self.at = f"blocks.{layer}."

    def has(self, *names: str) -> bool:
        """Whether these names are in this block's cache."""
        return all(self.at + name in self.cache for name in names)

    def views(self, *names: str) -> list[Tensor] | None:
        """Give weights of this block; None where it has not all of them."""
        try:
            return [_wide(self.model.weight(name, self.layer)) for name in names]
        except LensError:
            return None  # of blocks of another kind

    def __getitem__(self, name: str) -> Tensor:
        return _wide(self.cache[self.at + name])

    def equations(self) -> Iterator[Recomputed]:
        """Give what this block's weights recompute."""
        for made, how, expected, views in (
            *self._projections(),
            *self._experts(),
            *self._selection(),
            *self._scan(),
        ):
            yield f"{self.at}{made}, which is {how},", self[made], expected, views

    def _projections(self) -> Iterator[tuple[str, str, Tensor, tuple[str, ...]]]:
        for made, sources, *views, how in (*_PROJECTIONS, *_gates(set(self.model.weight_names))):
            names = tuple(view for view in views if view is not None)
            source = next((name for name in sources if self.has(name)), None)
            given = self.views(*names)
            if not self.has(made) or source is None or given is None:
                continue
            expected = torch.einsum(how, self[source], given[0])
            told = f"{source} {' + '.join(names)}"
            expected = expected + given[1] if len(given) > 1 else expected
            if made in self.model.declaration.writers:
                expected = expected * self.model.declaration.factor_of(made)
            yield made, told, expected, names

    def _experts(self) -> Iterator[tuple[str, str, Tensor, tuple[str, ...]]]:
        """What each chosen expert gives, by HF's own activation between the views."""
        names = tuple(name for name in self.model.weight_names if "_expert_" in name)
        given, indices, made = self.views(*names), "mlp.hook_expert_indices", "mlp.hook_expert_out"
        if not names or given is None or not self.has(indices, made):
            return
        own = {name: weight[self[indices].long()] for name, weight in zip(names, given, strict=True)}
        path = next(view for view in self.model.declaration.weights if view.name == names[0]).path
        path = path.format(layer=self.layer)
        module = self.model.bare_model.get_submodule(path)
        read = _wide(self.cache[f"hf.{path}.input"])
        read = read.reshape(*self[indices].shape[:2], 1, -1).expand(*self[indices].shape, -1)

        def through(part: str, x: Tensor) -> Tensor:
            out = torch.einsum("bpkd,bpkdm->bpkm", x, own[f"W_expert_{part}"])
            return out + own[f"b_expert_{part}"] if f"b_expert_{part}" in own else out

        inside = through("in", read)
        if "W_expert_gate" in own:
            pair = (through("gate", read), inside)
            inside = module._apply_gate(
                torch.cat(pair, -1) if module.is_concatenated else torch.stack(pair, -1).flatten(-2)
            )
        else:
            inside = module.act_fn(inside)
        yield made, "each chosen expert's W_expert_out of its activation of W_expert_in", through("out", inside), names

    def _selection(self) -> Iterator[tuple[str, str, Tensor, tuple[str, ...]]]:
        """The convolution, and the step sizes before softplus."""
        given = self.views("W_conv", "b_conv")
        if given is not None and self.has("mixer.hook_conv_in", "mixer.hook_conv"):
            kernel, bias = given  # channel width
            read = self["mixer.hook_conv_in"]
            padded = torch.nn.functional.pad(read, (0, 0, kernel.shape[1] - 1, 0))
            expected = torch.einsum("bpck,ck->bpc", padded.unfold(1, kernel.shape[1], 1), kernel) + bias
            yield (
                "mixer.hook_conv",
                "the causal convolution of conv_in with W_conv, + b_conv",
                expected,
                (
                    "W_conv",
                    "b_conv",
                ),
            )
        given = self.views("W_dt", "b_dt")
        if given is not None and self.has("mixer.hook_x_proj", "mixer.hook_delta_pre"):
            low, how = self["mixer.hook_x_proj"][..., : len(given[0])], "x_proj[:dt_rank]"
            low, how, gains = self._normed("dt", low, how)
            yield "mixer.hook_delta_pre", f"{how} W_dt + b_dt", low @ given[0] + given[1], ("W_dt", "b_dt", *gains)
        if self.has("mixer.hook_x_proj", "mixer.hook_B", "mixer.hook_C"):
            width = self["mixer.hook_B"].shape[-1]
            whole = self["mixer.hook_x_proj"]
            for part, columns in (("B", whole[..., -2 * width : -width]), ("C", whole[..., -width:])):
                expected, how, gains = self._normed(part, columns, f"{part} of x_proj")
                yield f"mixer.hook_{part}", how, expected, gains
        given = self.views("b_dt") if "W_dt" not in self.model.weight_names else None
        if given is not None and self.has("mixer.hook_in_proj", "mixer.hook_delta_pre"):
            step = self["mixer.hook_in_proj"][..., -len(given[0]) :]
            yield "mixer.hook_delta_pre", "the last n_heads of in_proj + b_dt", step + given[0], ("b_dt",)

    def _normed(self, part: str, read: Tensor, how: str) -> tuple[Tensor, str, tuple[str, ...]]:
        """Give dt, B or C after its norm, if it has one, how that is computed, and the views in it."""
        scale, gain = f"mixer.{part}_norm.hook_scale", self.views(f"W_{part}_norm")
        if not self.has(scale):
            return read, how, ()
        read, how = read / self[scale], f"{how} / {part}_norm.scale"
        return (read, how, ()) if gain is None else (read * gain[0], f"{how} * W_{part}_norm", (f"W_{part}_norm",))

    def _scan(self) -> Iterator[tuple[str, str, Tensor, tuple[str, ...]]]:
        """Decay, skip, and the gain of the norm inside."""
        if self.has("mixer.hook_delta", "mixer.hook_decay"):
            delta = self["mixer.hook_delta"]
            for name, of in (("A", lambda A: A), ("A_log", lambda A_log: -A_log.exp())):
                given = self.views(name)
                if given is not None:
                    A = of(given[0])
                    how = "exp(delta A)" if name == "A" else "exp(delta -exp(A_log))"
                    yield "mixer.hook_decay", how, (_spread(delta, A.ndim + 2) * A).exp(), (name,)
        given = self.views("D")
        if given is not None and self.has("mixer.hook_y", "mixer.hook_ssm_input", "mixer.hook_ssm_output"):
            read = self["mixer.hook_ssm_input"]
            expected = self["mixer.hook_y"] + _spread(given[0], read.ndim - 2) * read
            yield "mixer.hook_ssm_output", "y + D ssm_input", expected, ("D",)
        given = self.views("W_inner_norm")
        wanted = ("mixer.hook_ssm_output", "mixer.hook_gate", "mixer.inner_norm.hook_scale", "mixer.hook_gated")
        if given is not None and self.has(*wanted):
            output, gate, scale, gated = (self[name] for name in wanted)
            product = output.reshape(gated.shape) * torch.nn.functional.silu(gate)
            normed = product.unflatten(-1, (scale.shape[-1], -1)) / scale[..., None]
            how = "ssm_output SiLU(gate) / inner_norm.scale * W_inner_norm"
            yield "mixer.hook_gated", how, normed.flatten(-2) * given[0], ("W_inner_norm",)


def _spread(x: Tensor, ndim: int) -> Tensor:
    """Give so many axes, the new ones last."""
    return x.reshape(*x.shape, *[1] * (ndim - x.ndim))


def _gates(names: set[str]) -> tuple[Any, ...]:
    """A gated MLP's `pre` is the gate's; a plain one's is of `W_in`."""
    weight = "W_gate" if "W_gate" in names else "W_in"
    return (("mlp.hook_pre", ("mlp.hook_in",), weight, weight.replace("W_", "b_"), "bpd,dm->bpm"),)
