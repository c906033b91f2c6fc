"""The residual stream taken apart: every decomposition sums to the stream, every attribution to the logits."""

import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from lens_conformance.edits import edit_at

import lens_core as lens
from lens_core._declaration import Declaration, LensConfig, NormPlace
from lens_core._norms import NormKind
from lens_core.cache import ActivationCache
from lens_core.errors import ArgumentError, CacheError, TokenIdError, TokenizerError, UnknownHookError
from lens_core.hook_points import HookPoint, HookTable

N_LAYERS, N_HEADS, D_MLP, D_MODEL, BATCH, POS = 3, 3, 37, 21, 2, 5
HEADS = [f"L{layer}H{head}" for layer in range(N_LAYERS) for head in range(N_HEADS)]
NEURONS = [f"L{layer}N{neuron}" for layer in range(N_LAYERS) for neuron in range(D_MLP)]
PLACES = [(layer, False) for layer in (0, 1, 2, 3, None, -1)] + [(layer, True) for layer in (0, 1, 2)]


@pytest.fixture(scope="module")
def model():
    """Give a tiny GPT-2 in float64, so that a mistake of 1e-10 shows."""
    return lens.load(tiny_gpt2(dtype=torch.float64), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def ran(model):
    """Give the logits and the default cache of one run."""
    return run(model)


def run(model, *, edits=(), tokens=None, **options):
    """Run without a graph, perhaps with edits."""
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, edit_at(name)) for name in edits]):
        return model.run_with_cache(random_tokens(BATCH, POS) if tokens is None else tokens, **options)


def stream_at(cache, layer, mlp_input=False):
    """Read what enters a block, its MLP, or the final norm."""
    if layer in (None, -1, N_LAYERS):
        return cache["resid_post", -1]
    return cache["resid_mid" if mlp_input else "resid_pre", layer]


def normalized_at(cache, layer, mlp_input=False):
    """Read the normalized value of the norm that reads that stream."""
    if layer in (None, -1, N_LAYERS):
        return cache["ln_final.hook_normalized"]
    return cache["normalized", layer, "ln2" if mlp_input else "ln1"]


def close(ours, expected, tolerance=1e-10):
    """Compare to a tolerance relative to the largest value."""
    torch.testing.assert_close(ours, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


# ---------------------------------------------------------------------- sums


@pytest.mark.parametrize(("layer", "mlp_input"), PLACES)
def test_embeddings_and_parts_sum_to_the_stream(ran, layer, mlp_input):
    """decompose_resid sums to what enters the layer, and normalised to what its norm makes of it."""
    _, cache = ran
    parts, labels = cache.decompose_resid(layer, mlp_input, return_labels=True)
    last = N_LAYERS if layer in (None, -1) else layer
    names = ["embed", "pos_embed", *(f"{at}_{part}_out" for at in range(last) for part in ("attn", "mlp"))]
    assert labels == names + [f"{last}_attn_out"] * mlp_input
    assert parts.shape == (len(labels), BATCH, POS, D_MODEL)
    close(parts.sum(0), stream_at(cache, layer, mlp_input))
    normal = cache.decompose_resid(layer, mlp_input, apply_ln=True)
    close(normal.sum(0), normalized_at(cache, layer, mlp_input))


@pytest.mark.parametrize("expand_neurons", [True, False])
@pytest.mark.parametrize(("layer", "mlp_input"), PLACES)
def test_everything_sums_to_the_stream(ran, layer, mlp_input, expand_neurons):
    """Heads, neurons, embeddings and output biases sum to what enters the layer, and normalised likewise."""
    _, cache = ran
    options = {"layer": layer, "mlp_input": mlp_input, "expand_neurons": expand_neurons}
    parts, labels = cache.get_full_resid_decomposition(**options, return_labels=True)
    last = N_LAYERS if layer in (None, -1) else layer
    heads = HEADS[: (last + mlp_input) * N_HEADS]
    middle = NEURONS[: last * D_MLP] if expand_neurons else [f"{at}_mlp_out" for at in range(last)]
    assert labels == [*heads, *middle, "embed", "pos_embed", "bias"]
    assert parts.shape == (len(labels), BATCH, POS, D_MODEL)
    close(parts.sum(0), stream_at(cache, layer, mlp_input))
    close(cache.get_full_resid_decomposition(**options, apply_ln=True).sum(0), normalized_at(cache, layer, mlp_input))


def test_float32_sums_to_float32(model):
    """In single precision the sums are right to single precision."""
    single = lens.load(tiny_gpt2(), tokenizer=tiny_tokenizer())
    logits, cache = run(single)
    for parts in (
        cache.decompose_resid(),
        cache.get_full_resid_decomposition(),
        cache.stack_head_results(incl_remainder=True),
    ):
        assert parts.dtype == torch.float32
        close(parts.sum(0), cache["resid_post", -1], 1e-6)
        attributions, bias = cache.logit_attrs(parts, 3, 7, return_bias=True)
        close(attributions.sum(0) + bias, logits[..., 3] - logits[..., 7], 1e-5)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_slice_and_projection_is_that_of_the_whole(ran, data):
    """Positions, directions and the norm commute with decomposing, at any layer, in any combination."""
    _, cache = ran
    layer = data.draw(st.integers(0, N_LAYERS))
    mlp_input = data.draw(st.booleans()) if layer < N_LAYERS else False
    pos_slice = data.draw(
        st.sampled_from(
            [None, -1, 2, slice(1, 4), slice(None, None, 2), slice(None, None, -1), [4, 0], torch.tensor([3])]
        )
    )
    apply_ln, remainder = data.draw(st.booleans()), data.draw(st.booleans())
    width = data.draw(st.sampled_from([None, 0, 1, 4]))
    seeded = torch.Generator().manual_seed(0)
    onto = None
    if width is not None:
        onto = torch.randn([D_MODEL, width] if width else [D_MODEL], generator=seeded, dtype=torch.float64)
    method = data.draw(st.sampled_from(["heads", "neurons", "full"]))
    common = {"layer": layer, "apply_ln": apply_ln, "return_labels": True, "incl_remainder": remainder}
    if method == "heads":
        mlp_input, function = False, cache.stack_head_results
    else:
        function = cache.stack_neuron_results if method == "neurons" else cache.get_full_resid_decomposition
        common["mlp_input"] = mlp_input
    whole, labels = function(**common)
    part, same_labels = function(**common, pos_slice=pos_slice, project_output_onto=onto)
    assert part.shape[0] == len(labels) == len(same_labels)
    assert labels == same_labels
    positions = range(POS)
    if pos_slice is not None:
        positions = positions[pos_slice] if isinstance(pos_slice, slice) else torch.as_tensor(pos_slice).reshape(-1)
    index = torch.as_tensor(positions)
    expected = whole[:, :, index]
    expected = expected if onto is None else expected @ onto
    expected = expected[:, :, 0] if isinstance(pos_slice, int) else expected
    assert part.shape == expected.shape
    if len(part):
        close(part, expected)
    if remainder:
        target = (normalized_at if apply_ln else stream_at)(cache, layer, mlp_input)[:, index]
        target = target if onto is None else target @ onto
        close(part.sum(0), target[:, 0] if isinstance(pos_slice, int) else target)


@pytest.mark.parametrize(
    ("edited", "sums"),
    [
        (("hook_embed", "blocks.0.attn.hook_pattern", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"), "all"),
        (("blocks.1.hook_attn_out", "blocks.2.hook_mlp_out"), "parts"),
        (("blocks.1.hook_resid_mid", "blocks.2.hook_resid_pre"), "remainder"),
    ],
)
def test_an_edited_run_is_decomposed_as_it_ran(model, edited, sums):
    """Cached values of the run count; what an edit adds beyond the parts is in the remainder, and only there."""
    logits, cache = run(model, edits=edited)
    target = cache["resid_post", -1]
    assert not torch.allclose(target, run(model)[1]["resid_post", -1])
    full, parts = cache.get_full_resid_decomposition, cache.decompose_resid
    for function, is_exact in ((full, sums == "all"), (parts, sums != "remainder")):
        stack = function()
        off = float((stack.sum(0) - target).abs().max() / target.abs().max())
        assert (off < 1e-10) is is_exact
        stack, labels = function(incl_remainder=True, return_labels=True)
        assert labels[-1] == "remainder"
        close(stack.sum(0), target)
        attributions, bias = cache.logit_attrs(stack, 3, 7, return_bias=True)
        close(attributions.sum(0) + bias, logits[..., 3] - logits[..., 7])
        if is_exact:
            assert float(stack[-1].abs().max()) < 1e-10 * float(target.abs().max())


def test_a_padded_batch_sums_at_every_position(model):
    """Padding changes nothing: positions are columns."""
    tokens, mask = random_tokens(BATCH, POS), torch.ones(BATCH, POS, dtype=torch.long)
    mask[0, :2] = 0
    _, cache = run(model, tokens=tokens, attention_mask=mask)
    close(cache.get_full_resid_decomposition().sum(0), cache["resid_post", -1])


def test_without_a_batch_axis_everything_works(model):
    """After remove_batch_dim, and in one row of a batch, results are those of the row."""
    tokens = random_tokens(BATCH, POS)
    _, cache = run(model, tokens=tokens)
    _, alone = run(model, tokens=tokens[1:], remove_batch_dim=True)
    row = cache.apply_slice_to_batch_dim(1)
    for name, options in (
        ("accumulated_resid", {"apply_ln": True, "incl_mid": True}),
        ("accumulated_resid", {"layer": 1, "apply_ln": True}),
        ("decompose_resid", {"apply_ln": True, "pos_slice": -1}),
        ("stack_head_results", {"incl_remainder": True, "pos_slice": [0, 2]}),
        ("stack_neuron_results", {"apply_ln": True, "neuron_slice": 5}),
        ("get_full_resid_decomposition", {"apply_ln": True}),
        ("get_neuron_results", {"layer": 1}),
        ("stack_activation", {"activation_name": "z"}),
    ):
        expected = getattr(cache, name)(**options)
        expected = expected[1] if name == "get_neuron_results" else expected[:, 1]
        close(getattr(row, name)(**options), expected)
        close(getattr(alone, name)(**options), expected)
    expected = cache.logit_attrs(cache.decompose_resid(), 3, 7)[:, 1]
    for one in (row, alone):
        close(one.logit_attrs(one.decompose_resid(), 3, 7), expected)
        close(one.logit_attrs(one.decompose_resid(), torch.tensor([3] * POS), 7, has_batch_dim=False), expected)
        close(one.logit_attrs(one.decompose_resid(pos_slice=-1), 3, 7, pos_slice=-1), expected[:, -1])


# ---------------------------------------------------------------------- the stream itself


@pytest.mark.parametrize("layer", [0, 1, 2, 3, None, -1])
@pytest.mark.parametrize("incl_mid", [True, False])
def test_accumulated_streams_are_the_cached_ones(ran, layer, incl_mid):
    """Labels tell which; the entries are the cached bits."""
    _, cache = ran
    last = N_LAYERS if layer in (None, -1) else layer
    stack, labels = cache.accumulated_resid(layer, incl_mid=incl_mid, return_labels=True)
    expected = [f"{at}_{part}" for at in range(last) for part in (("pre", "mid") if incl_mid else ("pre",))]
    assert labels == [*expected, "final_post" if last == N_LAYERS else f"{last}_pre"]
    for label, entry in zip(labels, stack, strict=True):
        at, part = label.split("_")
        assert torch.equal(entry, cache["resid_post", -1] if at == "final" else cache[f"resid_{part}", int(at)]), label
    if last < N_LAYERS:
        with_mid, labels = cache.accumulated_resid(layer, incl_mid=incl_mid, mlp_input=True, return_labels=True)
        assert labels[-1] == f"{last}_mid"
        assert torch.equal(with_mid[-1], cache["resid_mid", last])
    assert torch.equal(cache.accumulated_resid(layer, pos_slice=-2), cache.accumulated_resid(layer)[:, :, -2])


def test_the_normalised_stream_is_the_logit_lens(model, ran):
    """At the end each entry goes through the whole final norm; earlier, through the layer's scale."""
    logits, cache = ran
    lens_logits = cache.accumulated_resid(apply_ln=True) @ model.W_U.detach()
    close(lens_logits[-1], logits)
    with torch.no_grad():
        close(lens_logits[1], model.unembed(model.ln_final(cache["resid_pre", 1])))
    close(cache.accumulated_resid(2, apply_ln=True)[-1], cache["normalized", 2, "ln1"])
    middle = cache.accumulated_resid(2, apply_ln=True, mlp_input=True, pos_slice=1)
    close(middle[-1], cache["normalized", 2, "ln2"][:, 1])
    assert not lens_logits.requires_grad


def test_recomputed_norms_are_the_norms_of_each_entry(ran):
    """recompute_ln applies gain and bias on each entry's own statistics, at any layer."""
    _, cache = ran
    close(cache.apply_ln_to_stack(cache["resid_pre", 1][None], 1, recompute_ln=True)[0], cache["blocks.1.ln1.hook_out"])
    mid = cache["resid_mid", 1][None]
    close(cache.apply_ln_to_stack(mid, 1, mlp_input=True, recompute_ln=True)[0], cache["blocks.1.ln2.hook_out"])


def test_an_edited_scale_is_the_scale(model):
    """What the run divided by counts, not what the input would give."""
    _, cache = run(model, edits=["blocks.1.ln1.hook_scale"])
    assert not torch.allclose(cache["scale", 1, "ln1"], run(model)[1]["scale", 1, "ln1"])
    close(cache.decompose_resid(1, apply_ln=True).sum(0), cache["normalized", 1, "ln1"])


def test_one_kind_of_part(ran):
    """Modes keep one kind and the embeddings, unless these are left out."""
    _, cache = ran
    parts, labels = cache.decompose_resid(mode="mlp", return_labels=True)
    assert labels == ["embed", "pos_embed", "0_mlp_out", "1_mlp_out", "2_mlp_out"]
    assert torch.equal(parts[2:], cache["mlp_out"])
    parts, labels = cache.decompose_resid(1, True, "attn", incl_embeds=False, return_labels=True)
    assert labels == ["0_attn_out", "1_attn_out"]
    parts, labels = cache.decompose_resid(0, incl_embeds=False, return_labels=True)
    assert labels == []
    assert parts.shape == (0, BATCH, POS, D_MODEL)
    with pytest.raises(ArgumentError, match="mode is 'all' or one of 'attn', 'mlp'; got 'mixer'"):
        cache.decompose_resid(mode="mixer")


def test_one_activation_over_layers(ran):
    """stack_activation stacks the layers before one, whatever the activation."""
    _, cache = ran
    assert torch.equal(cache.stack_activation("z"), cache["z"])
    assert torch.equal(cache.stack_activation("attn.hook_z", None), cache["z"])
    assert torch.equal(cache.stack_activation("pattern", 2), cache["pattern"][:2])
    assert torch.equal(cache.stack_activation("scale", 2, "ln2"), cache["scale", None, "ln2"][:2])
    with pytest.raises(ArgumentError, match="leaves no layer of 'z'"):
        cache.stack_activation("z", 0)
    with pytest.raises(ArgumentError, match="leaves no layer"):
        cache.stack_activation("hook_embed")
    with pytest.raises(UnknownHookError):
        cache.stack_activation("zz")


# ---------------------------------------------------------------------- heads and neurons


def test_heads_are_those_of_the_run(model, ran):
    """With and without hook_result in the cache the heads are the contract's; the cache stays as it was."""
    _, cache = ran
    _, results = run(model, names_filter=["result"])
    size = len(cache)
    heads, labels = cache.stack_head_results(return_labels=True)
    assert labels == HEADS
    assert len(cache) == size
    expected = torch.cat([results["result", layer].movedim(2, 0) for layer in range(N_LAYERS)])
    close(heads, expected)
    close(results.stack_head_results(), expected)
    for layer in range(N_LAYERS):
        ours = heads[layer * N_HEADS : (layer + 1) * N_HEADS].sum(0) + model.weight("b_O", layer).detach()
        close(ours, cache["attn_out", layer])


def test_an_edited_head_result_is_the_heads(model):
    """Where hook_result was edited and cached, it counts, since z does not tell."""
    edited = "blocks.1.attn.hook_result"
    default = [point.name for point in model.hook_points() if point.default]
    _, cache = run(model, edits=[edited], names_filter=[*default, edited])
    close(cache.stack_head_results()[N_HEADS : 2 * N_HEADS], cache[edited].movedim(2, 0))
    close(cache.get_full_resid_decomposition().sum(0), cache["resid_post", -1])


def test_head_results_can_be_kept(model, ran):
    """compute_head_results fills what was not cached, and replaces nothing."""
    _, cache = run(model, names_filter=["z", ("result", 1)])
    kept = cache["result", 1]
    assert cache.compute_head_results() is None
    assert cache["result", 1] is kept
    _, expected = run(model, names_filter=["result"])
    close(cache["result"], expected["result"])
    assert not cache["result"].requires_grad
    cache.compute_head_results()


def test_neurons_are_activations_times_rows(model, ran):
    """With directions only dot products are made; slices of neurons and positions are those of the whole."""
    _, cache = ran
    post, rows = cache["post", 1], model.weight("W_out", 1).detach()
    results = cache.get_neuron_results(1)
    assert results.shape == (BATCH, POS, D_MLP, D_MODEL)
    close(results, post[..., None] * rows)
    close(results.sum(-2) + model.weight("b_out", 1).detach(), cache["mlp_out", 1])
    close(cache.get_neuron_results(-2, neuron_slice=[4, 2], pos_slice=-1), results[:, -1][:, [4, 2]])
    assert torch.equal(cache.get_neuron_results(1, 7), results[:, :, 7])
    onto = torch.randn(D_MODEL, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(cache.get_neuron_results(1, project_output_onto=onto), results @ onto)
    close(cache.get_neuron_results(1, slice(3), 0, onto[:, 0]), (results @ onto[:, 0])[:, 0, :3])


def test_stacked_neurons_are_named_by_their_own_numbers(ran):
    """Labels follow the slice; one neuron of each layer is an entry each."""
    _, cache = ran
    some, labels = cache.stack_neuron_results(2, neuron_slice=[30, 4], return_labels=True)
    assert labels == ["L0N30", "L0N4", "L1N30", "L1N4"]
    close(some[2], cache.get_neuron_results(1, 30))
    one, labels = cache.stack_neuron_results(neuron_slice=-1, return_labels=True, incl_remainder=True)
    assert labels == ["L0N36", "L1N36", "L2N36", "remainder"]
    close(one.sum(0), cache["resid_post", -1])
    mid = cache.stack_neuron_results(1, mlp_input=True, incl_remainder=True, apply_ln=True)
    close(mid.sum(0), cache["normalized", 1, "ln2"])


def test_projected_neurons_are_never_materialised(ran, monkeypatch):
    """No tensor as large as all neurons' outputs is made with directions."""
    _, cache = ran
    onto, largest = torch.randn(D_MODEL, dtype=torch.float64), []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend([out.numel()] if isinstance(out, torch.Tensor) else [])
            return out

    with Watch():
        cache.stack_neuron_results(apply_ln=True, project_output_onto=onto)
        cache.get_neuron_results(1, project_output_onto=onto)
        cache.get_full_resid_decomposition(apply_ln=True, project_output_onto=onto)
    entries = N_LAYERS * D_MLP + N_LAYERS * N_HEADS + 3
    assert max(largest) == entries * BATCH * POS


# ---------------------------------------------------------------------- logits


def per_position(ids):
    """Give ids of each shape that logit_attrs takes, drawn once."""
    return torch.randint(0, 28, ids, generator=torch.Generator().manual_seed(len(ids)))


@pytest.mark.parametrize("decompose", ["decompose_resid", "get_full_resid_decomposition"])
@pytest.mark.parametrize("shape", [(), (1,), (BATCH,), (BATCH, POS), (1, POS), (BATCH, 1), "text", "id"], ids=str)
@pytest.mark.parametrize("is_difference", [True, False])
def test_attributions_sum_to_the_logits(model, ran, decompose, shape, is_difference):
    """Parts and bias sum to the true logit, or the true difference, on raw weights, for every form of tokens."""
    logits, cache = ran
    if shape == "text":
        right, wrong, ids, others = "w3", "w7", torch.tensor(3), torch.tensor(7)
    elif shape == "id":
        right, wrong, ids, others = 3, 7, torch.tensor(3), torch.tensor(7)
    else:
        right, wrong = per_position(shape), (per_position(shape) + 1) % 28
        ids, others = right, wrong
    grid = [x.reshape(x.shape + (1,) * (2 - x.ndim)).expand(BATCH, POS) for x in (ids.long(), others.long())]
    expected = logits.gather(-1, grid[0][..., None])[..., 0]
    if is_difference:
        expected = expected - logits.gather(-1, grid[1][..., None])[..., 0]
    stack = getattr(cache, decompose)()
    attributions, bias = cache.logit_attrs(stack, right, wrong if is_difference else None, return_bias=True)
    assert attributions.shape == stack.shape[:-1]
    close(attributions.sum(0) + bias, expected)
    assert not attributions.requires_grad
    assert not bias.requires_grad
    if is_difference:
        close(cache.logit_attrs(stack, wrong, right), -attributions)
    assert torch.equal(cache.logit_attrs(stack, right, wrong if is_difference else None), attributions)


def test_attributions_of_slices_are_slices_of_attributions(ran):
    """pos_slice says how the stack was sliced; batch_slice takes rows of stack and scale, or names the stack's row."""
    _, cache = ran
    stack, right, wrong = cache.decompose_resid(), per_position((BATCH, POS)), per_position((BATCH, POS)) * 0 + 3
    whole = cache.logit_attrs(stack, right, wrong)
    last = cache.decompose_resid(pos_slice=-1)
    close(cache.logit_attrs(last, right[:, -1], wrong[:, -1], pos_slice=-1), whole[:, :, -1])
    some = cache.decompose_resid(pos_slice=[3, 0])
    close(cache.logit_attrs(some, right[:, [3, 0]], wrong[:, [3, 0]], pos_slice=[3, 0]), whole[:, :, [3, 0]])
    close(cache.logit_attrs(stack, right[1], wrong[1], batch_slice=1), whole[:, 1])
    close(cache.logit_attrs(stack, right[1:], wrong[1:], batch_slice=slice(1, None)), whole[:, 1:])
    close(cache.logit_attrs(stack[:, 1], right[1], wrong[1], batch_slice=1, has_batch_dim=False), whole[:, 1])
    close(cache.logit_attrs(stack[:, 1], right[1], 3, batch_slice=[1], has_batch_dim=False), whole[:, 1])
    close(cache.logit_attrs(last, right[1, -1], 3, pos_slice=-1, batch_slice=1), whole[:, 1, -1])
    close(cache.logit_attrs(stack, ["w3", 7]), cache.logit_attrs(stack, torch.tensor([3, 7])))


def test_eight_bit_ids_are_ids(ran):
    """An uint8 tensor names tokens; torch would index with it as a mask."""
    _, cache = ran
    stack, ids = cache.decompose_resid(), torch.tensor([1, 0])
    assert torch.equal(cache.logit_attrs(stack, ids.to(torch.uint8)), cache.logit_attrs(stack, ids))


def test_neurons_are_attributed_by_directions(model, ran):
    """logit_directions with apply_ln gives each neuron's attribution without its output."""
    logits, cache = ran
    onto = cache.logit_directions("w3", 7)
    assert onto.shape == (D_MODEL,)
    neurons = cache.stack_neuron_results(apply_ln=True, project_output_onto=onto)
    close(neurons, cache.logit_attrs(cache.stack_neuron_results(), 3, 7))
    everything = cache.get_full_resid_decomposition(apply_ln=True, project_output_onto=onto)
    _, bias = cache.logit_attrs(cache.decompose_resid(), 3, 7, return_bias=True)
    close(everything.sum(0) + bias, logits[..., 3] - logits[..., 7])
    assert cache.logit_directions(per_position((BATCH, POS))).shape == (BATCH, POS, D_MODEL)
    assert cache.logit_directions(torch.tensor([3])).shape == (D_MODEL,)


def test_what_does_not_fit_is_refused(ran):
    """Tokens, stacks, layers, positions and directions that do not fit each other are errors, never broadcast."""
    _, cache = ran
    stack = cache.decompose_resid()
    for call, match in (
        (lambda: cache.logit_attrs(stack, per_position((POS,))), r"tokens of shape \[5\] do not fit .*\[2, 5\]"),
        (lambda: cache.logit_attrs(stack[:, :, -1], 3), r"a stack of shape \[8, 2, 21\] does not fit"),
        (lambda: cache.logit_attrs(cache.decompose_resid(pos_slice=[1, 2]), 3), "pos_slice"),
        (lambda: cache.logit_attrs(stack, per_position((BATCH,)), per_position((BATCH, POS))), "differ in shape"),
        (lambda: cache.logit_attrs(stack, 3.0), "tokens are text, ids, or an integer tensor; got 3.0"),
        (lambda: cache.logit_attrs(stack, True), "tokens are text"),
        (lambda: cache.logit_attrs(stack, []), "tokens are text"),
        (lambda: cache.logit_attrs(stack, object()), "tokens are text"),
        (lambda: cache.logit_attrs(stack[:, 0], 3, has_batch_dim=False), "does not fit the cached scale"),
        (lambda: cache.apply_ln_to_stack(stack[0]), "does not fit the cached scale"),
        (lambda: cache.apply_slice_to_batch_dim(0).logit_attrs(stack[:, 0], 3, batch_slice=0), "no batch axis"),
        (lambda: cache.decompose_resid(4), "layer is 0 to 3"),
        (lambda: cache.decompose_resid(-2), "layer is 0 to 3"),
        (lambda: cache.decompose_resid(1.0), "layer is 0 to 3"),
        (lambda: cache.decompose_resid(True), "layer is 0 to 3"),
        (lambda: cache.decompose_resid(mlp_input=True), "mlp_input is about one block"),
        (lambda: cache.accumulated_resid(3, mlp_input=True), "mlp_input is about one block"),
        (lambda: cache.decompose_resid(pos_slice=5), "5 is outside an axis of length 5"),
        (lambda: cache.decompose_resid(pos_slice=[0, -6]), "-6 is outside an axis of length 5"),
        (lambda: cache.decompose_resid(pos_slice="last"), "ints"),
        (lambda: cache.get_neuron_results(3), "layer is -3 to 2; got 3"),
        (lambda: cache.get_neuron_results(0, neuron_slice=D_MLP), "outside an axis of length 37"),
        (lambda: cache.stack_head_results(project_output_onto=torch.zeros(20)), r"\[21\] or \[21, k\].*got \[20\]"),
        (lambda: cache.stack_head_results(project_output_onto=[1.0]), "got list"),
    ):
        with pytest.raises(ArgumentError, match=match):
            call()
    for token in (29, -1):
        with pytest.raises(TokenIdError, match=f"{token} is outside the vocabulary of 29"):
            cache.logit_attrs(stack, torch.tensor([token, 0]))
    with pytest.raises(TokenizerError):
        cache.logit_attrs(stack, "two words")


@pytest.mark.parametrize(
    ("method", "options", "missing"),
    [
        ("accumulated_resid", {}, "blocks.0.hook_resid_pre"),
        ("decompose_resid", {}, "hook_embed"),
        ("decompose_resid", {"incl_embeds": False}, "blocks.0.hook_attn_out"),
        ("stack_head_results", {}, "blocks.0.attn.hook_z"),
        ("compute_head_results", {}, "blocks.0.attn.hook_z"),
        ("stack_neuron_results", {}, "blocks.0.mlp.hook_post"),
        ("get_neuron_results", {"layer": 1}, "blocks.1.mlp.hook_post"),
        ("stack_activation", {"activation_name": "q"}, "blocks.0.attn.hook_q"),
        ("apply_ln_to_stack", {"residual_stack": torch.zeros(1, 2, 5, 21)}, "ln_final.hook_scale"),
        ("stack_head_results", {"layer": 1, "apply_ln": True}, "blocks.1.ln1.hook_scale"),
        ("stack_head_results", {"layer": 0}, "blocks.0.hook_resid_pre"),
    ],
)
def test_a_value_that_was_not_cached_is_named(model, method, options, missing):
    """The error names the hook point, and where to put it."""
    _, cache = run(model, names_filter=["hook_tokens"])
    with pytest.raises(CacheError, match=rf"this needs .*'{missing}'.*names_filter"):
        getattr(cache, method)(**options)


def test_without_the_model_the_error_says_how_to_give_it(model, ran):
    """Stacks of cached values need no model; what needs weights says so."""
    _, cache = ran
    alone = ActivationCache(dict(cache), table=model.table)
    assert torch.equal(alone.stack_activation("z"), cache["z"])
    assert torch.equal(alone.accumulated_resid(), cache.accumulated_resid())
    for call in (
        alone.decompose_resid,
        alone.compute_head_results,
        alone.stack_head_results,
        lambda: alone.logit_attrs(torch.zeros(1, 2, 5, 21), 3),
        lambda: alone.logit_directions(3),
    ):
        with pytest.raises(CacheError, match=r"needs the model.*load\(path, model=model\)"):
            call()


# ---------------------------------------------------------------------- types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    """Sums lose no more than the model's own rounding of the stream; plain stacks keep the cached type."""
    half = lens.load(tiny_gpt2(dtype=dtype), tokenizer=tiny_tokenizer())
    _, cache = run(half)
    assert cache.accumulated_resid().dtype == cache.stack_activation("z").dtype == dtype
    rounding = 8 * torch.finfo(dtype).eps
    for parts in (
        cache.decompose_resid(),
        cache.get_full_resid_decomposition(),
        cache.stack_head_results(incl_remainder=True),
    ):
        assert parts.dtype == torch.float32
        close(parts.sum(0), cache["resid_post", -1].float(), rounding)
    exact = cache.decompose_resid(incl_remainder=True)
    close(exact.sum(0), cache["resid_post", -1].float(), 1e-6)
    for result in (
        cache.accumulated_resid(apply_ln=True),
        cache.get_neuron_results(1),
        cache.logit_directions(3),
        *cache.logit_attrs(exact, 3, 7, return_bias=True),
        cache.decompose_resid(apply_ln=True),
    ):
        assert result.dtype == torch.float32
    cache.compute_head_results()
    assert cache["result", 1].dtype == dtype
    attributions, bias = cache.logit_attrs(exact, 3, 7, return_bias=True)
    with torch.no_grad():
        wide = lens.load(half.hf_model.float())
        final = wide.unembed(wide.ln_final(cache["resid_post", -1].float()))
    close(attributions.sum(0) + bias, final[..., 3] - final[..., 7], rounding)


def test_gradients_flow_through_cached_values_only(model):
    """With a cache on the graph an attribution is differentiated by the values; weights are constants."""
    with model.caching(detach=False) as cache:
        model(random_tokens(BATCH, POS))
    attribution = cache.logit_attrs(cache.stack_head_results(pos_slice=-1), 3, 7, pos_slice=-1)
    (gradient,) = torch.autograd.grad(attribution[2, 0], cache["z", 0], retain_graph=True)
    assert gradient[0, -1, 2].any()
    assert torch.autograd.grad(
        cache.stack_head_results().sum(), model.hf_model.transformer.h[2].attn.c_proj.weight, allow_unused=True
    ) == (None,)


# ---------------------------------------------------------------------- other architectures


RMS = NormKind(
    name="RMS",
    split=lambda module, x: (x, (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()),
    affine=lambda module, x: x * (1 + module.weight),  # as Gemma writes its gain
    centres=False,
)


class Stub(torch.nn.Module):
    """A model with a final norm and nothing else."""

    def __init__(self):
        super().__init__()
        self.ln_f = torch.nn.Module()
        self.ln_f.weight = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))


class StubModel:
    """What the algebra asks of a model."""

    def __init__(self, declaration, weights):
        self.declaration, self.cfg = declaration, declaration.cfg
        self.hf_model = self.bare_model = Stub()
        self._weights = weights

    def weight(self, name, layer=None):
        """Give a weight."""
        return self._weights[name]


def stub(parts, *, writers, norms, seed=0):
    """Make a model of two blocks with these places, and a cache whose stream is the sum of what was written."""
    names = ["hook_embed", *(f"blocks.{layer}.{part}" for layer in range(2) for part in parts), "ln_final.hook_scale"]
    table = HookTable(
        HookPoint(
            name=name,
            layer=int(name.split(".")[1]) if name.startswith("blocks") else None,
            shape="batch pos 1" if name.endswith("scale") else "batch pos d_model",
            equation="",
            seam=None,
        )
        for name in names
    )
    cfg = LensConfig(
        model_type="stub",
        n_layers=2,
        d_model=4,
        n_heads=0,
        d_head=0,
        d_vocab=6,
        n_ctx=9,
        eps=1e-5,
        normalization_type="RMS",
        positional_embedding_type="none",
    )
    declaration = Declaration(
        cfg=cfg,
        base="",
        blocks="",
        embed="",
        unembed="",
        points=tuple(table.values()),
        writers=writers,
        norms={name: NormPlace(path="ln_f", kind=RMS) for name in (*norms, "ln_final")},
        embeddings=("hook_embed",),
        weights=(),
    )
    seeded = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(2, 3, 4, generator=seeded, dtype=torch.float64) for name in names}
    stream = values["hook_embed"]
    for layer in range(2):
        values[f"blocks.{layer}.hook_resid_pre"] = stream
        for writer in writers:
            stream = stream + values[f"blocks.{layer}.{writer}"]
        values[f"blocks.{layer}.hook_resid_post"] = stream
    for name in names:
        if name.endswith("scale"):
            at = stream if name.startswith("ln") else values[f"blocks.{name.split('.')[1]}.hook_resid_pre"]
            values[name] = RMS.split(None, at)[1]
    weights = {
        "W_U": torch.randn(4, 6, generator=seeded, dtype=torch.float64),
        "b_U": torch.zeros(6, dtype=torch.float64),
    }
    return ActivationCache(values, table=table, model=StubModel(declaration, weights))


def test_a_mixer_is_a_part_like_any_other():
    """State-space blocks have one writer, a norm of another kind and name, and no heads."""
    cache = stub(
        ["hook_resid_pre", "norm.hook_scale", "hook_mixer_out", "hook_resid_post"],
        writers=("hook_mixer_out",),
        norms=("norm",),
    )
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels == ["embed", "0_mixer_out", "1_mixer_out"]
    close(parts.sum(0), cache["resid_post", -1])
    normal = cache["resid_pre", 1] / cache["scale", 1, "norm"]
    close(
        cache.decompose_resid(1, apply_ln=True, mode="mixer", incl_embeds=False).sum(0),
        normal - cache["hook_embed"] / cache["scale", 1],
    )
    full, labels = cache.get_full_resid_decomposition(return_labels=True)
    assert labels == ["0_mixer_out", "1_mixer_out", "embed", "bias"]
    close(full.sum(0), cache["resid_post", -1])
    model = cache.model
    logits = RMS.affine(model.hf_model.ln_f, cache["resid_post", -1] / cache["ln_final.hook_scale"]) @ model.weight(
        "W_U"
    )
    attributions, bias = cache.logit_attrs(full, 2, 5, return_bias=True)
    close(attributions.sum(0) + bias, (logits[..., 2] - logits[..., 5]).detach())
    for call in (cache.stack_head_results, cache.stack_neuron_results, cache.compute_head_results):
        with pytest.raises(CacheError, match="and no block has a"):
            call()
    with pytest.raises(CacheError, match="block 1 has no MLP neurons"):
        cache.get_neuron_results(1)


def test_a_parallel_block_has_no_middle():
    """Attention and MLP read the same stream, and may share its norm."""
    parts = ["hook_resid_pre", "ln1.hook_scale", "hook_attn_out", "hook_mlp_out", "hook_resid_post"]
    cache = stub(parts, writers=("hook_attn_out", "hook_mlp_out"), norms=("ln1",))
    stack, labels = cache.decompose_resid(1, mlp_input=True, apply_ln=True, return_labels=True)
    assert labels == ["embed", "0_attn_out", "0_mlp_out"]
    close(stack.sum(0), cache["resid_pre", 1] / cache["scale", 1])
    close(cache.decompose_resid(1, mlp_input=True, incl_remainder=True).sum(0), cache["resid_pre", 1])
    _, labels = cache.accumulated_resid(1, incl_mid=True, mlp_input=True, return_labels=True)
    assert labels == ["0_pre", "1_pre"]
    full, labels = cache.get_full_resid_decomposition(return_labels=True, incl_remainder=True)
    assert labels == ["0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out", "embed", "bias", "remainder"]
    close(full.sum(0), cache["resid_post", -1])


def test_a_block_without_a_norm_says_so():
    """apply_ln where nothing normalises what enters the block is an error."""
    cache = stub(["hook_resid_pre", "hook_mlp_out", "hook_resid_post"], writers=("hook_mlp_out",), norms=())
    close(cache.decompose_resid(1).sum(0), cache["resid_pre", 1])
    with pytest.raises(CacheError, match="no norm reads the residual stream where it enters block 1"):
        cache.decompose_resid(1, apply_ln=True)
