"""Knockouts of each kind against golden forwards with the sums taken out by hand."""

import pytest
import torch
from analysis.ssm_subject import TOKENS, Subject, attention_of
from golden.tiny import tiny_gpt2
from golden.tiny_ssm import KINDS
from lens_conformance.float64 import true_float64
from torch import Tensor

import lens_core as lens
from lens_core.analysis.ssm_knockout import knockout
from lens_core.errors import ArgumentError, UnsupportedHookError


@pytest.fixture(scope="module", params=KINDS)
def subject(request):
    """Give a tiny model of each kind."""
    return Subject(request.param)


def removed(subject, values, layer, pairs, heads=None) -> Tensor:
    """Sum alpha[t, s] x_s over the pairs (t, s), in the shape of y; other heads and targets are zero."""
    at = f"blocks.{layer}.mixer.hook_"
    attention = attention_of(values, subject.own(layer, "A_log"), layer, subject.kind)
    x = values[at + "ssm_input"].detach()
    gone = torch.zeros_like(values[at + "y"])
    for t, s in pairs:
        for head in range(x.shape[2]) if heads is None else heads:
            flow = attention[:, head, t, s]
            gone[:, t, head] += (flow if x.ndim == 3 else flow[:, None]) * x[:, s, head]
    return gone.detach()


def close(found: Tensor, expected: Tensor) -> None:
    """Compare logits, float64."""
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-10)


def test_attention_from_one_source_to_one_target_is_gone(subject):
    """In one layer: at the target, what alpha says; nothing at other positions."""
    name = "blocks.1.mixer.hook_y"
    gone = removed(subject, subject.values, 1, [(6, 2)])
    expected, _ = subject.golden({name: lambda y, hook: y - gone})
    found = subject.hooked(knockout(subject.model, "attention", 2, 6, layers=1))
    close(found, expected)
    assert (found[:, 6] - subject.logits[:, 6]).abs().max() > 1e-3
    assert torch.equal(found[:, :6], subject.hooked([])[:, :6])


def test_sets_of_sources_targets_and_heads(subject):
    """The product of the sets, a source being its own target too; negative positions count from the end."""
    pairs = [(t, s) for t in (3, 5, 7) for s in (1, 3) if s <= t]
    gone = removed(subject, subject.values, 1, pairs, heads=[0, 2])
    expected, _ = subject.golden({"blocks.1.mixer.hook_y": lambda y, hook: y - gone})
    entries = knockout(subject.model, "attention", [1, -5], [3, 5, -1], layers=[1], heads=[0, 2])
    close(subject.hooked(entries), expected)


def test_later_layers_are_cut_by_their_own_attention_of_that_run(subject):
    """Layer 2 reads what layer 0 was left with."""
    first = removed(subject, subject.values, 0, [(6, 2)])
    edits = {"blocks.0.mixer.hook_y": lambda y, hook: y - first}
    _, values = subject.golden(edits)
    second = removed(subject, values, 2, [(6, 2)])
    stale = removed(subject, subject.values, 2, [(6, 2)])
    assert (second - stale).abs().max() > 1e-6
    expected, _ = subject.golden({**edits, "blocks.2.mixer.hook_y": lambda y, hook: y - second})
    close(subject.hooked(knockout(subject.model, "attention", 2, 6, layers=[0, -1])), expected)


def test_edits_of_the_same_run_count(subject):
    """A decay that was edited is what the knockout runs on."""
    name = "blocks.1.mixer.hook_decay"
    forget = (name, lambda decay, hook: decay * 0, 4)
    with_both = subject.hooked([forget, *knockout(subject.model, "attention", 2, 6, layers=1)])
    with true_float64():
        assert torch.equal(with_both, subject.hooked([forget]))  # nothing of 2 is left to knock out


def test_a_write_is_zero_for_every_later_target(subject):
    """And the state decays as it did."""

    def nothing(write, hook):
        write[:, 2] = 0

    expected, _ = subject.golden({"blocks.1.mixer.hook_ssm_write": nothing})
    found = subject.hooked(knockout(subject.model, "write", 2, layers=1))
    close(found, expected)
    assert (found[:, -1] - subject.logits[:, -1]).abs().max() > 1e-6


def test_a_step_of_zero_neither_writes_nor_decays(subject):
    """In some channels or heads, at several positions."""

    def nothing(delta, hook):
        delta[:, [2, 7], 1] = 0

    expected, _ = subject.golden({"blocks.1.mixer.hook_delta": nothing})
    close(subject.hooked(knockout(subject.model, "delta", [2, -1], layers=1, heads=1)), expected)


def test_writes_of_some_heads(subject):
    """Only those."""

    def nothing(write, hook):
        write[:, 2, [0, 3]] = 0

    expected, _ = subject.golden({"blocks.0.mixer.hook_ssm_write": nothing})
    close(subject.hooked(knockout(subject.model, "write", slice(2, 3), layers=0, heads=[0, 3])), expected)


def test_the_kinds_differ_as_they_say(subject):
    """Attention for all targets is the write, in outputs; the step size is another thing."""
    every = subject.hooked(knockout(subject.model, "attention", [1, 2]))
    write = subject.hooked(knockout(subject.model, "write", [1, 2]))
    delta = subject.hooked(knockout(subject.model, "delta", [1, 2]))
    close(every, write)
    assert (write - delta).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["attention", "write", "delta"])
def test_a_knockout_in_the_prompt_holds_while_decoding(subject, kind):
    """Step by step as in one run of the whole."""
    model, sources = subject.model, [1, 2]
    targets = [6, 9, 10] if kind == "attention" else None
    entries = knockout(model, kind, sources, targets)
    with true_float64(), model.hooks(fwd_hooks=entries), model.caching("hook_logits") as cache:
        tokens = model.generate(TOKENS, max_new_tokens=4, do_sample=False, return_type="tokens", verbose=False)
    found = cache["hook_logits"]
    whole = subject.hooked(knockout(model, kind, sources, targets), tokens[:, : found.shape[1]])
    plain = subject.hooked([], tokens[:, : found.shape[1]])
    assert found.shape[1] == 11
    torch.testing.assert_close(found, whole, rtol=1e-7, atol=1e-8)
    assert (whole[:, 10] - plain[:, 10]).abs().max() > 1e-6


def test_entries_serve_one_run_after_another(subject):
    """Nothing of the last sequence is left in them."""
    entries = knockout(subject.model, "attention", 2, -1)
    first = subject.hooked(entries)
    subject.hooked(entries, TOKENS.flip(1))
    assert torch.equal(subject.hooked(entries), first)


def test_a_sequence_that_began_without_the_knockout_is_refused(subject):
    """What the source wrote is unknown then."""
    model, entries = subject.model, knockout(subject.model, "attention", 2, -1)
    with true_float64():
        _, state = model(TOKENS, return_state=True)
        with pytest.raises(UnsupportedHookError, match="saw 0 positions.*from its beginning"):
            model.run_with_hooks(TOKENS[:, :1], fwd_hooks=entries, past_key_values=state)
        with model.hooks(fwd_hooks=entries):  # with the knockout from the beginning it goes on
            _, state = model(TOKENS[:, :7], return_state=True)
            found = model(TOKENS[:, 7:], past_key_values=state)
    # -1 is the last position of each call
    close(found[:, -1], subject.hooked(knockout(model, "attention", 2, [6, 7]))[:, -1])


def test_the_gradient_goes_through_what_is_left(subject):
    """As in the golden forward with the same sum taken out."""
    entries = knockout(subject.model, "attention", 2, 7, layers=1)
    with true_float64(), subject.model.hooks(fwd_hooks=entries):
        loss, cache = subject.model.run_with_cache(TOKENS, names_filter="hook_embed", return_type="loss", incl_bwd=True)
    assert loss.isfinite()
    assert cache.grad["hook_embed"].isfinite().all()
    with true_float64():
        _, plain = subject.model.run_with_cache(TOKENS, names_filter="hook_embed", return_type="loss", incl_bwd=True)
    assert torch.equal(cache.grad["hook_embed"][:, -1], plain.grad["hook_embed"][:, -1])  # the last has no target
    subject.hf.zero_grad()


def test_mistakes_are_named(subject):
    """What cannot be asked."""
    model = subject.model
    with pytest.raises(ArgumentError, match="'attention', 'write' or 'delta'; got 'all'"):
        knockout(model, "all", 1)
    with pytest.raises(ArgumentError, match="every later target"):
        knockout(model, "write", 1, 2)
    with pytest.raises(ArgumentError, match="give the sources"):
        knockout(model, "write", None)
    with pytest.raises(ArgumentError, match="from 0 to 2; got 5"):
        knockout(model, "write", 1, layers=5)
    with pytest.raises(ArgumentError, match="no channel or head 99"):
        subject.hooked(knockout(model, "delta", 1, heads=99))
    with pytest.raises(ArgumentError, match="no block of this model has an SSM mixer"):
        knockout(lens.load(tiny_gpt2()), "write", 1)
