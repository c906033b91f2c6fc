"""Law 1: every name fires exactly once per call of the model; the table declares names, shapes and defaults."""

from collections import Counter

import pytest
import torch
from families.compare import run
from golden.tiny import random_tokens
from transformers import DynamicCache


class Record:
    """A reading function that remembers every call."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, hook):
        """Note what the function is told, and return nothing."""
        self.calls.append((hook.name, tuple(x.shape), hook.positions.tolist(), hook.step, hook.is_prefill))

    def counts(self):
        """Count the calls by name."""
        return Counter(name for name, *_ in self.calls)


def expected_counts(one, calls, length):
    """Count one call per name and call, one per position where the subject says so."""
    return {name: length if one.subject.per_position(name) else calls for name in one.names()}


def table_of(one):
    """Give the model's hook points by name, `hf.` names aside."""
    return {point.name: point for point in one.model.hook_points() if not point.name.startswith("hf.")}


@pytest.mark.once
def test_table_holds_every_name_of_the_contract(subject, narrow):
    """Law 1: the contract's names, each once, starred ones as not default, with their layers."""
    table, points = table_of(narrow), narrow.model.hook_points()
    assert len(points) == len({point.name for point in points})
    assert sorted(table) == sorted(narrow.names())
    assert [name for name in narrow.names() if table[name].default == subject.is_starred(name)] == []
    for name, point in table.items():
        assert point.layer == (int(name.split(".")[1]) if name.startswith("blocks.") else None), name


@pytest.mark.once
def test_declared_shapes_are_observed(subject, narrow):
    """Law 1: the table's axes, with the config's sizes put in, are the shapes of the values."""
    sizes = {"batch": 2, "pos": 5, "query": 5, "key": 5, "1": 1, **subject.sizes(narrow.config)}
    _, cache = run(narrow, random_tokens(2, 5))
    for name, point in table_of(narrow).items():
        axes = [size_of(axis, sizes) for axis in point.shape.replace("(", " ").replace(")", " ").split()]
        assert tuple(cache[name].shape) == tuple(axes), f"{name}: {point.shape}"


def size_of(axis, sizes):
    """Give the size of an axis, which may be a sum of products of sizes such as `2*d_inner+2*n_groups*d_state`."""
    names = axis.replace("*", " ").replace("+", " ").split()
    assert all(name.isdigit() or name in sizes for name in names), f"unknown axis {axis}"
    total = 0
    for term in axis.split("+"):
        product = 1
        for factor in term.split("*"):
            product *= int(factor) if factor.isdigit() else sizes[factor]
        total += product
    return total


@pytest.mark.once
def test_default_cache_is_every_name_without_a_star(subject, narrow):
    """Law 1: run_with_cache without a filter holds exactly the names without a star."""
    with torch.no_grad():
        _, cache = narrow.model.run_with_cache(random_tokens())
    assert sorted(cache) == sorted(name for name in narrow.names() if not subject.is_starred(name))


def test_each_name_fires_once_in_a_whole_run(narrow):
    """Law 1: one call of the model, one call of the function, for all names at once, reading and editing."""
    for change in (lambda x: None, lambda x: x * 0.9 if x.is_floating_point() else x):
        record = Record()

        def note(x, hook, record=record, change=change):
            record(x, hook)
            return change(x)

        with torch.no_grad():
            narrow.model.run_with_hooks(random_tokens(), fwd_hooks=[(name, note) for name in narrow.names()])
        assert record.counts() == expected_counts(narrow, 1, 5)


@pytest.mark.once
@pytest.mark.sampled
def test_each_name_fires_once_alone(narrow):
    """Law 1: a name asked for alone fires once, as itself."""
    for name in narrow.edited_names():
        record = Record()
        with torch.no_grad():
            narrow.model.run_with_hooks(random_tokens(1, 3), fwd_hooks=[(name, record)])
        assert record.counts() == {name: 3 if narrow.subject.per_position(name) else 1}, name


@pytest.mark.sampled
def test_each_name_fires_once_per_prefill_and_decode_step(subject, narrow):
    """Law 1: prefill, then steps of one and of two tokens: one call each, with this call's positions."""
    tokens, cache = random_tokens(2, 7), DynamicCache(config=narrow.hf.config)
    for start, stop in subject.calls(0, 3, 4, 6, 7):
        record = Record()
        with torch.no_grad(), narrow.model.hooks(fwd_hooks=[(name, record) for name in narrow.names()]):
            narrow.model(tokens[:, start:stop], past_key_values=cache, use_cache=True)
        assert record.counts() == expected_counts(narrow, 1, stop - start)
        for name, shape, positions, _, is_prefill in record.calls:
            assert is_prefill == (start == 0), name
            if subject.per_position(name):
                continue
            if subject.pos_axis(name) is None:  # those of the keys that the model's own cache still has
                assert positions == list(range(stop))[-shape[1] :], name
                continue
            assert positions == list(range(start, stop)), name
            assert shape[subject.pos_axis(name)] == stop - start, name
            if subject.key_axis(name) is not None:
                assert shape[subject.key_axis(name)] == stop, name


@pytest.mark.sampled
@pytest.mark.parametrize("how", ["lens", "hf"])
def test_each_name_fires_once_per_generation_step(narrow, how):
    """Law 1: generation calls every function once a step, the steps numbered from the prompt's 0."""
    tokens, record = random_tokens(2, 4), Record()
    with torch.no_grad(), narrow.model.hooks(fwd_hooks=[(name, record) for name in narrow.names()]):
        if how == "lens":
            narrow.model.generate(tokens, max_new_tokens=4, do_sample=False, stop_at_eos=False)
        else:
            mask = torch.ones_like(tokens)
            narrow.hf.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert record.counts() == expected_counts(narrow, 4, 7)
    for name in narrow.names():
        calls = [call for call in record.calls if call[0] == name]
        if not narrow.subject.per_position(name) and narrow.subject.pos_axis(name) is not None:
            assert [call[2] for call in calls] == [[0, 1, 2, 3], [4], [5], [6]], name
            assert [call[3] for call in calls] == [0, 1, 2, 3], name
            assert [call[4] for call in calls] == [True, False, False, False], name
