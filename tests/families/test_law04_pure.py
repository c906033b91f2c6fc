"""Law 4: reading changes nothing, bit for bit: logits, random numbers drawn, parameter gradients."""

import contextlib

import pytest
import torch
from families.subject import pair, shared_pair
from golden.tiny import pad, random_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def look(x, hook):
    """Read and return nothing."""
    float(x.detach().sum())


def positions_of(mask):
    """Count real tokens from 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def quiet(examples):
    """Settings of a property: few examples, always the same."""
    return settings(
        deadline=None,
        max_examples=examples,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.in_full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_reading_any_subset_leaves_the_logits(subject, attn, dtype):
    """Law 4: any subset of names, read by cache, by function or both; padded or not; in each autograd mode."""
    one = shared_pair(subject.name, getattr(torch, dtype), attn)
    names = one.names()
    subsets = st.one_of(st.just(names), st.sets(st.sampled_from(names), min_size=1, max_size=6).map(sorted))

    @quiet(16 if subject.full else 4)
    @given(subsets, st.sampled_from(sorted(MODES)), st.sampled_from(["none", *subject.paddings]), st.integers(0, 2))
    def prove(chosen, mode, side, how):
        tokens, options, real = random_tokens(2, 6), {}, torch.ones(2, 6, dtype=torch.bool)
        if side != "none":
            tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (2, 6)], side, amount=1)
            options, real = {"attention_mask": mask}, mask.bool()
        with MODES[mode]():
            ids = (
                {}
                if side == "none" or subject.plugin.startswith("lens_mamba")
                else {"position_ids": positions_of(mask)}
            )
            expected = one.reference(tokens, **options, **ids).logits
            entries = [(name, look) for name in chosen] if how else []
            with one.model.hooks(fwd_hooks=entries):
                if how < 2:
                    ours, cache = one.model.run_with_cache(tokens, names_filter=list(chosen), **options)
                    assert sorted(cache) == sorted(chosen)
                else:
                    ours = one.model(tokens, **options)
        # Padding's own rows hang on the positions that padding is given, which nothing real reads.
        assert torch.equal(ours[real], expected[real]), f"{chosen}: off by {(ours - expected)[real].abs().max()}"

    prove()


@pytest.mark.in_full
def test_reading_one_name_leaves_the_logits(subject, narrow):
    """Law 4: each name alone, by cache, by function, at some positions; in each autograd mode in full."""
    tokens = random_tokens(2, 6)
    for mode in MODES if subject.full else ("grad", "inference"):
        with MODES[mode]():
            expected = narrow.reference(tokens).logits
            for name in narrow.edited_names():
                assert torch.equal(narrow.model.run_with_cache(tokens, names_filter=[name])[0], expected), name
                entry = (name, look) if subject.pos_axis(name) is None or not subject.full else (name, look, [1, 3])
                assert torch.equal(narrow.model.run_with_hooks(tokens, fwd_hooks=[entry]), expected), name


@pytest.mark.in_full
def test_returning_the_value_unchanged_leaves_the_logits(narrow):
    """Law 4: a function that returns its argument, or an equal copy, without autograd, changes no bit."""
    tokens, off = random_tokens(2, 6), {}
    with torch.no_grad():
        expected = narrow.reference(tokens).logits
        for name in narrow.edited_names():
            for what, same in (("argument", lambda x, hook: x), ("copy", lambda x, hook: x.clone())):
                ours = narrow.model.run_with_hooks(tokens, fwd_hooks=[(name, same)])
                if not torch.equal(ours, expected):
                    off[name, what] = float((ours - expected).abs().max())
    assert not off


@pytest.mark.in_full
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_reading_leaves_random_numbers_and_parameter_gradients(subject, attn, train):
    """Law 4: with dropout on, reading draws no number more, and no gradient bit changes."""
    if not subject.full and not train:
        return
    tokens = random_tokens(2, 6)
    one = pair(subject, attn=attn, **subject.dropout)
    for model in (one.hf, one.reference):
        model.train(train)
    torch.manual_seed(7)
    expected = one.reference(tokens).logits
    state = torch.get_rng_state()
    expected.pow(2).sum().backward()
    theirs = {name: parameter.grad for name, parameter in one.reference.named_parameters()}
    if train and subject.dropout:
        assert not torch.equal(expected, one.reference(tokens).logits), "no dropout is on: nothing is tested"
    names = one.names()
    for chosen in (names, [n for n in names if "attn" in n or "mixer" in n], ["hook_embed"]):
        for how in ("functions", "cache") if subject.full else ("functions",):
            one.hf.zero_grad(set_to_none=True)
            torch.manual_seed(7)
            if how == "cache":
                logits, _ = one.model.run_with_cache(tokens, names_filter=list(chosen))
            else:
                logits = one.model.run_with_hooks(tokens, fwd_hooks=[(name, look) for name in chosen])
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.equal(logits, expected)
            logits.pow(2).sum().backward()
            for name, parameter in one.hf.named_parameters():
                assert torch.equal(parameter.grad, theirs[name]), name


def generated(model, tokens, mask, **options):
    """Generate with HF, and give the tokens, the logits of each step and the random state."""
    torch.manual_seed(3)
    out = model.generate(
        tokens,
        attention_mask=mask,
        eos_token_id=None,
        pad_token_id=28,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences, torch.stack(out.logits), torch.get_rng_state()


@pytest.mark.in_full
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_reading_leaves_generation(subject, narrow, sample):
    """Law 4: generation with everything read gives HF's tokens, logits and random state, padded or not."""
    if sample and not subject.full:
        return
    rows = [random_tokens(1, n, seed=n)[0] for n in (3, 5)]
    for tokens, mask in (pad(rows, "left"), (random_tokens(2, 5), torch.ones(2, 5, dtype=torch.long))):
        options = {"max_new_tokens": 5, "do_sample": sample}
        with narrow.model.hooks(fwd_hooks=[(name, look) for name in narrow.names()]):
            ours = generated(narrow.hf, tokens, mask, **options)
        for left, right in zip(ours, generated(narrow.reference, tokens, mask, **options), strict=True):
            assert torch.equal(left, right)


@pytest.mark.in_full
def test_greedy_generation_of_many_lengths_is_hfs(subject, narrow):
    """Law 4: prompts of 1 to 40 tokens: lens' generation with everything read continues them as HF does."""
    options = {"max_new_tokens": 4, "do_sample": False}
    longest = min(40, getattr(narrow.config, "max_position_embeddings", 44) - 4)
    for length in (1, 2, 3, 7, 16, longest) if subject.full else (1, 9, longest):
        tokens = random_tokens(2, length, seed=length)
        expected, _, _ = generated(narrow.reference, tokens, torch.ones_like(tokens), **options)
        with narrow.model.hooks(fwd_hooks=[(name, look) for name in narrow.names()]):
            ours = narrow.model.generate(tokens, stop_at_eos=False, return_type="tokens", **options)
        assert torch.equal(ours, expected), length


@pytest.mark.once
def test_plain_forward_is_hf(subject, narrow):
    """Law 4: with nothing asked for, the model's logits are HF's, position ids from the mask included."""
    tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (2, 6)], "left")
    ids = {} if subject.plugin.startswith("lens_mamba") else {"position_ids": positions_of(mask)}
    with torch.no_grad():
        assert torch.equal(narrow.model(tokens[:, 4:]), narrow.reference(tokens[:, 4:]).logits)
        if "left" not in subject.paddings:
            return
        ours = narrow.model(tokens, attention_mask=mask)
        theirs = narrow.reference(tokens, attention_mask=mask, **ids).logits
        assert torch.equal(ours[mask.bool()], theirs[mask.bool()])
