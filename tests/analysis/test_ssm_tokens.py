"""Mixers taken apart by source token: against nested sums in float64, and against gradients."""

import pytest
import torch
from analysis.ssm_subject import LAYERS, TOKENS, Subject, attention_of
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_ssm import KINDS, tiny_ssm
from lens_conformance.float64 import true_float64
from torch import Tensor

import lens_core as lens
from lens_core.analysis.ssm_gradients import stop_gradients
from lens_core.analysis.ssm_tokens import mixer_tokens, token_attribution
from lens_core.errors import ArgumentError, CacheError


@pytest.fixture(scope="module", params=KINDS)
def subject(request):
    """Give a tiny model of each kind, with biases in its projections where its plugin serves them."""
    return Subject(request.param)


@pytest.fixture(scope="module")
def run(subject):
    """Give its logits and default cache."""
    return subject.run()


def silu(x: Tensor) -> Tensor:
    """Write it out."""
    return x / (1 + (-x).exp())


def nested(subject, layer: int, target: int) -> tuple[Tensor, Tensor]:
    """Sum over sources of the scan and taps of the kernel, one token and channel after the other, from golden values.

    Returns:
        What each token adds `[batch, source, d_model]`, and what the convolution's bias adds `[batch, d_model]`.
    """
    at = f"blocks.{layer}.mixer.hook_"
    values = {name.removeprefix(at): value.detach() for name, value in subject.values.items() if name.startswith(at)}
    attention = attention_of(subject.values, subject.own(layer, "A_log"), layer, subject.kind)
    kernel, bias, D = (
        subject.own(layer, "conv1d.weight")[:, 0],
        subject.own(layer, "conv1d.bias"),
        subject.own(layer, "D"),
    )
    width = values["gated"].shape[-1]
    hidden, constant = torch.zeros(2, 8, width).double(), torch.zeros(2, width).double()
    per_head = width // attention.shape[1]
    for channel in range(width):
        for s in range(target + 1):
            head = channel // per_head
            flow = attention[:, head, target, s] + (D[head] if s == target else 0)
            flow = flow / (1 + (-values["conv"][:, s, channel]).exp())  # times sigmoid(v)
            constant[:, channel] += flow * bias[channel]
            for k in range(4):
                j = s - 3 + k
                if j >= 0:
                    hidden[:, j, channel] += flow * kernel[channel, k] * values["conv_in"][:, j, channel]
    gate = silu(values["gate"][:, target])
    if subject.kind == "mamba2":
        scale = subject.values[f"blocks.{layer}.mixer.inner_norm.hook_scale"].detach()[:, target]
        gate = gate * subject.own(layer, "norm.weight") / scale.repeat_interleave(width // scale.shape[1], dim=1)
    out = subject.own(layer, "out_proj.weight").T
    return (hidden * gate[:, None]) @ out, (constant * gate) @ out


@pytest.mark.parametrize("target", [0, 2, 7])
def test_each_token_adds_what_the_nested_sums_say(subject, run, target):
    """And nothing comes from later tokens."""
    with true_float64():
        found = mixer_tokens(run[1], 1, target)
    values, constant = nested(subject, 1, target)
    torch.testing.assert_close(found.values, values, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.constant, constant, rtol=1e-9, atol=1e-11)
    assert not found.values[:, target + 1 :].any()
    assert found.error < 1e-12


@pytest.mark.parametrize("layer", LAYERS)
def test_the_parts_sum_to_the_mixers_output(subject, run, layer):
    """The golden forward's, to rounding; and a constant is needed."""
    expected = subject.values[f"blocks.{layer}.hook_mixer_out"].detach()
    for target in (-1, 3):
        with true_float64():
            found = mixer_tokens(run[1], layer, target)
        torch.testing.assert_close(found.values.sum(1) + found.constant, expected[:, target], rtol=1e-9, atol=1e-10)
        assert found.constant.abs().max() > 1e-3


def test_the_parts_are_linear_in_what_the_convolution_read(subject, run):
    """With all gates held still, twice the u of one token is twice its part: by the gradient at u."""
    name, target = "blocks.2.mixer.hook_conv_in", 6
    direction = torch.linspace(-1, 1, subject.hf.config.hidden_size, dtype=torch.float64)
    with true_float64(), subject.model.hooks(fwd_hooks=stop_gradients(subject.model)):
        with subject.model.caching([name, "blocks.2.hook_mixer_out"], detach=False) as cache:
            subject.model(TOKENS)
            (cache["blocks.2.hook_mixer_out"][:, target] @ direction).sum().backward()
        by_gradient = (cache[name] * cache.grad[name]).sum(-1).detach()
        found = mixer_tokens(run[1], 2, target, project_output_onto=direction)
    torch.testing.assert_close(found.values, by_gradient, rtol=1e-8, atol=1e-10)
    subject.hf.zero_grad()


def test_directions_project_without_making_the_outputs(subject, run):
    """One for all, or one for each row."""
    draw = torch.Generator().manual_seed(1)
    onto = torch.randn(2, subject.hf.config.hidden_size, generator=draw, dtype=torch.float64)
    with true_float64():
        whole = mixer_tokens(run[1], 0, -1)
        rows = mixer_tokens(run[1], 0, -1, project_output_onto=onto)
        one = mixer_tokens(run[1], 0, -1, project_output_onto=onto[0])
    torch.testing.assert_close(rows.values, torch.einsum("bsd,bd->bs", whole.values, onto))
    torch.testing.assert_close(rows.constant, (whole.constant * onto).sum(-1))
    torch.testing.assert_close(one.values, whole.values @ onto[0])
    assert rows.error == whole.error


def test_in_single_precision_the_sum_is_good_to_a_millionth(subject):
    """As the documentation says, on the model as users have it."""
    model = lens.load(tiny_ssm(subject.kind))
    _, cache = model.run_with_cache(TOKENS)
    for layer in LAYERS:
        found = mixer_tokens(cache, layer, -1)
        assert found.error < 5e-6
        expected = cache["mixer_out", layer][:, -1]
        error = (found.values.sum(1) + found.constant - expected).abs().max() / expected.abs().max()
        assert error < 1e-5


def test_padding_adds_nothing(subject):
    """And real tokens add what they add without it."""
    model, text = lens.load(tiny_ssm(subject.kind)), random_tokens(1, 5)
    padded = torch.cat([torch.full((1, 3), 28), text], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    _, alone = model.run_with_cache(text)
    _, cache = model.run_with_cache(padded, attention_mask=mask)
    found, expected = mixer_tokens(cache, 1, -1), mixer_tokens(alone, 1, -1)
    torch.testing.assert_close(found.values[:, 3:], expected.values, rtol=1e-4, atol=1e-5)
    assert not found.values[:, :3].any()
    assert found.error < 5e-6


def test_an_edit_inside_shows_in_the_error(subject):
    """The decomposition cannot know of it."""
    edit = ("blocks.1.mixer.hook_y", lambda y, hook: y + 1)
    with subject.model.hooks(fwd_hooks=[edit]):
        _, cache = subject.run()
    assert mixer_tokens(cache, 1, -1).error > 1e-2
    assert mixer_tokens(cache, 0, -1).error < 1e-5


@pytest.mark.parametrize("name", ["mixer.hook_conv", "mixer.hook_ssm_input", "hook_mixer_out", "hook_resid_pre"])
def test_no_edit_passes_for_what_tokens_brought(subject, name):
    """Inside the mixer it shows in the mixer's error, on the stream in that of the logit's."""
    with subject.model.hooks(fwd_hooks=[(f"blocks.1.{name}", lambda value, hook: value.flip(-1) + 0.5)]):
        _, cache = subject.run()
    assert token_attribution(cache, 7).error > 1e-2
    if ".mixer." in f".{name}":
        assert mixer_tokens(cache, 1, -1).error > 1e-2


def test_a_logit_difference_is_attributed_to_layers_and_tokens(subject, run):
    """Everything sums to the golden forward's difference; each part is the projection of the mixer's."""
    with true_float64():
        found = token_attribution(run[1], 3, 5, target=6)
        parts = [mixer_tokens(run[1], layer, 6) for layer in LAYERS]
    expected = (subject.logits[:, 6, 3] - subject.logits[:, 6, 5]).detach()
    torch.testing.assert_close(found.total, expected, rtol=1e-9, atol=1e-10)
    gain, W_U = (subject.hf.state_dict()[name] for name in ("backbone.norm_f.weight", "lm_head.weight"))
    scale = subject.values["ln_final.hook_scale"].detach()[:, 6]
    onto = (W_U[3] - W_U[5]) * gain / scale
    for layer in LAYERS:
        by_hand = torch.einsum("bsd,bd->bs", parts[layer].values, onto)
        torch.testing.assert_close(found.values[layer], by_hand, rtol=1e-9, atol=1e-11)
    embed = (subject.values["hook_embed"].detach()[:, 6] * onto).sum(-1)
    torch.testing.assert_close(found.other, embed, rtol=1e-9, atol=1e-11)
    assert found.layers == (0, 1, 2)
    assert found.error < 1e-12


def test_one_token_for_each_row(subject, run):
    """Ids `[batch]`."""
    with true_float64():
        found = token_attribution(run[1], torch.tensor([3, 7]))
    expected = torch.stack([subject.logits[0, -1, 3], subject.logits[1, -1, 7]]).detach()
    torch.testing.assert_close(found.total, expected, rtol=1e-9, atol=1e-10)


def test_a_cache_without_a_batch_axis(subject):
    """Parts without it; the attribution has a batch of one."""
    _, cache = subject.run(TOKENS[:1])
    with true_float64():
        whole, table = mixer_tokens(cache, 0, -1), token_attribution(cache, 3)
        cache.remove_batch_dim()
        row, again = mixer_tokens(cache, 0, -1), token_attribution(cache, 3)
    torch.testing.assert_close(row.values, whole.values[0])
    torch.testing.assert_close(row.constant, whole.constant[0])
    torch.testing.assert_close(again.values, table.values)
    torch.testing.assert_close(again.total, table.total)


def test_mistakes_are_named(subject, run):
    """What cannot be asked."""
    with pytest.raises(ArgumentError, match="one of 8 positions, an int; got 8"):
        mixer_tokens(run[1], 0, 8)
    with pytest.raises(ArgumentError, match=r"a direction is .*; got \[5\]"):
        mixer_tokens(run[1], 0, 1, project_output_onto=torch.zeros(5))
    _, cache = subject.run(names_filter=["delta", "B", "C", "ssm_input", "conv"])
    with pytest.raises(CacheError, match="blocks.0.mixer.hook_conv_in"):
        mixer_tokens(cache, 0, 1)
    _, other = lens.load(tiny_gpt2()).run_with_cache(TOKENS)
    with pytest.raises(ArgumentError, match="no block of this model has an SSM mixer"):
        token_attribution(other, 3)
