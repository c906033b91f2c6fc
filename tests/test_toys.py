"""The toys that plugins ship: small on disk, loaded by name, and able to copy what they read."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lens_core as lens
from lens_core._loading import toy_folder
from lens_core._registry import active_registry

TOYS = ("gpt2", "llama", "mamba", "mamba2")
WORDS = 40


def folder(name):
    """Give where a toy lies."""
    return Path(toy_folder(active_registry().resolve(name)))


def words_typed_twice(vocabulary, rows=16):
    """Give random words, twice in a row, after the token that texts start with."""
    rng = random.Random("toys")
    texts = [rng.choices(range(3, vocabulary), k=WORDS) for _ in range(rows)]
    return torch.tensor([[0, *text, *text] for text in texts])


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_is_small(name):
    """Each is under 2 MB, so that a plugin's wheel stays small."""
    files = [file for file in folder(name).rglob("*") if file.is_file()]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in files}
    assert sum(file.stat().st_size for file in files) < 2_000_000


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_is_hf_s_own_checkpoint(name):
    """`lens.load("toy:NAME")` gives the numbers that transformers gives for the folder."""
    hf = AutoModelForCausalLM.from_pretrained(folder(name)).eval()
    model = lens.load(f"toy:{name}")
    text = "king apple river moon book king apple river"
    tokens = AutoTokenizer.from_pretrained(folder(name))(text, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(text), hf(tokens).logits)


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_copies(name):
    """Words that came before cost less than half of what they cost the first time."""
    model = lens.load(f"toy:{name}")
    tokens = words_typed_twice(model.cfg.d_vocab)
    with torch.no_grad():
        losses = model(tokens, return_type="loss", loss_per_token=True)
    fresh, copied = losses[:, :WORDS].mean(), losses[:, WORDS + 1 :].mean()
    assert copied < fresh / 2, f"{copied:.2f} nats where words come again, {fresh:.2f} where they are new"
