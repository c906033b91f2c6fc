"""Collected activations against a cache of each text by itself."""

import pytest
import torch
from analysis.four_families import FAMILIES, tiny

from lens_core.analysis.activations import collect_activations
from lens_core.errors import ArgumentError, InputError, UnknownHookError, UnsupportedHookError

TEXTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [11, 12, 13, 14]]
NAMES = {
    "gpt2": ["resid_post", ("z", 1), ("pre", 0), "hook_embed"],
    "llama": ["resid_mid", ("v", 2), "ln_final.hook_normalized"],
    "mamba": ["resid_post", ("delta", 1), ("conv", 0)],
    "mamba2": ["resid_pre", ("y", 1), ("gated", 2)],
}


def alone(model, ids, name):
    """Give one text's values at a hook point, `[pos, width]`."""
    _, cache = model.run_with_cache(torch.tensor([ids]), names_filter=name)
    return cache[name][0].flatten(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_those_of_each_text_by_itself(family):
    """From either end, in batches with padding, at points of every kind."""
    model = tiny(family)
    found = collect_activations(model, iter(TEXTS), NAMES[family], positions=[1, -1], batch_size=3)
    assert found.names == model.table.select(NAMES[family]).names
    for name in found.names:
        expected = torch.stack([alone(model, ids, name)[[1, -1]] for ids in TEXTS])
        assert torch.allclose(found[name], expected, atol=1e-5), name
    assert found.tokens.tolist() == [[2, 5], [7, 7], [9, 10], [12, 14]]
    assert found.at.tolist() == [[1, 4], [1, 1], [1, 2], [1, 3]]
    assert [ids.tolist() for ids in found.ids] == TEXTS
    assert len(found) == 4


def test_each_text_may_have_its_own_positions():
    """As lists or a tensor."""
    model, where = tiny("gpt2"), [[0, 4], [-1, 0], [2, 1], [3, -2]]
    found = collect_activations(model, TEXTS, ("resid_post", 0), positions=where, batch_size=3)
    for row, (ids, own) in enumerate(zip(TEXTS, where, strict=True)):
        assert torch.allclose(
            found["resid_post", 0][row], alone(model, ids, "blocks.0.hook_resid_post")[own], atol=1e-5
        )
    again = collect_activations(model, TEXTS, ("resid_post", 0), positions=torch.tensor(where))
    assert torch.equal(again.at, found.at)
    assert again.positions == (0, 1)


def test_means_and_tokens_leave_padding_out():
    """A mean of each text; or every token an example, and which text it is of."""
    model, name = tiny("mamba2"), "blocks.1.hook_resid_post"
    mean = collect_activations(model, TEXTS, name, positions="mean")
    assert torch.allclose(mean[name][:, 0], torch.stack([alone(model, ids, name).mean(0) for ids in TEXTS]), atol=1e-5)
    every = collect_activations(model, TEXTS, name, positions="all", batch_size=3)
    assert torch.allclose(every[name][:, 0], torch.cat([alone(model, ids, name) for ids in TEXTS]), atol=1e-5)
    assert every.texts.tolist() == [0] * 5 + [1] * 2 + [2] * 3 + [3] * 4
    assert every.tokens[:, 0].tolist() == [token for ids in TEXTS for token in ids]


def test_blocks_that_are_not_needed_are_not_run():
    """Only hooks of the caller's own further on make them run, and then the edits before count."""
    model, ran = tiny("gpt2"), []
    handle = model.hf_model.transformer.h[2].register_forward_hook(lambda *_: ran.append(2))
    try:
        plain = collect_activations(model, TEXTS, ("resid_mid", 1))
        assert not ran
        with model.hooks([("resid_post", lambda value, hook: value * 2)]):
            edited = collect_activations(model, TEXTS, ("resid_pre", 1))
        assert ran
    finally:
        handle.remove()
    expected = 2 * collect_activations(model, TEXTS, ("resid_post", 0))["resid_post", 0]
    assert torch.allclose(edited["resid_pre", 1], expected, atol=1e-6)
    assert plain.names == ("blocks.1.hook_resid_mid",)


def test_what_cannot_be_is_refused():
    """By name, with the value."""
    model = tiny("gpt2")
    for names, error, message in [
        ("pattern", UnsupportedHookError, "'batch pos'"),
        (None, ArgumentError, "hook points"),
        ("hook_residual", UnknownHookError, "did you mean"),
    ]:
        with pytest.raises(error, match=message):
            collect_activations(model, TEXTS, names)
    with pytest.raises(UnsupportedHookError, match="a position at a time"):
        collect_activations(tiny("mamba"), TEXTS, "ssm_state")
    for positions, error, message in [
        (2, InputError, "text 1 has 2 tokens, and no position 2"),
        ("last", ArgumentError, "'last'"),
        (slice(0, 2), ArgumentError, "slice"),
        ([[0], [1]], ArgumentError, "positions name 2 texts"),
        ([[0]] * 5, ArgumentError, "positions name 5 texts, and there are 4"),
        ([[0], [0, 1], [0], [0]], ArgumentError, "different lengths"),
    ]:
        with pytest.raises(error, match=message):
            collect_activations(model, TEXTS, positions=positions)
    with pytest.raises(ArgumentError, match="was not collected"):
        collect_activations(model, TEXTS, ("resid_post", 0))["resid_post", 1]
