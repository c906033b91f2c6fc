"""The tuned lens: recovered where it is known, better on held-out text elsewhere, and of one model only."""

import copy

import pytest
import safetensors.torch
import torch
from analysis.lens_subjects import FAMILIES, TOKENS, loaded
from golden.tiny import random_tokens, tiny_gpt2, tiny_tokenizer
from lens_conformance.float64 import true_float64
from torch.distributions import Categorical, kl_divergence

import lens_core as lens
from lens_core.analysis.logit_lens import logit_lens
from lens_core.analysis.tuned_lens import TunedLens, fit_tuned_lens, lens_divergence
from lens_core.errors import AnalysisFileError, ArgumentError, EmptyInputError

DATA = random_tokens(48, 8, seed=1)


def affine_model():
    """Build a GPT-2 whose blocks and norms are affine: no attention, an MLP without a bend, norms of a fixed scale."""
    hf = tiny_gpt2(activation_function="linear", layer_norm_epsilon=1e8, n_embd=8, n_head=2, n_layer=2, n_inner=8)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                parameter.mul_(1e4)  # against the scale of sqrt(1e8)
            if "attn.c_proj" in name:
                parameter.zero_()
    return lens.load(hf)


def moved(model, amount=1.0):
    """Give a lens that is not the identity, drawn at random."""
    lens_ = TunedLens.identity(model)
    generator = torch.Generator().manual_seed(0)
    lens_.weights.add_(torch.randn(lens_.weights.shape, generator=generator) * 0.1 * amount)
    lens_.biases.add_(torch.randn(lens_.biases.shape, generator=generator) * amount)
    return lens_


def slow_divergence(model, tokens, lens_=None):
    """Measure row by row from whole logits."""
    found = []
    for row in tokens:
        logits, cache = model.run_with_cache(row[None])
        final = Categorical(logits=logits)
        streams = [cache["resid_pre", layer] for layer in range(model.cfg.n_layers)]
        if lens_ is not None:
            streams = [x + x @ lens_.weights[at] + lens_.biases[at] for at, x in enumerate(streams)]
        said = [model.finish_logits(model.unembed(model.ln_final(x))) for x in streams]
        found.append(torch.stack([kl_divergence(final, Categorical(logits=each)) for each in said]))
    return torch.cat(found, 1).mean((1, 2)).detach()


def test_an_affine_model_is_recovered():
    """Where what is left of the model is affine, the lens ends up saying what the model says; in the last block too."""
    model = affine_model()
    tuned = fit_tuned_lens(model, DATA, held_out=random_tokens(6, 8, seed=2), epochs=120, lr=0.2, batch_size=48)
    assert (tuned.logit_lens_kl > 0.05).all()
    assert (tuned.kl < 1e-3 * tuned.logit_lens_kl).all()


@pytest.mark.parametrize("toy", ["gpt2", "mamba2"])
def test_held_out_divergence_drops_in_every_layer(toy):
    """On a trained model, on texts that were not seen; what is reported is what is measured row by row."""
    model = lens.load(f"toy:{toy}")
    data, held_out = random_tokens(64, 10, seed=3, vocab=250), random_tokens(3, 10, seed=4, vocab=250)
    tuned = fit_tuned_lens(model, data, held_out=held_out, lr=3e-3)
    assert (tuned.kl < 0.9 * tuned.logit_lens_kl).all()
    torch.testing.assert_close(tuned.kl, slow_divergence(model, held_out, tuned), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tuned.logit_lens_kl, slow_divergence(model, held_out), rtol=1e-3, atol=1e-4)
    frame = tuned.to_dataframe()
    assert frame.tuned_lens_kl.tolist() == tuned.kl.tolist()


@pytest.mark.parametrize("kind", [*FAMILIES, "gemma2", "granite"])
def test_it_runs_on_every_family_and_changes_nothing_of_it(kind):
    """In float64: closer to the model after some steps; parameters and their gradients stay."""
    model = loaded(kind)
    before = copy.deepcopy(model.hf_model.state_dict())
    with true_float64():
        tuned = fit_tuned_lens(model, DATA[:16], held_out=DATA[:16], epochs=2, lr=2e-2)
    assert tuned.weights.dtype == torch.float64
    assert (tuned.kl < 0.9 * tuned.logit_lens_kl).all()
    assert all(torch.equal(value, before[name]) for name, value in model.hf_model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("sizes", [(6, 6), (3, 7, 5)])
def test_one_step_is_that_of_plain_autograd(sizes):
    """A step of SGD of size 1 is the clipped gradient of the mean divergence, row by row, padding left out."""
    model = loaded("gpt2")
    rows = [random_tokens(1, size, seed=size) for size in sizes]
    start = moved(model, 0.1)
    tuned = fit_tuned_lens(
        model,
        [row[0] for row in rows],
        held_out=TOKENS,
        start=start,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        batch_size=len(rows),
    )
    runs = [model.run_with_cache(row) for row in rows]
    final = torch.cat([logits[0] for logits, _ in runs]).detach()
    for layer in range(3):
        weight, bias = (value[layer].clone().requires_grad_() for value in (start.weights, start.biases))
        stream = torch.cat([cache["resid_pre", layer][0] for _, cache in runs])
        said = model.hf_model.lm_head(model.hf_model.transformer.ln_f(stream + stream @ weight + bias))
        loss = kl_divergence(Categorical(logits=final), Categorical(logits=said)).mean()
        gradients = torch.autograd.grad(loss, [weight, bias])
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        scale = min(1.0, 1.0 / (float(norm) + 1e-6))
        torch.testing.assert_close(start.weights[layer] - tuned.weights[layer], gradients[0] * scale)
        torch.testing.assert_close(start.biases[layer] - tuned.biases[layer], gradients[1] * scale)


def test_a_seed_is_a_lens():
    """The same seed gives the same bits, another seed others; also with positions drawn."""
    model = lens.load(tiny_gpt2())
    once, again, other = (
        fit_tuned_lens(model, DATA[:24], seed=seed, rows=9, batch_size=4, verbose=seed == 1) for seed in (0, 0, 1)
    )
    assert torch.equal(once.weights, again.weights)
    assert not torch.equal(once.weights, other.weights)


def test_padding_counts_for_nothing():
    """A padded batch is its rows."""
    model = lens.load(tiny_gpt2(), tokenizer=tiny_tokenizer())
    rows = [random_tokens(1, size, seed=size)[0] for size in (3, 7, 5)]
    texts = [" ".join(f"w{int(token)}" for token in row) for row in rows]
    together = lens_divergence(model, texts, batch_size=3)
    parts = [lens_divergence(model, model.to_tokens(text)) * (len(model.to_tokens(text)[0])) for text in texts]
    total = sum(len(model.to_tokens(text)[0]) for text in texts)
    torch.testing.assert_close(together, sum(parts) / total, rtol=1e-4, atol=1e-5)


def test_the_logit_lens_reads_through_it():
    """As written out; in half precision in the model's own dtype."""
    model = lens.load(tiny_gpt2(dtype=torch.float64))
    tuned = moved(model)
    found = logit_lens(model, TOKENS, lens=tuned)
    torch.testing.assert_close(found.kl[:-1].mean((1, 2)), slow_divergence(model, TOKENS, tuned))
    assert float(found.kl[-1].max()) < 1e-12
    half = lens.load(tiny_gpt2(dtype=torch.bfloat16))
    fitted = fit_tuned_lens(half, DATA[:16], batch_size=4)
    assert fitted.weights.dtype == torch.float32
    assert bool(fitted.kl.isfinite().all())
    assert logit_lens(half, TOKENS, lens=fitted).kl.isfinite().all()


# ---------------------------------------------------------------------- files


def test_a_saved_lens_comes_back(tmp_path):
    """Every bit, and its divergences; also for the model in another dtype."""
    hf = tiny_gpt2()
    model = lens.load(hf)
    tuned = fit_tuned_lens(model, DATA[:16], batch_size=4)
    path = tmp_path / "tuned.safetensors"
    tuned.save(path)
    again = TunedLens.load(path, model)
    for name in ("weights", "biases", "kl", "logit_lens_kl"):
        assert torch.equal(getattr(again, name), getattr(tuned, name))
    assert TunedLens.load(path, lens.load(copy.deepcopy(hf).to(torch.bfloat16))).weights.dtype == torch.float32
    TunedLens.identity(model).save(path)
    assert TunedLens.load(path, model).kl is None


def test_a_lens_of_another_model_is_refused(tmp_path):
    """By its sizes, and by one changed number among those sampled; unless it is wanted so."""
    model, path = lens.load(tiny_gpt2()), tmp_path / "tuned.safetensors"
    TunedLens.identity(model).save(path)
    other = lens.load(tiny_gpt2(seed=1))
    with pytest.raises(AnalysisFileError, match="was fitted to other weights .*; strict=False takes it"):
        TunedLens.load(path, other)
    assert TunedLens.load(path, other, strict=False).model is other
    finetuned = tiny_gpt2()
    with torch.no_grad():
        finetuned.transformer.h[1].mlp.c_fc.weight.mul_(1.001)
    with pytest.raises(AnalysisFileError, match="h.1.mlp.c_fc.weight' differs"):
        TunedLens.load(path, lens.load(finetuned))
    with pytest.raises(AnalysisFileError, match=r"its weights are \[3, 21, 21\], and here they are \[2, 21, 21\]"):
        TunedLens.load(path, lens.load(tiny_gpt2(n_layer=2)), strict=False)


def test_files_that_are_no_lens_are_refused(tmp_path):
    """Missing, another kind, cut short, tensors taken out."""
    model, path = lens.load(tiny_gpt2()), tmp_path / "tuned.safetensors"
    with pytest.raises(AnalysisFileError, match="there is no file"):
        TunedLens.load(path, model)
    safetensors.torch.save_file({"weights": torch.zeros(2)}, path)
    with pytest.raises(AnalysisFileError, match="no tuned lens: tuned.save"):
        TunedLens.load(path, model)
    TunedLens.identity(model).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(AnalysisFileError, match="damaged"):
        TunedLens.load(path, model)
    with safetensors.safe_open(_written(path, whole), framework="pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file({"biases": torch.zeros(3, 21)}, path, metadata=metadata)
    with pytest.raises(AnalysisFileError, match="not those that were saved"):
        TunedLens.load(path, model)
    with pytest.raises(AnalysisFileError, match="is a folder"):
        TunedLens.identity(model).save(tmp_path)


def _written(path, content):
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("data", "options", "match"),
    [
        (DATA[:8], {}, "nothing is left to fit on"),
        (DATA, {"epochs": 0}, "epochs is at least 1"),
        (DATA, {"rows": 0}, "rows is at least 1"),
        (DATA, {"batch_size": 0}, "batch_size is a positive number"),
        (3, {}, "texts are strings, or rows of token ids"),
    ],
)
def test_a_wrong_argument_says_what_is_right(data, options, match):
    """By name and value."""
    with pytest.raises(ArgumentError, match=match):
        fit_tuned_lens(lens.load(tiny_gpt2()), data, **options)


def test_a_model_in_training_mode_is_refused():
    """Dropout would draw."""
    model = lens.load(tiny_gpt2().train())
    with pytest.raises(ArgumentError, match="model.eval"):
        fit_tuned_lens(model, DATA)
    with pytest.raises(EmptyInputError, match="no texts"):
        lens_divergence(model.eval(), [])
    with pytest.raises(ArgumentError, match="was not fitted"):
        TunedLens.identity(model).to_dataframe()
