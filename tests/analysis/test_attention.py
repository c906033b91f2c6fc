"""Attention statistics, by loops over the queries of one text at a time."""

import math

import pytest
import torch
from analysis.four_families import tiny, tiny_hybrid
from golden.tiny import tiny_gpt2

import lens_core as lens
from lens_core.analysis.attention import STATISTICS, attention_statistics
from lens_core.errors import ArgumentError, EmptyInputError, UnsupportedHookError

TEXTS = [[5, 6, 5], [1, 2, 3, 1, 2, 4, 1], [8], [1, 1, 2, 2, 1, 3, 2, 1, 4]]


def by_queries(model, layer, head):
    """Give each statistic and what every token id gets, one text at a time."""
    sums, received, queries = dict.fromkeys(STATISTICS, 0.0), {}, 0
    for ids in TEXTS:
        _, cache = model.run_with_cache(torch.tensor([ids]), names_filter="pattern")
        pattern = cache["pattern", layer][0, head].double()
        for q in range(1, len(ids)):
            row = pattern[q, : q + 1].tolist()
            queries += 1
            sums["entropy"] -= sum(p * math.log(p) for p in row if p)
            sums["distance"] += sum(p * (q - k) for k, p in enumerate(row))
            sums["first"] += row[0]
            sums["current"] += row[q]
            sums["previous"] += row[q - 1]
            sums["largest"] += max(row)
            for k, p in enumerate(row):
                received[ids[k]] = received.get(ids[k], 0.0) + p
    return {n: s / queries for n, s in sums.items()}, {t: r / queries for t, r in received.items()}, queries


@pytest.mark.parametrize(("family", "batch_size"), [("gpt2", 1), ("gpt2", 8), ("llama", 3)])
def test_statistics_are_means_over_real_queries(family, batch_size):
    """Padding counts neither as query nor as key, and the size of batches does not matter."""
    model = tiny(family)
    found = attention_statistics(model, iter(TEXTS), batch_size=batch_size)
    for layer, head in [(0, 0), (1, 2), (2, 1)]:
        expected, received, queries = by_queries(model, layer, head)
        for name, value in expected.items():
            assert getattr(found, name)[layer, head].item() == pytest.approx(value, abs=1e-5), name
        ranked = sorted(received.items(), key=lambda item: -item[1])[:3]
        assert found.queries == queries
        for (token, share, count), (best, most) in zip(found.top_sources(layer, head, k=3), ranked, strict=True):
            assert token == best
            assert share == pytest.approx(most, abs=1e-5)
            assert count == sum(ids.count(token) for ids in TEXTS)


def test_even_attention_is_what_it_is_compared_with():
    """Of a pattern made even by a hook."""
    model = tiny("gpt2")

    def even(pattern, hook):
        mask = torch.ones_like(pattern).tril()
        return mask / mask.sum(-1, keepdim=True)

    with model.hooks([("pattern", even)]):
        found = attention_statistics(model, TEXTS)
    assert torch.allclose(found.entropy, torch.full((3, 3), found.even_entropy), atol=1e-5)
    assert torch.allclose(found.distance, torch.full((3, 3), found.even_distance), atol=1e-5)


def test_a_share_of_less_than_all():
    """Where a sink takes half, entropy and distance are of the rest, shares of the whole."""
    model = tiny("gpt2")
    plain = attention_statistics(model, TEXTS)
    with model.hooks([(("pattern", 2), lambda pattern, hook: pattern / 2)]):
        halved = attention_statistics(model, TEXTS)
    assert torch.allclose(halved.entropy[2], plain.entropy[2], atol=1e-5)
    assert torch.allclose(halved.distance[2], plain.distance[2], atol=1e-5)
    assert torch.allclose(halved.previous[2], plain.previous[2] / 2, atol=1e-6)


def test_the_shares_of_all_tokens_sum_to_one():
    """And may be left out."""
    model = tiny("gpt2")
    found = attention_statistics(model, TEXTS)
    assert torch.allclose(found.source_shares.sum(-1), torch.ones(3, 3), atol=1e-5)
    without = attention_statistics(model, TEXTS, sources=False)
    assert torch.equal(without.entropy, found.entropy)
    with pytest.raises(ArgumentError, match="sources=True"):
        without.top_sources(0, 0)


def test_half_precision_and_hybrids():
    """Statistics are float32; a hybrid has those of its attention layer."""
    model, plain = lens.load(tiny_gpt2(dtype=torch.bfloat16)), attention_statistics(tiny("gpt2"), TEXTS)
    found = attention_statistics(model, TEXTS)
    assert found.entropy.dtype == torch.float32
    assert torch.allclose(found.entropy, plain.entropy, atol=0.05)
    hybrid = attention_statistics(tiny_hybrid(), TEXTS)
    assert hybrid.layers == (1,)
    assert hybrid.top_sources(1, 0, k=1)[0][0] in {token for ids in TEXTS for token in ids}
    with pytest.raises(ArgumentError, match=r"layers \[1\]"):
        hybrid.top_sources(0, 0)


def test_tables_and_pictures_hold_the_numbers():
    """By layer and head."""
    found = attention_statistics(tiny("gpt2"), ["w1 w2 w1 w3", "w4 w5"])
    frame = found.to_dataframe().set_index(["layer", "head"])
    assert set(STATISTICS) == set(frame.columns)
    assert frame.loc[(2, 1), "distance"] == pytest.approx(found.distance[2, 1].item())
    assert "nats" in found._repr_html_()
    with pytest.raises(ArgumentError, match="no statistic 'kurtosis'"):
        found.picture("kurtosis")


def test_what_cannot_be_is_refused():
    """By name, with what to do instead."""
    with pytest.raises(UnsupportedHookError, match="effective_attention"):
        attention_statistics(tiny("mamba2"), TEXTS)
    model = tiny("gpt2")
    with pytest.raises(EmptyInputError, match="one token only"):
        attention_statistics(model, [[1], [2]])
    with pytest.raises(EmptyInputError, match="no texts"):
        attention_statistics(model, [])
    with pytest.raises(ArgumentError, match="texts are strings"):
        attention_statistics(model, 5)
    with pytest.raises(ArgumentError, match="prepend_bos is for text"):
        attention_statistics(model, TEXTS, prepend_bos=True)
