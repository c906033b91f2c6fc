"""A model spread over three devices that do not exist: nothing mixes tensors of two, and all is as on one device."""

import copy

import pytest
import torch
from golden.fake_devices import CPU, KIND, FakeDevices, MixedDevicesError, place, spread
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from torch import Tensor

import lens_core as lens
from lens_core.analysis.attribution import attribute_edges, attribute_nodes
from lens_core.analysis.direct import direct_logit_attribution
from lens_core.analysis.logit_lens import logit_lens

FAMILIES = ("gpt2", "llama", "mixtral", "mamba", "mamba2")
TOKENS, CLEAN = random_tokens(), random_tokens(seed=1)


def built(family):
    """Build HF's model; experts run HF's eager way, which does not look at the kind of device."""
    if family.startswith("mamba"):
        return tiny_ssm(family)
    hf = tiny_gpt2() if family == "gpt2" else tiny_llama(family)
    if family == "mixtral":
        hf.set_experts_implementation("eager")
    return hf


@pytest.fixture(params=FAMILIES)
def pair(request):
    """Give a model on one device, and the same one with a block on each of three; the final norm is on the second."""
    plain = lens.load(built(request.param))
    places, other = plain.declaration, copy.deepcopy(plain.hf_model)
    on = {f"{places.blocks}.{layer}": layer for layer in range(3)}
    for name, _ in other.get_submodule(places.base).named_children():
        path = f"{places.base}.{name}"
        if path != places.blocks:
            on[path] = 1 if path == places.norms["ln_final"].path else 0
    on[places.unembed] = 2
    with FakeDevices():
        yield plain, lens.load(spread(other, on))


def here(value):
    """Take a tensor from its device."""
    return place(value, CPU)


def bend(value, hook):
    """Change every finite value."""
    return torch.where(value.isfinite(), value * value * 0.7 + 0.03, value)


def floating(model):
    """List the hook points that hold no ids, starred ones too."""
    return [name for name in model.table if not model.table[name].dtype.startswith("int")]


def same(found, expected):
    """Compare results of both models: tensors, or what holds some."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(here(found), expected)


@pytest.mark.filterwarnings("ignore::lens_core.errors.CostWarning")
@torch.no_grad()
def test_values_are_where_they_are_computed_and_the_same(pair):
    """Every hook point, starred ones too, bit for bit; a block's insides are on its device."""
    plain, spread_out = pair
    logits, expected = plain.run_with_cache(TOKENS, names_filter=list(plain.table))
    found, cache = spread_out.run_with_cache(TOKENS, names_filter=list(plain.table))
    assert torch.equal(here(found), logits)
    assert [name for name in expected if not torch.equal(here(cache[name]), expected[name])] == []
    assert cache["blocks.2.hook_resid_post"].device == torch.device(KIND, 2)
    assert cache["ln_final.hook_scale"].device == torch.device(KIND, 1)


@torch.no_grad()
def test_edits_are_the_same(pair):
    """Each place of the last block, where three devices meet, and of the ends."""
    plain, spread_out = pair
    for name in floating(plain):
        if not name.startswith(("blocks.0", "blocks.1")):
            expected = plain.run_with_hooks(TOKENS, fwd_hooks=[(name, bend)])
            assert torch.equal(here(spread_out.run_with_hooks(TOKENS, fwd_hooks=[(name, bend)])), expected), name


def test_gradients_are_the_same(pair):
    """At every hook point, bit for bit."""
    grads = []
    for model in pair:
        with model.caching(floating(model), detach=False) as cache:
            (model(TOKENS)[:, -1] ** 2).sum().backward()
        grads.append(cache.grad)
    assert len(grads[0]) == len(floating(pair[0]))
    assert [name for name in grads[0] if not torch.equal(here(grads[1][name]), grads[0][name])] == []


@torch.no_grad()
def test_generation_partial_runs_and_states_are_the_same(pair):
    """Greedy decoding under a hook with a cache of its steps, a start and a stop, and a state that is forked."""
    found = []
    for model in pair:
        with model.hooks([("blocks.1.hook_resid_pre", bend)]), model.caching("resid_post") as cache:
            text = model.generate(TOKENS, max_new_tokens=4, do_sample=False, return_type="tokens")
        rest = model(model(TOKENS, stop_at_layer=2), start_at_layer=2)
        _, state = model(TOKENS[:, :4], return_state=True)
        more = model(TOKENS[:, 4:].repeat_interleave(2, 0), past_key_values=state.fork(2))
        found.append([text, cache["resid_post", 2], rest, more])
    for one, other in zip(*found, strict=True):
        same(other, one)


@torch.no_grad()
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_patching_sweeps_are_the_same(pair, exact):
    """By each engine: the residual stream, attention's output or the mixer's, and single heads."""
    plain, _ = pair
    names = ["resid_pre", "hook_resid_post", "z" if plain.cfg.n_heads and "W_Q" in plain.weight_names else "mixer_out"]
    for name in names:
        found = []
        for model in pair:
            _, clean = model.run_with_cache(CLEAN, names_filter=name)
            result = lens.patching.patch_sweep(
                model, TOKENS, clean, lambda logits: logits[:, -1, 3], name, positions=-1, exact=exact
            )
            found.append(result)
        assert found[0].engine == found[1].engine
        same(found[1].values, found[0].values)


@torch.no_grad()
def test_the_algebra_of_caches_is_the_same(pair):
    """Sums and stacks over layers, logits of components, and what an answer is made of."""
    found = []
    for model in pair:
        _, cache = model.run_with_cache(TOKENS)
        stack = cache.accumulated_resid()
        each = [stack, cache.decompose_resid(), cache.apply_ln_to_stack(stack), cache.logit_attrs(stack, 3)]
        each += [cache.get_full_resid_decomposition(expand_neurons=False)]
        each += [direct_logit_attribution(cache, answer_tokens=[3, 4]).values, model.accumulated_bias(None)]
        read = logit_lens(model, TOKENS, targets=[3, 4])
        found.append(
            [
                *each,
                read.kl,
                read.entropy,
                *(
                    model.stacked_weight(v.name)[1] if v.per_layer else model.weight(v.name)
                    for v in model.declaration.weights
                ),
            ]
        )
    assert len(found[0]) > 15
    for one, other in zip(*found, strict=True):
        same(other, one)


def test_attribution_is_the_same(pair):
    """Of nodes, and of edges, which multiply values and gradients of different blocks."""
    found = []
    for model in pair:
        nodes = attribute_nodes(model, CLEAN, TOKENS, lambda logits: logits[:, -1, 3], names="resid_pre")
        edges = attribute_edges(model, CLEAN, TOKENS, lambda logits: logits[:, -1, 3])
        found.append(
            [nodes.stacked("hook_resid_pre"), torch.tensor([float(value) for _, value in edges.top_edges(20)])]
        )
    for one, other in zip(*found, strict=True):
        same(other, one)


def test_a_mixture_of_devices_is_noticed():
    """The test's own devices: what CUDA refuses they refuse, and what it takes they take."""
    with FakeDevices():
        a, b = (torch.arange(3.0, device=f"{KIND}:{number}") for number in range(2))
        for mixed in (lambda: a + b, lambda: torch.stack([a, b]), lambda: a @ torch.ones(3), lambda: torch.equal(a, b)):
            with pytest.raises(MixedDevicesError):
                mixed()
        assert (a + torch.tensor(1.0)).device == a.device
        assert a[torch.tensor([0, 2])].device == a.device
        assert (a.to(b.device) + b).device == b.device
        assert a.cpu().device == CPU
