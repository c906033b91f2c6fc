"""Head detection against TransformerLens' definition, cell by cell."""

import math
from itertools import product

import pytest
import torch
from analysis.four_families import tiny, tiny_hybrid
from golden.tiny import random_tokens, tiny_gpt2

import lens_core as lens
from lens_core.analysis import head_detection
from lens_core.errors import ArgumentError, CacheError, ContextLengthError, UnsupportedHookError

MODELS = {family: tiny(family) for family in ("gpt2", "llama")}
TOKENS = random_tokens(1, 11, vocab=5)
KINDS = {
    "previous_token_head": lambda ids, q, k: k == q - 1,
    "duplicate_token_head": lambda ids, q, k: k < q and ids[k] == ids[q],
    "induction_head": lambda ids, q, k: 0 < k <= q and ids[k - 1] == ids[q],
}


def by_cells(pattern, ids, looks, measure, bos, current):
    """Sum over cells as TransformerLens defines it; `looks(ids, query, key)` says what is looked for."""
    match = total = off = 0.0
    for q, row in enumerate(pattern.tolist()):
        for k, weight in enumerate(row):
            if (bos and k == 0) or (current and k == q):
                continue
            wanted = float(looks(ids, q, k))
            match, total, off = match + weight * wanted, total + weight, off + abs(weight - wanted)
    return match / total if measure == "mul" else 1 - off / len(pattern)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_sums_over_cells(family, kind):
    """Every kind, measure and exclusion; grouped-query attention too."""
    model, ids = MODELS[family], TOKENS[0].tolist()
    _, cache = model.run_with_cache(TOKENS, names_filter="pattern")
    for measure, bos, current in product(("mul", "abs"), (False, True), (False, True)):
        found = head_detection.detect_head(
            model, TOKENS, kind, exclude_bos=bos, exclude_current_token=current, error_measure=measure
        )
        assert found.shape == (model.cfg.n_layers, model.cfg.n_heads)
        for layer, head in [(0, 0), (1, 2), (2, 1)]:
            expected = by_cells(cache["pattern", layer][0, head], ids, KINDS[kind], measure, bos, current)
            assert found[layer, head].item() == pytest.approx(expected, abs=1e-5)


def test_a_token_that_repeats_at_once_is_looked_at_itself():
    """TransformerLens' induction pattern has such cells on the diagonal; `heads.induction_places` has not."""
    assert head_detection.get_induction_head_detection_pattern(torch.tensor([[3, 3, 4]]))[1].tolist() == [0, 1, 0]


def test_a_cache_is_read_and_left_as_it_is():
    """With and without a batch axis; TransformerLens writes zeros into it."""
    model = MODELS["gpt2"]
    _, cache = model.run_with_cache(TOKENS)
    before = {name: cache[name].clone() for name in cache}
    options = {"exclude_bos": True, "exclude_current_token": True}
    plain = head_detection.detect_head(model, TOKENS, "induction_head", **options)
    for own in (cache, cache.remove_batch_dim()):
        assert torch.equal(head_detection.detect_head(model, TOKENS, "induction_head", None, own, **options), plain)
    assert all(torch.equal(cache[name], before[name].reshape(cache[name].shape)) for name in cache)


def test_several_texts_are_averaged_with_the_same_options():
    """TransformerLens drops heads, exclusions and measure there."""
    model = MODELS["gpt2"]
    texts = ["w1 w2 w3 w1 w2", "w4 w4 w5", "w6 w7 w6 w7 w8 w6"]
    options = {"heads": [(1, 2), (0, 1)], "exclude_bos": True, "error_measure": "abs"}
    each = [head_detection.detect_head(model, text, "duplicate_token_head", **options) for text in texts]
    found = head_detection.detect_head(model, texts, "duplicate_token_head", **options)
    assert torch.allclose(found, sum(each) / 3, atol=1e-6)
    assert not torch.allclose(found, head_detection.detect_head(model, texts, "duplicate_token_head"))


def test_only_the_heads_asked_for_are_scored():
    """As pairs or by layer; the others are -1."""
    model = MODELS["gpt2"]
    whole = head_detection.detect_head(model, TOKENS, "previous_token_head")
    for heads in ([(1, 2), (0, 0), (1, 0)], {1: [2, 0], 0: [0]}):
        found = head_detection.detect_head(model, TOKENS, "previous_token_head", heads)
        asked = torch.zeros(3, 3, dtype=torch.bool)
        asked[1, 2] = asked[0, 0] = asked[1, 0] = True
        assert torch.equal(found[asked], whole[asked])
        assert (found[~asked] == -1).all()


def test_a_pattern_of_ones_own():
    """Half the weight wanted on the first token, half on the token itself."""
    model = MODELS["gpt2"]
    wanted = torch.eye(11) / 2
    wanted[:, 0] += 0.5
    found = head_detection.detect_head(model, TOKENS, wanted, error_measure="abs")
    _, cache = model.run_with_cache(TOKENS)
    expected = by_cells(
        cache["pattern", 2][0, 1], None, lambda _, q, k: (0.5 if k == 0 else 0) + (0.5 if k == q else 0), "abs", 0, 0
    )
    assert found[2, 1].item() == pytest.approx(expected, abs=1e-5)


def test_nothing_but_bos_to_look_at_is_no_share():
    """0 of 0, as in TransformerLens."""
    pattern = torch.zeros(3, 3)
    pattern[:, 0] = 1.0
    options = {"exclude_bos": True, "exclude_current_token": False, "error_measure": "mul"}
    assert math.isnan(head_detection.compute_head_attention_similarity_score(pattern, torch.eye(3), **options))
    assert pattern[:, 0].tolist() == [1, 1, 1]


def test_half_precision_is_summed_in_single():
    """And the scores are float32."""
    model = lens.load(tiny_gpt2(dtype=torch.bfloat16))
    found = head_detection.detect_head(model, TOKENS, "previous_token_head")
    plain = head_detection.detect_head(MODELS["gpt2"], TOKENS, "previous_token_head")
    assert found.dtype == torch.float32
    assert torch.allclose(found, plain, atol=0.05)


def test_layers_without_attention_are_not_scored():
    """In a hybrid they are -1, and may not be asked for; a state-space model is refused."""
    model = tiny_hybrid()
    found = head_detection.detect_head(model, TOKENS, "previous_token_head")
    assert (found[[0, 2]] == -1).all()
    assert (found[1] > 0).all()
    with pytest.raises(ArgumentError, match=r"layers \[1\] with heads .*; got \(0, 0\)"):
        head_detection.detect_head(model, TOKENS, "previous_token_head", [(0, 0)])
    with pytest.raises(UnsupportedHookError, match="effective=True"):
        head_detection.detect_head(tiny("mamba"), TOKENS, "previous_token_head")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"detection_pattern": "induction"}, ArgumentError, "one of previous_token_head"),
        ({"detection_pattern": torch.ones(11, 11)}, ArgumentError, "lower triangular"),
        ({"detection_pattern": torch.eye(10)}, ArgumentError, r"\[11, 11\]"),
        ({"error_measure": "sum"}, ArgumentError, "'mul' or 'abs'; got 'sum'"),
        ({"heads": [(0, 3)]}, ArgumentError, r"got \(0, 3\)"),
        ({"heads": []}, ArgumentError, "no heads"),
        ({"seq": torch.tensor([5])}, ContextLengthError, "1 token"),
        ({"seq": ["w1 w2", "w3 w4"], "cache": "some"}, ArgumentError, "there are 2"),
        ({"seq": TOKENS[:, :5], "cache": "some"}, CacheError, "5 tokens"),
        ({"seq": torch.rand(4)}, ArgumentError, "ids"),
    ],
)
def test_what_cannot_be_is_refused(change, error, message):
    """By name, with the value."""
    model = MODELS["gpt2"]
    if "cache" in change:
        change = {**change, "cache": model.run_with_cache(TOKENS, names_filter="pattern")[1]}
    with pytest.raises(error, match=message):
        head_detection.detect_head(model, **{"seq": TOKENS, "detection_pattern": "induction_head", **change})
