"""Law 2: the value at a name equals its defining equation."""

import torch
from families.compare import same
from golden.tiny import random_tokens


def test_every_value_equals_golden(wide):
    """Law 2: every name, starred ones too, in a whole run, in float64."""
    tokens = random_tokens(2, 7)
    _, expected = wide.golden(tokens)
    with torch.no_grad():
        logits, cache = wide.model.run_with_cache(tokens, names_filter=wide.names())
    assert sorted(cache) == sorted(wide.names())
    same("logits", logits, expected["hook_logits"], 1e-9)
    for name in wide.names():
        same(name, cache[name], expected[name], 1e-9)
