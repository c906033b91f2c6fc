"""Scores by kind and their controls, by loops over queries and keys."""

import pytest
import torch
from analysis.four_families import tiny, tiny_hybrid
from analysis.ssm_subject import Subject, attention_of
from golden.tiny import random_tokens

import lens_core as lens
from lens_core.analysis import head_kinds, heads
from lens_core.errors import ArgumentError, ContextLengthError, UnsupportedHookError

TEXTS = [[1, 2, 3, 1, 2, 4, 1], [5, 6, 5, 6, 7], [8, 9, 8], [1, 1, 2, 2, 1, 3, 2, 1, 4]]


def shares(patterns, ids, kind):
    """Give one text's sum of attention to the places and its count of queries, for one head's `[query, key]`."""
    total, count = 0.0, 0
    for q in range(len(ids)):
        keys = {
            "previous": [q - 1] if q else [],
            "duplicate": [k for k in range(q) if ids[k] == ids[q]],
            "induction": [k for k in range(1, q) if ids[k - 1] == ids[q]],
        }[kind]
        total += sum(patterns[q, k].item() for k in keys)
        count += bool(keys)
    return total, count


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scores_over_texts_of_unequal_length(family):
    """One text at a time, without padding."""
    model = tiny(family)
    found = head_kinds.score_heads(model, TEXTS, batch_size=3)
    for kind, own in zip(found.kinds, found.scores, strict=True):
        sums = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
        queries = 0
        for ids in TEXTS:
            _, cache = model.run_with_cache(torch.tensor([ids]), names_filter="pattern")
            for layer in range(model.cfg.n_layers):
                for head in range(model.cfg.n_heads):
                    total, count = shares(cache["pattern", layer][0, head], ids, kind)
                    sums[layer, head] += total
            queries += count
        assert found.queries[found.kinds.index(kind)] == queries
        assert torch.allclose(own, sums / queries, atol=1e-5)


def test_chance_is_the_score_of_even_attention():
    """Of a pattern made even by hand."""
    model = tiny("gpt2")
    found = head_kinds.score_heads(model, TEXTS)
    for index, kind in enumerate(found.kinds):
        parts = [shares(torch.ones(9, 9) / torch.arange(1, 10)[:, None], ids, kind) for ids in TEXTS]
        assert found.chance[index].item() == pytest.approx(
            sum(p[0] for p in parts) / sum(p[1] for p in parts), rel=1e-5
        )


def test_a_head_of_fixed_distance_fools_the_score_and_not_its_excess():
    """A model whose every head looks 12 tokens back: the length of what comes again, less one."""
    model = tiny("gpt2")

    def look(pattern, hook):
        new = torch.zeros_like(pattern)
        for query in range(pattern.shape[2]):
            new[:, :, query, max(query - 11, 0)] = 1.0
        return new

    with model.hooks([("pattern", look)]):
        found = head_kinds.score_heads(model, length=12, prepend_bos=False, seed=3)
    assert (found.scores[2] > 0.8).all()
    assert (found.excess[2].abs() < 1e-6).all()


def test_the_toys_induction_head_is_found_beyond_control_and_chance():
    """Trained to: head 0 of layer 1, after previous-token heads in layer 0."""
    found = head_kinds.score_heads(lens.load("toy:gpt2"))
    (head, score), *others = found.top("induction", k=8)
    assert head == (1, 0)
    assert score > 0.7
    assert max(score for _, score in others) < 0.1
    assert found.of("induction", excess=True)[1, 0] > 0.7
    assert heads.heads_above(found.of("previous"), 0.9) == [(0, 2), (0, 0)]


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_effective_attention_is_scored_by_its_absolute_shares(kind):
    """By the sum over states written out in float64."""
    subject = Subject(kind)
    from lens_conformance.float64 import true_float64

    with true_float64():
        found = head_kinds.score_heads(subject.model, subject.tokens, effective=True)
    for index, name in enumerate(found.kinds):
        places = head_kinds.KINDS[name](subject.tokens)
        for layer in range(3):
            alpha = attention_of(subject.values, subject.own(layer, "A_log"), layer, kind).abs()
            expected = heads.attention_share(alpha / alpha.sum(-1, keepdim=True), places)
            assert torch.allclose(found.scores[index, layer], expected, atol=1e-12)


def test_many_channels_are_done_in_chunks(monkeypatch):
    """And give the same."""
    model, tokens = tiny("mamba"), random_tokens(2, 7, vocab=4)
    whole = head_kinds.score_heads(model, tokens, effective=True)
    monkeypatch.setattr(head_kinds, "_CHUNK_BYTES", 784 * 40)  # 40 channels at a time
    assert torch.equal(head_kinds.score_heads(model, tokens, effective=True).scores, whole.scores)


def test_a_hybrid_is_scored_by_either():
    """Its attention layer by patterns, its mixers by effective attention."""
    model = tiny_hybrid()
    tokens = random_tokens(2, 7, vocab=4)
    assert head_kinds.score_heads(model, tokens).layers == (1,)
    assert head_kinds.score_heads(model, tokens, effective=True).layers == (0, 2)


def test_a_kind_of_ones_own():
    """The first token: where attention sinks are."""

    def first(tokens):
        mask = torch.zeros(*tokens.shape, tokens.shape[1], dtype=torch.bool)
        mask[:, 1:, 0] = True
        return mask

    model, tokens = tiny("gpt2"), random_tokens(2, 7)
    found = head_kinds.score_heads(model, tokens, kinds={"first": first})
    _, cache = model.run_with_cache(tokens)
    assert torch.allclose(found.scores[0, 1], cache["pattern", 1][:, :, 1:, 0].mean((0, 2)), atol=1e-6)
    with pytest.raises(ArgumentError, match="'whole' gives torch.bool"):
        head_kinds.score_heads(model, tokens, kinds={"whole": lambda ids: torch.ones(2, 7, dtype=torch.bool)})


def test_tables_and_pictures_hold_the_numbers():
    """By kind, layer and head."""
    model = tiny("gpt2")
    found = head_kinds.score_heads(model, TEXTS)
    frame = found.to_dataframe().set_index(["kind", "layer", "head"])
    assert len(frame) == 3 * 3 * 3
    assert frame.loc[("induction", 2, 1), "score"] == pytest.approx(found.scores[2, 2, 1].item())
    assert frame.loc[("duplicate", 0, 2), "excess"] == pytest.approx(found.excess[1, 0, 2].item())
    assert "induction" in found._repr_html_()
    assert "less control" in found.picture("previous", excess=True).html


def test_reading_heads_changes_nothing_and_leaves_nothing():
    """The model's own numbers, before and after; one seed gives one result."""
    model, tokens = tiny("gpt2"), random_tokens()
    before = model(tokens)
    first, second = (head_kinds.score_heads(model, length=6, seed=5) for _ in range(2))
    assert torch.equal(first.control, second.control)
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize(
    ("family", "options", "error", "message"),
    [
        ("mamba", {}, UnsupportedHookError, "effective=True"),
        ("gpt2", {"effective": True}, UnsupportedHookError, "state-space"),
        ("gpt2", {"kinds": {}}, ArgumentError, "empty"),
        ("gpt2", {"n_controls": 0}, ArgumentError, "got 0"),
        ("gpt2", {"length": 0}, ArgumentError, "length; got 0"),
        ("gpt2", {"length": 40}, ContextLengthError, "32"),
        ("gpt2", {"batch_size": 0}, ArgumentError, "batch_size"),
    ],
)
def test_what_cannot_be_is_refused(family, options, error, message):
    """By name, with the value."""
    with pytest.raises(error, match=message):
        head_kinds.score_heads(tiny(family), **options)
    with pytest.raises(ArgumentError, match="no scores of kind 'current'"):
        head_kinds.score_heads(tiny("gpt2"), TEXTS).of("current")
