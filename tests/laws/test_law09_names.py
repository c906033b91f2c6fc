"""Law 9: unknown names raise with near matches; short forms and aliases are one name; filters see canonical names."""

import warnings

import pytest
import torch
from golden.tiny import random_tokens
from lens_conformance.edits import bend
from lens_conformance.golden.gpt2 import is_starred

from lens_core import errors

SHORT = {
    ("q", 0): "blocks.0.attn.hook_q",
    ("k", 1): "blocks.1.attn.hook_k",
    ("v", 2): "blocks.2.attn.hook_v",
    ("z", -1): "blocks.2.attn.hook_z",
    ("z", -3): "blocks.0.attn.hook_z",
    ("pattern", 1): "blocks.1.attn.hook_pattern",
    ("attn_scores", 1): "blocks.1.attn.hook_attn_scores",
    ("result", 1): "blocks.1.attn.hook_result",
    ("resid_pre", 0): "blocks.0.hook_resid_pre",
    ("resid_mid", 0): "blocks.0.hook_resid_mid",
    ("resid_post", 2): "blocks.2.hook_resid_post",
    ("attn_out", 1): "blocks.1.hook_attn_out",
    ("mlp_out", 1): "blocks.1.hook_mlp_out",
    ("mlp_in", 1): "blocks.1.hook_mlp_in",
    ("attn_in", 1): "blocks.1.hook_attn_in",
    ("q_input", 1): "blocks.1.hook_q_input",
    ("pre", 1): "blocks.1.mlp.hook_pre",
    ("post", 1): "blocks.1.mlp.hook_post",
    ("scale", 1, "ln1"): "blocks.1.ln1.hook_scale",
    ("normalized", 1, "ln2"): "blocks.1.ln2.hook_normalized",
    "embed": "hook_embed",
    "pos_embed": "hook_pos_embed",
    "blocks.1.attn.hook_z": "blocks.1.attn.hook_z",
}
UNKNOWN = {
    "blocks.1.attn.hook_zz": "blocks.1.attn.hook_z",
    "blocks.1.hook_resid_pree": "blocks.1.hook_resid_pre",
    "blocks.1.attn.hook_patern": "blocks.1.attn.hook_pattern",
    "ln_finl.hook_scale": "ln_final.hook_scale",
}


def nothing(x, hook):
    """Read and return nothing."""


@pytest.mark.parametrize("short", sorted(SHORT, key=str), ids=str)
def test_short_forms_are_the_canonical_name_everywhere(subject, short):
    """Law 9: a short form in cache, filter, fwd_hooks, add_hook and caching is the one canonical name."""
    one, tokens, seen, name = subject(), random_tokens(), [], SHORT[short]
    _, cache = one.model.run_with_cache(tokens, names_filter=one.names())
    assert cache[short] is cache[name]
    assert short in cache
    _, alone = one.model.run_with_cache(tokens, names_filter=[short])
    assert list(alone) == [name]
    entry = (short, lambda x, hook: seen.append(hook.name))
    one.model.run_with_hooks(tokens, fwd_hooks=[entry])
    one.model.add_hook(*entry)
    one.model(tokens)
    one.model.reset_hooks()
    one.model(tokens)
    assert seen == [name, name]
    with one.model.caching([short]) as cache:
        one.model(tokens)
    assert list(cache) == [name]


def test_one_point_asked_for_twice_is_one_entry(subject):
    """Law 9: the canonical name, a short form and a filter for one point fire its cache once and keep one entry."""
    one, tokens = subject(), random_tokens()
    _, cache = one.model.run_with_cache(tokens, names_filter=[("z", 1), "blocks.1.attn.hook_z", ("z", -2)])
    assert list(cache) == ["blocks.1.attn.hook_z"]
    assert len(cache) == 1


@pytest.mark.parametrize("name", sorted(UNKNOWN))
def test_unknown_names_raise_with_near_matches(subject, name):
    """Law 9: wherever a name is taken, an unknown one raises before anything runs, and offers what is near."""
    one, tokens = subject(), random_tokens()
    _, cache = one.model.run_with_cache(tokens)
    asks = [
        lambda: one.model.run_with_hooks(tokens, fwd_hooks=[(name, nothing)]),
        lambda: one.model.run_with_hooks(tokens, bwd_hooks=[(name, nothing)]),
        lambda: one.model.run_with_cache(tokens, names_filter=name),
        lambda: one.model.run_with_cache(tokens, names_filter=[name]),
        lambda: one.model.add_hook(name, nothing),
        lambda: one.model.hook_dict[name],
        lambda: one.model.hooks(fwd_hooks=[(name, nothing)]).__enter__(),
        lambda: one.model.caching([name]).__enter__(),
    ]
    for number, ask in enumerate(asks):
        with pytest.raises(errors.UnknownHookError) as caught:
            ask()
        assert name in str(caught.value), number
        assert UNKNOWN[name] in str(caught.value), f"way {number}: {caught.value}"
    with pytest.raises(KeyError):
        cache[name]
    assert torch.equal(one.model(tokens), one.reference(tokens).logits)


@pytest.mark.parametrize("name", [("q", 3), ("q", -4), ("zz", 0), (), 3, None, ("q", "x"), ("scale", 1)], ids=str)
def test_short_forms_that_mean_nothing_raise(subject, name):
    """Law 9: layers out of range, unknown short forms and other types raise an error of the tree."""
    with pytest.raises(errors.LensError):
        subject().model.run_with_hooks(random_tokens(), fwd_hooks=[(name, nothing)])


def test_a_layer_that_is_not_there_is_unknown(subject):
    """Law 9: a name of a layer beyond the model's depth raises."""
    with pytest.raises(errors.UnknownHookError):
        subject().model.run_with_hooks(random_tokens(), fwd_hooks=[("blocks.3.hook_resid_pre", nothing)])
    with pytest.raises(errors.UnknownHookError):
        subject().model.run_with_hooks(random_tokens(), fwd_hooks=[("hf.transformer.h.3.output", nothing)])


def test_filters_see_canonical_names_only(subject):
    """Law 9: a filter function is asked about canonical names, each of them, and never `hf.` ones."""
    one, asked = subject(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.CostWarning)
        one.model.run_with_cache(random_tokens(), names_filter=lambda name: asked.append(name) or name == "hook_embed")
        assert sorted(set(asked)) == sorted(one.names())
        asked.clear()
        entry = (lambda name: asked.append(name) or name == "hook_embed", nothing)
        one.model.run_with_hooks(random_tokens(), fwd_hooks=[entry])
        assert sorted(set(asked)) == sorted(one.names())


def test_a_filter_selects_exactly_its_names(subject):
    """Law 9: filters give exactly the subset, with the same values as the whole."""
    one, tokens = subject(), random_tokens()
    _, whole = one.model.run_with_cache(tokens, names_filter=one.names())
    for keep in (lambda n: "resid" in n, lambda n: n.startswith("blocks.1.attn.hook_") and "result" not in n):
        _, cache = one.model.run_with_cache(tokens, names_filter=keep)
        assert sorted(cache) == sorted(n for n in one.names() if keep(n))
        assert all(torch.equal(cache[name], whole[name]) for name in cache)


def test_a_filter_for_starred_names_warns_with_the_bytes(subject):
    """Law 9: asking for starred names by a filter warns with what it costs; naming them does not."""
    one, tokens = subject(), random_tokens()
    for pick in ("hook_result", "hook_q_input", "hook_mlp_in"):
        with pytest.warns(errors.CostWarning, match=r"\d"):
            _, cache = one.model.run_with_cache(tokens, names_filter=lambda name, p=pick: name.endswith(p))
        assert len(cache) == 3
        with pytest.warns(errors.CostWarning):
            one.model.run_with_hooks(tokens, fwd_hooks=[(lambda name, p=pick: name.endswith(p), nothing)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.model.run_with_cache(tokens, names_filter=[name for name in one.names() if is_starred(name)])
        one.model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_z"))
        one.model.run_with_cache(tokens)


def test_the_warned_bytes_are_the_cost(subject):
    """Law 9: the number of bytes in the warning is what those tensors take."""
    one, tokens = subject(), random_tokens(2, 5)
    with pytest.warns(errors.CostWarning) as caught:
        _, cache = one.model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_result"))
    cost = sum(value.numel() * value.element_size() for value in cache.values())
    text = str(caught[0].message).replace(",", "").replace("_", "")
    assert any(form in text for form in (f"{cost} ", f"{cost / 1e3:.1f}", f"{cost / 1024:.1f}")), text


def test_a_filter_that_matches_nothing_is_an_error(subject):
    """Law 9: filters and lists that select nothing raise, and name the filter's place."""
    one, tokens = subject(), random_tokens()
    with pytest.raises(errors.EmptyFilterError):
        one.model.run_with_cache(tokens, names_filter=lambda name: False)
    with pytest.raises(errors.EmptyFilterError):
        one.model.run_with_hooks(tokens, fwd_hooks=[(lambda name: False, nothing)])


@pytest.mark.parametrize("wrong", [3, 1.5, {"a": 1}, object(), [3], b"z", True], ids=lambda wrong: type(wrong).__name__)
def test_a_filter_of_a_wrong_type_is_an_error(subject, wrong):
    """Law 9: names_filter is a name, a list of names, a function or None."""
    with pytest.raises(errors.LensError):
        subject().model.run_with_cache(random_tokens(), names_filter=wrong)


def test_hook_dict_is_the_table(subject):
    """Law 9: hook_dict holds the canonical names, and adding there is add_hook."""
    one, tokens, seen = subject(), random_tokens(), []
    assert set(one.names()) <= set(one.model.hook_dict)
    one.model.hook_dict["blocks.1.attn.hook_z"].add_hook(lambda x, hook: seen.append(hook.name))
    one.model(tokens)
    one.model.reset_hooks()
    one.model(tokens)
    assert seen == ["blocks.1.attn.hook_z"]


def test_a_position_outside_of_the_input_is_an_error(subject):
    """Where nothing continues the call, a function that would never be called is a mistake; elsewhere it may come."""
    one, tokens = subject(), random_tokens(1, 5)
    for name in ("blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"):
        for position in (5, -6, [3, 99]):
            with pytest.raises(errors.ArgumentError, match=r"is for position (5|-6|99), and the input has 5"):
                one.model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: None, position)])
        with torch.no_grad():
            assert torch.equal(
                one.model.run_with_hooks(tokens, fwd_hooks=[(name, bend, slice(5, 9))]), one.model(tokens)
            )
            one.model.run_with_hooks(tokens, fwd_hooks=[(name, bend, 7)], return_state=True)
            with one.model.hooks(fwd_hooks=[(name, bend, 6)]):
                generated = one.model.generate(tokens, 3, do_sample=False, stop_at_eos=False)
        assert generated.shape[1] == 8


def test_a_single_hook_that_is_no_list_says_so(subject):
    """The list is what was forgotten."""
    with pytest.raises(errors.ArgumentError, match="fwd_hooks is a list"):
        subject().model.run_with_hooks(random_tokens(), fwd_hooks=("hook_embed", bend))
