"""What the tests of stores harvest: tiny models, corpora, and a store as one compares it."""

import copy
import hashlib
from pathlib import Path

import torch
from analysis import four_families
from golden.tiny import tiny_gpt2, tiny_tokenizer
from safetensors import safe_open

import lens_core as lens


def tiny(family, dtype=None):
    """Load a tiny model of the test's own, with noise in every parameter and a tokenizer of words."""
    model = copy.deepcopy(four_families.tiny(family))
    return model if dtype is None else model.to(dtype)


WORDS = [f"w{i}" for i in range(28)]


def worded(**options):
    """Give a tiny GPT-2 with a tokenizer of words."""
    return lens.load(tiny_gpt2(**options), tokenizer=tiny_tokenizer())


def texts(n=60, seed=0):
    """Make texts of 0 to 12 words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 13, (n,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, 28, (size,), generator=generator)) for size in lengths]


def id_rows(n=60, seed=0, most=12, vocab=28):
    """Make rows of 1 to `most` ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, most + 1, (n,), generator=generator).tolist()
    return [torch.randint(0, vocab, (size,), generator=generator).tolist() for size in lengths]


def shards(store):
    """Read each shard by safetensors' own reader, in the order of the store."""
    found = []
    for record in store.records:
        with safe_open(record.file(store.path), "pt") as file:
            found.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def digests(folder):
    """Give the SHA-256 of every shard's file, by name."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


__all__ = ["WORDS", "digests", "id_rows", "shards", "texts", "worded"]
