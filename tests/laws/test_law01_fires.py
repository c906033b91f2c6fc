"""Law 1: every name fires exactly once per call of the model, and a name that did not fire is an error."""

from collections import Counter

import pytest
import torch
from golden.tiny import random_tokens
from lens_conformance.golden.gpt2 import names
from transformers import DynamicCache

from lens_core import errors


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


def test_table_holds_every_name_of_the_contract(subject):
    """Law 1: the model's table declares the contract's names, each once, starred ones as not default."""
    one = subject()
    points = one.model.hook_points()
    table = {point.name: point for point in points if not point.name.startswith("hf.")}
    assert len(points) == len({point.name for point in points})
    assert sorted(table) == sorted(one.names())
    starred = ("attn_in", "q_input", "k_input", "v_input", "hook_result", "mlp_in")
    assert [name for name in one.names() if table[name].default == name.endswith(starred)] == []
    for name, point in table.items():
        assert point.layer == (int(name.split(".")[1]) if name.startswith("blocks.") else None), name


def test_each_name_fires_once_in_a_whole_run(subject, attn):
    """Law 1: one call of the model, one call of the function, for all names at once."""
    one, record = subject(attn=attn), Record()
    one.model.run_with_hooks(random_tokens(), fwd_hooks=[(name, record) for name in one.names()])
    assert record.counts() == dict.fromkeys(one.names(), 1)


@pytest.mark.parametrize("name", [name for name in names(3) if "blocks.0" not in name and "blocks.2" not in name])
def test_each_name_fires_once_alone(subject, name):
    """Law 1: a name asked for alone fires once, as itself."""
    one, record = subject(), Record()
    one.model.run_with_hooks(random_tokens(), fwd_hooks=[(name, record)])
    assert [call[0] for call in record.calls] == [name]


def test_each_name_fires_once_when_it_edits(subject, attn):
    """Law 1: functions that all return something new are each called once."""
    one, record = subject(attn=attn), Record()

    def edit(x, hook):
        record(x, hook)
        return x * 0.9 if x.is_floating_point() else x

    one.model.run_with_hooks(random_tokens(), fwd_hooks=[(name, edit) for name in one.names()])
    assert record.counts() == dict.fromkeys(one.names(), 1)


def test_each_name_fires_once_per_prefill_and_decode_step(subject, attn):
    """Law 1: prefill, then steps of one and of two tokens: one call each, with this call's positions."""
    one, tokens = subject(attn=attn), random_tokens(2, 7)
    cache = DynamicCache(config=one.hf.config)
    for start, stop in ((0, 3), (3, 4), (4, 6), (6, 7)):
        record = Record()
        with torch.no_grad(), one.model.hooks(fwd_hooks=[(name, record) for name in one.names()]):
            one.model(tokens[:, start:stop], past_key_values=cache, use_cache=True)
        assert record.counts() == dict.fromkeys(one.names(), 1)
        for name, shape, positions, _, is_prefill in record.calls:
            assert positions == list(range(start, stop)), name
            assert is_prefill == (start == 0), name
            if name.endswith(("scores", "pattern")):
                assert shape == (2, 3, stop - start, stop), name
            else:
                assert shape[:2] == (2, stop - start), name


@pytest.mark.parametrize("how", ["lens", "hf"])
def test_each_name_fires_once_per_generation_step(subject, attn, how):
    """Law 1: generation calls every function once a step, the steps numbered from the prompt's 0."""
    one, tokens, record = subject(attn=attn), random_tokens(2, 4), Record()
    forwards = []
    handle = one.hf.register_forward_pre_hook(lambda module, args: forwards.append(1))
    with one.model.hooks(fwd_hooks=[(name, record) for name in one.names()]):
        if how == "lens":
            one.model.generate(tokens, max_new_tokens=4, do_sample=False, stop_at_eos=False)
        else:
            mask = torch.ones_like(tokens)
            one.hf.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    handle.remove()
    assert len(forwards) == 4
    assert record.counts() == dict.fromkeys(one.names(), 4)
    for name in one.names():
        calls = [call for call in record.calls if call[0] == name]
        assert [call[2] for call in calls] == [[0, 1, 2, 3], [4], [5], [6]], name
        assert [call[1][2 if name.endswith(("scores", "pattern")) else 1] for call in calls] == [4, 1, 1, 1], name
        assert [call[3] for call in calls] == [0, 1, 2, 3], name
        assert [call[4] for call in calls] == [True, False, False, False], name


def test_beams_are_more_rows_of_one_call(subject):
    """Law 1: with beams a step is one call whose batch is rows times beams."""
    one, tokens, record = subject(), random_tokens(2, 4), Record()
    with one.model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", record)]):
        mask = torch.ones_like(tokens)
        one.hf.generate(tokens, attention_mask=mask, max_new_tokens=3, num_beams=3, do_sample=False, eos_token_id=None)
    assert [call[1][0] for call in record.calls] == [6, 6, 6]


def test_hook_knows_its_name_layer_and_context(subject):
    """Law 1: a function is told the canonical name and the layer, positions as a 1-D LongTensor, and keeps a ctx."""
    one, seen = subject(), []

    def look(x, hook):
        assert hook.positions.dtype == torch.long
        assert hook.positions.ndim == 1
        hook.ctx["seen"] = hook.ctx.get("seen", 0) + 1
        seen.append((hook.name, hook.layer() if hook.name.startswith("blocks.") else None, hook.ctx["seen"]))

    with one.model.hooks(fwd_hooks=[(("z", 2), look), ("hook_embed", look)]):
        one.model(random_tokens())
        one.model(random_tokens())
    expected = [("hook_embed", None, 1), ("blocks.2.attn.hook_z", 2, 1), ("hook_embed", None, 2)]
    assert seen == [*expected, ("blocks.2.attn.hook_z", 2, 2)]


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_post", "blocks.2.attn.hook_pattern", "ln_final.hook_out"])
def test_a_name_beyond_the_stop_is_an_error(subject, name):
    """Law 1: what stop_at_layer leaves out is an error naming it, if it was named exactly."""
    one = subject()
    with pytest.raises(errors.HookDidNotFireError, match=name):
        one.model.run_with_hooks(random_tokens(), fwd_hooks=[(name, Record())], stop_at_layer=1)
    with pytest.raises(errors.HookDidNotFireError, match=name):
        one.model.run_with_cache(random_tokens(), names_filter=[name], stop_at_layer=1)


def test_a_filter_beyond_the_stop_is_no_error(subject):
    """Law 1: a filter's names that stop_at_layer or start_at_layer leaves out are exempt."""
    one, record = subject(), Record()
    one.model.run_with_hooks(
        random_tokens(), fwd_hooks=[(lambda name: name.endswith("hook_resid_pre"), record)], stop_at_layer=2
    )
    assert record.counts() == {"blocks.0.hook_resid_pre": 1, "blocks.1.hook_resid_pre": 1}
    _, cache = one.model.run_with_cache(random_tokens(), stop_at_layer=1)
    assert {name.split(".")[1] for name in cache if name.startswith("blocks.")} == {"0"}
    residual = cache["resid_post", 0]
    _, cache = one.model.run_with_cache(residual, start_at_layer=1)
    assert {name.split(".")[1] for name in cache if name.startswith("blocks.")} == {"1", "2"}


def test_a_name_before_the_start_is_an_error(subject):
    """Law 1: what start_at_layer leaves out is an error naming it, if it was named exactly."""
    one = subject()
    residual = torch.randn(1, 4, 21)
    with pytest.raises(errors.HookDidNotFireError, match=r"blocks\.0\.hook_resid_post"):
        one.model.run_with_hooks(residual, fwd_hooks=[("blocks.0.hook_resid_post", Record())], start_at_layer=1)


def test_tokens_are_absent_with_embeddings(subject):
    """Law 1: with embeddings as input hook_tokens cannot fire: an error if named, left out of a filter."""
    one, embeds = subject(), torch.randn(1, 4, 21)
    with pytest.raises(errors.HookError, match="hook_tokens"):
        one.model.run_with_hooks(embeds, fwd_hooks=[("hook_tokens", Record())])
    _, cache = one.model.run_with_cache(embeds)
    assert "hook_tokens" not in cache
    torch.testing.assert_close(cache["hook_embed"], embeds)


def test_hf_names_that_never_fire_are_exempt(subject):
    """Law 1: `hf.` names may stay silent: GPT-2's attention dropout is never called as a module."""
    one, record = subject(), Record()
    one.model.run_with_hooks(random_tokens(), fwd_hooks=[("hf.transformer.h.0.attn.attn_dropout.output", record)])
    assert record.calls == []
