"""Law 3: an edit replaces the value for everything downstream that the equations say, and for nothing else."""

import pytest
import torch
from golden.tiny import pad, random_tokens
from lens_conformance.edits import bend, edit_at, in_place, only_at, only_head
from lens_conformance.golden.gpt2 import BLOCK, TOP, names_at

HEADED = ["hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "attn.hook_q", "attn.hook_k", "attn.hook_v"]
HEADED += ["attn.hook_z", "attn.hook_result", "attn.hook_attn_scores", "attn.hook_pattern"]
PLACES = [*TOP, *(f"blocks.L.{name}" for name in BLOCK)]
TOLERANCE = 1e-10


def at_layers(place, layers=(0, 1, 2)):
    """Give the names of a place in some layers, or the place itself where there are none."""
    return [place.replace(".L.", f".{layer}.") for layer in layers] if ".L." in place else [place]


def error(ours, expected):
    """Give the largest difference in units of the scale; masked scores must be masked in both."""
    hidden = expected == -torch.inf
    if ours.shape != expected.shape or not torch.equal(ours == -torch.inf, hidden):
        return float("inf")
    if not ours.is_floating_point():
        return float((ours != expected).any())
    ours, expected = ours.double().masked_fill(hidden, 0), expected.masked_fill(hidden, 0)
    return float((ours - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def check(one, tokens, entries, edits, **options):
    """Run lens with the entries and golden with the edits: the logits and the value at every name must agree."""
    plain, _ = one.golden(tokens, **options)
    logits, values = one.golden(tokens, edits=edits, **options)
    assert (logits - plain).abs().max() > 1e-3, f"{list(edits)}: the edit moves nothing, so it tests nothing"
    with torch.no_grad(), one.model.hooks(fwd_hooks=entries):
        ours, cache = one.model.run_with_cache(tokens, names_filter=one.names(), **options)
    assert error(ours, logits) <= TOLERANCE, f"edit at {list(edits)}: logits off by {error(ours, logits):.2e}"
    for name in one.names():
        off = error(cache[name], values[name])
        assert off <= TOLERANCE, f"edit at {list(edits)}: {name} off by {off:.2e}"


@pytest.mark.parametrize("place", PLACES)
def test_an_edit_has_golden_effect_everywhere(subject, attn, place):
    """Law 3: logits and the value at every other name are golden's with the same edit, for every layer."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    for name in at_layers(place):
        check(one, tokens, [(name, edit_at(name))], {name: edit_at(name)})


@pytest.mark.parametrize("place", PLACES)
def test_an_edit_alone_has_golden_effect(subject, attn, place):
    """Law 3: with nothing else asked for, in grad mode, the logits are golden's with the same edit."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    for name in at_layers(place, [1]):
        expected, _ = one.golden(tokens, edits={name: edit_at(name)})
        for entry in (edit_at(name), in_place(edit_at(name))):
            ours = one.model.run_with_hooks(tokens, fwd_hooks=[(name, entry)])
            assert error(ours.detach(), expected) <= TOLERANCE, name
            with torch.inference_mode():
                ours = one.model.run_with_hooks(tokens, fwd_hooks=[(name, entry)])
            assert error(ours, expected) <= TOLERANCE, f"{name} under inference_mode"


@pytest.mark.parametrize("place", PLACES)
def test_an_edit_is_right_to_float32_precision(subject, attn, place):
    """Law 3: in float32 the error is a rounding error."""
    one, tokens = subject(attn=attn), random_tokens()
    for name in at_layers(place, [1]):
        expected, _ = one.golden(tokens, edits={name: edit_at(name)})
        ours = one.model.run_with_hooks(tokens, fwd_hooks=[(name, edit_at(name))])
        assert error(ours.detach(), expected) <= 1e-5, name


@pytest.mark.parametrize("place", [f"blocks.L.{name}" for name in HEADED])
def test_an_edit_of_one_head_reaches_that_head(subject, attn, place):
    """Law 3: an edit of one head's part equals golden's, for each head."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    for head in range(3):
        for name in at_layers(place, [1]):
            axis = 1 if name.endswith(("scores", "pattern")) else 2
            edit = only_head(edit_at(name), head, axis)
            check(one, tokens, [(name, edit)], {name: edit})


@pytest.mark.parametrize("place", PLACES)
def test_an_entry_may_name_positions(subject, attn, place):
    """Law 3: an entry with positions is shown those only, and edits those only."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens(2, 6)
    for name in at_layers(place, [1]):
        edit, shapes = edit_at(name), []

        def shown(x, hook, edit=edit, shapes=shapes):
            shapes.append(
                (
                    x.shape[2 if x.shape[1] == 3 and hook.name.endswith(("scores", "pattern")) else 1],
                    hook.positions.tolist(),
                )
            )
            return edit(x, hook=hook)

        check(one, tokens, [(name, shown, [1, 4])], {name: only_at(name, edit, [1, 4])})
        assert shapes == [(2, [1, 4])], name


@pytest.mark.parametrize("positions", [[3], [0, 2], range(1, 4), slice(2, None), [-1]], ids=str)
def test_positions_may_be_given_in_several_ways(subject, positions):
    """Law 3: positions are a list, a range or a slice; negative ones count from the end."""
    one, tokens = subject(dtype=torch.float64), random_tokens(2, 6)
    absolute = list(range(6))[positions] if isinstance(positions, slice) else [p % 6 for p in positions]
    for name in ("blocks.1.hook_resid_mid", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_q"):
        edits = {name: only_at(name, edit_at(name), absolute)}
        check(one, tokens, [(name, edit_at(name), positions)], edits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_edits_under_padding_equal_golden(subject, attn, side):
    """Law 3: under a mask the logits at real positions are golden's with the same edit."""
    one = subject(dtype=torch.float64, attn=attn)
    tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (3, 6)], side)
    for name in names_at(1):
        expected, _ = one.golden(tokens, attention_mask=mask, edits={name: edit_at(name)})
        ours = one.model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[(name, edit_at(name))])
        real = mask.bool()
        if name.endswith("hook_pattern"):  # the affine edit gives weight to padding keys, whose values are nobody's
            shrink = edit_at(name, causal=True)
            expected, _ = one.golden(tokens, attention_mask=mask, edits={name: shrink})
            ours = one.model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[(name, shrink)])
        assert error(ours.detach()[real], expected[real]) <= TOLERANCE, name


def test_several_edits_compose(subject, attn):
    """Law 3: edits at many names at once, as golden composes them."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    # Not resid-like ones: thirty bends in a row overflow anything.
    wanted = ["hook_scale", "hook_q", "hook_k", "hook_v", "attn_scores", "hook_z", "hook_result", "hook_attn_out"]
    wanted += ["resid_mid", "mlp_in", "hook_post", "hook_q_input"]
    chosen = [name for name in one.names() if name.endswith(tuple(wanted))]
    edits = {name: lambda x, hook: x * 0.95 + 0.01 for name in chosen}
    check(one, tokens, list(edits.items()), edits)


@pytest.mark.parametrize("head", [0, 2])
def test_an_edited_head_no_longer_hears_the_shared_norm(subject, attn, head):
    """Law 3: `ln1` edits reach the heads whose input nobody edited, and `attn_in` edits start q, k and v inputs."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    for norm in ("ln1.hook_scale", "ln1.hook_normalized", "ln1.hook_out"):
        for own in ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"):
            edits = {f"blocks.1.{norm}": bend, f"blocks.1.{own}": only_head(bend, head)}
            check(one, tokens, list(edits.items()), edits)
    edits = {"blocks.1.hook_attn_in": only_head(bend, head), "blocks.1.hook_k_input": only_head(bend, 2 - head)}
    edits |= {"blocks.1.hook_q_input": only_head(bend, head), "blocks.1.attn.hook_v": only_head(bend, 1)}
    check(one, tokens, list(edits.items()), edits)


def test_middle_of_the_residual_stream_reaches_both_branches(subject, attn):
    """Law 3: hook_resid_mid reaches ln2 and the residual sum; a small number survives beside bfloat16's rounding."""
    one, tokens = subject(dtype=torch.bfloat16, attn=attn), random_tokens()
    new = torch.full((2, 5, 21), 1e-3, dtype=torch.bfloat16)
    new[..., 0] = 2e-3
    with torch.no_grad(), one.model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", lambda x, hook: new)]):
        _, cache = one.model.run_with_cache(tokens, names_filter=one.names())
    assert torch.equal(cache["resid_mid", 1], new)
    assert torch.equal(cache["mlp_in", 1], new)
    assert torch.equal(cache["resid_post", 1], new + cache["mlp_out", 1])
    other = one.reference.transformer.h[1]
    with torch.no_grad():
        assert torch.equal(cache["mlp_out", 1], other.mlp(other.ln_2(new)))


def test_a_function_that_returns_a_shared_tensor_is_safe(subject):
    """Law 3: returning a tensor of one's own, or another hook's value, neither changes it nor is changed by it."""
    one, tokens, kept = subject(dtype=torch.float64), random_tokens(), {}
    mine = torch.randn(2, 5, 21, dtype=torch.float64)
    before = mine.clone()

    def keep(x, hook):
        kept["x"] = x

    entries = [("blocks.0.hook_resid_mid", lambda x, hook: mine), ("blocks.1.hook_resid_mid", keep)]
    entries += [("blocks.2.hook_resid_mid", lambda x, hook: kept["x"])]
    with torch.no_grad():
        logits = one.model.run_with_hooks(tokens, fwd_hooks=entries)
    state = {}
    edits = {
        "blocks.0.hook_resid_mid": lambda x, hook: before,
        "blocks.1.hook_resid_mid": lambda x, hook: state.update(x=x),
    }
    edits["blocks.2.hook_resid_mid"] = lambda x, hook: state["x"]
    assert error(logits, one.golden(tokens, edits=edits)[0]) <= TOLERANCE
    assert torch.equal(mine, before)


def test_hf_names_can_be_edited(subject):
    """Law 3: an edit at `hf.<path>.output` is what the next module sees."""
    one, tokens = subject(dtype=torch.float64), random_tokens()
    expected, _ = one.golden(tokens, edits={"blocks.1.mlp.hook_post": bend})
    for name in ("hf.transformer.h.1.mlp.act.output", "hf.transformer.h.1.mlp.c_proj.input"):
        ours = one.model.run_with_hooks(tokens, fwd_hooks=[(name, bend)])
        assert error(ours.detach(), expected) <= TOLERANCE, name


def test_calling_the_hf_model_inside_hooks_is_edited(subject, attn):
    """Law 3: the same edit holds when the HF model is called directly inside the context."""
    one, tokens = subject(dtype=torch.float64, attn=attn), random_tokens()
    for name in names_at(1):
        expected, _ = one.golden(tokens, edits={name: edit_at(name)})
        with torch.no_grad(), one.model.hooks(fwd_hooks=[(name, edit_at(name))]):
            assert error(one.model.hf_model(tokens).logits, expected) <= TOLERANCE, name
