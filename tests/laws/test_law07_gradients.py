"""Law 7: the gradient at a hook point is golden's with the value as a cut point; zeros where nothing depends on it."""

import pytest
import torch
from golden.tiny import pad, random_tokens
from lens_conformance.edits import bend, edit_at
from lens_conformance.golden.gpt2 import BLOCK, TOP, golden, is_starred, names, names_at

import lens_core as lens

FLOATS = [name for name in names(3) if name != "hook_tokens"]
INPUTS = [name for name in names(3) if name.endswith(("attn_in", "q_input", "k_input", "v_input"))]
TOGETHER = [name for name in FLOATS if name not in INPUTS]
PLACES = [name for name in (*TOP, *(f"blocks.L.{name}" for name in BLOCK)) if name != "hook_tokens"]


def at_layers(place, layers=(0, 1, 2)):
    """Give the names of a place in some layers, or the place itself where there are none."""
    return [place.replace(".L.", f".{layer}.") for layer in layers] if ".L." in place else [place]


def metric(logits):
    """Weigh the logits by fixed random numbers, and bend: a scalar whose gradient is nowhere constant."""
    weight = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return (logits * weight).sum() + (logits.pow(2) * weight.roll(1)).sum() * 0.1


def expected_gradients(one, tokens, *, loss=metric, **options):
    """Run golden with a graph and return the gradient at every cut and of every parameter, by name."""
    state = {key: value.detach().clone().requires_grad_() for key, value in one.reference.state_dict().items()}
    if one.reference.config.tie_word_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    logits, values = golden(state, one.reference.config, tokens, **options)
    loss(logits).backward()
    cuts = {name: value.grad for name, value in values.items() if name != "hook_tokens"}
    return cuts, {key: value.grad for key, value in state.items()}


def check(name, ours, theirs, tolerance=1e-9):
    """Compare relatively to the scale; None is never right."""
    assert ours is not None, f"{name}: no gradient"
    theirs = torch.zeros_like(ours) if theirs is None else theirs
    assert ours.shape == theirs.shape, name
    assert bool(torch.isfinite(ours).all()), f"{name}: not finite"
    off = float((ours - theirs).abs().max()) / max(1e-6, float(theirs.abs().max()))
    assert off <= tolerance, f"{name}: gradient off by {off:.2e} of its scale"


def collect(got):
    """Make a backward function that keeps what it is given."""

    def keep(grad, hook):
        assert hook.name not in got, f"{hook.name}: its backward function was called twice"
        got[hook.name] = grad.detach().clone()

    return keep


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_backward_functions_see_golden_gradients(subject, attn, frozen):
    """Law 7: all names on HF's own way at once, whether or not the parameters ask for gradients."""
    one, tokens, got = subject(dtype=torch.float64, attn=attn), random_tokens(), {}
    one.hf.requires_grad_(not frozen)
    cuts, parameters = expected_gradients(one, tokens)
    logits = one.model.run_with_hooks(tokens, bwd_hooks=[(name, collect(got)) for name in TOGETHER])
    metric(logits).backward()
    assert sorted(got) == sorted(TOGETHER)
    for name in TOGETHER:
        check(name, got[name], cuts[name])
    for name, parameter in one.hf.named_parameters():
        if frozen:
            assert parameter.grad is None, name
        else:
            check(name, parameter.grad, parameters[name])


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("place", PLACES)
def test_each_gradient_alone_is_golden(subject, attn, place, frozen):
    """Law 7: one name at a time, per-head inputs too, by backward function, with and without an edit there."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    one.hf.requires_grad_(not frozen)
    for name in at_layers(place, [1]):
        for edits in ({}, {name: edit_at(name)}):
            got, through = {}, {name} if name in INPUTS else ()
            cuts, _ = expected_gradients(one, tokens, through=through, edits=edits)
            logits = one.model.run_with_hooks(tokens, fwd_hooks=list(edits.items()), bwd_hooks=[(name, collect(got))])
            metric(logits).backward()
            check(f"{name} with edits at {list(edits)}", got.get(name), cuts[name])


def test_cache_keeps_golden_gradients(subject, attn):
    """Law 7: `caching(detach=False)` has the gradient under the name that the value has."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    cuts, _ = expected_gradients(one, tokens)
    with one.model.caching(TOGETHER, detach=False) as cache:
        metric(one.model(tokens)).backward()
    for name in TOGETHER:
        check(name, cache.grad[name], cuts[name])
        assert cache[name].requires_grad, name
    check("short form", cache.grad["z", 1], cuts["blocks.1.attn.hook_z"])


@pytest.mark.parametrize("name", INPUTS)
def test_cache_keeps_gradients_of_per_head_inputs(subject, attn, name):
    """Law 7: the per-head inputs, one at a time: their gradient is that of the run that goes through them."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    cuts, _ = expected_gradients(one, tokens, through={name})
    with one.model.caching([name], detach=False) as cache:
        metric(one.model(tokens)).backward()
    check(name, cache.grad[name], cuts[name])


def test_a_graph_through_cached_values_is_right(subject, attn):
    """Law 7: a loss of cached values themselves, not detached, gives the parameters golden's gradients."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    for name in (name for name in names_at(1) if name in TOGETHER):
        state = {key: value.detach().clone().requires_grad_() for key, value in one.reference.state_dict().items()}
        state["lm_head.weight"] = state["transformer.wte.weight"]
        _, values = golden(state, one.reference.config, tokens)
        wanted = values[name]
        wanted.masked_fill(wanted == -torch.inf, 0).pow(2).sum().backward()
        one.hf.zero_grad(set_to_none=True)
        with one.model.caching([name], detach=False) as cache:
            one.model(tokens)
        cache[name].masked_fill(cache[name] == -torch.inf, 0).pow(2).sum().backward()
        for key, parameter in one.hf.named_parameters():
            if state[key].grad is not None and parameter.grad is None:
                assert not bool(state[key].grad.any()), f"loss of {name}: {key} has no gradient"
            elif parameter.grad is not None:
                theirs = torch.zeros_like(parameter) if state[key].grad is None else state[key].grad
                scale = max(1.0, float(theirs.abs().max()))
                assert float((parameter.grad - theirs).abs().max()) <= 1e-9 * scale, f"loss of {name}: {key}"


def test_run_with_cache_keeps_gradients_of_the_loss(subject, attn):
    """Law 7: incl_bwd runs the backward pass of the loss and keeps the gradients."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()

    def loss_of(logits):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    cuts, _ = expected_gradients(one, tokens, loss=loss_of)
    loss, cache = one.model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    torch.testing.assert_close(loss.detach(), loss_of(one.golden(tokens)[0]))
    for name in cache:
        if name != "hook_tokens":
            check(name, cache.grad[name], cuts[name])


@pytest.mark.parametrize("place", PLACES)
def test_detaching_stops_the_gradient_and_changes_no_bit(subject, attn, place):
    """Law 7: x.detach() leaves the logits bit-equal, and parameters have golden's gradients with it."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    plain = one.reference(tokens).logits.detach()
    for name in at_layers(place):
        through = {name} if name in INPUTS else ()
        cut = {name: lambda x, hook: x.detach()}
        _, parameters = expected_gradients(one, tokens, through=through, edits=cut)
        for fn in (cut[name], lens.edits.detach()):
            one.hf.zero_grad(set_to_none=True)
            logits = one.model.run_with_hooks(tokens, fwd_hooks=[(name, fn)])
            assert torch.equal(logits.detach(), plain), f"{name}: detaching changed the logits"
            if not logits.requires_grad:
                assert name in ("unembed.hook_out", "hook_logits"), f"{name}: no graph is left"
                continue
            metric(logits).backward()
            for key, parameter in one.hf.named_parameters():
                theirs = torch.zeros_like(parameter) if parameters[key] is None else parameters[key]
                ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                scale = max(1.0, float(theirs.abs().max()))
                off = float((ours - theirs).abs().max())
                assert off <= 1e-9 * scale, f"{name} detached: gradient of {key} off by {off:.2e}"


def test_detaching_changes_no_bit_in_float32(subject, attn):
    """Law 7: the same in float32, where another order of the sums would show."""
    one, tokens = subject(attn=attn), random_tokens()
    plain = one.reference(tokens).logits.detach()
    for name in FLOATS:
        logits = one.model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x.detach())])
        assert torch.equal(logits.detach(), plain), name


def test_what_the_output_does_not_depend_on_has_zeros(subject, attn):
    """Law 7: gradients of names after the metric, and of later positions, are zeros and never None."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    with one.model.caching(TOGETHER, detach=False) as cache:
        one.model(tokens)
        cache["resid_post", 0].pow(2).sum().backward()
    for name in TOGETHER:
        gradient = cache.grad[name]
        assert gradient is not None, name
        assert gradient.shape == cache[name].shape, name
        if name.startswith(("blocks.1", "blocks.2", "ln_final", "unembed", "hook_logits")):
            assert not bool(gradient.any()), name
    got = {}
    logits = one.model.run_with_hooks(tokens, bwd_hooks=[(name, collect(got)) for name in TOGETHER])
    logits[:, 1].sum().backward()
    for name in TOGETHER:
        axis = 2 if name.endswith(("scores", "pattern")) else 1
        assert not bool(got[name].narrow(axis, 2, 3).any()), name


def test_backward_functions_may_edit_the_gradient(subject, attn):
    """Law 7: what a backward function returns stands for the gradient of everything upstream."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    name, got = "blocks.1.hook_resid_mid", {}
    cuts, _ = expected_gradients(one, tokens)
    entries = [(name, lambda g, hook: g * 3.0), ("blocks.1.hook_attn_out", collect(got))]
    metric(one.model.run_with_hooks(tokens, bwd_hooks=entries)).backward()
    check("blocks.1.hook_attn_out", got["blocks.1.hook_attn_out"], cuts["blocks.1.hook_attn_out"] * 3.0)


def test_backward_functions_live_as_long_as_the_graph(subject):
    """Law 7: they fire in a backward pass after the run and after the context, and again on a second pass."""
    one, tokens, calls = subject(dtype=torch.float64), random_tokens(), []
    with one.model.hooks(bwd_hooks=[("blocks.1.attn.hook_z", lambda g, hook: calls.append(g.clone()))]):
        logits = one.model(tokens)
    metric(logits).backward(retain_graph=True)
    metric(logits).backward()
    assert len(calls) == 2
    assert torch.equal(calls[0], calls[1])
    one.model(tokens).sum().backward()
    assert len(calls) == 2


def test_gradients_under_padding_equal_golden(subject, attn):
    """Law 7: under a mask, with a metric of real positions."""
    one, got = subject(dtype=torch.float64, attn=attn), {}
    tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (3, 6)], "left")

    def loss_of(logits):
        return metric(logits * mask[..., None])

    cuts, _ = expected_gradients(one, tokens, loss=loss_of, attention_mask=mask)
    entries = [(name, collect(got)) for name in TOGETHER]
    loss_of(one.model.run_with_hooks(tokens, bwd_hooks=entries, attention_mask=mask)).backward()
    for name in TOGETHER:
        ours, theirs = got[name], cuts[name]
        if name.endswith("hook_pattern"):  # weight for a padding key would multiply padding's value, which is nobody's
            ours, theirs = (gradient * mask[:, None, None, :] for gradient in (ours, theirs))
        check(name, ours, theirs)


def test_a_read_only_loss_and_an_edit_share_a_run(subject, attn):
    """Law 7: a function that keeps x*x in a loss of its own, then an edit at the same name: backward is right."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    for name in (n for n in FLOATS if n.startswith("blocks.1") and not is_starred(n) and "scores" not in n):
        kept = []
        entries = [(name, lambda x, hook, kept=kept: kept.append(x * x)), (name, bend)]
        one.hf.zero_grad(set_to_none=True)
        logits = one.model.run_with_hooks(tokens, fwd_hooks=entries)
        (metric(logits) + kept[0].sum()).backward()
        theirs = []
        state = {key: value.detach().clone().requires_grad_() for key, value in one.reference.state_dict().items()}
        state["lm_head.weight"] = state["transformer.wte.weight"]
        both = {name: lambda x, hook, theirs=theirs: theirs.append(x * x) or bend(x)}
        expected, _ = golden(state, one.reference.config, tokens, edits=both)
        (metric(expected) + theirs[0].sum()).backward()
        for key, parameter in one.hf.named_parameters():
            check(f"{name}: {key}", parameter.grad, state[key].grad)
