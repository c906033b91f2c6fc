"""State as a value: a sequence run in parts is the whole, whatever is done with the state in between."""

import copy
import functools
import importlib.util

import pytest
import torch
from golden.tiny import pad, random_tokens, tiny_gpt2, tiny_tokenizer
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from transformers import DynamicCache, StaticCache

import lens_core as lens
from lens_core.errors import ArgumentError, ContextLengthError, InputError, LensError, StateError

BUILDERS = {
    "gpt2": ("lens_gpt2", tiny_gpt2),
    "llama": ("lens_llama", functools.partial(tiny_llama, "llama")),
    "mistral": ("lens_llama", functools.partial(tiny_llama, "mistral")),  # window 3
    "mamba": ("lens_mamba", functools.partial(tiny_ssm, "mamba")),
    "mamba2": ("lens_mamba2", functools.partial(tiny_ssm, "mamba2")),
}
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(importlib.util.find_spec(plugin) is None, reason=f"without {plugin}"))
    for kind, (plugin, _) in BUILDERS.items()
]
SKIPS_GAPS = ("gpt2", "llama")
GREEDY = {"do_sample": False, "stop_at_eos": False}


@functools.cache
def both(kind):
    """Give the lens model of a kind, and an HF model with the same weights that nothing of lens has touched."""
    hf = BUILDERS[kind][1]()
    reference = copy.deepcopy(hf)
    return lens.load(hf, tokenizer=tiny_tokenizer()), reference


@pytest.fixture(params=KINDS)
def kind(request):
    """Name each kind of model."""
    return request.param


@pytest.fixture(autouse=True)
def without_a_graph(request):
    """Run without a graph, but where a test is about gradients."""
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def close(ours, expected, what=""):
    """Compare in units of the scale, at float32's rounding."""
    error = float((ours - expected).abs().max())
    assert error <= 2e-5 * max(1.0, float(expected.abs().max())), f"{what}: off by {error:.1e}"


def parts(kind, first, n):
    """Split positions behind the first part: at once, but for Mamba, which HF continues one at a time only."""
    return [slice(at, at + 1) for at in range(first, n)] if kind == "mamba" else [slice(first, n)]


def go_on(kind, model, tokens, first, **options):
    """Run a prefix and then the rest on its state; give all logits and the last state."""
    logits, state = model(tokens[:, :first], return_state=True, **options)
    pieces = [logits]
    for part in parts(kind, first, tokens.shape[1]):
        logits, state = model(tokens[:, part], past_key_values=state, return_state=True)
        pieces.append(logits)
    return torch.cat(pieces, dim=1), state


def snapshot(state):
    """Copy all that a state holds."""
    return [(name, value.clone()) for _, name, value in held(state)], state.length


def held(state):
    """List a state's tensors, by layer."""
    found = []
    for index, layer in enumerate(state.cache.layers):
        for name in ("keys", "values"):
            if getattr(layer, name, None) is not None:
                found.append((index, name, getattr(layer, name)))
        for name in ("conv_states", "recurrent_states"):
            found += [(index, name, value) for value in getattr(layer, name, {}).values()]
    assert found
    return found


def unchanged(state, before):
    """Whether a state still is what it was."""
    tensors, length = snapshot(state)
    return length == before[1] and all(torch.equal(a, b) for (_, a), (_, b) in zip(tensors, before[0], strict=True))


# ---------------------------------------------------------------------- parts are the whole


def test_parts_have_the_values_of_the_whole_for_every_split(kind):
    """Logits are HF's of the whole run; every hook point has the whole run's values."""
    model, reference = both(kind)
    tokens = random_tokens(2, 6)
    expected = reference(tokens).logits
    _, whole = model.run_with_cache(tokens)
    for first in range(1, 6):
        with model.caching() as cache:
            logits, state = go_on(kind, model, tokens, first)
        close(logits, expected, f"split at {first}")
        assert torch.equal(state.tokens, tokens)
        assert state.length == 6
        for name in whole:
            hidden = whole[name] == -torch.inf
            assert torch.equal(cache[name] == -torch.inf, hidden), name
            close(cache[name].masked_fill(hidden, 0), whole[name].masked_fill(hidden, 0), f"{name}, split at {first}")


def test_generation_in_parts_is_hfs_of_the_whole(kind):
    """Generate goes on from a state, gives one back, and forward goes on from that."""
    model, reference = both(kind)
    tokens = random_tokens(2, 5)
    whole = reference.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    _, prefix = model(tokens[:, :4], return_state=True)
    ours, cache, state = model.generate(
        tokens[:, 4:], 4, past_key_values=prefix, return_state=True, return_cache=True, **GREEDY
    )
    assert torch.equal(ours, whole[:, 4:9])
    assert state.length == 8
    assert torch.equal(state.tokens, whole[:, :8])
    assert cache["hook_embed"].shape[1] == 4
    again, last = model.generate(ours[:, -1:], 2, past_key_values=state, return_state=True, **GREEDY)
    assert torch.equal(again, whole[:, 8:])
    assert last.length == 10
    close(model(ours[:, -1:], past_key_values=state), reference(whole[:, :9]).logits[:, -1:])
    streamed = list(model.generate_stream(ours[:, -1:], 2, past_key_values=state, return_type="tokens", **GREEDY))
    assert torch.equal(torch.cat(streamed, dim=1), whole[:, 9:])
    fresh, first = model.generate(tokens, 6, return_state=True, **GREEDY)
    assert torch.equal(fresh, whole)
    close(model(whole[:, -1:], past_key_values=first), reference(whole).logits[:, -1:])


def test_a_prefix_padded_on_the_left_goes_on_as_each_row_alone(kind):
    """The state knows its mask: forward, generate and forward again, in both orders."""
    model, reference = both(kind)
    rows = [random_tokens(1, n, seed=n)[0] for n in (3, 5)]
    tokens, mask = pad(rows, amount=1)
    new = random_tokens(2, 1, seed=9)
    _, state = model(tokens, attention_mask=mask, return_state=True)
    assert torch.equal(state.attention_mask, mask)
    logits, longer = model(new, past_key_values=state, return_state=True)
    ids, after = model.generate(new, 3, past_key_values=state, return_state=True, **GREEDY)
    step = model(ids[:, -1:], past_key_values=after)
    first, both_ways = model.generate(tokens, 2, attention_mask=mask, return_state=True, **GREEDY)
    other = model(first[:, -1:], past_key_values=both_ways)
    assert longer.attention_mask.sum() == mask.sum() + 2
    for index, row in enumerate(rows):
        alone = torch.cat([row, new[index]])[None]
        close(logits[index], reference(alone).logits[0, -1:], f"row {index}")
        whole = reference.generate(
            alone, attention_mask=torch.ones_like(alone), max_new_tokens=3, do_sample=False, eos_token_id=None
        )
        assert torch.equal(ids[index], whole[0, len(row) :])
        close(step[index], reference(whole).logits[0, -1:], f"row {index} after generation")
        greedy = torch.cat([row, first[index, -2:]])[None]
        close(other[index], reference(greedy).logits[0, -1:], f"row {index}, prefix generated")


def test_an_edit_of_the_prefix_is_in_the_state(kind):
    """The continuation without hooks sees what an edit in the prefix did."""
    model, _ = both(kind)
    tokens = random_tokens(2, 6)
    names = ("ssm_input", "conv_in") if kind.startswith("mamba") else ("k", "v")
    for part in names:
        entry = [((part, 1), lens.edits.scale(1.7), [1])]
        expected = model.run_with_hooks(tokens, fwd_hooks=entry)
        _, state = model.run_with_hooks(tokens[:, :4], fwd_hooks=entry, return_state=True)
        pieces = []
        for piece in parts(kind, 4, 6):
            logits, state = model(tokens[:, piece], past_key_values=state, return_state=True)
            pieces.append(logits)
        ours = torch.cat(pieces, dim=1)
        close(ours, expected[:, 4:], part)
        if kind != "mistral":  # whose window the position has left
            assert (ours - model(tokens)[:, 4:]).abs().max() > 1e-3, part


def test_hooks_know_where_they_are(kind):
    """Positions are absolute, steps count, and a continuation is no prefill."""
    model, _ = both(kind)
    tokens, seen = random_tokens(1, 6), []

    def watch(x, hook):
        seen.append((hook.positions.tolist(), hook.step, hook.is_prefill))

    _, state = model(tokens[:, :4], return_state=True)
    with model.hooks(fwd_hooks=[(("resid_post", 1), watch)]):
        _, state = model(tokens[:, 4:5], past_key_values=state, return_state=True)
        model.generate(tokens[:, 5:], 2, past_key_values=state, **GREEDY)
        model(tokens[:, :2])
    assert seen == [([4], 1, False), ([5], 2, False), ([6], 3, False), ([0, 1], 0, True)]


# ---------------------------------------------------------------------- a value


def test_no_call_changes_a_state(kind):
    """Two continuations of one state, a generation, and a call that fails leave it as it was, bit for bit."""
    model, reference = both(kind)
    tokens, others = random_tokens(2, 6), random_tokens(2, 1, seed=5)
    _, state = model(tokens[:, :5], return_state=True)
    before = snapshot(state)

    def fail(x, hook):
        raise ZeroDivisionError

    first = model(tokens[:, 5:], past_key_values=state)
    model.generate(others, 3, past_key_values=state, **GREEDY)
    with pytest.raises(LensError):
        model.run_with_hooks(others, fwd_hooks=[(("resid_post", 1), fail)], past_key_values=state)
    model(others, past_key_values=state, stop_at_layer=2)
    second = model(others, past_key_values=state)
    assert unchanged(state, before)
    assert torch.equal(model(tokens[:, 5:], past_key_values=state), first)
    close(first, reference(tokens).logits[:, -1:])
    close(second, reference(torch.cat([tokens[:, :5], others], dim=1)).logits[:, -1:])


def test_a_fork_shares_nothing(kind):
    """What is written into a fork changes its continuations, and nobody else's."""
    model, _ = both(kind)
    tokens = random_tokens(2, 6)
    _, state = model(tokens[:, :5], return_state=True)
    fork, before = state.fork(), snapshot(state)
    ours = {value.untyped_storage().data_ptr() for _, _, value in held(fork)}
    assert not ours & {value.untyped_storage().data_ptr() for _, _, value in held(state)}
    plain = model(tokens[:, 5:], past_key_values=state)
    assert torch.equal(model(tokens[:, 5:], past_key_values=fork), plain)
    for _, _, value in held(fork):
        value.mul_(1.5)
    assert unchanged(state, before)
    assert (model(tokens[:, 5:], past_key_values=fork) - plain).abs().max() > 1e-3
    assert torch.equal(model(tokens[:, 5:], past_key_values=state), plain)


def test_a_fork_repeats_rows(kind):
    """Each row stands n times beside itself, mask and ids too."""
    model, reference = both(kind)
    rows = [random_tokens(1, n, seed=n)[0] for n in (3, 4)]
    tokens, mask = pad(rows)
    _, state = model(tokens, attention_mask=mask, return_state=True)
    fork, new = state.fork(n=3), random_tokens(6, 1, seed=3)
    assert (fork.batch, fork.length) == (6, 4)
    assert torch.equal(fork.tokens, tokens.repeat_interleave(3, dim=0))
    logits = model(new, past_key_values=fork)
    for index in range(6):
        alone = torch.cat([rows[index // 3], new[index]])[None]
        close(logits[index], reference(alone).logits[0, -1:], f"row {index}")
    for n in (0, -1, True, 1.5):
        with pytest.raises(ArgumentError, match="n is how often"):
            state.fork(n=n)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_gradient_flows_into_the_prefix(kind):
    """In grad mode a state stays in its graph, forks too: the gradient is that of the whole run."""
    if importlib.util.find_spec(BUILDERS[kind][0]) is None:
        pytest.skip(f"without {BUILDERS[kind][0]}")
    model, reference = both(kind)
    tokens = random_tokens(1, 5)
    embedded = reference.get_input_embeddings()(tokens).detach()
    whole = embedded.clone().requires_grad_()
    reference(inputs_embeds=whole).logits[:, -1].square().sum().backward()
    part = embedded[:, :4].clone().requires_grad_()
    _, state = model(part, return_state=True)
    model(tokens[:, 4:], past_key_values=state.fork())[:, -1].square().sum().backward()
    assert whole.grad[:, :4].abs().max() > 1e-3
    close(part.grad, whole.grad[:, :4])


# ---------------------------------------------------------------------- padding between tokens, text


def test_padding_between_tokens_is_skipped_or_refused(kind):
    """Full attention skips it; recurrent states and windows do not, so the call is refused."""
    model, reference = both(kind)
    tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (2, 4)], "right")
    new = random_tokens(2, 1, seed=9)
    if kind not in SKIPS_GAPS:
        with pytest.raises(LensError, match="right"):
            model(tokens, attention_mask=mask, return_state=True)
        return
    _, state = model(tokens, attention_mask=mask, return_state=True)
    logits, state = model(new, past_key_values=state, return_state=True)
    ids = model.generate(new, 2, past_key_values=state, **GREEDY)
    for index, n in enumerate((2, 4)):
        alone = torch.cat([tokens[index, :n], new[index]])[None]
        close(logits[index], reference(alone).logits[0, -1:], f"row {index}")
        alone = torch.cat([alone, new[index][None]], dim=1)
        whole = reference.generate(
            alone, attention_mask=torch.ones_like(alone), max_new_tokens=2, do_sample=False, eos_token_id=None
        )
        assert torch.equal(ids[index, -2:], whole[0, -2:])


@pytest.mark.parametrize("kind", [one for one in KINDS if one.values[0] != "mamba"])
def test_texts_go_on_without_bos_and_padded_on_the_right(kind):
    """Continuations of unequal length, none of them beginning anew; a state of texts is padded on the left."""
    model, reference = both(kind)
    _, state = model("w3 w1 w4", prepend_bos=True, return_state=True)
    assert state.tokens.tolist() == [[28, 3, 1, 4]]
    logits = model(["w9", "w7 w2 w6"], past_key_values=state.fork(n=2))
    for row, new in enumerate(([9], [7, 2, 6])):
        expected = reference(torch.tensor([[28, 3, 1, 4, *new]])).logits[0, 4:]
        close(logits[row, : len(new)], expected, f"row {row}")
    _, state = model(["w3 w1 w4", "w9"], prepend_bos=False, return_state=True)
    assert state.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    if kind not in SKIPS_GAPS:
        with pytest.raises((StateError, InputError), match=r"row 0 has padding at position 4|padding on the right"):
            model(["w9", "w7 w2"], past_key_values=state, return_state=True, padding_side="right")


def test_rows_that_end_early_are_padding_in_the_state():
    """Behind the end token HF fills up and runs what it filled: the state says that it is padding."""
    model, _ = both("gpt2")
    tokens = random_tokens(4, 3)
    plain = model.generate(tokens, 6, **GREEDY)
    end = int(plain[0, 4])
    ids, state = model.generate(tokens, 6, do_sample=False, eos_token_id=end, return_state=True)
    assert state.length == ids.shape[1] - 1
    for row in range(4):
        ends = (ids[row, 3:] == end).nonzero()
        real = ids.shape[1] if not len(ends) else 3 + int(ends[0]) + 1
        mask = torch.ones(4, state.length) if state.attention_mask is None else state.attention_mask
        assert int(mask[row].sum()) == min(real, state.length)
    assert state.attention_mask is not None


# ---------------------------------------------------------------------- with blocks left out, with caches of HF's own


@pytest.mark.parametrize("kind", ["gpt2", KINDS[1], KINDS[4]])
def test_blocks_left_out_read_from_a_state(kind):
    """start_at_layer and stop_at_layer have the values of the whole run, and give no state."""
    model, reference = both(kind)
    tokens = random_tokens(2, 6)
    _, state = model(tokens[:, :4], return_state=True)
    middle = model(tokens[:, 4:], past_key_values=state, stop_at_layer=1)
    close(middle, model(tokens, stop_at_layer=1)[:, 4:])
    close(model(middle, past_key_values=state, start_at_layer=1), reference(tokens).logits[:, 4:])
    for options in ({"stop_at_layer": 1}, {"start_at_layer": 1}):
        given = middle if "start_at_layer" in options else tokens[:, 4:]
        with pytest.raises(ArgumentError, match="leave blocks out"):
            model(given, past_key_values=state, return_state=True, **options)
        with pytest.raises(ArgumentError, match="leave blocks out"):
            model(given, past_key_values=DynamicCache(config=model.config), **options)


def test_a_cache_of_hfs_own_is_extended_in_place(kind):
    """As HF does it; a state made of it is as good as any, and tells when its length is not known."""
    model, reference = both(kind)
    tokens, cache = random_tokens(2, 6), DynamicCache(config=model.config)
    model(tokens[:, :4], past_key_values=cache)
    logits = model(tokens[:, 4:5], past_key_values=cache)
    close(logits, reference(tokens[:, :5]).logits[:, -1:])
    state = lens.State(cache=cache)
    assert state.length == 5
    close(model(tokens[:, 5:], past_key_values=state), reference(tokens).logits[:, -1:])
    close(model(tokens[:, 5:], past_key_values=cache), reference(tokens).logits[:, -1:])
    with pytest.raises(ArgumentError, match="goes on from a state"):
        model(tokens[:, 5:], past_key_values=cache, return_state=True)
    foreign = DynamicCache(config=model.config)
    name = "cache_params" if kind.startswith("mamba") else "past_key_values"
    reference(tokens[:, :5], **{name: foreign}, use_cache=True)
    if kind.startswith("mamba"):
        with pytest.raises(StateError, match=r"give lens_core.State\(cache=cache, length"):
            model(tokens[:, 5:], past_key_values=foreign)
    told = lens.State(cache=foreign, length=5)
    logits, longer = model(tokens[:, 5:], past_key_values=told, return_state=True)
    close(logits, reference(tokens).logits[:, -1:])
    assert longer.tokens is None
    if not kind.startswith("mamba"):
        with pytest.raises(StateError, match="length=7, and the cache holds 5"):
            lens.State(cache=foreign, length=7)


def test_an_empty_state_is_the_beginning():
    """A state of no positions goes on as a fresh call does."""
    model, reference = both("gpt2")
    tokens = random_tokens(2, 4)
    state = lens.State(cache=DynamicCache(config=model.config))
    assert (state.length, state.batch) == (0, None)
    logits, longer = model(tokens, past_key_values=state, return_state=True)
    close(logits, reference(tokens).logits)
    assert state.length == 0
    assert torch.equal(longer.tokens, tokens)


# ---------------------------------------------------------------------- mistakes


def test_a_static_cache_is_no_state():
    """Kinds that are not copied faithfully are refused by name, and taken as HF takes them."""
    model, reference = both("gpt2")
    tokens, cache = random_tokens(2, 4), StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(StateError, match="StaticCache"):
        lens.State(cache=cache)
    with pytest.raises(StateError, match="DynamicCache"):
        lens.State(cache=DynamicCache(config=model.config, offloading=True))
    recording = DynamicCache(config=model.config)
    recording.layers[0].record_past = True
    with pytest.raises(StateError, match="records its past"):
        lens.State(cache=recording)
    close(model(tokens, past_key_values=cache), reference(tokens).logits)


def test_a_state_of_another_model_is_refused():
    """The message says what differs; a state without origin is told by its layers."""
    model, _ = both("gpt2")
    tokens = random_tokens(2, 4)
    other = lens.load(tiny_gpt2(n_head=1))
    _, state = other(tokens, return_state=True)
    with pytest.raises(StateError, match="n_head is 1 there and 3 here"):
        model(tokens, past_key_values=state)
    with pytest.raises(StateError, match="n_head is 1 there"):
        model.generate(tokens, 2, past_key_values=state)
    double = lens.load(tiny_gpt2(dtype=torch.float64))
    _, state = double(tokens, return_state=True)
    with pytest.raises(StateError, match="dtype is 'torch.float64' there"):
        model(tokens, past_key_values=state)
    deep = DynamicCache(config=tiny_gpt2(n_layer=2).config)
    lens.load(tiny_gpt2(n_layer=2))(tokens, past_key_values=deep)
    with pytest.raises(StateError, match="it has 2 layers, and this model 3"):
        model(tokens, past_key_values=lens.State(cache=deep))
    twin = lens.load(tiny_gpt2(seed=1, attn="eager", resid_pdrop=0.1))  # other weights, the same shapes
    _, state = twin(tokens, return_state=True)
    assert model(tokens, past_key_values=state).shape == (2, 4, 29)


def test_what_does_not_fit_a_state_is_told():
    """Batch, masks, lengths, kinds and options that contradict it."""
    model, _ = both("gpt2")
    tokens = random_tokens(2, 4)
    _, state = model(tokens, return_state=True)
    ones = torch.ones(2, 2, dtype=torch.long)
    for given, options, error, message in (
        (random_tokens(3, 1), {}, StateError, "3 rows and the state 2"),
        (random_tokens(2, 29), {}, ContextLengthError, "33 positions"),
        (tokens[:, :2], {"attention_mask": torch.cat([ones, 0 * ones, ones], 1)}, StateError, "contradicts"),
        (tokens[:, :2], {"attention_mask": ones[:, :1]}, LensError, "mask"),
        (tokens, {"past_key_values": ((tokens,),)}, ArgumentError, "past_key_values is a state"),
        (tokens, {"past_key_values": None, "use_cache": True}, ArgumentError, "nobody would get"),
        (tokens, {"return_state": True, "use_cache": False}, ArgumentError, "use_cache=False"),
    ):
        with pytest.raises(error, match=message):
            model(given, **{"past_key_values": state, **options})
    joined = model(tokens[:, :2], past_key_values=state, attention_mask=torch.cat([ones, ones, ones], 1))
    assert torch.equal(joined, model(tokens[:, :2], past_key_values=state))
    for options, message in (
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup"),
        ({"use_past_kv_cache": False}, "use_past_kv_cache=False"),
        ({"stop_strings": ["w3"], "return_state": True}, "where each row ends"),
    ):
        with pytest.raises(ArgumentError, match=message):
            model.generate(tokens, 2, **{**GREEDY, "past_key_values": state, **options})
    with pytest.raises(ContextLengthError):
        model.generate(tokens[:, :1], 28, past_key_values=state)
    with pytest.raises(ArgumentError, match="a stream gives tokens only"):
        next(model.generate_stream(tokens, 2, return_state=True))
    with pytest.raises(StateError, match="tokens of a state of 2 rows and 4 positions"):
        lens.State(cache=state.cache, tokens=tokens[:, :3])


def test_runs_with_a_cache_give_both(kind):
    """`run_with_cache` and `run_with_hooks` pass the state through, the loss and its gradients too."""
    model, _ = both(kind)
    tokens = random_tokens(2, 5)
    (logits, state), cache = model.run_with_cache(tokens[:, :4], return_state=True, names_filter="resid_post")
    assert cache["resid_post", 0].shape[1] == 4
    (_, longer), cache = model.run_with_cache(
        tokens[:, 4:], past_key_values=state, return_state=True, names_filter="resid_post"
    )
    assert cache["resid_post", 0].shape[1] == 1
    assert torch.equal(longer.tokens, tokens)
    assert torch.equal(logits, model(tokens[:, :4]))
    none, state = model(tokens, None, return_state=True)
    assert none is None
    assert state.length == 5
    with torch.enable_grad():
        (loss, _), cache = model.run_with_cache(
            tokens, names_filter="resid_post", incl_bwd=True, return_type="loss", return_state=True
        )
        assert loss.ndim == 0
        assert cache.grad["resid_post", 0].abs().max() > 0


def test_mamba_goes_on_one_position_at_a_time():
    """HF's scan would start from zero again, silently: several positions are refused, through every door."""
    if importlib.util.find_spec("lens_mamba") is None:
        pytest.skip("without lens_mamba")
    model, _ = both("mamba")
    tokens = random_tokens(1, 6)
    _, state = model(tokens[:, :4], return_state=True)
    for call in (
        lambda: model(tokens[:, 4:], past_key_values=state),
        lambda: model.generate(tokens[:, 4:], 2, past_key_values=state, **GREEDY),
        lambda: model.run_with_cache(tokens[:, 4:], past_key_values=state),
    ):
        with pytest.raises(LensError, match="one position at a time"):
            call()


def test_copies_of_a_state_go_on_like_it(kind):
    """`copy.deepcopy` gives a state that knows its length, also where its cache does not count."""
    model, _ = both(kind)
    tokens = random_tokens(1, 6)
    _, state = model(tokens[:, :4], return_state=True)
    again = copy.deepcopy(state)
    expected = model(tokens[:, 4:5], past_key_values=state)
    assert torch.equal(model(tokens[:, 4:5], past_key_values=again), expected)
    assert torch.equal(model(tokens[:, 4:5], past_key_values=again.fork()), expected)


def test_a_length_that_the_cache_contradicts_is_refused():
    """A cache of recurrent states does not count, but it knows whether there is anything."""
    model, _ = both("mamba")
    _, state = model(random_tokens(1, 4), return_state=True)
    for length in (-3, 0):
        with pytest.raises(StateError, match=f"length={length}, and the cache holds something"):
            lens.State(cache=state.cache, length=length)
