"""Stopped gradients: no bit of a value changes, and what flows is what the formulas with constants say."""

import pytest
import torch
from analysis.ssm_subject import LAYERS, TOKENS, Subject
from golden.tiny_ssm import KINDS
from lens_conformance.float64 import true_float64

from lens_core.analysis.ssm_gradients import FROZEN_PARTS, frozen_share, stop_gradients
from lens_core.errors import ArgumentError

PLACE = {
    "decay": "mixer.hook_decay",
    "delta": "mixer.hook_delta",
    "B": "mixer.hook_B",
    "C": "mixer.hook_C",
    "gate": "mixer.hook_gate",
    "scale": "norm.hook_scale",
}


@pytest.fixture(scope="module", params=KINDS)
def subject(request):
    """Give a tiny model of each kind, its convolution without a bias: then nothing in it is constant."""
    return Subject(request.param, use_conv_bias=False)


def gradient(subject, parts, *, layers=None, names="hook_embed"):
    """Give logits and gradients of a sum of logits at the last position, with parts held still."""
    model = subject.model
    weights = torch.linspace(-1, 1, subject.logits.shape[-1], dtype=torch.float64)
    with true_float64(), model.hooks(fwd_hooks=stop_gradients(model, parts, layers=layers)):
        with model.caching(names, incl_bwd=True) as cache:
            logits = model(TOKENS)
            (logits[:, -1] * weights).sum().backward()
    subject.hf.zero_grad()
    return logits.detach(), cache


def golden_gradient(subject, places, name="hook_embed"):
    """Give the golden forward's gradient with the values at some places taken as constants."""
    weights = torch.linspace(-1, 1, subject.logits.shape[-1], dtype=torch.float64)
    logits, values = subject.golden({place: lambda tensor, hook: tensor.detach() for place in places})
    (logits[:, -1] * weights).sum().backward()
    return values[name].grad


@pytest.mark.parametrize("parts", [*[[part] for part in FROZEN_PARTS], FROZEN_PARTS], ids=str)
def test_no_bit_of_a_value_changes(subject, parts):
    """The logits are those of the plain model."""
    with true_float64():
        plain = subject.model(TOKENS)
    logits, _ = gradient(subject, list(parts))
    assert torch.equal(logits, plain)


@pytest.mark.parametrize("part", list(PLACE))
def test_each_stop_is_a_constant_of_the_formula(subject, part):
    """The gradient at the embeddings is the golden forward's with that value detached, in every layer."""
    _, cache = gradient(subject, [part])
    places = [f"blocks.{layer}.{PLACE[part]}" for layer in LAYERS]
    if part == "scale":
        inner = [f"blocks.{layer}.mixer.inner_norm.hook_scale" for layer in LAYERS]
        places += [*(inner if subject.kind == "mamba2" else ()), "ln_final.hook_scale"]
    expected = golden_gradient(subject, places)
    torch.testing.assert_close(cache.grad["hook_embed"], expected, rtol=1e-8, atol=1e-10)
    plain = golden_gradient(subject, [])
    assert (plain - expected).abs().max() > 1e-6


def test_some_layers_only(subject):
    """The others learn as before."""
    _, cache = gradient(subject, ["delta"], layers=[1])
    expected = golden_gradient(subject, ["blocks.1.mixer.hook_delta"])
    torch.testing.assert_close(cache.grad["hook_embed"], expected, rtol=1e-8, atol=1e-10)


def test_the_activation_passes_gradients_as_its_sigmoid(subject):
    """On the way to the convolution: the gradient at x times sigmoid(v), the slope of SiLU left out."""
    names = [f"blocks.1.mixer.hook_{name}" for name in ("conv_in", "conv", "ssm_input")]
    _, cache = gradient(subject, ["activation", "B", "C"], names=names)
    x = cache.grad[names[2]].flatten(2)
    width = x.shape[-1]
    at_v = x * torch.sigmoid(cache[names[1]][..., :width])
    kernel = subject.own(1, "conv1d.weight")[:width, 0]
    expected = torch.zeros_like(x)
    for t in range(8):
        for k in range(4):
            if t + 3 - k < 8:  # u_t is in v_(t + K - 1 - k) by w_k
                expected[:, t] += at_v[:, t + 3 - k] * kernel[:, k]
    found = cache.grad[names[0]]
    torch.testing.assert_close(found[..., :width], expected, rtol=1e-9, atol=1e-12)
    assert not found[..., width:].any()  # Mamba-2: B and C come from there, and are held still
    assert x.abs().max() > 1e-6


def test_with_all_of_them_input_times_gradient_is_the_output(subject):
    """Exactly: the logits are linear in the embeddings then, and nothing else is added."""
    logits, cache = gradient(subject, FROZEN_PARTS)
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=torch.float64)
    attributed = (cache["hook_embed"] * cache.grad["hook_embed"]).sum((1, 2))
    torch.testing.assert_close(attributed, (logits[:, -1] * weights).sum(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("left", [part for part in FROZEN_PARTS if part != "decay"])
def test_without_any_one_of_them_it_is_not(subject, left):
    """So each is needed; the decay follows from the step size."""
    logits, cache = gradient(
        subject, [part for part in FROZEN_PARTS if part != left and (left, part) != ("delta", "decay")]
    )
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=torch.float64)
    attributed = (cache["hook_embed"] * cache.grad["hook_embed"]).sum((1, 2))
    assert (attributed - (logits[:, -1] * weights).sum(-1)).abs().max() > 1e-6


def test_the_decay_follows_from_the_step_size(subject):
    """With delta held still it is redundant."""
    _, one = gradient(subject, FROZEN_PARTS)
    _, other = gradient(subject, [part for part in FROZEN_PARTS if part != "decay"])
    torch.testing.assert_close(one.grad["hook_embed"], other.grad["hook_embed"], rtol=1e-9, atol=1e-12)


def test_shares_are_quotients_and_zero_at_zero():
    """SiLU(v) over v, also where a mask came between."""
    v = torch.tensor([-2.0, 0.0, 3.0, 5.0])
    x = torch.nn.functional.silu(v) * torch.tensor([1.0, 1.0, 1.0, 0.0])
    expected = torch.sigmoid(v) * torch.tensor([1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(frozen_share(x, v), expected)


def test_mistakes_are_named(subject):
    """Parts are a list of those there are."""
    with pytest.raises(ArgumentError, match="parts are some of decay, delta.*got \\['A'\\]"):
        stop_gradients(subject.model, ["A"])
    with pytest.raises(ArgumentError, match="parts are some of"):
        stop_gradients(subject.model, "gate")


@pytest.mark.parametrize("place", ["conv", "ssm_input"])
@pytest.mark.parametrize("is_stop_first", [True, False])
def test_a_stopped_activation_invents_no_gradient(subject, place, is_stop_first):
    """Where a constant was patched in, at the convolution or after the activation, nothing flows to what it read."""
    name = f"blocks.0.mixer.hook_{place}"
    width = subject.values[name].shape[2:]
    constant = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    patch = [(name, lambda tensor, hook: constant.expand_as(tensor), list(range(8)))]
    stop = stop_gradients(subject.model, ["activation", "B", "C", "delta"], layers=0)
    with true_float64(), subject.model.hooks(fwd_hooks=stop + patch if is_stop_first else patch + stop):
        with subject.model.caching("blocks.0.mixer.hook_conv_in", incl_bwd=True) as cache:
            subject.model(TOKENS)[:, -1, 7].sum().backward()
    subject.hf.zero_grad()
    flowing = cache.grad["blocks.0.mixer.hook_conv_in"]
    flowing = flowing[..., : subject.values["blocks.0.mixer.hook_ssm_input"][0, 0].numel()]  # B and C have their own
    assert not flowing.any()
