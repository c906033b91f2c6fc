"""Several SAEs, and what a block leaves when it ends."""

import contextlib
from typing import Any

import pytest
import torch
from lens_conformance.float64 import true_float64
from sae.sae_subject import TOKENS, by_hand, handmade, made
from torch import Tensor

import lens_core as lens
from lens_core.errors import HookDidNotFireError, SaeError, UnknownHookError


def test_two_saes_and_one_in_a_block_of_its_own(subjects):
    """Together, nested, and an SAE of what another one leaves."""
    subject = subjects["gpt2"]
    first, second = "blocks.0.hook_mlp_out", "blocks.2.hook_resid_pre"
    (a, wa), (b, wb) = made("standard", 21, seed=1), made("gated", 21, seed=2)
    expected, _ = subject.golden({first: handmade(a, wa), second: handmade(b, wb)})
    with true_float64():
        with subject.model.saes({first: a, second: b}):
            together = subject.model(TOKENS)
        with subject.model.saes({first: a}), subject.model.saes({second: b}):
            nested, cache = subject.model.run_with_cache(TOKENS, names_filter="*.hook_sae_acts_post")
        assert "hook_sae" not in " ".join(subject.model.table)
    assert torch.equal(together, nested)
    assert (together - expected).abs().max() < 1e-9
    assert list(cache) == [f"{first}.hook_sae_acts_post", f"{second}.hook_sae_acts_post"]
    assert cache["sae_acts_post", 2, "hook_resid_pre"].shape == (2, 6, 23)

    error = f"{first}.hook_sae_error"
    _, values = subject.golden()
    with true_float64(), subject.model.saes({first: a}, use_error_term=True), subject.model.saes({error: b}):
        _, cache = subject.model.run_with_cache(TOKENS, names_filter=[error, f"{error}.hook_sae_input", first])
    x = values[first]
    left = x - by_hand({"architecture": "standard"}, wa, x)["recons"]
    assert torch.allclose(cache[f"{error}.hook_sae_input"], left, atol=1e-9)
    assert torch.allclose(cache[error], by_hand({"architecture": "gated"}, wb, left)["recons"], atol=1e-9)
    assert torch.allclose(cache[first], x - left + cache[error], atol=1e-9)


def test_one_hook_point_has_one_sae(subjects):
    """In one block, and in blocks around each other."""
    model, name = subjects["gpt2"].model, "blocks.0.hook_mlp_out"
    sae = made("standard", 21, hook_name=name)[0]
    with pytest.raises(SaeError, match="has an SAE already"), model.saes([sae, sae]):
        pass
    with model.saes(sae), pytest.raises(SaeError, match="has an SAE already"), model.saes({("mlp_out", 0): sae}):
        pass


def test_hooks_at_the_place_see_what_goes_in_or_what_comes_out(subjects):
    """Those of blocks around it the one, those inside the other; added ones come first of all."""
    model, name = subjects["gpt2"].model, "blocks.1.hook_resid_post"
    sae = made("standard", 21)[0]
    seen: dict[str, Tensor] = {}

    def see(label: str) -> Any:
        def look(value: Tensor, hook: Any) -> Tensor:
            seen[label] = value.clone()
            return value + 1

        return look

    with model.hooks([(name, see("outer"))]), model.saes({name: sae}):
        model.add_hook(name, see("added"))
        with model.caching([name, f"{name}.hook_sae_input", f"{name}.hook_sae_output"]) as cache:
            model.run_with_hooks(TOKENS, fwd_hooks=[(name, see("inner"))])
    model.reset_hooks()
    assert torch.equal(seen["outer"], seen["added"] + 1)
    assert torch.equal(cache[f"{name}.hook_sae_input"], seen["outer"] + 1)
    assert torch.equal(cache[f"{name}.hook_sae_output"], seen["inner"])
    assert torch.equal(cache[name], seen["inner"] + 1)


def test_nothing_remains(subjects):
    """Names, hooks, contexts, taps: gone with the block, also one that raised; the cache stays readable."""
    model, name = subjects["llama"].model, "blocks.1.hook_resid_post"
    plain, names, sae = model(TOKENS), list(model.table), made("standard", 32)[0]
    post = f"{name}.hook_sae_acts_post"
    with contextlib.suppress(RuntimeError), model.saes({name: sae}):
        model.add_hook(post, lambda acts, hook: hook.ctx.update(seen=True))
        model.add_hook([post, name], lambda value, hook: None, is_permanent=True)
        with model.hooks([(post, lambda acts, hook: None)], reset_hooks_end=False):
            _, cache = model.run_with_cache(TOKENS)
        assert model.hook_dict[post].has_hooks()
        assert {p.name for p in model.hook_points()} - set(names) == {n for n in cache if "hook_sae" in n}
        raise RuntimeError("stop")
    assert list(model.table) == names
    assert [entry.names for entry in model.added_hooks] == [(name,)]
    assert post not in model.hook_contexts
    model.reset_hooks(including_permanent=True)
    assert torch.equal(model(TOKENS), plain)
    assert cache["sae_acts_post", 1].shape == (2, 6, 23)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf_model.modules())
    with pytest.raises(UnknownHookError, match="inside `with model.saes"):
        model.run_with_cache(TOKENS, names_filter="sae_acts_post")
    with model.saes({name: sae}):
        pass  # a block without a call is no mistake


def test_a_block_may_end_before_one_inside_of_it(subjects):
    """What the inner block goes on with is the model without the SAE, and the SAE's points are gone."""
    model, name = subjects["gpt2"].model, "blocks.1.hook_resid_post"
    plain = model(TOKENS)
    outer = model.saes({name: made("standard", 21)[0]})
    outer.__enter__()
    inner = model.hooks([(f"{name}.hook_sae_acts_post", lambda acts, hook: acts * 0)])
    inner.__enter__()
    assert not torch.equal(model(TOKENS), plain)
    outer.__exit__(None, None, None)
    assert torch.equal(model(TOKENS), plain)
    assert not any("hook_sae" in n for n in model.table)
    inner.__exit__(None, None, None)


def test_other_threads_run_the_model_as_it_is(subjects):
    """A block is its thread's own, and so are its names."""
    from concurrent.futures import ThreadPoolExecutor

    model, name = subjects["gpt2"].model, "blocks.1.hook_resid_post"
    plain = model(TOKENS)
    with model.saes({name: made("standard", 21)[0]}), ThreadPoolExecutor(1) as pool:
        model.add_hook(f"{name}.hook_sae_acts_post", lambda acts, hook: acts * 0)
        assert torch.equal(pool.submit(model, TOKENS).result(), plain)
        assert not any("hook_sae" in n for n in pool.submit(lambda: list(model.table)).result())
        assert not torch.equal(model(TOKENS), plain)


def test_a_run_of_some_layers_leaves_the_sae_out_with_its_place(subjects):
    """start_at_layer and stop_at_layer: silently, unless a name of it is asked for."""
    model, name = subjects["gpt2"].model, "blocks.1.hook_resid_post"
    sae = made("standard", 21)[0]
    with model.saes({name: sae}):
        early = model(TOKENS, stop_at_layer=1)
        assert torch.equal(early, model.run_with_cache(TOKENS, stop_at_layer=1)[0])
        with pytest.raises(HookDidNotFireError, match="left out"):
            model.run_with_cache(TOKENS, stop_at_layer=1, names_filter=f"{name}.hook_sae_acts_post")
        late = model(model(TOKENS, stop_at_layer=2), start_at_layer=2)
        assert torch.equal(late, model(TOKENS))


def test_a_cache_with_features_is_saved_and_read(subjects, tmp_path):
    """The file knows the names of points that the model no longer has."""
    model, name = subjects["gpt2"].model, "blocks.1.attn.hook_z"
    with model.saes({name: made("standard", 21)[0]}, use_error_term=True):
        _, cache = model.run_with_cache(TOKENS, pos_slice=slice(2, 4))
    cache.save(tmp_path / "run.safetensors")
    for again in (lens.ActivationCache.load(tmp_path / "run.safetensors"), cache):
        assert again[f"{name}.hook_sae_acts_post"].shape == (2, 2, 23)
        assert again[f"{name}.hook_sae_error"].shape == (2, 2, 3, 7)
