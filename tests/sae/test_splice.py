"""SAEs inside the model: against golden forwards in float64 with the SAE written out by hand at the hook point."""

import contextlib
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2, tiny_tokenizer
from golden.tiny_ssm import tiny_ssm
from lens_conformance.float64 import true_float64
from sae.sae_subject import MAKERS, TOKENS, Subject, by_hand, made
from torch import Tensor, nn

import lens_core as lens
from lens_core.errors import ArgumentError, HookDidNotFireError, HookFunctionError, SaeError, UnknownHookError

PLACES = {
    "gpt2": ("blocks.1.hook_resid_post", "blocks.1.hook_resid_mid", "blocks.1.attn.hook_z", "hook_embed"),
    "llama": ("blocks.1.hook_resid_pre", "blocks.1.mlp.hook_post", "blocks.1.attn.hook_z", "blocks.1.attn.hook_k"),
    "mamba": ("blocks.1.hook_resid_post", "blocks.1.mixer.hook_gated", "blocks.1.mixer.hook_conv"),
    "mamba2": ("blocks.1.hook_resid_post", "blocks.1.mixer.hook_y", "blocks.1.hook_mixer_out"),
}
CASES = [(kind, name) for kind, names in PLACES.items() for name in names]
KINDS = ("standard", "gated", "jumprelu", "topk")


@pytest.fixture(scope="module")
def subjects():
    """Make every tiny model once."""
    return {kind: Subject(kind) for kind in MAKERS}


def handmade(
    sae: Any, weights: dict[str, Tensor], kept: dict[str, Tensor] | None = None, *, error: bool = False
) -> Any:
    """Give an edit for a golden forward: the SAE by hand; `kept` gets its values, with their gradients."""
    fields = {"architecture": sae.cfg.architecture, "k": sae.cfg.k}

    def edit(value: Tensor, hook: Any) -> Tensor:
        flat = value.flatten(2)
        parts = by_hand(fields, weights, flat)
        acts = parts["acts_post"] * 1
        recons = acts @ weights["W_dec"] + weights["b_dec"]
        result = recons + (flat - parts["recons"]) if error else recons
        if kept is not None:
            kept.update(parts, acts_post=acts, recons=recons)
            for one in kept.values():
                if one.requires_grad:
                    one.retain_grad()
        return result.view(value.shape)

    return edit


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_logits_and_values_are_those_of_the_sae_by_hand(subjects, kind, name):
    """At every kind of place, with every architecture in turn."""
    subject = subjects[kind]
    architecture = KINDS[CASES.index((kind, name)) % len(KINDS)]
    sae, weights = made(architecture, subject.width(name), **({"k": 4} if architecture == "topk" else {}))
    kept: dict[str, Tensor] = {}
    expected, _ = subject.golden({name: handmade(sae, weights, kept)})
    plain, values = subject.golden()
    with true_float64(), subject.model.saes({name: sae}):
        logits, cache = subject.model.run_with_cache(TOKENS)
    assert (logits - expected).abs().max() < 1e-9
    assert (logits - plain).abs().max() > 1e-2
    for part, value in kept.items():
        assert torch.allclose(cache[f"{name}.hook_sae_{part}"], value, atol=1e-9), part
    assert torch.allclose(cache[f"{name}.hook_sae_input"], values[name].flatten(2), atol=1e-9)
    assert torch.equal(cache[f"{name}.hook_sae_output"], cache[name])
    assert f"{name}.hook_sae_error" not in cache.table


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_error_term_changes_no_bit(subjects, kind, name):
    """Cached, read by functions, or unseen; and the parameters' gradients neither."""
    subject = subjects[kind]
    model, parameters = subject.model, list(subject.hf.parameters())
    sae, _ = made("gated", subject.width(name))
    plain = model(TOKENS)
    expected = torch.autograd.grad(plain.square().sum(), parameters, allow_unused=True)
    seen: list[Tensor] = []
    reading = [(lambda n: "hook_sae" in n, lambda value, hook: seen.append(value))]
    with model.saes({name: sae}, use_error_term=True):
        assert torch.equal(model(TOKENS), plain)
        assert torch.equal(model.run_with_cache(TOKENS)[0], plain)
        read = model.run_with_hooks(TOKENS, fwd_hooks=reading)
        assert torch.equal(read, plain)
        got = torch.autograd.grad(read.square().sum(), parameters, allow_unused=True)
    assert len(seen) == 6
    for one, other in zip(got, expected, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_edited_feature_moves_the_value_along_its_decoder_row(subjects, kind, name):
    """With the error term: the same logits as adding the row to the value, at the position alone."""
    subject = subjects[kind]
    sae, weights = made("standard", subject.width(name))

    def raised(acts: Tensor, hook: Any) -> Tensor:
        return acts + 1.5 * nn.functional.one_hot(torch.tensor(7), 23)

    def shifted(value: Tensor, hook: Any) -> Tensor:
        moved = value.flatten(2).clone()
        moved[:, 3] += 1.5 * weights["W_dec"][7]
        return moved.view(value.shape)

    expected, _ = subject.golden({name: shifted})
    with true_float64(), subject.model.saes({name: sae}, use_error_term=True):
        logits = subject.model.run_with_hooks(TOKENS, fwd_hooks=[(f"{name}.hook_sae_acts_post", raised, 3)])
        plain = subject.model(TOKENS)
    assert (logits - expected).abs().max() < 1e-9
    if ".mixer." not in name:  # a scan with an edit in it is computed another way, at all positions
        assert torch.equal(logits[:, :3], plain[:, :3])


PARTS = ("input", "acts_pre", "acts_post", "recons", "error", "output")


@pytest.mark.parametrize(
    ("part", "use_error_term"),
    [(part, use_error_term) for part in PARTS for use_error_term in (False, True) if part != "error" or use_error_term],
)
def test_an_edit_of_each_part_reaches_what_the_formula_says(subjects, part, use_error_term):
    """The whole formula again by hand, with the edit in it."""
    subject, name = subjects["gpt2"], "blocks.1.hook_resid_post"
    sae, w = made("standard", subject.width(name))

    def halved(value: Tensor, hook: Any = None) -> Tensor:
        return value * 0.5 + 0.1

    def edit(value: Tensor, hook: Any) -> Tensor:
        given = {one: (halved if one == part else lambda v: v) for one in PARTS}
        x = given["input"](value)
        pre = given["acts_pre"]((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
        recons = given["recons"](given["acts_post"](pre.clamp(min=0)) @ w["W_dec"] + w["b_dec"])
        true = ((value - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).clamp(min=0) @ w["W_dec"] + w["b_dec"]
        return given["output"](recons + given["error"](value - true) if use_error_term else recons)

    expected, _ = subject.golden({name: edit})
    with true_float64(), subject.model.saes({name: sae}, use_error_term=use_error_term):
        logits = subject.model.run_with_hooks(TOKENS, fwd_hooks=[(f"{name}.hook_sae_{part}", halved)])
    assert (logits - expected).abs().max() < 1e-9


@pytest.mark.parametrize("use_error_term", [False, True])
@pytest.mark.parametrize("kind", list(MAKERS))
def test_gradients_are_those_of_the_formula(subjects, kind, use_error_term):
    """At the features, before the SAE, and for the SAE's own parameters."""
    subject, name = subjects[kind], "blocks.1.hook_resid_post"
    sae, weights = made("jumprelu", subject.width(name))
    weights = {n: w.clone().requires_grad_(n != "threshold") for n, w in weights.items()}
    kept: dict[str, Tensor] = {}
    logits, values = subject.golden({name: handmade(sae, weights, kept, error=use_error_term)})
    logits.square().sum().backward()
    with true_float64(), subject.model.saes({name: sae}, use_error_term=use_error_term):
        with subject.model.caching(lambda n: "hook_sae" in n or n.endswith("0.hook_resid_post"), detach=False) as cache:
            subject.model(TOKENS).square().sum().backward()
        grad = cache.grad
    for part in ("acts_post", "recons"):
        assert torch.allclose(grad[f"{name}.hook_sae_{part}"], kept[part].grad, rtol=1e-8, atol=1e-8), part
    before = "blocks.0.hook_resid_post"
    assert torch.allclose(grad[before], values[before].grad, rtol=1e-8, atol=1e-8)
    for parameter, expected in ((n, w.grad) for n, w in weights.items() if n != "threshold"):
        assert torch.allclose(getattr(sae, parameter).grad, expected, rtol=1e-8, atol=1e-7), parameter
    if use_error_term:  # Marks et al. 2024: through the error to what lies before, through the decoder to the features
        assert torch.equal(grad[f"{name}.hook_sae_error"], grad[f"{name}.hook_sae_output"])
        assert torch.allclose(kept["acts_post"].grad, kept["recons"].grad @ weights["W_dec"].T)


def test_a_function_that_reads_may_keep_the_gradient(subjects):
    """`tensor.retain_grad()` in a function that returns nothing, with the error term on."""
    subject, name = subjects["gpt2"], "blocks.1.hook_resid_post"
    sae, weights = made("standard", subject.width(name))
    kept: list[Tensor] = []

    def keep(acts: Tensor, hook: Any) -> None:
        acts.retain_grad()
        kept.append(acts)

    with subject.model.saes({name: sae}, use_error_term=True):
        with subject.model.caching(f"{name}.hook_sae_output", incl_bwd=True) as cache:
            out = subject.model.run_with_hooks(TOKENS, fwd_hooks=[(f"{name}.hook_sae_acts_post", keep)])
            out.square().sum().backward()
    expected = cache.grad[f"{name}.hook_sae_output"] @ weights["W_dec"].T
    assert torch.allclose(kept[0].grad, expected)


def test_a_backward_hook_that_stops_the_features_leaves_the_error_path(subjects):
    """The gradient before the SAE is then the output's, less what went through the features."""
    subject, name = subjects["gpt2"], "blocks.1.hook_resid_post"
    sae, w = made("standard", subject.width(name))
    stop = [(f"{name}.hook_sae_acts_post", lambda gradient, hook: torch.zeros_like(gradient))]
    names = [f"{name}.hook_sae_input", f"{name}.hook_sae_output"]
    with subject.model.saes({name: sae}, use_error_term=True):
        with subject.model.caching([*names, "blocks.1.hook_resid_mid"], incl_bwd=True) as cache:
            with subject.model.hooks(bwd_hooks=stop):
                subject.model(TOKENS).square().sum().backward()
    assert not cache.grad[names[0]].any()
    is_on = cache[names[0]] @ w["W_enc"] - w["b_dec"] @ w["W_enc"] + w["b_enc"] > 0
    out = cache.grad[names[1]]
    through = ((out @ w["W_dec"].T) * is_on) @ w["W_enc"].T
    with torch.enable_grad():
        middle = cache["blocks.1.hook_resid_mid"].clone().requires_grad_()
        block = subject.hf.transformer.h[1]
        (middle + block.mlp(block.ln_2(middle))).backward(out - through)
    assert torch.allclose(cache.grad["blocks.1.hook_resid_mid"], middle.grad, atol=1e-7)


def test_parameters_of_the_sae_train_through_the_splice(subjects):
    """End to end: the loss of the spliced model goes down, and the model's own weights stay."""
    subject, name = subjects["gpt2"], "blocks.1.hook_resid_post"
    sae, _ = made("standard", subject.width(name))
    before = {n: p.clone() for n, p in subject.hf.named_parameters()}
    losses, optimizer = [], torch.optim.Adam(sae.parameters(), lr=0.02)
    with subject.model.saes({name: sae}):
        for _ in range(8):
            loss = subject.model(TOKENS, return_type="loss")
            optimizer.zero_grad()
            torch.autograd.backward(loss, inputs=list(sae.parameters()))
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(p, before[n]) for n, p in subject.hf.named_parameters())


# ---------------------------------------------------------------------- steps


@pytest.mark.parametrize("kind", list(MAKERS))
def test_decoding_is_the_whole_run(subjects, kind):
    """Prefill and steps with an SAE, and an edit of its features, are the run over all positions at once."""
    subject, name = subjects[kind], "blocks.1.hook_resid_post"
    sae, _ = made("topk", subject.width(name), k=3)
    edit = [(f"{name}.hook_sae_acts_post", lambda acts, hook: acts * 0, [1, 4])]
    model = subject.model
    with true_float64(), model.saes({name: sae}, use_error_term=True), model.hooks(fwd_hooks=edit):
        with model.caching(f"{name}.hook_sae_acts_post") as whole:
            expected = model(TOKENS)
        with model.caching(f"{name}.hook_sae_acts_post") as parts:
            logits, state = model(TOKENS[:, :3], return_state=True)
            steps = [logits]
            for position in range(3, 6):
                logits, state = model(TOKENS[:, position : position + 1], past_key_values=state, return_state=True)
                steps.append(logits)
    assert torch.allclose(torch.cat(steps, 1), expected, atol=1e-9)
    assert torch.allclose(parts["sae_acts_post", 1], whole["sae_acts_post", 1], atol=1e-9)
    assert not whole["sae_acts_post", 1][:, [1, 4]].any()


def test_generation_is_spliced_at_every_step():
    """`generate` with an SAE is greedy choice over whole runs with it."""
    model = lens.load(tiny_gpt2())
    name, sae = "blocks.1.hook_mlp_out", made("standard", 21)[0].float()
    tokens = random_tokens(1, 3)
    with model.saes({name: sae}):
        with model.caching(f"{name}.hook_sae_acts_post") as cache:
            generated = model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None)
        expected = tokens
        for _ in range(4):
            expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, expected)
    assert cache["sae_acts_post", 1].shape == (1, 6, 23)
    assert not torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None), generated)


# ---------------------------------------------------------------------- several, and the block's ends


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


# ---------------------------------------------------------------------- heads, transcoders, any module


def test_one_head(subjects):
    """`hook_head_index`: the other heads stay."""
    subject, name = subjects["llama"], "blocks.1.attn.hook_z"
    sae, weights = made("standard", 10, hook_head_index=2)

    def edit(z: Tensor, hook: Any) -> Tensor:
        made_of = by_hand({"architecture": "standard"}, weights, z[:, :, 2])["recons"]
        return torch.stack([z[:, :, 0], z[:, :, 1], made_of, z[:, :, 3]], 2)

    expected, _ = subject.golden({name: edit})
    with true_float64(), subject.model.saes({name: sae}):
        logits, cache = subject.model.run_with_cache(TOKENS)
    assert (logits - expected).abs().max() < 1e-9
    assert cache[f"{name}.hook_sae_output"].shape == (2, 6, 10)
    with subject.model.saes({name: sae}, use_error_term=True):
        assert torch.equal(subject.model.run_with_cache(TOKENS)[0], subject.model(TOKENS))


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder"])
@pytest.mark.parametrize("read", ["blocks.1.ln2.hook_out", "blocks.1.hook_mlp_in", "blocks.0.hook_resid_post"])
def test_a_transcoder_reads_at_one_place_and_writes_at_another(subjects, architecture, read):
    """By hand, with an edit of what it reads; gradients reach what it reads; with the error term nothing changes."""
    subject, write = subjects["gpt2"], "blocks.1.hook_mlp_out"
    sae, weights = made(architecture, 21, hook_name=read, hook_name_out=write, d_out=21, apply_b_dec_to_input=False)
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> Tensor:
        kept["read"] = value * 1.5
        return kept["read"]

    def put(value: Tensor, hook: Any) -> Tensor:
        fields = {"architecture": architecture, "apply_b_dec_to_input": False}
        return by_hand(fields, weights, kept["read"])["recons"]

    expected, values = subject.golden({read: keep, write: put})
    expected.square().sum().backward()
    model = subject.model
    with true_float64(), model.saes([sae]):
        with model.caching([read, f"{write}.hook_sae_input", "blocks.0.hook_resid_pre"], incl_bwd=True) as cache:
            logits = model.run_with_hooks(TOKENS, fwd_hooks=[(read, lambda value, hook: value * 1.5)])
            logits.square().sum().backward()
    assert (logits - expected).abs().max() < 1e-9
    assert torch.equal(cache[read], cache[f"{write}.hook_sae_input"])
    first = "blocks.0.hook_resid_pre"
    assert torch.allclose(cache.grad[first], values[first].grad, atol=1e-7)
    plain = model(TOKENS)
    with model.saes([sae], use_error_term=True):
        assert torch.equal(model(TOKENS), plain)
        assert torch.equal(model.run_with_cache(TOKENS)[0], plain)


class Plain(nn.Module):
    """Somebody's own autoencoder: encode and decode, nothing else."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.dictionary = nn.Linear(d_in, 8)

    def encode(self, x: Tensor) -> Tensor:
        """Give the features."""
        return self.dictionary(x).relu()

    def decode(self, code: Tensor) -> Tensor:
        """Give the reconstruction."""
        return (code - self.dictionary.bias) @ self.dictionary.weight


def test_any_module_with_encode_and_decode(subjects):
    """In its own dtype; without pre-activations there is no hook point for them."""
    model, name = lens.load(tiny_gpt2(dtype=torch.bfloat16)), "blocks.1.hook_resid_post"
    plain, theirs = model(TOKENS), Plain(21)
    with model.saes({name: theirs}, use_error_term=True):
        points = [p for p in model.hook_points() if "hook_sae" in p.name]
        logits, cache = model.run_with_cache(TOKENS)
    assert torch.equal(logits, plain)
    assert [p.part.rsplit("_sae_")[-1] for p in points] == ["input", "acts_post", "recons", "error", "output"]
    assert [p.dtype for p in points] == ["float32"] * 4 + ["model"]
    assert {p.name: cache[p.name].dtype for p in points} == {
        p.name: torch.float32 if p.dtype == "float32" else torch.bfloat16 for p in points
    }
    with model.saes({name: theirs}):
        _, cache = model.run_with_cache(TOKENS)
    x = cache[f"{name}.hook_sae_input"]
    assert torch.equal(cache[name], theirs.decode(theirs.encode(x)).bfloat16())


def test_modules_that_keep_their_metadata_as_saelens_does(subjects):
    """The hook name below `cfg.metadata`, where what is missing is None; heads flattened here and not there."""
    model, theirs = subjects["gpt2"].model, Plain(21).double()
    metadata = SimpleNamespace(hook_name="blocks.1.attn.hook_z", hook_name_out=None, prepend_bos=True)
    theirs.cfg = SimpleNamespace(d_in=21, d_sae=8, metadata=metadata)
    theirs.hook_z_reshaping_mode = False
    with model.saes(theirs):
        _, cache = model.run_with_cache(TOKENS, names_filter="*hook_sae_*")
    assert cache["sae_acts_post", 1].shape == (2, 6, 8)
    theirs.hook_z_reshaping_mode = True
    with pytest.raises(SaeError, match="turn_off_forward_pass_hook_z_reshaping"), model.saes(theirs):
        pass
    theirs.cfg.d_in = 768
    theirs.hook_z_reshaping_mode = False
    with pytest.raises(SaeError, match="d_in=768, and 'blocks.1.attn.hook_z' is 21 wide"), model.saes(theirs):
        pass


def test_what_does_not_fit_is_refused_by_name(subjects):
    """And the model goes on."""
    model = subjects["gpt2"].model
    sae = made("standard", 21)[0]
    for place, error, message in (
        ("blocks.0.attn.hook_pattern", SaeError, "each position has a vector"),
        ("hook_tokens", SaeError, "each position has a vector"),
        ("blocks.0.mlp.hook_post", SaeError, "d_in=21, and 'blocks.0.mlp.hook_post' is 37 wide"),
        ("blocks.0.hook_resid_pots", UnknownHookError, "did you mean"),
        ("hf.transformer.h.0.output", SaeError, "each position has a vector"),
    ):
        with pytest.raises(error, match=message), model.saes({place: sae}):
            pass
    with pytest.raises(ArgumentError, match="does not say where it belongs"), model.saes(sae):
        pass
    with (
        pytest.raises(ArgumentError, match="encode and decode; got Linear"),
        model.saes({"hook_embed": nn.Linear(3, 3)}),
    ):
        pass
    for head, place, message in ((3, "blocks.0.attn.hook_z", "heads 0 to 2"), (0, "hook_embed", "with heads")):
        one = made("standard", 7, hook_head_index=head)[0]
        with pytest.raises(SaeError, match=message), model.saes({place: one}):
            pass
    backwards = made("transcoder", 21, hook_name="blocks.1.hook_mlp_out", hook_name_out="blocks.1.hook_resid_pre")[0]
    with pytest.raises(SaeError, match="is computed after"), model.saes(backwards):
        pass
    with model.saes({"hook_embed": Plain(5)}), pytest.raises(HookFunctionError, match="Plain at hook_embed"):
        model(TOKENS)
    mamba = lens.load(tiny_ssm("mamba"))
    with pytest.raises(SaeError, match="inside the recurrence"), mamba.saes({"blocks.0.mixer.hook_ssm_state": sae}):
        pass
    assert torch.equal(model(TOKENS), model(TOKENS))


# ---------------------------------------------------------------------- what it was trained on


def test_processed_weights_are_asked_for_and_refused():
    """Where they change the values at the hook point, and only there."""
    model = lens.load(tiny_gpt2())
    stream, heads = "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"
    centred = {"center_writing_weights": True}
    wants = made("standard", 21, model_from_pretrained_kwargs=centred)[0]
    raw = made("standard", 21, model_from_pretrained_kwargs={})[0]
    nobody = made("standard", 21)[0]
    with pytest.raises(SaeError, match=r"trained on a model with center_writing_weights.*'transformerlens'"):
        model.saes({stream: wants}).__enter__()
    with pytest.warns(lens.SaeWarning, match="center_writing_weights"), model.saes({stream: wants}, strict=False):
        pass
    for sae, place in ((wants, heads), (raw, stream), (nobody, stream)):
        with model.saes({place: sae}):
            pass
    lens.passes.center_writing_weights(model)
    with pytest.raises(SaeError, match="with no center_writing_weights.*undo_passes"):
        model.saes({stream: raw}).__enter__()
    for sae, place in ((wants, stream), (nobody, stream), (raw, heads)):
        with model.saes({place: sae}):
            pass
    model.undo_passes()
    with model.saes({stream: raw}):
        pass
    with pytest.raises(SaeError, match=r"gain and bias too.*'blocks.1.ln2.hook_out'"):
        model.saes({"blocks.1.ln2.hook_normalized": raw}).__enter__()


def test_texts_that_begin_otherwise_than_the_trainings_are_told(recwarn):
    """Once in a block, for the prompt only."""
    model = lens.load(tiny_gpt2(), tokenizer=tiny_tokenizer())
    name = "blocks.1.hook_resid_pre"
    for habit in (True, False):
        sae = made("standard", 21, prepend_bos=habit)[0].float()
        with model.saes({name: sae}):
            model("w1 w2 w3", prepend_bos=habit)
            model(model.to_tokens("w1 w2 w3", prepend_bos=habit))
            assert not [w for w in recwarn if issubclass(w.category, lens.SaeWarning)]
            with pytest.warns(lens.SaeWarning, match=f"pass prepend_bos={habit}"):
                model("w1 w2 w3", prepend_bos=not habit)
            model.generate("w1 w2 w3", max_new_tokens=2, prepend_bos=not habit)
        assert not [w for w in recwarn if issubclass(w.category, lens.SaeWarning)]
    silent = attrs.evolve(sae.cfg, prepend_bos=None)
    with model.saes({name: lens.saes.SparseAutoencoder(silent)}):
        model("w1 w2 w3")
    assert not [w for w in recwarn if issubclass(w.category, lens.SaeWarning)]
