"""The recurrent state as a hook point inside the recurrence: what an edit there reaches, in prefill and in decode."""

import contextlib

import pytest
import torch
from families.compare import error, same
from families.mamba import dual, ssm
from golden.tiny import pad, random_tokens
from lens_conformance.edits import bend, only_at
from transformers import DynamicCache

import lens_core as lens
from lens_core import errors

pytestmark = ssm
LAYERS = (0, 1, 2)
# prefill of 3, one step, then one step after the other
STEPS = ((0, 3), (3, 4), (4, 5), (5, 6))


def state_of(layer):
    """Name a layer's state."""
    return f"blocks.{layer}.mixer.hook_ssm_state"


def run(one, tokens, entries=(), names=None, **options):
    """Run with the entries and cache every name, without a graph."""
    with torch.no_grad(), one.model.hooks(fwd_hooks=list(entries)):
        return one.model.run_with_cache(tokens, names_filter=names or one.names(), **options)


def check(one, tokens, entries, edits, **options):
    """Compare logits and every value with golden's under the same edits, and see that the edits do something."""
    plain, _ = one.golden(tokens, **options)
    expected, values = one.golden(tokens, edits=edits, **options)
    assert (expected - plain).abs().max() > 1e-4, "the edit moves nothing, so it tests nothing"
    logits, cache = run(one, tokens, entries, **options)
    same("logits", logits, expected, 1e-10)
    for name in one.names():
        same(name, cache[name], values[name], 1e-10)


def stepwise(one, tokens, entries_of, steps=STEPS):
    """Run the steps on one cache, each with its own entries; return all logits."""
    past, pieces = DynamicCache(config=one.hf.config), []
    for start, stop in steps:
        with torch.no_grad():
            pieces.append(
                one.model.run_with_hooks(
                    tokens[:, start:stop],
                    fwd_hooks=entries_of(start, stop),
                    past_key_values=past,
                    use_cache=True,
                )
            )
    return torch.cat(pieces, dim=1)


def normal(shape, seed=0):
    """Draw float64 noise."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------- the law


def read_out(C, state):
    """Give C h for one position: `[batch, d_inner]` or `[batch, n_heads, head_dim]`."""
    if state.ndim == 3:
        return torch.einsum("ben,bn->be", state, C)
    return torch.einsum("bhpn,bhn->bhp", state, C.repeat_interleave(state.shape[1] // C.shape[1], dim=1))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_state_edit_decays_and_is_read_out(wide, layer, at):
    """A state edit d at t changes y_(t') by C_(t') (prod_(k=t+1..t') decay_k) d; delta, B and C stay bit for bit."""
    tokens, name, mixer = random_tokens(2, 6), state_of(layer), f"blocks.{layer}.mixer."
    _, plain = run(wide, tokens)
    d = normal(plain[name][:, 0].shape)
    _, edited = run(wide, tokens, [(name, lambda x, hook: x + d[:, None], [at])])
    left = d.clone()
    for t in range(6):
        change = edited[mixer + "hook_y"][:, t] - plain[mixer + "hook_y"][:, t]
        if t < at:
            same(f"y at {t}, before the edit", change, torch.zeros_like(change), 1e-14)
            continue
        if t > at:
            decay = plain[mixer + "hook_decay"][:, t]
            left = left * (decay if decay.ndim == left.ndim else decay[..., None, None])
        same(f"y at {t}", change, read_out(plain[mixer + "hook_C"][:, t], left), 1e-10)
        same(f"state at {t}", edited[name][:, t] - plain[name][:, t], left, 1e-10)
    for other in ("delta_pre", "delta", "B", "C", "decay", "ssm_input", "ssm_write", "conv", "gate"):
        assert torch.equal(edited[f"{mixer}hook_{other}"], plain[f"{mixer}hook_{other}"]), other


# ------------------------------------------------------------------- how the function is called


def record(calls):
    """Make a function that notes what it is shown."""

    def note(x, hook):
        assert hook.name.endswith("hook_ssm_state")
        assert hook.is_prefill == (hook.step == 0)
        calls.append((tuple(x.shape), hook.positions.tolist(), hook.is_prefill, hook.layer()))

    return note


@pytest.mark.parametrize("edits", [False, True], ids=["reading", "editing"])
def test_the_function_is_called_once_per_position_in_order(wide, edits):
    """Each call is shown `[batch, 1, ...]` and one absolute position, in prefill and in every step."""
    calls, tokens = [], random_tokens(2, 6)
    note = record(calls)

    def function(x, hook):
        note(x, hook)
        return bend(x) if edits else None

    stepwise(wide, tokens, lambda start, stop: [(state_of(1), function)])
    shape = tuple(wide.golden(tokens)[1][state_of(1)][:, :1].shape)
    assert calls == [(shape, [t], t < 3, 1) for t in range(6)]


@pytest.mark.parametrize("positions", [[1], [0, 4], [4, 0], range(2, 5), slice(1, None, 2), [-1], [-6, 3], slice(-2)])
def test_an_entry_with_positions_is_called_for_those_only(wide, positions):
    """In order, once each; the others are not shown, and the effect is golden's."""
    calls, tokens = [], random_tokens(2, 6)
    wanted = sorted(list(range(6))[positions] if isinstance(positions, slice) else [p % 6 for p in positions])
    note = record(calls)

    def function(x, hook):
        note(x, hook)
        return bend(x)

    edits = {state_of(1): only_at(state_of(1), bend, wanted)}
    check(wide, tokens, [(state_of(1), function, positions)], edits)
    assert [call[1] for call in calls] == [[t] for t in wanted]


def test_positions_are_absolute_in_decode(wide):
    """An entry at positions 1 and 4 is called in the prefill for 1, in the step of 4 for 4, and in no other."""
    calls, tokens = [], random_tokens(2, 6)
    note = record(calls)

    def function(x, hook):
        note(x, hook)
        return bend(x)

    expected, _ = wide.golden(tokens, edits={state_of(1): only_at(state_of(1), bend, [1, 4])})
    got = stepwise(wide, tokens, lambda start, stop: [(state_of(1), function, [1, 4])])
    same("logits", got, expected, 1e-10)
    assert [(call[1], call[2]) for call in calls] == [([1], True), ([4], False)]


def test_the_function_may_look_back(wide):
    """A function sees what its own earlier edits made of the state, and may carry values from call to call."""

    def lag():
        kept = {}

        def function(x, hook):
            before = kept.get("x", torch.zeros_like(x))
            kept["x"] = x.clone()
            return 0.6 * x + 0.4 * before

        return function

    check(wide, random_tokens(2, 6), [(state_of(1), lag())], {state_of(1): lag()})


@pytest.mark.parametrize("value", ["shape", "kind", "pos"])
def test_what_does_not_fit_is_an_error(wide, value):
    """A wrong shape or type from a state function is a clear error, and the model works on afterwards."""
    tokens = random_tokens(2, 4)

    def wrong(x, hook):
        return {"shape": x[..., :-1], "kind": "state", "pos": x.expand(-1, 4, *x.shape[2:])}[value]

    with torch.no_grad():
        with pytest.raises(errors.LensError, match="hook_ssm_state"):
            wide.model.run_with_hooks(tokens, fwd_hooks=[(state_of(1), wrong)])
        assert torch.equal(wide.hf(tokens).logits, wide.reference(tokens).logits)


# ------------------------------------------------------------------- values and edits, whole and in steps


@pytest.mark.parametrize("layer", LAYERS)
def test_edits_at_every_position_equal_golden(wide, layer):
    """Returned, written in place, or both; at all positions."""
    tokens, name = random_tokens(2, 6), state_of(layer)

    def write(x, hook):
        x.copy_(bend(x.clone()))

    def both(x, hook):
        x.mul_(0.5)
        return x + 0.1

    check(wide, tokens, [(name, bend)], {name: bend})
    check(wide, tokens, [(name, write)], {name: bend})
    check(wide, tokens, [(name, both)], {name: lambda x, hook: 0.5 * x + 0.1})


def test_several_functions_at_one_state_compose(wide):
    """In the order given, each seeing the last one's result, each at its own positions; the cache comes last."""
    tokens, name = random_tokens(2, 6), state_of(1)

    def halve(x, hook=None):
        return x * 0.5

    def golden_edit(x, hook):
        t = int(hook.positions)
        x = bend(x) if t in (1, 2) else x
        x = halve(x) if t in (2, 4) else x
        return x + 0.3

    entries = [(name, bend, [1, 2]), (name, halve, [4, 2]), (name, lambda x, hook: x + 0.3)]
    check(wide, tokens, entries, {name: golden_edit})


def test_all_layers_and_all_of_the_scan_at_once(wide):
    """States of every layer, and what the scan reads and gives, edited in one run."""
    tokens, edits = random_tokens(2, 6), {}
    for name in wide.names():
        if name.endswith(("ssm_state", "ssm_write", "decay", "hook_B", "hook_C", "hook_delta", "hook_y", "conv_in")):
            edits[name] = lambda x, hook: x * 0.9 + 0.02 * x * x
    check(wide, tokens, list(edits.items()), edits)


@pytest.mark.parametrize("place", ["prefill", "decode", "one step", "everywhere"])
@pytest.mark.parametrize("layer", LAYERS)
def test_edits_in_prefill_decode_and_across(wide, layer, place):
    """What the function returned is what the next position starts from, in the same call or in a later one."""
    tokens, name = random_tokens(2, 6), state_of(layer)
    where = {"prefill": [0, 1, 2], "decode": [3, 4, 5], "one step": [4], "everywhere": [0, 1, 2, 3, 4, 5]}[place]
    expected, _ = wide.golden(tokens, edits={name: only_at(name, bend, where)})
    plain, _ = wide.golden(tokens)

    def entries(start, stop):
        return [(name, bend)] if start in where else []

    got = stepwise(wide, tokens, entries)
    same("logits", got, expected, 1e-10)
    assert error(got, plain) > 1e-4


@pytest.mark.parametrize("at", [0, 1, 2])
def test_one_position_of_the_prompt_then_bare_decode(wide, at):
    """An edit at one position of the prompt is in the state that bare decoding starts from."""
    tokens, name = random_tokens(2, 6), state_of(1)
    expected, _ = wide.golden(tokens, edits={name: only_at(name, bend, [at])})
    got = stepwise(wide, tokens, lambda start, stop: [(name, bend, [at])] if start == 0 else [])
    same("logits", got, expected, 1e-10)


def test_the_cached_trajectory_is_golden(wide):
    """Whole, alone or with all names; and its pieces in decode."""
    tokens = random_tokens(2, 6)
    _, values = wide.golden(tokens)
    for layer in LAYERS:
        _, cache = run(wide, tokens, names=[state_of(layer)])
        assert list(cache) == [state_of(layer)]
        same(state_of(layer), cache[state_of(layer)], values[state_of(layer)], 1e-10)
    past = DynamicCache(config=wide.hf.config)
    for start, stop in STEPS:
        _, cache = run(wide, tokens[:, start:stop], past_key_values=past, use_cache=True)
        for layer in LAYERS:
            same(f"{start}:{stop}", cache[state_of(layer)], values[state_of(layer)][:, start:stop], 1e-10)
            same("HF's cache", cache[state_of(layer)][:, -1], past.layers[layer].recurrent_states[0], 1e-12)


def test_a_cached_state_never_changes_later(wide):
    """HF writes its recurrent state in place: neither a cached state nor one that a function kept follows it."""
    tokens, name, kept = random_tokens(2, 6), state_of(1), []
    past = DynamicCache(config=wide.hf.config)
    entries = [(name, lambda x, hook: kept.append((x, x.clone())))]
    _, first = run(wide, tokens[:, :3], entries, past_key_values=past, use_cache=True)
    _, second = run(wide, tokens[:, 3:4], entries, past_key_values=past, use_cache=True)
    before = {n: (first[n].clone(), second[n].clone()) for n in first}
    for t in (4, 5):
        run(wide, tokens[:, t : t + 1], [(name, bend)], past_key_values=past, use_cache=True)
    assert all(torch.equal(x, copy) for x, copy in kept)
    for n, (a, b) in before.items():
        assert torch.equal(first[n], a), n
        assert torch.equal(second[n], b), n


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("part", ["ssm_state", "ssm_write", "ssm_input", "conv_in", "in_proj", "decay", "delta", "B"])
def test_edits_under_padding_stay_with_their_row(wide, side, part):
    """What a function makes of padding reaches no real position: each row has what it has alone."""
    rows = [random_tokens(1, n, seed=n)[0] for n in (2, 6)]
    tokens, mask = pad(rows, side, amount=1)
    name = f"blocks.1.mixer.hook_{part}"
    logits, cache = run(wide, tokens, [(name, bend)], attention_mask=mask)
    for row, ids in enumerate(rows):
        expected, values = wide.golden(ids[None], edits={name: bend})
        real = mask[row].bool()
        same("logits", logits[row][real], expected[0], 1e-10)
        for other in wide.names():
            same(f"{other}, row {row}", cache[other][row][real], values[other][0], 1e-10)


# ------------------------------------------------------------------- gradients


def metric(logits):
    """Weigh the logits, and bend."""
    weight = normal(logits.shape, 5)
    return (logits * weight).sum() + (logits.pow(2) * weight.roll(1)).sum() * 0.1


def expected_gradients(one, tokens, **options):
    """Run golden with a graph; return the gradient at every cut, and of every parameter."""
    state = {key: value.detach().clone().requires_grad_() for key, value in one.reference.state_dict().items()}
    if one.config.tie_word_embeddings:
        state["lm_head.weight"] = state["backbone.embeddings.weight"]
    logits, values = one.subject.golden(state, one.config, tokens, **options)
    metric(logits).backward()
    return {n: v.grad for n, v in values.items() if n != "hook_tokens"}, {k: v.grad for k, v in state.items()}


@pytest.mark.parametrize("edited", [False, True], ids=["plain", "edited"])
def test_the_state_gradient_is_golden_position_by_position(wide, edited):
    """Through what reads a state directly and through all later states; cached or by backward functions."""
    tokens, name = random_tokens(2, 6), state_of(1)
    cuts, _ = expected_gradients(wide, tokens, edits={name: bend} if edited else {})
    entries = [(name, bend)] if edited else []
    with wide.model.hooks(fwd_hooks=entries), wide.model.caching([name], detach=False) as cache:
        metric(wide.model(tokens)).backward()
    same("cache.grad", cache.grad[name], cuts[name], 1e-9)
    got, order = torch.full_like(cuts[name], torch.nan), []

    def keep(grad, hook):
        assert got[:, hook.positions].isnan().all(), "called twice for a position"
        got[:, hook.positions] = grad
        order.extend(hook.positions.tolist())

    metric(wide.model.run_with_hooks(tokens, fwd_hooks=entries, bwd_hooks=[(name, keep)])).backward()
    same("backward functions", got, cuts[name], 1e-9)
    assert sorted(order) == list(range(6))


@pytest.mark.parametrize("at", [1, 4])
def test_a_detached_state_stops_the_gradient_there_only(wide, at):
    """Detaching one position's state stops what flows through it, and changes no bit of the logits."""
    tokens, name = random_tokens(2, 6), state_of(1)
    plain = wide.reference(tokens).logits.detach()
    cut = only_at(name, lambda x, hook: x.detach(), [at])
    _, parameters = expected_gradients(wide, tokens, edits={name: cut})
    _, whole = expected_gradients(wide, tokens)
    wide.hf.zero_grad(set_to_none=True)
    logits = wide.model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x.detach(), [at])])
    assert torch.equal(logits.detach(), plain)
    metric(logits).backward()
    moved = 0.0
    for key, parameter in wide.hf.named_parameters():
        same(key, parameter.grad, parameters[key], 1e-9)
        moved = max(moved, float((parameters[key] - whole[key]).abs().max()))
    wide.hf.zero_grad(set_to_none=True)
    assert moved > 1e-3


def test_two_states_of_one_trajectory_have_their_own_gradients(wide):
    """A metric at one position gives zeros at later states, and a loss of one cached state alone is right."""
    tokens, name = random_tokens(2, 6), state_of(1)
    with wide.model.caching([name], detach=False) as cache:
        wide.model(tokens)[:, 2].sum().backward()
    assert not cache.grad[name][:, 3:].any()
    assert cache.grad[name][:, :3].flatten(2).abs().amax((0, 2)).min() > 1e-5
    state = {key: value.detach().clone().requires_grad_() for key, value in wide.reference.state_dict().items()}
    _, values = wide.subject.golden(state, wide.config, tokens)
    values[name][:, 3].pow(2).sum().backward()
    wide.hf.zero_grad(set_to_none=True)
    with wide.model.caching([name], detach=False) as cache:
        wide.model(tokens)
    cache[name][:, 3].pow(2).sum().backward()
    mixer = "backbone.layers.1.mixer."
    for key in (f"{mixer}A_log", f"{mixer}in_proj.weight", f"{mixer}conv1d.weight", "backbone.layers.0.norm.weight"):
        same(key, wide.hf.get_parameter(key).grad, state[key].grad, 1e-9)
    wide.hf.zero_grad(set_to_none=True)


# ------------------------------------------------------------------- edits that users make


def test_patching_a_state_from_another_run(wide):
    """`edits.replace` takes each position's state from a cache; zero, scale and add work per position too."""
    tokens, other, name = random_tokens(2, 6), random_tokens(2, 6, seed=9), state_of(1)
    _, donor = run(wide, other, names=[name])
    theirs = wide.golden(other)[1][name]
    whole = {name: lambda x, hook: theirs[:, hook.positions]}
    check(wide, tokens, [(name, lens.edits.replace(donor))], whole)
    check(wide, tokens, [(name, lens.edits.replace(donor), [2, 4])], {name: only_at(name, whole[name], [2, 4])})
    check(wide, tokens, [(name, lens.edits.replace(donor, pos=[2, 4]))], {name: only_at(name, whole[name], [2, 4])})
    check(wide, tokens, [(name, lens.edits.zero(), [3])], {name: only_at(name, lambda x, hook: x * 0, [3])})
    check(
        wide,
        tokens,
        [(name, lens.edits.zero(pos=slice(4, None)))],
        {name: only_at(name, lambda x, hook: x * 0, [4, 5])},
    )
    check(wide, tokens, [(name, lens.edits.scale(0.5))], {name: lambda x, hook: x * 0.5})
    d = normal(theirs.shape[2:])
    check(wide, tokens, [(name, lens.edits.add(d), [0])], {name: only_at(name, lambda x, hook: x + d, [0])})


@pytest.mark.parametrize("pos", [-1, slice(-2, None), slice(None, -4)], ids=str)
def test_positions_of_an_edit_count_from_the_end_of_the_call(wide, pos):
    """A negative position of an edit is the call's, although a state function is shown one position at a time."""
    tokens, name = random_tokens(2, 6), state_of(1)
    where = list(range(6))[pos] if isinstance(pos, slice) else [5]
    edits = {name: only_at(name, lambda x, hook: x * 0.5, where)}
    with contextlib.suppress(errors.LensError):  # a clear refusal is as good
        check(wide, tokens, [(name, lens.edits.scale(0.5, pos=pos))], edits)


@dual
@pytest.mark.parametrize("part", ["ssm_state", "ssm_write", "y", "ssm_input", "ssm_output", "delta", "decay", "B"])
def test_one_head_can_be_edited(wide, part):
    """Mamba-2: an edit of one head, or group, changes that head's state and output only."""
    tokens, name = random_tokens(2, 6), f"blocks.1.mixer.hook_{part}"

    def one_only(x, hook):
        x[:, :, 1] = bend(x[:, :, 1])

    check(wide, tokens, [(name, one_only)], {name: one_only})
    _, plain = run(wide, tokens)
    _, cache = run(wide, tokens, [(name, one_only)])
    change = (cache["blocks.1.mixer.hook_ssm_output"] - plain["blocks.1.mixer.hook_ssm_output"]).abs().amax((0, 1, 3))
    assert (change > 1e-6).nonzero()[:, 0].tolist() == ([2, 3] if part == "B" else [1])
