"""Corners where several laws meet: shared HF models, users' buffers, knocked-out attention, autocast."""

import pytest
import torch
from golden.tiny import random_tokens
from lens_conformance.edits import edit_at
from lens_conformance.fingerprint import differences, fingerprint
from lens_conformance.golden.gpt2 import golden, names_at

import lens_core as lens
from lens_core import errors

FLOATS = [name for name in names_at(1) if name != "hook_tokens"]
INPUTS = ("attn_in", "q_input", "k_input", "v_input")


def close(ours, theirs, what=None):
    """Compare in float64."""
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=1e-9, rtol=1e-9, msg=what)


def test_two_lens_models_may_share_one_hf_model(subject):
    """Law 5: hooks of one lens model hold when another one of the same HF model makes the call."""
    one, tokens = subject(dtype=torch.float64), random_tokens()
    other = lens.load(one.hf)
    first, second = "blocks.0.hook_resid_mid", "blocks.1.attn.hook_pattern"
    alone, _ = one.golden(tokens, edits={first: edit_at(first)})
    both, values = one.golden(tokens, edits={first: edit_at(first), second: edit_at(second)})
    with torch.no_grad(), one.model.hooks(fwd_hooks=[(first, edit_at(first))]):
        close(other(tokens), alone)
        logits, cache = other.run_with_cache(tokens, names_filter=[first])
        close(logits, alone)
        close(cache[first], values[first])
        close(other.run_with_hooks(tokens, fwd_hooks=[(second, edit_at(second))]), both)
    close(other(tokens), one.golden(tokens)[0])


def test_a_residual_that_the_user_gave_is_not_the_cache(subject):
    """Law 6: a residual given to start_at_layer may be written over afterwards."""
    one = subject()
    residual = torch.randn(2, 5, 21)
    before = residual.clone()
    _, cache = one.model.run_with_cache(residual, start_at_layer=1)
    assert torch.equal(residual, before)
    residual.zero_()
    assert torch.equal(cache["resid_pre", 1], before)


def test_writing_into_the_returned_logits_leaves_the_cache(subject):
    """Law 6: masking the returned logits, or the residual of a partial run, in place does not reach what was cached."""
    one, tokens = subject(), random_tokens()
    with torch.no_grad():
        logits, cache = one.model.run_with_cache(tokens)
        before = cache["hook_logits"].clone()
        logits.zero_()
        assert torch.equal(cache["hook_logits"], before)
        residual, cache = one.model.run_with_cache(tokens, stop_at_layer=1)
        before = cache["resid_post", 0].clone()
        residual.zero_()
        assert torch.equal(cache["resid_post", 0], before)


@pytest.mark.parametrize("where", ["visible", "hidden", "one-key", "a-query", "all"])
def test_scores_may_be_opened_and_knocked_out(subject, attn, where):
    """Law 3: a function may give weight to masked cells, and take it from visible ones; no row turns into NaN."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()

    def change(x, hook):
        masked = x == -torch.inf
        if where == "visible":
            return torch.where(masked, x, torch.zeros_like(x))
        if where == "hidden":
            return torch.where(masked, torch.full_like(x, 0.5), x)
        x = x.clone()
        if where == "one-key":
            x[:, 1, 2:, 0] = -torch.inf
        elif where == "a-query":
            x[:, 1, 3] = -torch.inf
        else:
            x[:] = -torch.inf
        return x

    name = "blocks.1.attn.hook_attn_scores"
    expected, values = one.golden(tokens, edits={name: change})
    with torch.no_grad(), one.model.hooks(fwd_hooks=[(name, change)]):
        logits, cache = one.model.run_with_cache(tokens, names_filter=["blocks.1.attn.hook_pattern"])
    close(cache["pattern", 1], values["blocks.1.attn.hook_pattern"])
    close(logits, expected)


def test_hfs_own_records_show_the_edit(subject, attn):
    """Law 3: hidden states that HF itself reports inside the context are the edited ones."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    for layer, name in (
        (1, "blocks.0.hook_resid_post"),
        (1, "blocks.1.hook_resid_pre"),
        (2, "blocks.1.hook_resid_mid"),
    ):
        _, values = one.golden(tokens, edits={name: edit_at(name)})
        with torch.no_grad(), one.model.hooks(fwd_hooks=[(name, edit_at(name))]):
            states = one.model.hf_model(tokens, output_hidden_states=True).hidden_states
        if name != "blocks.1.hook_resid_pre":  # what enters a block is edited after HF has noted it
            close(states[layer], values[f"blocks.{layer}.hook_resid_pre"], name)
        close(states[3], values["unembed.hook_in"], name)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_reading_under_autocast_is_pure(subject, attn, grad):
    """Law 4: under autocast to bfloat16, reading everything leaves logits and parameter gradients."""
    one, tokens = subject(attn=attn), random_tokens()
    results = []
    for reads in (True, False):
        model = one.hf if reads else one.reference
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
            if reads:
                logits, _ = one.model.run_with_cache(tokens, names_filter=one.names())
            else:
                logits = model(tokens).logits
        if grad:
            logits.float().pow(2).sum().backward()
        results.append([logits, *(p.grad for p in model.parameters() if grad)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_undetached_cached_values_are_on_the_way_to_the_logits(subject, attn, frozen):
    """Law 7: torch.autograd.grad with respect to a cached value is golden's gradient, one name at a time."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    one.hf.requires_grad_(not frozen)
    for name in FLOATS:
        through = {name} if name.endswith(INPUTS) else ()
        expected, values = golden(one.reference.state_dict(), one.reference.config, tokens, through=through)
        expected.pow(2).sum().backward()
        with one.model.caching([name], detach=False) as cache:
            logits = one.model(tokens)
        (ours,) = torch.autograd.grad(logits.pow(2).sum(), [cache[name]])
        scale = max(1.0, float(values[name].grad.abs().max()))
        assert float((ours - values[name].grad).abs().max()) <= 1e-9 * scale, name


def test_a_tensor_kept_by_a_function_is_on_the_way_to_the_logits(subject, attn):
    """Law 7: what a function returned, or was handed on HF's own way, may be differentiated with respect to."""
    # Reading there is no way into the graph.
    beside = ("scale", "normalized", "scores", "pattern", "result", "mlp_in")
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    for name in (n for n in FLOATS if not n.endswith(INPUTS)):
        kept = {}

        def keep(x, hook, kept=kept):
            x.retain_grad()
            kept["handed"] = x

        def edit(x, hook, kept=kept):
            kept["returned"] = edit_at(hook.name)(x)
            kept["returned"].retain_grad()
            return kept["returned"]

        ways = [(edit, "returned", {name: edit_at(name)})]
        ways += [] if name.endswith(beside) else [(keep, "handed", {})]
        for fn, key, edits in ways:
            expected, values = golden(one.reference.state_dict(), one.reference.config, tokens, edits=edits)
            expected.pow(2).sum().backward()
            one.model.run_with_hooks(tokens, fwd_hooks=[(name, fn)]).pow(2).sum().backward()
            assert kept[key].grad is not None, f"{name}: the {key} tensor is not on the way"
            scale = max(1.0, float(values[name].grad.abs().max()))
            assert float((kept[key].grad - values[name].grad).abs().max()) <= 1e-9 * scale, f"{name}: {key}"


def test_an_error_in_a_backward_function_leaves_the_model(subject):
    """Law 5: a backward function that raises is an error that names the place, and nothing is left behind."""
    one, tokens = subject(), random_tokens()
    one.hf(tokens)
    before = fingerprint(one.hf)

    def boom(grad, hook):
        raise RuntimeError("boom")

    logits = one.model.run_with_hooks(tokens, bwd_hooks=[("blocks.1.attn.hook_z", boom)])
    with pytest.raises(errors.HookFunctionError, match=r"blocks\.1\.attn\.hook_z"):
        logits.sum().backward()
    one.hf.zero_grad(set_to_none=True)
    assert differences(before, fingerprint(one.hf)) == []
    one.model(tokens).sum().backward()
    one.reference(tokens).logits.sum().backward()
    for ours, theirs in zip(one.hf.parameters(), one.reference.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_functions_stay_with_reset_hooks_end_false(subject):
    """Law 10: reset_hooks_end=False leaves the call's functions on until reset_hooks."""
    one, tokens, log = subject(), random_tokens(), []
    entry = [("blocks.1.attn.hook_z", lambda x, hook: log.append(1))]
    one.model.run_with_hooks(tokens, fwd_hooks=entry, reset_hooks_end=False)
    one.model(tokens)
    one.model.reset_hooks()
    one.model(tokens)
    assert log == [1, 1]


def test_editing_in_training_mode_with_dropout_is_repeatable(subject, attn):
    """Law 3: in training mode an edit of the pattern still works, and a seed gives the same result twice."""
    one, tokens = subject(attn=attn, attn_pdrop=0.3, resid_pdrop=0.3), random_tokens()
    one.hf.train()
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(
            one.model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: x * 0)])
        )
    torch.manual_seed(0)
    assert torch.equal(*results)
    assert not torch.equal(results[0], one.model(tokens))


def test_the_whole_batch_of_one_and_one_token(subject, attn):
    """Law 2 and 3: one row of one token, every name, read and edited."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens(1, 1)
    _, values = one.golden(tokens)
    _, cache = one.model.run_with_cache(tokens, names_filter=one.names())
    for name in names_at(1):
        close(cache[name], values[name], name)
        expected, _ = one.golden(tokens, edits={name: edit_at(name)})
        close(one.model.run_with_hooks(tokens, fwd_hooks=[(name, edit_at(name))]), expected, name)
