"""State space models through HF's own cache: convolution windows, generation, and HF's known limits.

Where HF itself gives wrong values silently, lens gives the right ones or refuses with a LensError: never a third thing.
"""

import itertools

import pytest
import torch
from families.compare import error, same
from families.mamba import brief_ssm, dual, ssm
from families.subject import pair
from golden.tiny import pad, random_tokens
from lens_conformance.edits import bend, only_at
from lens_conformance.float64 import true_float64
from transformers import DynamicCache

from lens_core.errors import LensError

pytestmark = brief_ssm


def calls(one, tokens, bounds, entries=(), mask=None, names=None):
    """Run tokens in pieces on one cache; give all logits and the list of caches."""
    past, pieces, caches = DynamicCache(config=one.hf.config), [], []
    for start, stop in itertools.pairwise(bounds):
        options = {} if mask is None else {"attention_mask": mask[:, :stop]}
        with torch.no_grad(), one.model.hooks(fwd_hooks=list(entries)):
            logits, cache = one.model.run_with_cache(
                tokens[:, start:stop],
                names_filter=one.names() if names is None else names,
                past_key_values=past,
                use_cache=True,
                **options,
            )
        pieces.append(logits)
        caches.append(cache)
    return torch.cat(pieces, dim=1), caches


def right_or_refused(run, expected, what):
    """Let a run either refuse clearly or give the expected logits; say which."""
    try:
        logits = run()
    except LensError:
        return "refused"
    same(what, logits, expected, 1e-10)
    return "right"


# ------------------------------------------------------------------- the convolution's window


@pytest.mark.parametrize("prompt", [1, 2, 4])
@pytest.mark.parametrize("part", ["conv_in", "in_proj", "conv", "ssm_input"])
def test_edits_of_the_convolution_through_decode(wide, part, prompt):
    """What is edited before the convolution enters its window, what is edited after it does not; short prompts too."""
    tokens, name = random_tokens(2, 8), f"blocks.1.mixer.hook_{part}"
    bounds = [0, *range(prompt, 9)]
    for where in (range(8), [prompt - 1, prompt + 1], [0, prompt, 7]):
        edits = {name: only_at(name, bend, list(where))}
        expected, values = wide.golden(tokens, edits=edits)
        logits, caches = calls(wide, tokens, bounds, [(name, bend, list(where))])
        same(f"{part} at {list(where)}", logits, expected, 1e-10)
        for n in wide.names():
            joined = torch.cat([cache[n] for cache in caches], dim=1)
            same(f"{n} under {part} at {list(where)}", joined, values[n], 1e-10)


@pytest.mark.parametrize("width", [2, 3, 5])
def test_every_width_of_the_convolution(subject, attn, width):
    """Reading and editing with windows of other widths, prompts shorter and longer than the window."""
    with true_float64():
        one, tokens = pair(subject, dtype=torch.float64, attn=attn, conv_kernel=width), random_tokens(2, 7)
        name = "blocks.1.mixer.hook_conv_in"
        for prompt, edits in itertools.product((1, width - 1, 6), ({}, {name: bend})):
            expected, values = one.golden(tokens, edits=edits)
            logits, caches = calls(one, tokens, [0, *range(prompt, 8)], list(edits.items()))
            same(f"width {width}, prompt {prompt}", logits, expected, 1e-10)
            for n in one.names():
                same(n, torch.cat([cache[n] for cache in caches], dim=1), values[n], 1e-10)


@ssm
def test_edits_of_the_window_leave_hf_cache_as_golden_says(wide):
    """HF's convolution cache holds the edited inputs, its recurrent cache the edited state."""
    tokens, past = random_tokens(2, 6), DynamicCache(config=wide.hf.config)
    edits = {"blocks.1.mixer.hook_conv_in": bend, "blocks.1.mixer.hook_ssm_state": bend}
    _, values = wide.golden(tokens, edits=edits)
    for start, stop in ((0, 5), (5, 6)):
        with torch.no_grad():
            piece = tokens[:, start:stop]
            wide.model.run_with_hooks(piece, fwd_hooks=list(edits.items()), past_key_values=past, use_cache=True)
    layer = past.layers[1]
    same("window", layer.conv_states[0], values["blocks.1.mixer.hook_conv_in"][:, -4:].mT, 1e-10)
    same("state", layer.recurrent_states[0], values["blocks.1.mixer.hook_ssm_state"][:, -1], 1e-10)


# ------------------------------------------------------------------- generation


@pytest.mark.parametrize("edited", [None, "ssm_state", "conv_in", "decay"])
@ssm
def test_everything_captured_while_generating_equals_the_whole(wide, edited):
    """The cache of a greedy generation is golden's values of the whole sequence; the tokens are golden's choice."""
    tokens = random_tokens(2, 4)
    edits = {f"blocks.1.mixer.hook_{edited}": bend} if edited else {}
    with wide.model.hooks(fwd_hooks=list(edits.items())):
        ids, cache = wide.model.generate(
            tokens, 5, do_sample=False, stop_at_eos=False, return_cache=True, names_filter=wide.names()
        )
    logits, values = wide.golden(ids[:, :-1], edits=edits)
    assert torch.equal(ids[:, 4:], logits[:, 3:].argmax(-1))
    for name in wide.names():
        expected = values[name]
        if name.startswith(("unembed.", "hook_logits", "ln_final")):  # HF computes the prompt's last logits only
            expected = expected[:, -cache[name].shape[1] :]
        same(name, cache[name], expected, 1e-10)


def test_padded_prompts_generate_what_each_does_alone(wide):
    """Left padding, edits and generation together: each row continues as alone."""
    rows = [random_tokens(1, n, seed=n)[0] for n in (2, 5)]
    tokens, mask = pad(rows, "left", amount=1)
    edits = {"blocks.1.mixer.hook_ssm_state": bend, "blocks.0.mixer.hook_conv_in": bend}
    options = {"do_sample": False, "stop_at_eos": False}
    with wide.model.hooks(fwd_hooks=list(edits.items())):
        ids = wide.model.generate(tokens, 4, attention_mask=mask, **options)
        for row, prompt in enumerate(rows):
            alone = wide.model.generate(prompt[None], 4, **options)
            assert torch.equal(ids[row, -4:], alone[0, -4:])
            logits, _ = wide.golden(alone[:, :-1], edits=edits)
            assert torch.equal(alone[0, -4:], logits[0, -4:].argmax(-1))


def test_beams_and_sampling_are_hfs_with_everything_read(narrow):
    """Beam search, which reorders the cache, and sampling give HF's own tokens while every name is captured."""
    tokens = random_tokens(2, 4)
    for options in ({"num_beams": 3, "do_sample": False}, {"num_beams": 2, "do_sample": True}, {"do_sample": True}):
        torch.manual_seed(0)
        expected = narrow.reference.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=5,
            eos_token_id=None,
            pad_token_id=28,
            **({"top_k": 0, "top_p": 1.0, **options} if options["do_sample"] else options),
        )
        torch.manual_seed(0)
        seen = []
        entries = [(name, lambda x, hook, seen=seen: seen.append(hook.name)) for name in narrow.names()]
        with narrow.model.hooks(fwd_hooks=entries):
            assert torch.equal(narrow.model.generate(tokens, 5, stop_at_eos=False, **options), expected), options
        assert set(seen) == set(narrow.names())


def test_generation_without_a_cache_is_the_same(wide):
    """Recomputing the whole at every step gives the tokens of the cached generation, with an edit."""
    tokens, entries = random_tokens(2, 4), [("blocks.1.mixer.hook_ssm_state", bend)]
    with wide.model.hooks(fwd_hooks=entries):
        cached, whole = (
            wide.model.generate(tokens, 4, do_sample=False, stop_at_eos=False, use_past_kv_cache=flag)
            for flag in (True, False)
        )
    assert torch.equal(cached, whole)


# ------------------------------------------------------------------- HF's limits

EDITED = [("blocks.1.mixer.hook_ssm_state", bend)]
CHUNKS = ((0, 3, 5, 6), (0, 1, 6), (0, 2, 4, 6))


@pytest.mark.parametrize("bounds", CHUNKS, ids=str)
@pytest.mark.parametrize("use", ["plain", "cache", "hooks", "edit"])
@ssm
def test_a_prompt_in_chunks_is_right_or_refused(wide, bounds, use):
    """HF's Mamba resets the state at the second chunk, silently (Mamba-2 goes on from it)."""
    tokens, entries = random_tokens(2, 6), EDITED if use == "edit" else []
    expected, values = wide.golden(tokens, edits=dict(entries))
    plain, seen = wide.golden(tokens)[0], []

    def run():
        if use in ("cache", "edit"):
            logits, caches = calls(wide, tokens, bounds, entries)
            for name in wide.names():
                same(name, torch.cat([cache[name] for cache in caches], dim=1), values[name], 1e-10)
            return logits
        past, pieces = DynamicCache(config=wide.hf.config), []
        fwd_hooks = [("blocks.1.hook_resid_post", lambda x, hook: seen.append(x))] if use == "hooks" else []
        for start, stop in itertools.pairwise(bounds):
            with torch.no_grad():
                part = tokens[:, start:stop]
                pieces.append(
                    wide.model.run_with_hooks(part, fwd_hooks=fwd_hooks, past_key_values=past, use_cache=True)
                )
        return torch.cat(pieces, dim=1)

    outcome = right_or_refused(run, expected, f"chunks {bounds}, {use}")
    if wide.subject.name == "mamba2":
        assert outcome == "right", "HF's Mamba-2 can do this"
    with torch.no_grad():
        same("afterwards", wide.model(tokens), plain, 1e-10)


@dual
@pytest.mark.parametrize("use", ["plain", "cache", "edit", "generate"])
def test_steps_beyond_the_limit_are_right_or_refused(subject, attn, use):
    """HF's Mamba-2 ignores time_step_limit in its decode step: lens gives the clamped values or refuses."""
    with true_float64():
        one, tokens = pair(subject, dtype=torch.float64, attn=attn, time_step_limit=(0.3, 0.9)), random_tokens(2, 6)
        entries = [("blocks.1.mixer.hook_delta_pre", bend)] if use == "edit" else []
        expected, values = one.golden(tokens, edits=dict(entries))

        def run():
            if use == "plain":
                return calls(one, tokens, [0, 3, 4, 5, 6], names=["hook_embed"])[0]
            logits, caches = calls(one, tokens, [0, 3, 4, 5, 6], entries)
            for name in one.names():
                same(name, torch.cat([cache[name] for cache in caches], dim=1), values[name], 1e-10)
            return logits

        if use != "generate":
            right_or_refused(run, expected, f"limited steps, {use}")
            return
        try:
            ids, cache = one.model.generate(
                tokens, 4, do_sample=False, stop_at_eos=False, return_cache=True, names_filter=one.names()
            )
        except LensError:
            return
        logits, values = one.golden(ids[:, :-1])
        assert torch.equal(ids[:, 6:], logits[:, 5:].argmax(-1))
        same("delta", cache["blocks.1.mixer.hook_delta"], values["blocks.1.mixer.hook_delta"], 1e-10)


@pytest.mark.parametrize("use", ["cache", "edit"])
def test_decoding_after_right_padding_is_right_or_refused(wide, use):
    """HF's cached state after right padding has seen the padding: lens gives each row's own values or refuses."""
    rows = [random_tokens(1, n, seed=n)[0] for n in (2, 4)]
    tokens, mask = pad(rows, "right")
    after = random_tokens(2, 1, seed=8)
    entries = [("blocks.1.mixer.hook_conv_in", bend)] if use == "edit" else []

    def run():
        whole = torch.cat([mask, torch.ones_like(after)], dim=1)
        return calls(wide, torch.cat([tokens, after], dim=1), [0, 4, 5], entries, mask=whole)[0][:, -1:]

    expected = torch.stack(
        [
            wide.golden(torch.cat([row, new])[None], edits=dict(entries))[0][0, -1:]
            for row, new in zip(rows, after, strict=True)
        ]
    )
    right_or_refused(run, expected, "a step after right padding")


@pytest.mark.parametrize("edited", [False, True], ids=["read", "edited"])
@ssm
def test_a_left_padded_prompt_may_be_decoded(wide, edited):
    """Left padding, then steps with the mask that grows: each row has its own values, edits included."""
    rows = [random_tokens(1, n, seed=n)[0] for n in (5, 7)]
    tokens, mask = pad(rows, "left", amount=1)
    entries = [("blocks.1.mixer.hook_ssm_state", bend), ("blocks.0.mixer.hook_conv_in", bend)] if edited else []
    logits, caches = calls(wide, tokens, [0, 5, 6, 7, 8], entries, mask=mask)
    for row, ids in enumerate(rows):
        expected, values = wide.golden(ids[None], edits=dict(entries))
        real = mask[row].bool()
        same("logits", logits[row][real], expected[0], 1e-10)
        for name in wide.names():
            joined = torch.cat([cache[name] for cache in caches], dim=1)
            same(f"{name}, row {row}", joined[row][real], values[name][0], 1e-10)


def mild(x, hook=None):
    """Change every element, without the growth that float16 cannot hold."""
    return x * 0.7 + 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@ssm
def test_half_precision_is_as_good_as_hf_in_prefill_and_decode(subject, attn, dtype):
    """Every step's logits, read or with an edit that changes nothing, are HF's own to the bit; edits no worse."""
    one, tokens = pair(subject, dtype=dtype, attn=attn), random_tokens(2, 8)
    theirs, past = [], DynamicCache(config=one.config)
    with torch.no_grad():
        for start, stop in itertools.pairwise([0, 5, 6, 7, 8]):
            theirs.append(one.reference(tokens[:, start:stop], cache_params=past).logits)
    logits, caches = calls(one, tokens, [0, 5, 6, 7, 8])
    assert torch.equal(logits, torch.cat(theirs, dim=1))
    exact, values = one.golden(tokens)
    floor = max(error(logits, exact), 4 * torch.finfo(dtype).eps)  # what HF itself is off by
    for name in one.names():
        joined = torch.cat([cache[name] for cache in caches], dim=1)
        assert error(joined, values[name]) <= 4 * floor, name
    for part in ("ssm_state", "conv_in", "decay", "delta"):
        name = f"blocks.1.mixer.hook_{part}"
        expected, _ = one.golden(tokens, edits={name: mild})
        edited, _ = calls(one, tokens, [0, 5, 6, 7, 8], [(name, mild)], names=["hook_embed"])
        assert error(edited, expected) <= 4 * floor, f"{part}: {error(edited, expected):.2e}, HF {floor:.2e}"


def test_a_failed_call_leaves_nothing_behind(wide):
    """A call that raised in the middle of a scan leaves the model as it was."""
    tokens = random_tokens(2, 5)

    def fail(x, hook):
        if hook.positions.tolist() == [2]:
            raise ZeroDivisionError

    with torch.no_grad():
        with pytest.raises((LensError, ZeroDivisionError)):
            wide.model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mixer.hook_ssm_state", fail)])
        assert torch.equal(wide.hf(tokens).logits, wide.reference(tokens).logits)
        same("afterwards", calls(wide, tokens, [0, 3, 4, 5])[0], wide.golden(tokens)[0], 1e-10)
