"""Properties 13, 23, 25, 27 and 28: the model stays what it was, weights and records are what they claim."""

import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

import lens_core as lens
from lens_conformance.case import Case, tokens
from lens_conformance.checks import check
from lens_conformance.fingerprint import differences, fingerprint
from lens_conformance.float64 import Wide
from lens_conformance.oracle import new_pair, plain, tiny_config
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
    ("mlp.hook_router_logits", ("mlp.hook_in",), "W_router", None, "bpd,de->bpe"),
    ("mlp.hook_out", ("mlp.hook_post",), "W_out", "b_out", "bpm,md->bpd"),
    ("mixer.hook_in_proj", ("norm.hook_out",), "W_in_proj", "b_in_proj", "bpd,dm->bpm"),
    ("mixer.hook_x_proj", ("mixer.hook_ssm_input",), "W_x", None, "bpm,mr->bpr"),
    ("hook_mixer_out", ("mixer.hook_gated",), "W_out_proj", "b_out_proj", "bpm,md->bpd"),
)


@check(23, "weight views recompute the activations that they claim", judge="law", needs=Capability.WEIGHT_VIEWS)
def weights(case: Case) -> None:
    """Embedding, every projection of every block, unembedding."""
    one, ids = case.pair(), case.tokens()
    model, names = one.model, set(one.model.weight_names)
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, names_filter=one.names())
        embedded = model.weight("W_E")[ids]
        scale = (embedded * cache["hook_embed"]).sum() / embedded.square().sum()  # some types scale embeddings
        case.same("W_E[tokens], but for a scale", embedded * scale, cache["hook_embed"], 1e-5)
        own = cache["unembed.hook_in"] @ model.weight("W_U") + model.weight("b_U")
        case.same("unembed.in W_U + b_U", own, cache["unembed.hook_out"], 1e-4)
        tried = 0
        for layer in range(model.cfg.n_layers):
            at = f"blocks.{layer}."
            for made, sources, weight, bias, how in (*_PROJECTIONS, *_gates(names)):
                source = next((at + name for name in sources if at + name in cache), None)
                if at + made not in cache or source is None or weight not in names:
                    continue
                try:
                    matrix = model.weight(weight, layer)
                except LensError:
                    continue  # of blocks of another kind
                expected = torch.einsum(how, cache[source], matrix)
                expected = expected if bias is None else expected + model.weight(bias, layer)
                told = f"{at}{made}, which is {source.removeprefix(at)} {weight}{f' + {bias}' if bias else ''},"
                case.same(told, cache[at + made], expected, 1e-4)
                tried += 1
    assert tried, "no weight of a block recomputes any activation"


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
    family, ids = case.family, tokens(2, 5)
    base = new_pair(family)
    architecture = base.model.architecture
    config = tiny_config(family, {})
    default = type(config)()
    ignored = [name for name in architecture.config_ignored if isinstance(getattr(default, name, None), int | float)]
    if ignored:
        name = case.choice(ignored, "ignored field")
        value = getattr(default, name)
        other = new_pair(family, overrides={name: _another(value)})
        other.hf.load_state_dict(base.hf.state_dict())
        with torch.no_grad():
            ours, expected = other.hf(ids), base.hf(ids)
        case.equal(f"the logits with the ignored {name} changed", ours.logits, expected.logits)
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


def _another(value: Any) -> Any:
    """Give another value of the same kind, within what HF's configs let pass."""
    return (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2 + 0.25
