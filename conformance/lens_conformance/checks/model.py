"""Properties 13, 23, 25, 27 and 28: the model stays what it was, weights and records are what they claim."""

import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lens_core as lens
from lens_conformance.case import Case, tokens
from lens_conformance.checks import check
from lens_conformance.fingerprint import differences, fingerprint
from lens_conformance.float64 import Wide
from lens_conformance.oracle import Pair, new_pair, plain, tiny_config, tiny_model
from lens_core.errors import LensError, UnsupportedConfigError
from lens_core.plugin import Capability


class _BoomError(Exception):
    """What a function of a check raises."""


@check(13, "nothing is left behind: hooks, flags, parameters, also after an exception", judge="law")
def clean(case: Case) -> None:
    """After reading, editing, generating, and an error inside any function; the user's own torch hooks stay."""
    one, ids = case.pair(is_own=True), case.tokens()
    calls: list[int] = []
    handle = one.hf.register_forward_hook(lambda module, given, output: calls.append(1))
    one.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    before = fingerprint(one.hf)
    name, wrong = case.deal(one.names(), 2)

    def boom(x: torch.Tensor, hook: Any) -> None:
        raise _BoomError

    with torch.no_grad():
        one.model.run_with_cache(ids, names_filter=case.names(one.names()))
        one.model.run_with_hooks(ids, fwd_hooks=[(name, case.family.edit_at(name))])
        with one.model.hooks(fwd_hooks=[(name, case.family.edit_at(name, causal=True))]):
            one.model.generate(ids, 2, do_sample=False, stop_at_eos=False)
        try:
            one.model.run_with_hooks(ids, fwd_hooks=[(wrong, boom)])
        except LensError as error:
            told = str(error)
        else:
            raise AssertionError(f"a function at {wrong} raised, and the run did not")
        assert wrong in told, f"the error of a function at {wrong} does not name it: {told}"
        expected = plain(one, ids)
        calls.clear()
        case.equal("the logits after an error", one.hf(ids, use_cache=False).logits, expected)
    assert calls == [1], "the user's own torch hook is gone"
    left = differences(before, fingerprint(one.hf))
    assert not left, f"left behind: {left[:5]}"
    handle.remove()


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
        _, cache = model.run_with_cache(ids, names_filter=one.names())
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
        for made, how, expected, views in (*self._projections(), *self._selection(), *self._scan()):
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


@check(25, "a cache and a state come back from a file bit for bit", judge="law", share=0.4)
def files(case: Case) -> None:
    """`cache.save` and `load`, `save_state` and `load_state`."""
    one, ids = case.pair(case.choice((torch.float32, torch.bfloat16), "dtype")), case.tokens(min_pos=2)
    names = case.names(one.names())
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        _, cache = one.model.run_with_cache(ids, names_filter=names)
        cache.save(Path(folder) / "cache.safetensors")
        again = lens.ActivationCache.load(Path(folder) / "cache.safetensors", model=one.model)
        for name in names:
            case.equal(f"{name} from a file", again[name], cache[name])
        _, state = one.model(ids[:, :-1], return_state=True)
        one.model.save_state(state, Path(folder) / "state.safetensors")
        loaded = one.model.load_state(Path(folder) / "state.safetensors")
        ours, expected = (one.model(ids[:, -1:], past_key_values=given) for given in (loaded, state))
        case.equal("the logits after a state from a file", ours, expected)


@check(27, "threads do not meet", judge="hf", share=0.2)
def threads(case: Case) -> None:
    """One plain, one that reads, one that edits, on one model at once."""
    with case.exact():
        one, ids = case.pair(torch.float64), case.tokens()
        [name] = case.deal(one.names())
        with torch.no_grad():
            unedited = plain(one, ids)
            edited = one.model.run_with_hooks(ids, fwd_hooks=[(name, case.family.edit_at(name))])
        jobs = (
            (lambda: one.hf(ids, use_cache=False).logits, unedited),
            (lambda: one.model.run_with_cache(ids, names_filter=one.names())[0], unedited),
            (lambda: one.model.run_with_hooks(ids, fwd_hooks=[(name, case.family.edit_at(name))]), edited),
        )
        failures: list[str] = []
        start = threading.Barrier(len(jobs))

        def work(job: Any, expected: torch.Tensor) -> None:
            start.wait()
            for _ in range(4):
                try:
                    with Wide(), torch.no_grad():
                        is_same = torch.equal(job(), expected)
                except Exception as error:
                    failures.append(f"with an edit at {name} in another thread: {error}")
                else:
                    failures.extend([] if is_same else [f"with an edit at {name} in another thread, other logits"])

        running = [threading.Thread(target=work, args=job) for job in jobs]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
    assert not failures, failures[0]


@check(
    28, "config fields that are ignored change nothing, and fields that nobody declared refuse", judge="hf", share=0.4
)
def configuration(case: Case) -> None:
    """A field in `config_ignored` at another value; a field of HF's that the plugin does not hold."""
    family, ids = case.family, tokens(2, 12)
    base = new_pair(family)
    architecture = base.model.architecture
    default = type(tiny_config(family, {}))()
    both = sorted({*architecture.config_ignored} & {*family.axes})
    assert not both, (
        f"{', '.join(both)} is in config_ignored, and the type's checkpoints vary it: it changes the values"
    )
    ignored = [name for name in architecture.config_ignored if hasattr(default, name)]
    for name in case.deal(ignored, 3):
        value = getattr(default, name)
        tried = [_is_ignored(case, base, name, other, ids) for other in _others(value)]
        assert any(tried) or not isinstance(value, int | float), (
            f"HF builds and runs no model at another value of the ignored {name}, so that nothing shows that it is"
        )
    hf = new_pair(family).hf
    hf.config.__class__ = _grown(type(hf.config))
    hf.config.field_of_a_later_release = 1
    try:
        lens.load(hf)
    except UnsupportedConfigError as error:
        told = str(error)
    else:
        raise AssertionError("a config field that nobody declared, at another value than its default, loads")
    assert "field_of_a_later_release=1" in told, f"the refusal does not name the field and its value: {told}"


def _grown(config_class: Any) -> Any:
    """Make HF's config class as a later release may have it: with one more field."""

    class Grown(config_class):  # pyright: ignore[reportUntypedBaseClass]
        """The class and a field."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.field_of_a_later_release = 0

    return Grown


def _others(value: Any) -> list[Any]:
    """Give other values that HF's configs may let pass: of the same kind, small ones, and none at all."""
    if isinstance(value, bool):
        found: list[Any] = [not value]
    elif isinstance(value, int):
        found = [value + 1, 1, 2, 0, None]
    elif isinstance(value, float):
        found = [value / 2 + 0.25, 0.0, 1.0, 2.0, None]
    else:
        found = ["relu", "silu"] if isinstance(value, str) else [1, 2, 0.5, True]
    return [other for other in found if other is not value and (other is None or other != value)]


def _is_ignored(case: Case, base: Pair, name: str, value: Any, ids: Tensor) -> bool:
    """See that a value of a field changes no bit, in evaluation and in training; whether HF runs with it at all.

    Dropout draws from the same seed in both.
    """
    try:
        other = tiny_model(base.family, {name: value})
        _seeded(other, ids, is_training=False)
    except Exception:  # HF's own refusal of the value: there is no such checkpoint
        return False
    told, known = f"with the ignored {name} at {value!r}", base.reference.state_dict()
    shapes = [{key: tuple(tensor.shape) for key, tensor in state.items()} for state in (other.state_dict(), known)]
    assert shapes[0] == shapes[1], f"{told}, HF's model has other parameters"
    other.load_state_dict(known)
    for is_training in (False, True):
        ours, expected = (_seeded(hf, ids, is_training=is_training) for hf in (other, base.reference))
        case.equal(f"the logits {told}, in {'training' if is_training else 'evaluation'},", ours, expected)
    lens.load(other)
    return True


def _seeded(hf: Any, ids: Tensor, *, is_training: bool) -> Tensor:
    """Give HF's logits with random numbers from a fixed seed; the model is left in evaluation."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        hf.train(is_training)
        try:
            return hf(ids, use_cache=False).logits
        finally:
            hf.eval()
