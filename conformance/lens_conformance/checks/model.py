"""Properties 13, 25, 27 and 28: the model stays what it was, records are what they claim."""

import sys
import tempfile
import threading
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
