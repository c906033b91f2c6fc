"""The activation cache as a mapping: names, slices, devices, and being filled by several calls."""

import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2, tiny_tokenizer
from transformers import DynamicCache

import lens_core as lens
from lens_core.cache import ActivationCache
from lens_core.errors import ArgumentError, CacheError, UnknownHookError

HF = "hf.transformer.h.1.mlp.output"


@pytest.fixture(scope="module")
def model():
    """Give a tiny GPT-2."""
    return lens.load(tiny_gpt2(), tokenizer=tiny_tokenizer())


def run(model, tokens=None, **options):
    """Run without a graph and give the cache."""
    with torch.no_grad():
        return model.run_with_cache(random_tokens() if tokens is None else tokens, **options)[1]


# ---------------------------------------------------------------------- a mapping


def test_it_is_a_mapping_of_canonical_names_in_the_order_of_computation(model):
    """keys, items, values, len and iteration agree, and hold each entry once."""
    cache = run(model)
    expected = [point.name for point in model.hook_points() if point.default]
    assert list(cache) == list(cache.keys()) == [name for name, _ in cache.items()]
    assert sorted(cache) == sorted(expected)
    assert next(iter(cache)) == "hook_tokens"
    assert list(cache)[-1] == "hook_logits"
    assert len(cache) == len(expected)
    assert [id(value) for value in cache.values()] == [id(value) for _, value in cache.items()]
    assert dict(cache).keys() == set(expected)


def test_every_form_of_a_name_is_one_entry(model):
    """Canonical names, tuples, negative layers, joined short forms and aliases give the same tensor."""
    cache = run(model)
    whole = cache["blocks.2.attn.hook_q"]
    for form in (("q", 2), ("q", -1), "q2", ("q", 2, "attn"), ("query", 2)):
        assert cache[form] is whole, form
        assert form in cache, form
    assert cache["embed.hook_out"] is cache["hook_embed"]
    assert cache["blocks.1.hook_in"] is cache["resid_pre", 1]


def test_a_short_form_without_a_layer_stacks_the_layers(model):
    """The layer axis comes first; layers that were not cached are left out."""
    cache = run(model)
    assert cache["z"].shape == (3, 2, 5, 3, 7)
    assert all(torch.equal(cache["z"][layer], cache["z", layer]) for layer in range(3))
    some = run(model, names_filter=[("z", 0), ("z", 2)])
    assert torch.equal(some["z"], torch.stack([cache["z", 0], cache["z", 2]]))


def test_a_stack_over_one_layer_is_a_stack():
    """In a model of one layer a short form has a layer axis as anywhere; names with a layer have none."""
    model = lens.load(tiny_gpt2(n_layer=1))
    cache = run(model)
    assert cache["z"].shape == (1, 2, 5, 3, 7)
    assert cache["ln1.hook_scale"].shape == cache["scale", None, "ln1"].shape == (1, 2, 5, 1)
    for key in (
        ("z", 0),
        ("z", -1),
        "z0",
        "scale0ln1",
        ("scale", 0, "ln2"),
        "blocks.0.attn.hook_z",
        "blocks.0.hook_in",
    ):
        assert cache[key].shape[:2] == (2, 5), key
    assert cache["scale"] is cache["ln_final.hook_scale"]
    assert cache["embed"] is cache["hook_embed"]
    assert torch.equal(cache.accumulated_resid(), torch.stack([cache["resid_pre", 0], cache["resid_post", 0]]))


def test_asking_whether_a_name_is_there_stacks_nothing(model, monkeypatch):
    """`in` reads no tensor, and looks for no near matches of what is absent."""
    cache = run(model)
    monkeypatch.setattr("difflib.get_close_matches", lambda *_, **__: pytest.fail("looked for near matches"))
    monkeypatch.setattr(torch, "stack", lambda *_: pytest.fail("stacked"))
    monkeypatch.setattr(ActivationCache, "_joined", lambda *_: pytest.fail("joined"))
    assert "z" in cache
    assert ("z", 1) in cache
    for absent in ("hook_nothing", ("z", 9), ("q_input", 1), "blocks.0.attn.*", None, 3, ["z"], len):
        assert absent not in cache, absent
    monkeypatch.undo()
    assert cache.get("hook_nothing") is None


def test_what_is_missing_is_told_apart(model):
    """Not cached, no such name, and no name at all are three errors; the first says where to name it."""
    cache = run(model, names_filter="z")
    with pytest.raises(
        CacheError, match=r"\('q', 1\) was not cached; 3 hook points were: blocks.0.attn.hook_z.*names_filter"
    ):
        cache["q", 1]
    with pytest.raises(KeyError):
        cache["q", 1]
    with pytest.raises(UnknownHookError, match="attn.hook_z"):
        cache["blocks.0.attn.hook_zz"]
    for key in (None, ["z"], "blocks.*.attn.hook_z", len, 3):
        with pytest.raises(ArgumentError, match="one name or short form"):
            cache[key]
    with pytest.raises(CacheError, match="nothing was"):
        ActivationCache(table=model.table, model=model)["z", 1]


def test_a_cache_equals_itself_only(model):
    """== gives one truth value, and a cache can be a key."""
    cache, other = run(model, names_filter="z"), run(model, names_filter="z")
    assert cache == cache  # noqa: PLR0124
    assert cache != other
    assert len({cache, other, cache}) == 2
    assert "3 entries" in repr(cache)


def test_an_entry_can_be_forgotten(model):
    """`del` takes every form of a name, and frees what it held."""
    cache = run(model, names_filter=["z", "q"])
    del cache["z", 1]
    assert ("z", 1) not in cache
    del cache["q"]
    assert list(cache) == ["blocks.0.attn.hook_z", "blocks.2.attn.hook_z"]
    with pytest.raises(CacheError, match="not cached"):
        del cache["z", 1]


# ---------------------------------------------------------------------- moving and slicing


def test_moving_casts_floating_entries_in_place(model):
    """`to` gives the cache back; ids keep their type; gradients go along."""
    with model.caching(["resid_pre", "hook_tokens"], detach=False) as cache:
        model(random_tokens(), return_type="loss").backward()
    assert cache.to("cpu", torch.float64) is cache
    assert cache["resid_pre", 1].dtype == cache.grad["resid_pre", 1].dtype == torch.float64
    assert cache["hook_tokens"].dtype == torch.long
    assert cache.to(torch.float16)["resid_pre", 1].dtype == torch.float16
    with pytest.raises(ArgumentError, match="floating dtype; got torch.int64"):
        cache.to(dtype=torch.long)
    with pytest.raises(ArgumentError, match="no such device: 'nowhere'"):
        cache.to("nowhere")


def test_the_batch_axis_of_one_row_can_go(model):
    """Every entry loses its first axis, those of hf names too where it is the batch."""
    tokens = random_tokens(1, 5)
    cache, whole = run(model, tokens, names_filter=["z", HF]), run(model, tokens, names_filter=["z", HF])
    assert cache.remove_batch_dim() is cache
    assert not cache.has_batch_dim
    assert all(torch.equal(cache[name], whole[name][0]) for name in whole)
    assert cache.remove_batch_dim() is cache
    assert cache["z"].shape == (3, 5, 3, 7)


def test_a_batch_of_two_keeps_its_axis(model):
    """The error names an entry, and nothing has changed."""
    cache = run(model, names_filter="z")
    with pytest.raises(CacheError, match=r"'blocks.0.attn.hook_z' has 2 rows"):
        cache.remove_batch_dim()
    assert cache.has_batch_dim
    assert cache["z", 0].shape[0] == 2


@pytest.mark.parametrize(
    "rows", [1, -1, slice(1, 3), [2, 0], torch.tensor([0, 2]), torch.tensor([True, False, True])], ids=str
)
def test_rows_are_taken(model, rows):
    """A new cache holds the rows; an int drops the axis; entries and gradients go along, and the old one stays."""
    with model.caching(["pattern", "hook_tokens", HF], detach=False) as cache:
        model(random_tokens(3, 5), return_type="loss").backward()
    part = cache.apply_slice_to_batch_dim(rows)
    assert part.has_batch_dim is not isinstance(rows, int)
    for name in cache:
        assert torch.equal(part[name], cache[name][rows]), name
    assert torch.equal(part.grad["pattern", 1], cache.grad["pattern", 1][rows])
    assert cache["pattern", 1].shape[0] == 3


def test_rows_that_are_not_there_are_refused(model):
    """Out of range, not a row at all, or no axis any more."""
    cache = run(model, names_filter="z")
    with pytest.raises(ArgumentError, match="2 is outside an axis of length 2"):
        cache.apply_slice_to_batch_dim(2)
    with pytest.raises(ArgumentError, match="ints"):
        cache.apply_slice_to_batch_dim("first")
    with pytest.raises(CacheError, match="no batch axis"):
        cache.apply_slice_to_batch_dim(0).apply_slice_to_batch_dim(0)


def test_an_hf_entry_of_another_layout_keeps_it(model):
    """Where HF's first axis is not the batch it is left alone."""
    odd = torch.randn(10, 4)  # such as [batch * pos, experts]
    whole = ActivationCache({"hook_embed": torch.randn(1, 5, 21), HF: odd}, table=model.table, model=model)
    assert whole.apply_slice_to_batch_dim(0)[HF] is odd
    assert whole.slice_pos(0)[HF] is odd
    assert whole.remove_batch_dim()[HF] is odd


@pytest.mark.parametrize(
    "positions", [1, -1, slice(1, None, 2), slice(None, None, -1), [4, 0], torch.tensor([1, 3])], ids=str
)
@pytest.mark.parametrize("has_batch_dim", [True, False])
def test_positions_are_taken(model, positions, has_batch_dim):
    """The axis stays; scores and patterns keep all keys; it works without a batch axis."""
    with model.caching(["resid_pre", "pattern", "hook_tokens"], detach=False) as cache:
        model(random_tokens(1, 5), return_type="loss").backward()
    if not has_batch_dim:
        cache.remove_batch_dim()
    part = cache.slice_pos(positions)
    chosen = range(5)[positions] if isinstance(positions, slice) else positions
    index = torch.as_tensor(chosen).reshape(-1) % 5
    for name in cache:
        axis = (2 if "pattern" in name else 1) - (not has_batch_dim)
        assert torch.equal(part[name], cache[name].index_select(axis, index)), name
    assert torch.equal(part.grad["resid_pre", 1], cache.grad["resid_pre", 1].index_select(-2, index))
    assert part.has_batch_dim is has_batch_dim


def test_slices_are_views_and_indices_copies(model):
    """Slicing costs no memory."""
    cache = run(model, names_filter="z")
    whole = cache["z", 1].untyped_storage().data_ptr()
    assert cache.slice_pos(slice(1, 3))["z", 1].untyped_storage().data_ptr() == whole
    assert cache.apply_slice_to_batch_dim(1)["z", 1].untyped_storage().data_ptr() == whole
    assert cache.slice_pos([1])["z", 1].untyped_storage().data_ptr() != whole


# ---------------------------------------------------------------------- being filled


def in_steps(model, names, tokens, steps=(3, 1, 1), **options):
    """Cache a prefill and the calls that continue it."""
    past = DynamicCache(config=model.hf_model.config)
    logits, start = [], 0
    with model.caching(names, **options) as cache:
        for step in steps:
            logits.append(model(tokens[:, start : start + step], past_key_values=past))
            start += step
    return cache, torch.cat(logits, 1)


NAMES = ["resid_pre", "z", "pattern", "attn_scores"]


def test_calls_that_continue_append_their_positions(model):
    """Prefill and decode together hold what one whole run holds; later keys are masked for earlier queries."""
    tokens = random_tokens(2, 5)
    whole = run(model, tokens, names_filter=NAMES)
    with torch.no_grad():
        cache, _ = in_steps(model, NAMES, tokens)
    for name in whole:
        torch.testing.assert_close(cache[name], whole[name], atol=1e-5, rtol=1e-5)
        assert cache[name] is cache[name]
    assert torch.equal(cache["attn_scores", 1] == -torch.inf, whole["attn_scores", 1] == -torch.inf)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_of_several_calls_stand_in_the_order_of_positions(model, detach):
    """The last call's gradient comes first in a backward pass, and is still that of the last position."""
    tokens = random_tokens(2, 5)
    options = {"detach": detach, "incl_bwd": detach}
    cache, logits = in_steps(model, NAMES, tokens, **options)
    logits.pow(2).sum().backward()
    with model.caching(NAMES, **options) as whole:
        model(tokens).pow(2).sum().backward()
    for name in whole:
        ours, expected = cache.grad[name], whole.grad[name]
        if "pattern" in name:  # a longer call can give weight to later keys, which a step does not see
            ours, expected = ours.tril(), expected.tril()
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-4)


def test_a_call_without_a_gradient_has_zeros(model):
    """What one call's output does not depend on is zero at that call's positions only."""
    cache, logits = in_steps(model, ["resid_post", "z"], random_tokens(2, 5))
    assert list(cache.grad) == []
    cache, logits = in_steps(model, ["resid_post", "z"], random_tokens(2, 5), detach=False)
    assert not cache.grad["z", 1].any()
    logits[:, 2].sum().backward()
    last = cache.grad["resid_post", 2]
    assert last.shape == (2, 5, 21)
    assert last[:, 2].any()
    assert not last[:, [0, 1, 3, 4]].any()


def test_gradients_add_up_until_cleared(model):
    """As with torch's .grad, two backward passes add; `clear` forgets."""
    with model.caching([("resid_post", 1)], detach=False) as cache:
        loss = model(random_tokens(), return_type="loss")
    (once,) = torch.autograd.grad(loss, cache["resid_post", 1], retain_graph=True)
    assert torch.equal(cache.grad["resid_post", 1], once)
    loss.backward()
    assert torch.equal(cache.grad["resid_post", 1], 2 * once)
    assert torch.equal(cache["blocks.1.hook_resid_post_grad"], 2 * once)
    assert "blocks.1.hook_resid_post_grad" in cache
    assert "1 entries" in repr(cache.grad)
    cache.grad.clear()
    assert "blocks.1.hook_resid_post_grad" not in cache
    with pytest.raises(CacheError, match="no gradient was kept at"):
        cache.grad["resid_post", 1]
    assert cache.grad != {}
    assert hash(cache.grad) != hash(cache)


def test_gradients_of_a_sequence_that_was_replaced_do_not_mix_in(model):
    """A second sequence's values have the second sequence's gradients, whatever is backpropagated."""
    one, two = random_tokens(seed=1), random_tokens(seed=2)
    with model.caching([("resid_post", 1)], detach=False) as cache:
        first, second = model(one, return_type="loss"), model(two, return_type="loss")
    (first + second).backward()
    with model.caching([("resid_post", 1)], detach=False) as alone:
        model(two, return_type="loss").backward()
    assert torch.equal(cache["resid_post", 1], alone["resid_post", 1])
    assert torch.equal(cache.grad["resid_post", 1], alone.grad["resid_post", 1])


def test_gradients_reach_a_cache_that_lost_its_batch_axis_or_an_entry(model):
    """What was done to the cache before the backward pass is done to the gradients."""
    with model.caching(["resid_post"], detach=False) as cache:
        loss = model(random_tokens(1, 5), return_type="loss")
    cache.remove_batch_dim()
    del cache["resid_post", 0]
    loss.backward()
    assert cache.grad["resid_post", 1].shape == (5, 21)
    assert cache.grad["resid_post", 1].any()
    assert list(cache.grad) == ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]


def test_a_new_sequence_replaces_everything(model):
    """Entries, gradients, derived entries and a dropped batch axis are those of the last sequence."""
    with torch.no_grad(), model.caching(["z"]) as cache:
        model(random_tokens(1, 5))
        cache.remove_batch_dim()
        cache.compute_head_results()
        assert ("result", 1) in cache
        model(random_tokens(2, 4))
    assert cache.has_batch_dim
    assert ("result", 1) not in cache
    assert cache["z", 1].shape == (2, 4, 3, 7)
    with model.caching(["z"], detach=False) as cache:
        model(random_tokens(1, 5))
        cache.remove_batch_dim()
        model(random_tokens(2, 4), return_type="loss").backward()
    assert cache.grad["z", 1].shape == (2, 4, 3, 7)
    assert cache.grad["z", 1][1].any()


def test_what_was_computed_from_entries_goes_when_they_grow(model):
    """Head results of a prefill would not hold the next positions."""
    tokens, past = random_tokens(1, 5), DynamicCache(config=model.hf_model.config)
    with torch.no_grad(), model.caching(["z"]) as cache:
        model(tokens[:, :3], past_key_values=past)
        cache.compute_head_results()
        cache.remove_batch_dim()
        model(tokens[:, 3:], past_key_values=past)
    assert ("result", 1) not in cache
    torch.testing.assert_close(cache["z", 1], run(model, tokens)["z", 1][0], atol=1e-5, rtol=1e-5)
    assert cache.stack_head_results().shape == (9, 5, 21)


def test_a_cache_on_the_graph_is_cast_when_asked(model):
    """Type and device hold with detach=False too, and gradients come in the kept dtype."""
    with model.caching([("resid_post", 1)], detach=False, dtype=torch.float64, pos_slice=[-1]) as cache:
        model(random_tokens(), return_type="logits").sum().backward()
    assert cache["resid_post", 1].dtype == cache.grad["resid_post", 1].dtype == torch.float64
    assert cache.grad["resid_post", 1].shape == (2, 1, 21)
    assert cache.grad["resid_post", 1].any()


def test_a_cache_of_hf_names_alone_is_sliced_by_its_own_rows(model):
    """Without another entry, the first axis of HF's own values is taken for the batch."""
    cache = run(model, names_filter=[HF])
    assert torch.equal(cache.apply_slice_to_batch_dim(1)[HF], cache[HF][1])
    assert HF in cache
    assert cache[HF].shape == (2, 5, 21)
