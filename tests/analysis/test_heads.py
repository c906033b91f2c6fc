"""Scores of attention patterns, on patterns made by hand."""

import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2
from torch import Tensor

import lens_core as lens
from lens_core.analysis import heads
from lens_core.errors import ArgumentError, CacheError

#                   0  1  2  3  4  5  6
TEXT = torch.tensor([[0, 7, 8, 9, 7, 8, 5]])


def looking(places: dict[int, int], size: int = 7) -> Tensor:
    """Return one head's pattern [1, 1, query, key]: query q looks at key places[q], or at key 0."""
    pattern = torch.zeros(1, 1, size, size)
    for query in range(size):
        pattern[0, 0, query, places.get(query, 0)] = 1.0
    return pattern


def marked(places: Tensor) -> list[tuple[int, int]]:
    """Return the marked (query, key) of the first row."""
    return [tuple(pair) for pair in places[0].nonzero().tolist()]


def test_places_are_where_the_text_says():
    """By hand: 7 and 8 come twice, and after the first 7 came 8, after the first 8 came 9."""
    assert marked(heads.previous_places(TEXT)) == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (6, 5)]
    assert marked(heads.duplicate_places(TEXT)) == [(4, 1), (5, 2)]
    assert marked(heads.induction_places(TEXT)) == [(4, 2), (5, 3)]


def test_no_place_is_the_query_itself():
    """In a run of one token, the token after the last occurrence is the current one: that is no looking back."""
    run = torch.tensor([[3, 3, 3]])
    assert marked(heads.induction_places(run)) == [(2, 1)]
    for places in (heads.previous_places, heads.duplicate_places, heads.induction_places):
        assert not places(run).diagonal(dim1=1, dim2=2).any()
        assert not places(run).triu(1).any()


def test_each_row_has_its_own_places():
    """Rows of a batch do not see each other."""
    rows = torch.tensor([[1, 2, 1], [1, 2, 3]])
    assert heads.induction_places(rows).sum((1, 2)).tolist() == [1, 0]
    assert heads.repeated_tokens(rows).tolist() == [[False] * 3, [False] * 3]


def test_a_token_is_repeated_where_its_pair_came_before():
    """The second 8 follows 7 as before; the second 7 follows another token."""
    assert heads.repeated_tokens(TEXT)[0].nonzero().flatten().tolist() == [5]
    assert not heads.repeated_tokens(torch.tensor([[5]])).any()


def test_a_head_that_does_one_thing_scores_1_for_it_and_0_for_the_others():
    """Three made heads, three kinds of place."""
    made = {
        "induction": looking({4: 2, 5: 3}),
        "duplicate": looking({4: 1, 5: 2}),
        "previous": looking({query: query - 1 for query in range(1, 7)}),
    }
    places = {
        "induction": heads.induction_places(TEXT),
        "duplicate": heads.duplicate_places(TEXT),
        "previous": heads.previous_places(TEXT),
    }
    for kind, pattern in made.items():
        scores = {name: heads.attention_share(pattern, where).item() for name, where in places.items()}
        assert scores[kind] == 1.0
        others = {name: score for name, score in scores.items() if name != kind}
        # Looking at key 0 by default, each looks at the token before once: query 1.
        assert others == {name: pytest.approx(1 / 6 if name == "previous" else 0.0) for name in others}


def test_queries_where_kinds_mix_can_be_left_out():
    """In runs and short cycles a previous-token head does what an induction head does; elsewhere it does not."""
    text = torch.tensor([[1, 2, 5, 5, 5, 1, 2, 3, 2, 3, 4]])
    kinds = heads.induction_places(text), heads.previous_places(text), heads.duplicate_places(text)
    assert marked(heads.unmixed(*kinds)) == [(5, 1), (6, 2)]
    previous = looking({query: query - 1 for query in range(1, 11)}, size=11)
    assert heads.attention_share(previous, kinds[0]).item() > 0.3
    assert heads.attention_share(previous, heads.unmixed(*kinds)).item() == 0.0
    assert (heads.unmixed(kinds[0]) == kinds[0]).all()
    with pytest.raises(ArgumentError, match="not of one text"):
        heads.unmixed(kinds[0], heads.previous_places(TEXT))


def test_only_queries_that_have_a_place_count():
    """Half of the attention at one of two queries is a quarter, however long the text."""
    pattern = looking({})
    pattern[0, 0, 4, 0], pattern[0, 0, 4, 2] = 0.5, 0.5
    assert heads.attention_share(pattern, heads.induction_places(TEXT)).tolist() == [0.25]


def test_attention_to_several_places_adds_up():
    """After both earlier occurrences: 7 was followed by 8 and by 9."""
    text = torch.tensor([[7, 8, 7, 9, 7]])
    pattern = torch.zeros(1, 1, 5, 5)
    pattern[0, 0, 2, 1] = 1.0
    pattern[0, 0, 4] = torch.tensor([0.1, 0.3, 0.0, 0.6, 0.0])
    assert heads.attention_share(pattern, heads.induction_places(text)).item() == pytest.approx((1.0 + 0.9) / 2)


def test_a_text_without_such_places_scores_0():
    """And not a division by zero."""
    assert heads.attention_share(looking({}, 3), heads.induction_places(torch.tensor([[1, 2, 3]]))).tolist() == [0.0]


def test_half_precision_is_summed_in_single():
    """Many small shares do not drown."""
    pattern = torch.full((1, 1, 512, 512), 1 / 512, dtype=torch.bfloat16)
    share = heads.attention_share(pattern, heads.duplicate_places(torch.zeros(1, 512, dtype=torch.long)))
    assert share.dtype == torch.float32
    assert share.item() == pytest.approx(0.5, abs=0.01)


def test_a_pattern_of_another_text_is_refused():
    """Rather than broadcast."""
    with pytest.raises(ArgumentError, match=r"\(1, 1, 5, 5\) and the places \(1, 7, 7\)"):
        heads.attention_share(looking({}, 5), heads.induction_places(TEXT))


def test_every_head_of_a_cache_is_scored_by_layer_and_head():
    """Against the patterns themselves; a cache without the batch axis gives the same."""
    model, tokens = lens.load(tiny_gpt2()), random_tokens(1, 12, vocab=6)
    _, cache = model.run_with_cache(tokens)
    places = heads.induction_places(tokens)
    scores = heads.head_scores(cache, places)
    assert list(scores) == [(layer, head) for layer in range(3) for head in range(3)]
    for (layer, head), score in scores.items():
        kept = cache["pattern", layer][0, head][places[0]].sum() / places[0].any(-1).sum()
        assert score == pytest.approx(kept.item())
    assert heads.head_scores(cache.remove_batch_dim(), places) == scores


def test_layers_whose_pattern_is_not_cached_are_left_out():
    """As in a model that has attention in some layers only."""
    model, tokens = lens.load(tiny_gpt2()), random_tokens(1, 6)
    _, cache = model.run_with_cache(tokens, names_filter=["z", "blocks.1.attn.hook_pattern"])
    assert {layer for layer, _ in heads.head_scores(cache, heads.previous_places(tokens))} == {1}


def test_a_cache_without_patterns_says_what_to_cache():
    """And not that there are no heads."""
    model, tokens = lens.load(tiny_gpt2()), random_tokens(1, 6)
    _, cache = model.run_with_cache(tokens, names_filter="z")
    with pytest.raises(CacheError, match="names_filter='pattern'"):
        heads.head_scores(cache, heads.previous_places(tokens))


SCORES = {(0, 0): 0.3, (0, 1): 0.1, (1, 0): 0.9, (1, 1): 0.05, (1, 2): 0.6, (2, 0): 0.0, (2, 1): 0.7}


def test_heads_above_a_threshold_come_best_first():
    """The threshold itself counts."""
    assert heads.heads_above(SCORES, 0.6) == [(1, 0), (2, 1), (1, 2)]
    assert heads.heads_above(SCORES, 0.95) == []


def test_controls_are_the_least_inductive_of_the_same_layers():
    """As many as there are heads, and none of them."""
    assert heads.control_heads([(1, 0)], SCORES) == [(1, 1)]
    assert heads.control_heads([(1, 0), (2, 1)], SCORES) == [(1, 1), (2, 0)]


def test_a_full_layer_takes_its_control_from_the_nearest():
    """Both heads of layer 2 are ablated: the second control comes from layer 1."""
    assert heads.control_heads([(2, 0), (2, 1)], SCORES) == [(1, 1), (1, 2)]


def test_where_few_heads_are_left_there_are_few_controls():
    """Even none."""
    assert heads.control_heads([(0, 0), (0, 1)], {(0, 0): 0.9, (0, 1): 0.8, (1, 0): 0.0}) == [(1, 0)]
    assert heads.control_heads([(0, 0)], {(0, 0): 0.9}) == []
