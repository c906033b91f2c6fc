"""State space models: reading changes no bit, values do not depend on chunks, threads do not meet."""

import itertools
import random
import sys
import threading

import pytest
import torch
from families.compare import same
from families.mamba import brief_ssm, dual, ssm
from families.subject import pair
from golden.tiny import pad, random_tokens
from lens_conformance.edits import bend
from lens_conformance.fingerprint import differences, fingerprint
from lens_conformance.float64 import Wide, true_float64
from transformers import DynamicCache

pytestmark = brief_ssm
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def subsets(names, count, seed=0):
    """Draw subsets of names: all, none but one, and some."""
    rng = random.Random(seed)
    yield list(names)
    for _ in range(count):
        yield rng.sample(list(names), rng.randint(1, len(names)))


# ------------------------------------------------------------------- reading is pure


@pytest.mark.parametrize("residual", [True, False], ids=["residual-float32", "residual-own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ssm
def test_reading_changes_no_bit(subject, attn, dtype, residual):
    """Logits of a whole run, under padding and in decode are HF's to the bit, whatever is read."""
    one = pair(subject, dtype=dtype, attn=attn, residual_in_fp32=residual)
    tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (3, 6)], "left", amount=1)
    with torch.no_grad():
        whole = one.reference(tokens).logits
        padded = one.reference(tokens, attention_mask=mask).logits
        past, steps = DynamicCache(config=one.config), []
        for start, stop in itertools.pairwise((0, 4, 5, 6)):
            steps.append(one.reference(tokens[:, start:stop], cache_params=past).logits)
    assert whole.dtype == one.reference(tokens).logits.dtype
    for names in subsets(one.names(), 5):
        with torch.no_grad():
            assert torch.equal(one.model.run_with_cache(tokens, names_filter=names)[0], whole), names
            logits, _ = one.model.run_with_cache(tokens, names_filter=names, attention_mask=mask)
            assert torch.equal(logits, padded), names
            ours = DynamicCache(config=one.config)
            for (start, stop), expected in zip(itertools.pairwise((0, 4, 5, 6)), steps, strict=True):
                part = tokens[:, start:stop]
                logits, _ = one.model.run_with_cache(part, names_filter=names, past_key_values=ours, use_cache=True)
                assert torch.equal(logits, expected), (names, start)
            for a, b in zip(ours.layers, past.layers, strict=True):
                assert torch.equal(a.conv_states[0], b.conv_states[0])
                assert torch.equal(a.recurrent_states[0], b.recurrent_states[0])
                assert a.recurrent_states[0].dtype == b.recurrent_states[0].dtype


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_reading_changes_no_gradient(subject, attn, dtype):
    """Parameter gradients in training mode are HF's to the bit while every name is read."""
    one, tokens = pair(subject, dtype=dtype, attn=attn), random_tokens(2, 6)
    one.hf.train()
    one.reference.train()
    one.reference(tokens, labels=tokens).loss.backward()
    for names in subsets(one.names(), 2):
        one.hf.zero_grad(set_to_none=True)
        with one.model.hooks(fwd_hooks=[(name, lambda x, hook: None) for name in names]), one.model.caching(names):
            one.hf(tokens, labels=tokens).loss.backward()
        for (key, ours), theirs in zip(one.hf.named_parameters(), one.reference.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad), f"{key} while {names} are read"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions_that_give_back_what_they_got_change_no_bit(subject, attn, dtype):
    """An edit whose result has the same bits is no edit, at the state and at every other name."""
    one, tokens = pair(subject, dtype=dtype, attn=attn), random_tokens(2, 6)
    with torch.no_grad():
        plain = one.reference(tokens).logits
        for name in one.edited_names():
            for same_value in (lambda x, hook: x, lambda x, hook: x.clone()):
                assert torch.equal(one.model.run_with_hooks(tokens, fwd_hooks=[(name, same_value)]), plain), name


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("residual", [True, False], ids=["residual-float32", "residual-own"])
def test_dtypes_are_hfs_own(subject, attn, dtype, residual):
    """Values have the dtype that HF has at that place, as seen by torch's own hooks on the twin."""
    one, tokens, seen = pair(subject, dtype=dtype, attn=attn, residual_in_fp32=residual), random_tokens(2, 5), {}
    reference = one.reference.backbone

    def note(name, which):
        def hook(module, args, out=None):
            seen[name] = (out if which == "out" else args[0]).dtype

        return hook

    handles = []
    for layer, block in enumerate(reference.layers):
        at, mixer = f"blocks.{layer}.", block.mixer
        handles.append(block.register_forward_pre_hook(note(at + "hook_resid_pre", "in")))
        handles.append(block.register_forward_hook(note(at + "hook_resid_post", "out")))
        handles.append(block.norm.register_forward_hook(note(at + "norm.hook_out", "out")))
        handles.append(mixer.register_forward_hook(note(at + "hook_mixer_out", "out")))
        handles.append(mixer.in_proj.register_forward_hook(note(at + "mixer.hook_in_proj", "out")))
        handles.append(mixer.out_proj.register_forward_pre_hook(note(at + "mixer.hook_gated", "in")))
        if hasattr(mixer, "x_proj"):
            handles.append(mixer.x_proj.register_forward_pre_hook(note(at + "mixer.hook_ssm_input", "in")))
            handles.append(mixer.x_proj.register_forward_hook(note(at + "mixer.hook_x_proj", "out")))
    handles.append(reference.norm_f.register_forward_hook(note("ln_final.hook_out", "out")))
    past = DynamicCache(config=one.config)
    with torch.no_grad():
        logits = one.reference(tokens, cache_params=past).logits
    for handle in handles:
        handle.remove()
    seen["hook_logits"] = logits.dtype
    with torch.no_grad():
        _, cache = one.model.run_with_cache(tokens, names_filter=one.names())
    for name, expected in seen.items():
        assert cache[name].dtype == expected, f"{name} is {cache[name].dtype}, HF's {expected}"
    points = {point.name: point for point in one.model.hook_points()}
    assert set(points) >= set(one.names())
    for name in one.edited_names():
        bent = []
        entries = [(name, lambda x, hook, bent=bent: bent.append(x.dtype) or x)]
        with torch.no_grad():
            one.model.run_with_hooks(tokens, fwd_hooks=entries)
        assert set(bent) == {cache[name].dtype}, name


# ------------------------------------------------------------------- chunks


@dual
def test_the_chunk_size_does_not_matter(subject, attn):
    """Values, edited states and decode are the same for every chunk size, and golden's."""
    tokens, name = random_tokens(2, 7), "blocks.1.mixer.hook_ssm_state"
    cases = {
        "read": [],
        "state": [(name, bend)],
        "some states": [(name, bend, [2, 3])],
        "last state": [(name, bend, [6])],
        "write": [("blocks.1.mixer.hook_ssm_write", bend)],
        "decay": [("blocks.1.mixer.hook_decay", bend)],
        "delta": [("blocks.1.mixer.hook_delta", bend)],
    }
    with true_float64():
        expected = {}
        for size in (1, 2, 3, 7, 8, 64):
            one = pair(subject, dtype=torch.float64, attn=attn, chunk_size=size)
            for what, entries in cases.items():
                with torch.no_grad(), one.model.hooks(fwd_hooks=entries):
                    logits, cache = one.model.run_with_cache(tokens, names_filter=one.names())
                    alone = one.model(tokens)
                same(f"{what} alone, chunks of {size}", alone, logits, 1e-11)
                first = expected.setdefault(what, (logits, cache))
                same(f"{what}, chunks of {size}", logits, first[0], 1e-11)
                for n in one.names():
                    same(f"{n}, {what}, chunks of {size}", cache[n], first[1][n], 1e-11)
        same("golden", expected["state"][0], one.golden(tokens, edits={name: bend})[0], 1e-10)


def test_long_sequences_neither_overflow_nor_drift(subject, attn):
    """A hundred positions of strong decay: finite values, gradients and golden's, with a state edited early."""
    with true_float64():
        one, tokens = pair(subject, dtype=torch.float64, attn=attn), random_tokens(1, 100)
        with torch.no_grad():
            for key, parameter in [*one.hf.named_parameters(), *one.reference.named_parameters()]:
                if key.endswith("A_log"):
                    parameter.add_(3.0)
        name = "blocks.1.mixer.hook_ssm_state"
        for entries, edits in (([], {}), ([(name, lambda x, hook: x + 1, [3])], {name: plus_one_at_three})):
            expected, values = one.golden(tokens, edits=edits)
            with torch.no_grad(), one.model.hooks(fwd_hooks=entries):
                logits, cache = one.model.run_with_cache(tokens, names_filter=one.names())
            same("logits", logits, expected, 1e-9)
            for n in one.names():
                same(n, cache[n], values[n], 1e-9)
        got = []
        logits = one.model.run_with_hooks(
            tokens, bwd_hooks=[("blocks.1.mixer.hook_decay", lambda g, hook: got.append(g))]
        )
        logits.pow(2).sum().backward()
        assert all(torch.isfinite(g).all() for g in got)
        assert got


def plus_one_at_three(x, hook):
    """Add one to the state at position 3."""
    return x + 1 if hook.positions.tolist() == [3] else x


# ------------------------------------------------------------------- threads, and what is left behind

EDITED = ["blocks.1.mixer.hook_ssm_state", "blocks.0.mixer.hook_conv_in", "blocks.1.mixer.hook_decay"]


def in_threads(jobs, rounds=6):
    """Run each job over and over in a thread of its own, switching often; return what was raised."""
    failures, start = [], threading.Barrier(len(jobs))

    def work(job):
        start.wait()
        for _ in range(rounds):
            try:
                with Wide():
                    job()
            except BaseException as error:
                failures.append(f"{job.__name__}: {type(error).__name__}: {error}")
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
        with true_float64():  # here, not in each thread: the default dtype is that of all
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    return failures


def test_threads_do_not_meet(subject, attn):
    """Bare, reading, generating and differently editing threads, on one model and on a second of the same class."""
    with true_float64():
        one, two = (pair(subject, dtype=torch.float64, attn=attn, seed=seed) for seed in (0, 1))
        tokens = random_tokens(2, 5)
        with torch.no_grad():
            plain = one.reference(tokens).logits
            other = two.reference(tokens).logits
            greedy = one.reference.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False, eos_token_id=None
            )
        _, values = one.golden(tokens)
        expected = {name: one.golden(tokens, edits={name: bend})[0] for name in EDITED}
    one.hf.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=1, do_sample=False)
    before = fingerprint(one.hf)

    def bare():
        with torch.no_grad():
            assert torch.equal(one.hf(tokens).logits, plain)

    def bare_two():
        with torch.no_grad():
            assert torch.equal(two.hf(tokens).logits, other)

    def read():
        with torch.no_grad():
            logits, cache = one.model.run_with_cache(tokens, names_filter=one.names())
        assert torch.equal(logits, plain)
        for name in one.names():
            same(name, cache[name], values[name], 1e-10)

    def generate():
        ours = one.model.generate(tokens, 3, do_sample=False, stop_at_eos=False)
        assert torch.equal(ours, greedy)

    def editor(name):
        def edit():
            with torch.no_grad():
                same(name, one.model.run_with_hooks(tokens, fwd_hooks=[(name, bend)]), expected[name], 1e-10)

        return edit

    assert in_threads([bare, bare_two, read, generate, *(editor(name) for name in EDITED)]) == []
    assert differences(before, fingerprint(one.hf)) == []


def test_nothing_is_left_behind(wide):
    """After reading, editing, generating and a function that raised, HF's model, classes and module are as before."""
    tokens = random_tokens(2, 5)
    wide.hf.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2, do_sample=False)
    before = fingerprint(wide.hf)

    def fail(x, hook):
        raise ZeroDivisionError

    with torch.no_grad():
        for name in wide.edited_names():
            wide.model.run_with_cache(tokens, names_filter=[name])
            wide.model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x * 1)])
            with pytest.raises(Exception, match="ZeroDivision|hook_"):
                wide.model.run_with_hooks(tokens, fwd_hooks=[(name, fail)])
        wide.model.generate(tokens, 3, do_sample=False, return_cache=True, names_filter=wide.names())
    assert differences(before, fingerprint(wide.hf)) == []


@ssm
def test_calling_hf_itself_inside_hooks_is_hooked(wide):
    """The HF model, called directly in the context, has the edit too, with a cache of its own making."""
    tokens = random_tokens(2, 5)
    for name in (*EDITED, "blocks.1.hook_mixer_in", "blocks.1.mixer.hook_B"):
        expected, _ = wide.golden(tokens, edits={name: bend})
        with torch.no_grad(), wide.model.hooks(fwd_hooks=[(name, bend)]):
            same(name, wide.hf(tokens).logits, expected, 1e-10)
            same(name, wide.hf(tokens, use_cache=False).logits, expected, 1e-10)


@ssm
def test_the_gated_norm_has_an_alias(wide):
    """Mamba-2: `mixer.hook_inner_norm` is `mixer.hook_gated`, one cache entry; Mamba has no such name."""
    tokens = random_tokens(2, 5)
    if wide.subject.name != "mamba2":
        with pytest.raises(KeyError):
            wide.model.run_with_cache(tokens, names_filter=["blocks.1.mixer.hook_inner_norm"])
        return
    expected, values = wide.golden(tokens, edits={"blocks.1.mixer.hook_gated": bend})
    with torch.no_grad(), wide.model.hooks(fwd_hooks=[("blocks.1.mixer.hook_inner_norm", bend)]):
        logits, cache = wide.model.run_with_cache(tokens, names_filter=["blocks.1.mixer.hook_inner_norm"])
    same("logits", logits, expected, 1e-10)
    assert list(cache) == ["blocks.1.mixer.hook_gated"]
    same("value", cache["blocks.1.mixer.hook_inner_norm"], values["blocks.1.mixer.hook_gated"], 1e-10)
