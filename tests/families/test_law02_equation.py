"""Law 2: the value at a name equals its defining equation."""

import pytest
import torch
from families.compare import error, part, real_part, run, same
from golden.tiny import pad, random_tokens
from transformers import DynamicCache, StaticCache


def test_every_value_equals_golden(wide):
    """Law 2: every name, starred ones too, in a whole run, in float64."""
    tokens = random_tokens(2, 7)
    _, expected = wide.golden(tokens)
    logits, cache = run(wide, tokens)
    assert sorted(cache) == sorted(wide.names())
    same("logits", logits, expected["hook_logits"])
    for name in wide.names():
        same(name, cache[name], expected[name])


def test_every_value_is_right_to_float32_precision(narrow):
    """Law 2: in float32, HF unmodified, the error of each value is a rounding error."""
    tokens = random_tokens(2, 7)
    _, expected = narrow.golden(tokens)
    _, cache = run(narrow, tokens)
    for name in narrow.names():
        same(name, cache[name], expected[name], 1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize("side", ["left", "right"])
def test_values_under_padding_equal_golden(subject, wide, side):
    """Law 2: under a mask, every value at real positions and real keys."""
    if side not in subject.paddings:
        return
    tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (3, 7)], side, amount=1)
    _, expected = wide.golden(tokens, attention_mask=mask)
    _, cache = run(wide, tokens, attention_mask=mask)
    for name in wide.names():
        for row in range(2):
            real = mask[row].nonzero()[:, 0]
            ours, theirs = (real_part(subject, name, values[name], row, real) for values in (cache, expected))
            same(name, ours, theirs)


@pytest.mark.sampled
def test_what_a_function_sees_is_what_the_cache_holds(wide):
    """Law 2: functions see golden's values."""
    tokens, seen = random_tokens(2, 5), {}

    def look(x, hook):
        seen.setdefault(hook.name, []).append(x.detach().clone())

    with torch.no_grad():
        wide.model.run_with_hooks(tokens, fwd_hooks=[(name, look) for name in wide.names()])
    for name, value in wide.golden(tokens)[1].items():
        same(name, torch.cat(seen[name], dim=1) if wide.subject.per_position(name) else seen[name][0], value)


def decoded(one, tokens, expected, bounds, past):
    """Compare the values of each call with the whole run's."""
    for start, stop in one.subject.calls(*bounds):
        _, cache = run(one, tokens[:, start:stop], past_key_values=past, use_cache=True)
        off = {}
        for name in one.names():
            want = part(one.subject, name, expected[name], start, stop)
            if one.subject.pos_axis(name) is None:  # keys that the model's own cache has dropped may be missing
                want = want.narrow(1, stop - cache[name].shape[1], cache[name].shape[1])
            off |= {name: error(cache[name], want)} if not error(cache[name], want) <= 1e-9 else {}
        assert not off, f"call {start}:{stop} of {bounds}: off at {off}"


@pytest.mark.sampled
def test_values_while_decoding_equal_the_whole(subject, wide):
    """Law 2: prefill of k tokens and steps of one have the whole run's values; for every k, or a sample of them."""
    tokens = random_tokens(2, 7)
    _, expected = wide.golden(tokens)
    for k in range(1, 7) if subject.full else (2,):
        decoded(wide, tokens, expected, [0, *range(k, 8)], DynamicCache(config=wide.hf.config))
    decoded(wide, tokens, expected, [0, 2, 5, 7], DynamicCache(config=wide.hf.config))


@pytest.mark.sampled
@pytest.mark.subjects(lambda one: one.key_axis("blocks.0.attn.hook_pattern") == 3 and one.plugin == "lens_llama")
def test_static_cache_is_trimmed(wide):
    """Law 2: with a static key-value cache the key axis holds real positions only."""
    tokens = random_tokens(2, 6)
    _, expected = wide.golden(tokens)
    decoded(wide, tokens, expected, [0, 4, 5, 6], StaticCache(config=wide.hf.config, max_cache_len=11))


@pytest.mark.sampled
def test_values_with_embeddings_equal_golden(wide):
    """Law 2: with embeddings as input, scaled where HF scales them."""
    embeds = torch.randn(2, 5, wide.config.hidden_size, generator=torch.Generator().manual_seed(0))
    _, expected = wide.golden(embeds)
    wanted = [name for name in wide.names() if name != "hook_tokens"]
    _, cache = run(wide, embeds, names=wanted)
    for name in wanted:
        same(name, cache[name], expected[name])


@pytest.mark.sampled
@pytest.mark.subjects(lambda one: "mamba" not in one.plugin)
def test_given_position_ids_are_used(wide):
    """Law 2: position ids that the user gives are HF's, one row for the whole batch or one each."""
    tokens, mask = random_tokens(2, 5), torch.ones(2, 5, dtype=torch.long)
    for ids in (torch.tensor([[4, 0, 31, 7, 7]]), torch.tensor([[4, 0, 31, 7, 7], [1, 2, 3, 4, 5]])):
        _, expected = wide.golden(tokens, position_ids=ids)
        # without a mask, HF reads ids that do not grow as several packed sequences
        _, cache = run(wide, tokens, position_ids=ids, attention_mask=mask)
        for name in wide.names():
            same(name, cache[name], expected[name])
