"""Effective attention, retention and the residual stream of SSM caches, against the golden forward and plain sums."""

import math

import pytest
import torch
from analysis.ssm_subject import LAYERS, TOKENS, Subject, attention_of
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_ssm import KINDS, tiny_ssm
from lens_conformance.float64 import true_float64

import lens_core as lens
from lens_core.analysis import ssm_retention
from lens_core.analysis.ssm_retention import half_life, retention, scan_half_life
from lens_core.analysis.ssm_scan import Scan
from lens_core.errors import ArgumentError, CacheError


@pytest.fixture(scope="module")
def subject(kind):
    """Give a tiny model of the kind."""
    return Subject(kind)


@pytest.fixture(scope="module")
def run(subject):
    """Give its logits and default cache."""
    return subject.run()


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """Name the model type."""
    return request.param


@pytest.mark.parametrize("layer", LAYERS)
def test_effective_attention_of_a_cache_is_the_formula(subject, run, layer):
    """From the golden forward's values; it says itself that it gives the output back."""
    expected = attention_of(subject.values, subject.own(layer, "A_log"), layer, subject.kind)
    with true_float64():
        found = run[1].effective_attention(layer)
        row = run[1].effective_attention(layer, target=-1)
        skip = run[1].effective_attention(layer, skip=True, reduce="norm", max_bytes=1)
    torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(row.values, expected[:, :, -1], rtol=1e-9, atol=1e-11)
    assert (found.layer, found.per) == (layer, "head" if subject.kind == "mamba2" else "channel")
    for one in (found, row, skip):
        assert one.error < 1e-12
    with_skip = expected.clone()
    with_skip.diagonal(dim1=2, dim2=3).add_(subject.own(layer, "D")[:, None])
    torch.testing.assert_close(skip.values, with_skip.norm(dim=1), rtol=1e-9, atol=1e-11)


def test_edits_of_the_run_are_in_it(subject):
    """Step sizes, B and C of the run; where the decay was edited and cached, that; and the error stays small."""
    layer, at = 1, "blocks.1.mixer.hook_"
    edits = [
        (at + "delta", lambda delta, hook: delta * 1.5, 3),
        (at + "B", lambda B, hook: -B, [2, 5]),
        (at + "C", lambda C, hook: C * 2, -1),
    ]
    with subject.model.hooks(fwd_hooks=edits):
        _, cache = subject.run()

    def golden_edit(positions, function):
        def edit(tensor, hook):
            tensor[:, positions] = function(tensor[:, positions])

        return edit

    _, values = subject.golden(
        {
            at + "delta": golden_edit([3], lambda delta: delta * 1.5),
            at + "B": golden_edit([2, 5], lambda B: -B),
            at + "C": golden_edit([7], lambda C: C * 2),
        }
    )
    with true_float64():
        found = cache.effective_attention(layer)
    expected = attention_of(values, subject.own(layer, "A_log"), layer, subject.kind)
    torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=1e-11)
    assert found.error < 1e-12
    plain = attention_of(subject.values, subject.own(layer, "A_log"), layer, subject.kind)
    assert (plain - expected).abs().max() > 0.01


def test_an_edited_decay_is_used_where_it_was_cached(subject):
    """Elsewhere the reconstruction error tells that something is missing."""
    name = "blocks.1.mixer.hook_decay"
    forget = (name, lambda decay, hook: decay * 0, 4)
    with subject.model.hooks(fwd_hooks=[forget]):
        _, cache = subject.run(names_filter=[lambda name: subject.model.table[name].default, name])
    with true_float64():
        found = cache.effective_attention(1)
        assert found.error < 1e-12
        assert not found.values[:, :, 4:, :4].any()  # what was before position 4 is forgotten
        assert found.values[:, :, 3, :3].any()
        del cache[name]
        assert cache.effective_attention(1).error > 0.01


def test_an_edit_between_inputs_and_output_shows_in_the_error(subject):
    """The attention cannot know of an edited state."""
    edit = ("blocks.0.mixer.hook_ssm_state", lambda state, hook: state + 1, 3)
    with subject.model.hooks(fwd_hooks=[edit]):
        _, cache = subject.run()
    assert cache.effective_attention(0).error > 0.01


def test_what_cannot_be_rebuilt_has_no_error(subject, run):
    """One source, no step size, no output."""
    cache = run[1]
    assert cache.effective_attention(0, source=2).error is None
    assert cache.effective_attention(0, with_delta=False).error is None
    _, small = subject.run(names_filter=["delta", "B", "C"])
    assert small.effective_attention(0).error is None
    assert small.effective_attention(0, target=3, heads=1, reduce="sum").values.shape == (2, 8)


def test_prompt_and_continuation_give_one_map(subject):
    """A cache of a generation holds all positions; so has its effective attention."""
    model = subject.model
    with true_float64(), model.caching() as cache:
        tokens = model.generate(TOKENS, max_new_tokens=3, do_sample=False, return_type="tokens", verbose=False)
    with true_float64():
        found = cache.effective_attention(1)
        whole = subject.run(tokens[:, : found.values.shape[-1]])[1].effective_attention(1)
    assert found.values.shape[-1] == 10  # the last new token was never run
    torch.testing.assert_close(found.values, whole.values, rtol=1e-8, atol=1e-10)
    assert found.error < 1e-12


def test_padding_neither_sends_nor_receives(kind):
    """And real positions are those of the text alone."""
    model = lens.load(tiny_ssm(kind))
    text = random_tokens(1, 5)
    padded = torch.cat([torch.full((1, 3), 28), text], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    _, alone = model.run_with_cache(text)
    _, cache = model.run_with_cache(padded, attention_mask=mask)
    found, expected = (one.effective_attention(1).values for one in (cache, alone))
    torch.testing.assert_close(found[:, :, 3:, 3:], expected, rtol=1e-4, atol=1e-5)
    assert not found[:, :, :, :3].any()


def test_a_cache_without_a_batch_axis_or_from_a_file(subject, tmp_path):
    """The values of the row; from a file without the model, the decays must be there."""
    _, cache = subject.run(TOKENS[:1])
    whole = cache.effective_attention(0).values
    cache.save(tmp_path / "run.safetensors")
    again = lens.ActivationCache.load(tmp_path / "run.safetensors", model=subject.model)
    assert torch.equal(again.effective_attention(0).values, whole)
    assert torch.equal(cache.remove_batch_dim().effective_attention(0).values, whole[0])
    bare = lens.ActivationCache.load(tmp_path / "run.safetensors")
    if subject.kind == "mamba2":  # there the decays are in the default cache
        torch.testing.assert_close(bare.effective_attention(0).values, whole, rtol=1e-4, atol=1e-6)
        return
    with pytest.raises(CacheError, match="no model to take A from.*blocks.0.mixer.hook_decay"):
        bare.effective_attention(0)


def test_what_is_missing_is_named(subject):
    """The name to cache; the layers there are."""
    _, cache = subject.run(names_filter=["delta", "B"])
    with pytest.raises(CacheError, match="'blocks.1.mixer.hook_C'"):
        cache.effective_attention(1)
    with pytest.raises(ArgumentError, match="from 0 to 2; got 3"):
        cache.effective_attention(3)
    model = lens.load(tiny_gpt2())
    _, other = model.run_with_cache(TOKENS)
    with pytest.raises(ArgumentError, match="no block of this model has an SSM mixer"):
        other.effective_attention(0)


def test_reading_attention_leaves_the_cache_as_it_was(subject):
    """The values are shared with it, not changed."""
    _, cache = subject.run()
    before = {name: cache[name].clone() for name in cache}
    cache.effective_attention(0)
    cache.effective_attention(0, skip=True, reduce="norm")
    assert list(before) == list(cache)
    assert all(torch.equal(before[name], cache[name]) for name in cache)


def test_gradients_flow_through_an_undetached_cache(subject):
    """To the parameters, as for anything computed from the run."""
    with true_float64(), subject.model.caching(["delta", "B", "C"], detach=False) as cache:
        subject.model(TOKENS)
        subject.hf.zero_grad()
        cache.effective_attention(0, reduce="norm").values.sum().backward()
    gradient = subject.hf.backbone.embeddings.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    subject.hf.zero_grad()


# ---------------------------------------------------------------------- retention


def test_retention_is_the_product_of_the_decays(subject, run):
    """After the source, up to the target; from A as from the decays."""
    decay = subject.values["blocks.1.mixer.hook_decay"].detach()
    with true_float64():
        kept = ssm_retention.retention(run[1], 1, source=2)
        last = ssm_retention.retention(run[1], 1, source=2, target=-1, heads=1)
    assert kept.shape == decay.shape
    assert not kept[:, :2].any()
    assert (kept[:, 2] == 1).all()
    for target in range(3, 8):
        torch.testing.assert_close(kept[:, target], decay[:, 3 : target + 1].prod(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(last, decay[:, 3:, 1].prod(1), rtol=1e-9, atol=1e-12)


def test_a_state_is_half_after_its_half_life(subject, run):
    """At the mean step size: decay to the power of the half-life is 1/2, over the tokens that count."""
    delta = subject.values["blocks.1.mixer.hook_delta"].detach()
    rates = -subject.own(1, "A_log").exp()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]])
    for given, mean in ((None, delta.mean((0, 1))), (mask, delta[mask.bool()].mean(0))):
        with true_float64():
            tokens = ssm_retention.half_life(run[1], 1, mask=given)
        assert tokens.shape == rates.shape
        steady = mean if rates.ndim == 1 else mean[:, None]
        torch.testing.assert_close((steady * rates * tokens).exp(), torch.full_like(tokens, 0.5))
    with pytest.raises(ArgumentError, match="no token is left"):
        ssm_retention.half_life(run[1], 1, mask=mask * 0)
    with pytest.raises(ArgumentError, match="8 positions"):
        ssm_retention.retention(run[1], 1, source=8)


def test_where_nothing_is_forgotten_the_half_life_is_infinite(subject):
    """Decays of 1, as an edit may put there."""
    name = "blocks.0.mixer.hook_decay"
    with subject.model.hooks(fwd_hooks=[(name, lambda decay, hook: torch.ones_like(decay))]):
        _, cache = subject.run(names_filter=["delta", "B", "C", name])
    assert (ssm_retention.half_life(cache, 0) == torch.inf).all()
    assert (ssm_retention.retention(cache, 0, source=1, target=-1) == 1).all()


# ---------------------------------------------------------------------- the residual stream


def test_the_stream_is_the_embedding_and_the_mixers_outputs(subject, run):
    """Which is all that `decompose_resid` gives, against HF-independent values."""
    _, cache = run
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels == ["embed", "0_mixer_out", "1_mixer_out", "2_mixer_out"]
    names = ["hook_embed", *(f"blocks.{layer}.hook_mixer_out" for layer in LAYERS)]
    torch.testing.assert_close(parts, torch.stack([subject.values[name] for name in names]).detach())
    torch.testing.assert_close(parts.sum(0), subject.values["blocks.2.hook_resid_post"].detach())
    early, labels = cache.decompose_resid(layer=1, mode="mixer", incl_embeds=False, return_labels=True)
    assert labels == ["0_mixer_out"]
    torch.testing.assert_close(early[0], parts[1])


def test_logits_are_attributed_to_the_mixers(subject, run):
    """Parts and constant sum to the golden forward's difference of logits."""
    _, cache = run
    with true_float64():
        attributed, bias = cache.logit_attrs(cache.decompose_resid(), 3, 5, return_bias=True)
    expected = subject.logits[..., 3] - subject.logits[..., 5]
    torch.testing.assert_close(attributed.sum(0) + bias, expected.detach(), rtol=1e-9, atol=1e-10)
    assert attributed[1:].abs().min(0).values.max() > 0


def test_the_accumulated_stream_ends_in_the_logits(subject, run):
    """The logit lens, mixer by mixer."""
    _, cache = run
    with true_float64():
        stream, labels = cache.accumulated_resid(apply_ln=True, return_labels=True)
    assert labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    torch.testing.assert_close(stream[-1] @ subject.model.W_U.detach(), subject.logits.detach())
    raw = cache.accumulated_resid()
    torch.testing.assert_close(raw[1], subject.values["blocks.1.hook_resid_pre"].detach())


def test_half_lives_do_not_depend_on_what_was_cached(subject):
    """The logarithm of a decay that was rounded to 0 or 1 is not what the run had; edited decays count."""
    names = ["delta", "B", "C"]
    with true_float64():
        plain = half_life(subject.run(names_filter=names)[1], 0)
        cached = half_life(subject.run(names_filter=[*names, "decay"])[1], 0)
        with subject.model.hooks(fwd_hooks=[("blocks.0.mixer.hook_decay", lambda decay, hook: decay**2)]):
            edited = half_life(subject.run(names_filter=[*names, "decay"])[1], 0)
    torch.testing.assert_close(plain, cached, rtol=1e-12, atol=0)
    torch.testing.assert_close(edited, plain / 2, rtol=1e-12, atol=0)
    steps = torch.full((1, 1000, 1), 0.01)
    steps[0, 5] = 200.0  # exp(-200) is 0 in float32
    scan = Scan(
        delta=steps, B=steps[..., None], C=steps[..., None], A=-torch.ones(1, 1), decay=(-steps).exp()[..., None]
    )
    assert scan_half_life(scan).item() == pytest.approx(math.log(2) / steps.mean().item(), rel=1e-4)


def test_positions_left_out_are_an_error(subject):
    """States pass through every position, so a cache of some of them says nothing of what is kept in between."""
    for cache in (subject.run(pos_slice=[0, 3, 7])[1], subject.run()[1].slice_pos([0, 3, 7])):
        with pytest.raises(CacheError, match="leaves out positions"):
            retention(cache, 0, source=0)
        with pytest.raises(CacheError, match="leaves out positions"):
            cache.effective_attention(0)
    assert retention(subject.run(pos_slice=slice(3, 7))[1], 0, source=0).shape[1] == 4


def test_heads_may_be_tensors_without_axes(subject):
    """What `argmax` gives is an int."""
    _, cache = subject.run()
    for head in (torch.tensor(3), torch.tensor(3).numpy()[()]):
        assert torch.equal(retention(cache, 0, 1, heads=head), retention(cache, 0, 1, heads=3))
        found = cache.effective_attention(0, heads=head)
        assert found.axes == cache.effective_attention(0, heads=3).axes
        assert torch.equal(found.values, cache.effective_attention(0, heads=3).values)


def test_gradients_reach_decay_rates_and_skip(subject):
    """On a cache that stays on the graph, A and D are parts of the effective attention."""
    with true_float64(), subject.model.caching(["delta", "B", "C", "ssm_input"], detach=False) as cache:
        subject.model(TOKENS)
        cache.effective_attention(0, target=-1, skip=True).values.square().sum().backward()
    mixer = subject.hf.backbone.layers[0].mixer
    assert mixer.A_log.grad.abs().max() > 0
    assert mixer.D.grad.abs().max() > 0
    subject.hf.zero_grad()
