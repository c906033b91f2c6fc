"""The code of `make real` on a tiny random Llama: it runs, and its checks can fail. The real weights are not needed."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lens_core as lens

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def real():
    """Give the modules of the example by name."""
    sys.path.insert(0, str(ROOT))
    names = ("checks", "equations", "ioi", "page", "study")
    yield {name: importlib.import_module(f"examples.smollm2.{name}") for name in names}
    sys.path.remove(str(ROOT))


def word_tokenizer(texts):
    """Build a tokenizer that knows the words of some texts."""
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*words, "<s>"])}, unk_token="<s>"))
    backend.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def tiny_llama(vocab, *, seed=0):
    """Build a Llama with noise in every parameter: 2 layers, 6 heads of 8 over 2 key heads."""
    sizes = {"hidden_size": 48, "intermediate_size": 37, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}
    special = {"bos_token_id": vocab - 1, "eos_token_id": vocab - 1, "pad_token_id": vocab - 1}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes, **heads, **special))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.15 + float(name.endswith("norm.weight")))
    return model.eval()


@pytest.fixture(scope="module")
def pair(real):
    """Give a lens model and a reference of the same weights that lens never saw."""
    ioi = real["ioi"]
    fill = {"first": " ".join(ioi.NAMES), "second": "", "subject": "", "place": " ".join(ioi.PLACES)}
    texts = [template.format(**fill, thing=" ".join(ioi.THINGS)) for template in ioi.TEMPLATES]
    tokenizer = word_tokenizer(texts)
    return lens.load(tiny_llama(len(tokenizer)), tokenizer=tokenizer), tiny_llama(len(tokenizer))


TEXTS = ("When Mary and John went to the store, John gave a drink to", "Then Tom and Anna had a long talk")


def test_every_check_holds_on_a_tiny_llama(real, pair):
    """Logits, greedy text, every hook point and the edits."""
    checks, (model, reference) = real["checks"], pair
    tokens = model.to_tokens([TEXTS[0], TEXTS[0].replace("Mary", "Alice")])
    points = checks.check_points(model, reference, tokens)
    assert len(points) == 42
    assert [one for one in points if not one.holds] == []
    equal, error = checks.check_equations(reference, tokens)
    found = [
        equal,
        *checks.check_logits(model, reference, TEXTS),
        *checks.check_greedy(model, reference, TEXTS, 5),
    ]
    assert [one for one in found if not one.holds] == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "HEAD", 4)
        edits = checks.check_edits(model, reference, tokens, error, layer=1)
    assert [one.name for one in edits if not one.holds] == []
    assert len(edits) == len(checks.EDITS)


def test_the_checks_fail_for_another_model(real, pair):
    """A weight that differs in one place is seen by every kind of check."""
    checks, (_, reference) = real["checks"], pair
    other = tiny_llama(reference.config.vocab_size)
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight[3] *= 1.01
    model = lens.load(other, tokenizer=pair[0].tokenizer)
    tokens = model.to_tokens(TEXTS[0])
    assert {one.name for one in checks.check_points(model, reference, tokens) if not one.holds} >= {
        "blocks.L.attn.hook_q",
        "blocks.L.attn.hook_rot_q",
        "blocks.L.attn.hook_pattern",
        "blocks.L.attn.hook_z",
        "blocks.L.hook_resid_post",
        "hook_logits",
    }
    assert not any(one.holds for one in checks.check_logits(model, reference, TEXTS))
    assert not any(one.holds for one in checks.check_edits(model, reference, tokens, 1e-7, layer=1))


@pytest.mark.parametrize("wrong", ["rope_theta", "rms_norm_eps"])
def test_the_equations_fail_for_another_constant(real, pair, wrong):
    """They are not so loose that a slightly wrong model would do."""
    checks, (_, reference) = real["checks"], pair
    other = tiny_llama(reference.config.vocab_size)
    if wrong == "rope_theta":
        other.config.rope_parameters["rope_theta"] *= 1.1
    else:
        other.config.rms_norm_eps *= 100
    assert not checks.check_equations(other, pair[0].to_tokens(TEXTS[0]))[0].holds


def test_the_study_runs_and_its_sums_are_true(real, pair):
    """From sentences to the numbers that page and pictures are made of."""
    model, layers, heads = pair[0], 2, 6
    found = real["study"].study(model, per_template=2, pairs=1)
    json.dumps(found, allow_nan=False)
    parts = sum(map(sum, found["heads"])) + sum(found["mlps"]) + sum(found["rest"].values())
    assert parts == pytest.approx(found["total"], abs=1e-5)
    assert found["error"] < 1e-5
    assert len(found["heads"]) == layers
    assert len(found["heads"][0]) == heads
    stream = torch.tensor(found["patching"]["stream_swapped"]["share"])
    tokens = found["patching"]["tokens"]
    assert stream.shape == (layers, len(tokens))
    # Only S2 differs in the embeddings, so patching it there is the corrupted run itself, and what is before is equal.
    s2 = tokens.index("S2")
    assert stream[0, s2] == pytest.approx(1, abs=1e-4)
    assert not stream[:, :s2].any()
    assert found["patching"]["gap"] == 0
    circuit = found["circuit"]
    assert not {map(tuple, circuit["groups"]["writers"])} & {map(tuple, circuit["groups"]["senders"])}


def test_the_sentences_are_what_they_say(real, pair):
    """One name comes once and is right; the other comes twice; the corrupted runs differ in the names only."""
    ioi, model = real["ioi"], pair[0]
    for batch in ioi.random_batches(model, 4):
        places = batch.places()
        rows = torch.arange(4)
        assert torch.equal(batch.tokens[rows, places["IO"]], batch.io)
        for place in ("S1", "S2"):
            assert torch.equal(batch.tokens[rows, places[place]], batch.subject)
        assert bool((places["S1"] < places["S2"]).all())
        assert bool(((batch.tokens == batch.io[:, None]).sum(1) == 1).all())
        assert bool(((batch.swapped == batch.io[:, None]).sum(1) == 2).all())
        assert (batch.swapped != batch.tokens).sum(1).tolist() == [1] * 4
        assert (batch.unrelated != batch.tokens).sum(1).tolist() == [3] * 4


def test_its_packages_are_pinned_and_shadow_none_of_the_runtime():
    """They come first on the path, so none may be another version of what lens itself runs on."""
    names = {}
    for file in ("real.txt", "runtime.txt"):
        lines = [line.partition(" #")[0] for line in (ROOT / "requirements" / file).read_text().splitlines()]
        found = [Requirement(line) for line in lines if line and not line.startswith("#")]
        assert all([part.operator for part in one.specifier] == ["=="] for one in found)
        names[file] = {canonicalize_name(one.name) for one in found}
    assert not names["real.txt"] & names["runtime.txt"]


@pytest.mark.skipif(not (ROOT / "examples/smollm2/results.json").is_file(), reason="not measured yet")
def test_the_page_shows_the_numbers_that_were_measured(real):
    """Its tables are those of results.json, in which every check holds."""
    results = json.loads((ROOT / "examples/smollm2/results.json").read_text(encoding="utf-8"))
    assert real["page"].write(results, ROOT / "docs" / "ioi.md", check=True) == 0
    assert all(one["holds"] for one in (*results["checks"], *results["points"]))
