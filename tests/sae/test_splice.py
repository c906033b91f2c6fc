"""SAEs inside the model: against golden forwards in float64 with the SAE written out by hand at the hook point."""

from typing import Any

import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2
from lens_conformance.float64 import true_float64
from sae.sae_subject import MAKERS, TOKENS, handmade, made
from torch import Tensor, nn

import lens_core as lens

PLACES = {
    "gpt2": ("blocks.1.hook_resid_post", "blocks.1.hook_resid_mid", "blocks.1.attn.hook_z", "hook_embed"),
    "llama": ("blocks.1.hook_resid_pre", "blocks.1.mlp.hook_post", "blocks.1.attn.hook_z", "blocks.1.attn.hook_k"),
    "mamba": ("blocks.1.hook_resid_post", "blocks.1.mixer.hook_gated", "blocks.1.mixer.hook_conv"),
    "mamba2": ("blocks.1.hook_resid_post", "blocks.1.mixer.hook_y", "blocks.1.hook_mixer_out"),
}
CASES = [(kind, name) for kind, names in PLACES.items() for name in names]
KINDS = ("standard", "gated", "jumprelu", "topk")


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
