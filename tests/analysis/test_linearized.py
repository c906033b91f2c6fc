"""Stopped gradients: no bit of a value changes, and what is left of the model is linear, in float64."""

import pytest
import torch
from analysis.attribution_subject import CLEAN, CORRUPTED, change_of, heard, in_float64, shared
from golden.tiny_llama import tiny_llama
from lens_conformance.float64 import true_float64
from torch import nn

import lens_core as lens
from lens_core.analysis.attribution import attribute_edges, attribute_nodes
from lens_core.analysis.gradients import linearized
from lens_core.analysis.graph import graph
from lens_core.errors import ArgumentError, UnsupportedHookError

TYPES = ("gpt2", "gemma3_text", "stablelm-parallel", "mamba2", "falcon_h1")
PARTS = ("pattern", "norm_scale", "gate", "ssm_transition", "activation")


@pytest.fixture(autouse=True)
def _float64():
    with true_float64():
        yield


@pytest.fixture(scope="module", params=TYPES)
def model(request):
    """Give a tiny model of each type in float64, biases in all that has some."""
    return shared(request.param)


def metric(logits):
    """Give a linear function of the last logits."""
    return (logits[:, -1] * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)).sum(-1)


def biases(model):
    """Give the parameters that are added, as against multiplied."""
    found = {
        name: parameter
        for name, parameter in model.hf_model.named_parameters()
        if name.endswith(("bias", "dt_bias")) and "norm" not in name.split(".")[-1]
    }
    assert all(parameter.ndim == 1 for parameter in found.values())
    return found


def decomposed(model, entries, sources=("hook_embed",)):
    """Give the metric's sum, and the sum of value times gradient over the sources and the biases."""
    names = [name for name in ("hook_pos_embed", *sources) if name in model.table] or list(sources)
    names = list(dict.fromkeys([*names, *sources]))
    with model.hooks(entries), model.caching(names, detach=False) as cache:
        value = metric(model(CLEAN)).sum()
        value.backward()
    total = sum((cache[name] * cache.grad[name]).sum() for name in names)
    for parameter in biases(model).values():
        if parameter.grad is not None:
            total = total + (parameter * parameter.grad).sum()
    model.zero_grad()
    return value.detach(), total.detach()


def test_all_held_still_value_times_gradient_is_the_metric(model):
    """Over the embeddings and every bias there is, in every family: nothing is lost or counted twice."""
    value, total = decomposed(model, linearized(model))
    torch.testing.assert_close(total, value, rtol=1e-9, atol=1e-9)


def test_no_bit_of_a_value_changes(model):
    """The logits are the model's own."""
    plain = model(CLEAN)
    assert torch.equal(model.run_with_hooks(CLEAN, fwd_hooks=linearized(model)), plain)
    assert torch.equal(model.run_with_hooks(CLEAN, fwd_hooks=linearized(model, mlp_out=True)), plain)


def test_each_part_is_needed(model):
    """With any one of them live, the sum is another, wherever the model has such a part."""
    whole = {name for name, _ in linearized(model)}
    for part in PARTS:
        entries = linearized(model, **{part: False})
        if {name for name, _ in entries} != whole:  # else there is nothing of the kind: patterns of Mamba
            value, total = decomposed(model, entries)
            assert (total - value).abs() > 1e-6, part


def test_where_mlps_are_sources_they_count_and_what_they_read_does_not(model):
    """Their outputs take part in the sum; through them nothing flows."""
    sources = [name for name in model.table if name.endswith("hook_mlp_out")]
    readers = [name.replace("mlp_out", "mlp_in") for name in sources]
    held = linearized(model, mlp_out=True)
    with model.hooks(held), model.caching(["hook_embed", *readers], incl_bwd=True) as cache:
        metric(model(CLEAN)).sum().backward()
    model.zero_grad()
    assert not any(cache.grad[name].any() for name in readers)
    assert cache.grad["hook_embed"].any()
    value, total = decomposed(model, held, ("hook_embed", *sources))
    torch.testing.assert_close(total, value, rtol=1e-9, atol=1e-9)


def test_attribution_in_such_a_block_adds_up_to_the_metric():
    """From zero, over the embeddings and the MLPs as sources: this model has no biases."""
    model = in_float64("llama")
    with model.hooks(linearized(model, mlp_out=True)):
        found = attribute_nodes(model, CLEAN, None, metric, names=["hook_embed", "mlp_out"], baseline="zero")
    total = sum(value.sum(1) for value in found.values.values())
    torch.testing.assert_close(total, metric(model(CLEAN)).detach(), rtol=1e-9, atol=1e-9)
    live = attribute_nodes(model, CLEAN, None, metric, names=["hook_embed", "mlp_out"], baseline="zero")
    assert not torch.allclose(sum(value.sum(1) for value in live.values.values()), total, rtol=1e-3)


class Gain(nn.Module):
    """A norm that does not norm."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)

    def forward(self, x):
        """Multiply and add."""
        return x * self.weight if self.bias is None else x * self.weight + self.bias


def linear(name):
    """Build a model that is linear: without norms' scales, activation functions or products with gates."""
    model = in_float64(name, **({"n_layer": 2} if name == "gpt2" else {"num_hidden_layers": 2}))
    for norm in [module for module in model.hf_model.modules() if "Norm" in type(module).__name__]:
        for parent in model.hf_model.modules():
            for own, child in list(parent.named_children()):
                if child is norm:
                    setattr(parent, own, Gain(norm))
    for block in model.hf_model.transformer.h if name == "gpt2" else ():
        block.mlp.act = nn.Identity()
    return model


def constant(model):
    """Hold the patterns of one run in every run, and leave out MLPs that have gates."""
    held = [name for name in model.table if name.endswith("hook_pattern")]
    _, cache = model.run_with_cache(CLEAN.flip(1), names_filter=held)
    entries = [(held, lens.edits.replace({name: cache[name].detach() for name in held}))]
    return [*entries, ("mlp_out", lens.edits.zero())] if model.cfg.gated_mlp else entries


@pytest.mark.parametrize("name", ["gpt2", "llama-biases"])
def test_where_the_model_is_linear_attribution_is_patching(name):
    """Every edge, and every head at every position, patched one by one in runs of a model with constant factors."""
    model = linear(name)
    own = graph(model)
    with model.hooks(constant(model)):
        edges = attribute_edges(model, CLEAN, CORRUPTED, metric, graph=own)
        nodes = attribute_nodes(model, CLEAN, CORRUPTED, metric, names=("z", 0))
        with torch.no_grad():
            delta, logits = change_of(model, own), model(CORRUPTED)
            _, clean = model.run_with_cache(CLEAN, names_filter=("z", 0))
            for edge in own.edges:
                writer, reader = own.writers.index(edge.source), own.readers.index(edge.target)
                patched = model.run_with_hooks(CORRUPTED, fwd_hooks=[heard(edge.target, delta[writer])])
                exact = metric(patched) - metric(logits)
                torch.testing.assert_close(edges.values[:, writer, reader], exact, rtol=1e-8, atol=1e-8)
            for pos, head in torch.ones(5, model.cfg.n_heads).nonzero().tolist():
                entry = (("z", 0), lens.edits.replace(clean, heads=head, pos=pos))
                exact = metric(model.run_with_hooks(CORRUPTED, fwd_hooks=[entry])) - metric(logits)
                found = nodes.values["blocks.0.attn.hook_z"][:, pos, head]
                torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)
    # Queries and keys do nothing there; values and what follows do.
    reads = torch.tensor([reader.part in ("q", "k") for reader in own.readers])
    assert not edges.values[:, :, reads].any()
    assert edges.values[:, :, ~reads].abs().max() > 0.1


def test_reading_gradients_of_single_heads_changes_none_of_the_streams(model):
    """A head's own copy goes through the norm apart from the others; its scale is held still there too."""
    readers = [n for n in graph(model).reader_names if "resid" not in n]
    with model.hooks(linearized(model)):
        with model.caching("hook_embed", incl_bwd=True) as alone:
            metric(model(CLEAN)).sum().backward()
        with model.caching(["hook_embed", *readers], incl_bwd=True) as beside:
            metric(model(CLEAN)).sum().backward()
    model.zero_grad()
    torch.testing.assert_close(beside.grad["hook_embed"], alone.grad["hook_embed"], rtol=1e-9, atol=1e-10)


def test_edges_of_the_linear_model_sum_to_its_nodes(model):
    """The edges' gradients are those of the model with its factors held still, too."""
    own = graph(model, heads=False)
    names = [name for name in own.writer_names if not name.endswith("scale")]
    with model.hooks(linearized(model)):
        edges = attribute_edges(model, CLEAN, CORRUPTED, metric, graph=own)
        nodes = attribute_nodes(model, CLEAN, CORRUPTED, metric, names=names)
    for writer, value in zip(own.writers, edges.node_values.T, strict=True):
        torch.testing.assert_close(value, nodes.values[writer.hook].sum(1), rtol=1e-9, atol=1e-9)


def test_an_edited_activation_is_not_made_linear():
    """Where a constant was put after the activation function, nothing flows to what it read."""
    model = in_float64("gpt2")
    name = "blocks.0.mlp.hook_post"
    patch = (name, lambda value, hook: torch.full_like(value, 0.3))
    with model.hooks([*linearized(model), patch]), model.caching("blocks.0.mlp.hook_in", incl_bwd=True) as cache:
        metric(model(CLEAN)).sum().backward()
    model.zero_grad()
    assert not cache.grad["blocks.0.mlp.hook_in"].any()


def test_some_layers_only():
    """The others, and the final norm, stay live."""
    names = [name for name, _ in linearized(in_float64("gpt2"), layers=-1)]
    assert all(name.startswith("blocks.2.") for name in names)
    assert "ln_final.hook_scale" in [name for name, _ in linearized(in_float64("gpt2"))]


def test_what_cannot_be_linear_is_refused():
    """Experts, activation functions with parameters, layers that are not there."""
    experts = in_float64("mixtral")
    with pytest.raises(UnsupportedHookError, match=r"block 0 has experts.*mlp_out=True"):
        linearized(experts)
    held = linearized(experts, mlp_out=True)
    sources = [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]
    value, total = decomposed(experts, held, ("hook_embed", *sources))
    torch.testing.assert_close(total, value, rtol=1e-9, atol=1e-9)
    with pytest.raises(UnsupportedHookError, match=r"'xielu' has parameters"):
        linearized(lens.load(tiny_llama("apertus")))
    with pytest.raises(ArgumentError, match=r"a layer is an int from -3 to 2; got 3"):
        linearized(experts, layers=[3], mlp_out=True)
