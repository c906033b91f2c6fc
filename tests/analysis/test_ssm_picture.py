"""Effective attention as a picture: what it says of itself, and which maps it draws."""

import json
import re

import pytest
from analysis.ssm_subject import TOKENS
from golden.tiny_ssm import tiny_ssm

import lens_core as lens
from lens_core.analysis.ssm_picture import attention_picture
from lens_core.errors import ArgumentError

WORDS = [f"w{token}" for token in TOKENS[1].tolist()]


@pytest.fixture(scope="module")
def cache():
    """Give the cache of a tiny model."""
    return lens.load(tiny_ssm("mamba")).run_with_cache(TOKENS)[1]


def test_a_picture_says_that_it_is_no_softmax(cache):
    """And its scale has two sides, since entries are negative."""
    found = cache.effective_attention(1, heads=[4, 7])
    assert (found.values < 0).any()
    html = attention_picture(WORDS, found, row=1).html
    assert "rows do not sum to 1, and entries may be negative" in html
    assert "map-signed" in html
    assert "Effective attention, layer 1" in html
    names = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL)[1])
    assert [label for label in ("channel 4", "channel 7") if label in json.dumps(names)] == ["channel 4", "channel 7"]


def test_a_reduction_is_one_map(cache):
    """Also of a cache without a batch axis."""
    assert attention_picture(WORDS, cache.effective_attention(0, reduce="norm")).html.count("<canvas") == 1
    assert attention_picture(WORDS, cache.effective_attention(0, heads=slice(3))).html.count("<canvas") == 3
    row = cache.apply_slice_to_batch_dim(1)
    assert attention_picture(WORDS, row.effective_attention(0, heads=5)).html.count("<canvas") == 1


def test_parts_of_the_text_are_refused(cache):
    """A row or a column is no map."""
    for part in ({"target": -1}, {"source": 2}, {"target": [1, 2]}):
        with pytest.raises(ArgumentError, match="all targets and sources of the 8 tokens"):
            attention_picture(WORDS, cache.effective_attention(0, **part))
