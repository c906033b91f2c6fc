"""Law 7: the gradient at a hook point is golden's with the value as a cut point; zeros where nothing depends on it."""

import pytest
import torch
from families.subject import pair
from golden.tiny import pad, random_tokens
from lens_conformance.float64 import true_float64

TIGHT = 1e-8
"""Of the gradient's own scale, in true float64."""


def metric(logits):
    """Weigh the logits by fixed random numbers, and bend: a scalar whose gradient is nowhere constant."""
    weight = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return (logits * weight).sum() + (logits.pow(2) * weight.roll(1)).sum() * 0.1


def expected_gradients(one, tokens, *, loss=metric, **options):
    """Run golden with a graph and return the gradient at every cut and of every parameter, by name."""
    state = {key: value.detach().clone().requires_grad_() for key, value in one.reference.state_dict().items()}
    tied = {id(parameter): key for key, parameter in one.reference.named_parameters()}
    for key, parameter in one.reference.named_parameters(remove_duplicate=False):
        state[key] = state[tied[id(parameter)]]
    logits, values = one.subject.golden(state, one.config, tokens, **options)
    loss(logits).backward()
    cuts = {name: value.grad for name, value in values.items() if one.subject.gradient(name)}
    return cuts, {key: value.grad for key, value in state.items()}


def off_by(ours, theirs):
    """Give the relative difference of gradients; None of ours is never right, None of theirs is zeros."""
    if ours is None or not bool(torch.isfinite(ours).all()):
        return float("inf")
    theirs = torch.zeros_like(ours) if theirs is None else theirs
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max()) / max(1e-6, float(theirs.abs().max()))


def together(one):
    """List the names on HF's own way: their gradients can be had at once."""
    return [name for name in one.names() if one.subject.gradient(name) and not one.subject.apart(name)]


def collect(got):
    """Make a backward function that keeps what it is given; of one position at a time, what adds up."""

    def keep(grad, hook):
        got.setdefault(hook.name, []).append(grad.detach().clone())

    return keep


def whole(one, name, got):
    """Give the gradient of the whole value: backward goes through positions last to first."""
    pieces = got.get(name, [])
    if one.subject.per_position(name):
        return torch.cat(pieces[::-1], dim=1) if pieces else None
    assert len(pieces) <= 1, f"{name}: its backward function was called {len(pieces)} times"
    return pieces[0] if pieces else None


@pytest.mark.sampled
def test_backward_functions_see_golden_gradients(subject, wide):
    """Law 7: all names on HF's own way at once, whether or not the parameters ask for gradients."""
    tokens, got = random_tokens(2, 5), {}
    cuts, parameters = expected_gradients(wide, tokens)
    for frozen in (False, True):
        got.clear()
        wide.hf.requires_grad_(not frozen)
        wide.hf.zero_grad(set_to_none=True)
        try:
            metric(
                wide.model.run_with_hooks(tokens, bwd_hooks=[(name, collect(got)) for name in together(wide)])
            ).backward()
        finally:
            wide.hf.requires_grad_(True)
        off = {name: off_by(whole(wide, name, got), cuts[name]) for name in together(wide)}
        assert not {name: value for name, value in off.items() if not value <= TIGHT}
        if not frozen:
            off = {key: off_by(p.grad, parameters[key]) for key, p in wide.hf.named_parameters()}
            assert not {key: value for key, value in off.items() if not value <= TIGHT}


@pytest.mark.sampled
def test_each_gradient_alone_is_golden(subject, wide):
    """Law 7: one name at a time, the copies too, by backward function, with and without an edit there."""
    tokens = random_tokens(2, 4)
    names = [name for name in wide.edited_names() if subject.gradient(name)]
    wrong = {}
    for index, name in enumerate(names):
        if not (subject.full or subject.apart(name) or index % 4 == 0):
            continue
        for edits in ({}, {name: subject.edit_at(name)}):
            got, through = {}, {name} if subject.apart(name) else ()
            cuts, _ = expected_gradients(wide, tokens, through=through, edits=edits)
            entries = {"fwd_hooks": list(edits.items()), "bwd_hooks": [(name, collect(got))]}
            metric(wide.model.run_with_hooks(tokens, **entries)).backward()
            off = off_by(whole(wide, name, got), cuts[name])
            wrong |= {} if off <= TIGHT else {(name, "edited" if edits else "plain"): off}
    assert not wrong


@pytest.mark.sampled
def test_cache_keeps_golden_gradients(wide):
    """Law 7: `caching(detach=False)` has the gradient under the name that the value has, zeros included."""
    tokens = random_tokens(2, 5)
    cuts, _ = expected_gradients(wide, tokens)
    with wide.model.caching(together(wide), detach=False) as cache:
        metric(wide.model(tokens)).backward()
    off = {name: off_by(cache.grad[name], cuts[name]) for name in together(wide)}
    assert not {name: value for name, value in off.items() if not value <= TIGHT}


@pytest.mark.sampled
def test_detaching_stops_the_gradient_and_changes_no_bit(subject, wide):
    """Law 7: x.detach() leaves the logits bit-equal, and parameters have golden's gradients with it."""
    tokens = random_tokens(2, 4)
    plain = wide.reference(tokens).logits.detach()
    names = [name for name in wide.edited_names() if subject.gradient(name)]
    wrong = {}
    for name in names[:: 1 if subject.full else 3]:
        cut = {name: lambda x, hook: x.detach()}
        _, parameters = expected_gradients(wide, tokens, through={name} if subject.apart(name) else (), edits=cut)
        wide.hf.zero_grad(set_to_none=True)
        logits = wide.model.run_with_hooks(tokens, fwd_hooks=list(cut.items()))
        if not torch.equal(logits.detach(), plain):
            wrong[name] = "the logits changed"
        if not logits.requires_grad:
            assert name in ("unembed.hook_out", "hook_logits"), f"{name}: no graph is left"
            continue
        metric(logits).backward()
        for key, parameter in wide.hf.named_parameters():
            theirs = torch.zeros_like(parameter) if parameters[key] is None else parameters[key]
            ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            off = float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
            if not off <= TIGHT:
                wrong[name] = f"gradient of {key} off by {off:.1e}"
    assert not wrong


@pytest.mark.sampled
def test_detaching_changes_no_bit_in_float32(subject, narrow):
    """Law 7: the same in float32, where another order of the sums would show."""
    tokens, wrong = random_tokens(2, 5), []
    plain = narrow.reference(tokens).logits.detach()
    for name in narrow.edited_names():
        if subject.gradient(name):
            logits = narrow.model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x.detach())])
            wrong += [] if torch.equal(logits.detach(), plain) else [name]
    assert not wrong


@pytest.mark.sampled
def test_what_the_output_does_not_depend_on_has_zeros(subject, wide):
    """Law 7: gradients of names after the metric, and of later positions, are zeros and never None."""
    tokens = random_tokens(2, 5)
    with wide.model.caching(together(wide), detach=False) as cache:
        wide.model(tokens)
        cache["blocks.0.hook_resid_post"].pow(2).sum().backward()
    for name in together(wide):
        assert cache.grad[name] is not None, name
        assert cache.grad[name].shape == cache[name].shape, name
        if not name.startswith(("hook_embed", "hook_pos_embed", "blocks.0")):
            assert not bool(cache.grad[name].any()), name
    got = {}
    names = [name for name in together(wide) if not subject.per_position(name) and subject.pos_axis(name) is not None]
    logits = wide.model.run_with_hooks(tokens, bwd_hooks=[(name, collect(got)) for name in names])
    logits[:, 1].sum().backward()
    for name in names:
        assert not bool(got[name][0].narrow(subject.pos_axis(name), 2, 3).any()), name


@pytest.mark.in_full
def test_gradients_under_padding_equal_golden(subject, wide):
    """Law 7: under a mask, with a metric of real positions."""
    tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (3, 6)], "left")
    got = {}

    def loss_of(logits):
        return metric(logits * mask[..., None])

    cuts, _ = expected_gradients(wide, tokens, loss=loss_of, attention_mask=mask)
    entries = [(name, collect(got)) for name in together(wide)]
    loss_of(wide.model.run_with_hooks(tokens, bwd_hooks=entries, attention_mask=mask)).backward()
    for name in together(wide):
        ours, theirs = whole(wide, name, got), cuts[name]
        if name.endswith("hook_pattern"):  # weight for a padding key would multiply padding's value, which is nobody's
            ours, theirs = (gradient * mask[:, None, None, :] for gradient in (ours, theirs))
        assert off_by(ours, theirs) <= TIGHT, f"{name}: {off_by(ours, theirs):.1e}"


@pytest.mark.in_full
def test_backward_functions_may_edit_the_gradient(subject, attn):
    """Law 7: what a backward function returns stands for the gradient upstream, on a second pass too."""
    with true_float64():
        one, tokens, got = pair(subject, dtype=torch.float64, attn=attn), random_tokens(2, 5), []
        mid = "blocks.1.hook_resid_mid" if "blocks.1.hook_resid_mid" in one.names() else "blocks.1.hook_resid_post"
        inner = "blocks.1.hook_attn_out" if "blocks.1.hook_attn_out" in one.names() else "blocks.1.hook_mixer_out"
        cuts, _ = expected_gradients(one, tokens)
        entries = [(mid, lambda g, hook: g * 3.0), (inner, lambda g, hook: got.append(g.clone()))]
        logits = one.model.run_with_hooks(tokens, bwd_hooks=entries)
        metric(logits).backward(retain_graph=True)
        metric(logits).backward()
        assert len(got) == 2
        for gradient in got:
            assert off_by(gradient, cuts[inner] * 3.0) <= TIGHT
