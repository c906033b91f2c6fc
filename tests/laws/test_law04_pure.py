"""Law 4: reading changes nothing, bit for bit: logits, random numbers drawn, parameter gradients."""

import contextlib
import copy

import pytest
import torch
from golden.tiny import fresh, pad, random_tokens, tiny_gpt2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lens_conformance.golden.gpt2 import names, names_at

import lens_core as lens
from lens_core import errors

NAMES = names(3)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
QUIET = settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))


def look(x, hook):
    """Read and return nothing."""
    float(x.detach().sum())


def positions_of(mask):
    """Count real tokens from 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def subsets():
    """Draw a subset of the names: a few of them, or all."""
    return st.one_of(st.just(NAMES), st.sets(st.sampled_from(NAMES), min_size=1, max_size=6).map(sorted))


@pytest.fixture(scope="module")
def pairs():
    """Build each model once per module: (lens model, untouched twin)."""
    made = {}

    def build(dtype, attn, **config):
        key = dtype, attn, tuple(sorted(config.items()))
        if key not in made:
            hf = tiny_gpt2(dtype=dtype, attn=attn, **config)
            made[key] = lens.load(hf), fresh(hf)
        return made[key]

    return build


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_reading_any_subset_leaves_the_logits(pairs, attn, dtype):
    """Law 4: any subset of names, read by cache, by function or both; padded or not; in each autograd mode."""
    model, reference = pairs(DTYPES[dtype], attn)

    @QUIET
    @given(subsets(), st.sampled_from(sorted(MODES)), st.sampled_from(["none", "left", "right"]), st.integers(0, 2))
    def prove(chosen, mode, side, how):
        tokens, options, real = random_tokens(2, 6), {}, torch.ones(2, 6, dtype=torch.bool)
        if side != "none":
            tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (2, 6)], side, amount=1)
            options, real = {"attention_mask": mask, "position_ids": positions_of(mask)}, mask.bool()
        with MODES[mode]():
            expected = reference(tokens, **options).logits
            options.pop("position_ids", None)
            entries = [(name, look) for name in chosen] if how else []
            with model.hooks(fwd_hooks=entries):
                if how < 2:
                    ours, cache = model.run_with_cache(tokens, names_filter=list(chosen), **options)
                    assert sorted(cache) == sorted(chosen)
                else:
                    ours = model(tokens, **options)
        # Padding's own rows hang on the positions that padding is given, which nothing real reads.
        assert torch.equal(ours[real], expected[real]), f"off by {(ours - expected)[real].abs().max()}"

    prove()


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", names_at(1))
def test_reading_one_name_leaves_the_logits(pairs, attn, name):
    """Law 4: each name alone, in float32, in each autograd mode, by cache, by function, at some positions."""
    model, reference = pairs(torch.float32, attn)
    tokens = random_tokens(2, 6)
    for mode in MODES.values():
        with mode():
            expected = reference(tokens).logits
            assert torch.equal(model.run_with_cache(tokens, names_filter=[name])[0], expected)
            assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, look)]), expected)
            assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, look, [1, 3])]), expected)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", names_at(1))
def test_returning_the_value_unchanged_leaves_the_logits(pairs, attn, name):
    """Law 4: a function that returns its argument, or an equal copy, without autograd, changes no bit."""
    model, reference = pairs(torch.float32, attn)
    tokens = random_tokens(2, 6)
    with torch.no_grad():
        expected = reference(tokens).logits
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x)]), expected)
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x.clone())]), expected)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_reading_leaves_random_numbers_and_parameter_gradients(subject, attn, train):
    """Law 4: with dropout on, reading everything draws no number more, and no gradient bit changes."""
    for chosen in (NAMES, [n for n in NAMES if "attn" in n], ["blocks.1.attn.hook_pattern"], ["hook_embed"]):
        for how in ("cache", "functions"):
            one = subject(attn=attn, **DROPOUT)
            tokens = random_tokens(2, 6)
            states = []
            for model in (one.model.hf_model, one.reference):
                model.train(train)
            for run in (True, False):
                torch.manual_seed(7)
                if not run:
                    logits = one.reference(tokens).logits
                elif how == "cache":
                    logits, _ = one.model.run_with_cache(tokens, names_filter=list(chosen))
                else:
                    logits = one.model.run_with_hooks(tokens, fwd_hooks=[(name, look) for name in chosen])
                states.append((logits.detach(), torch.get_rng_state()))
                logits.pow(2).sum().backward()
                assert torch.equal(torch.get_rng_state(), states[-1][1])
            assert torch.equal(states[0][0], states[1][0])
            assert torch.equal(states[0][1], states[1][1])
            theirs = dict(one.reference.named_parameters())
            for name, parameter in one.hf.named_parameters():
                assert torch.equal(parameter.grad, theirs[name].grad), name


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_reading_leaves_generation(subject, attn, sample):
    """Law 4: generation with everything read gives HF's tokens and random state, padded or not."""
    one = subject(attn=attn)
    rows = [random_tokens(1, n, seed=n)[0] for n in (3, 5)]
    for tokens, mask in (pad(rows, "left"), (random_tokens(2, 5), torch.ones(2, 5, dtype=torch.long))):
        results = []
        for hooked in (True, False):
            model = one.hf if hooked else one.reference
            context = (
                one.model.hooks(fwd_hooks=[(name, look) for name in NAMES]) if hooked else contextlib.nullcontext()
            )
            torch.manual_seed(3)
            with context:
                out = model.generate(
                    tokens,
                    attention_mask=mask,
                    max_new_tokens=5,
                    do_sample=sample,
                    eos_token_id=None,
                    pad_token_id=28,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            results.append((out.sequences, torch.stack(out.logits), torch.get_rng_state()))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


def test_plain_forward_is_hf(subject, attn):
    """Law 4: with nothing asked for, the model's logits are HF's, position ids from the mask included."""
    one = subject(attn=attn)
    tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (2, 6)], "left")
    with torch.no_grad():
        assert torch.equal(one.model(tokens[:, 4:]), one.reference(tokens[:, 4:]).logits)
        ours = one.model(tokens, attention_mask=mask)
        theirs = one.reference(tokens, attention_mask=mask, position_ids=positions_of(mask)).logits
        assert torch.equal(ours[mask.bool()], theirs[mask.bool()])


def test_reading_a_cache_in_the_graph_gives_golden_values(subject, attn):
    """Law 4: a cached value that stays in the graph may take the explicit way; the logits are right all the same."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    expected, _ = one.golden(tokens)
    with one.model.caching(one.names(), detach=False) as cache:
        logits = one.model(tokens)
    torch.testing.assert_close(logits.detach(), expected, atol=1e-10, rtol=1e-10)
    assert all(cache[name].requires_grad for name in one.names() if name != "hook_tokens")


def test_upcasting_attention_is_read_purely_or_refused():
    """Law 4: under eager, reorder_and_upcast_attn takes another way in HF: bit-pure and right there too, or refused."""
    for attn in ("eager", "sdpa"):
        hf = tiny_gpt2(attn=attn, reorder_and_upcast_attn=True, dtype=torch.bfloat16)
        reference, tokens = fresh(hf), random_tokens()
        try:
            model = lens.load(hf)
            with torch.no_grad():
                logits, cache = model.run_with_cache(tokens, names_filter=["blocks.1.attn.hook_pattern"])
        except errors.LensError:
            continue
        with torch.no_grad():
            eager = copy.deepcopy(reference)
            eager.set_attn_implementation("eager")
            pattern = eager(tokens, output_attentions=True).attentions[1]
            assert torch.equal(logits, reference(tokens).logits)
        torch.testing.assert_close(cache["pattern", 1].float(), pattern.float(), atol=2e-2, rtol=0)
