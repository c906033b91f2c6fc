"""The command line in this process, and models in folders for it to load."""

from pathlib import Path
from typing import NamedTuple

import pytest
from golden.tiny import tiny_gpt2, tiny_tokenizer

from lens_core._cli import main

TEXT = "w1 w2 w3 w4 w5 w1 w2 w3 w4 w5"


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Give the function that runs `lens ARGUMENTS` in an empty folder, as in a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as left:  # argparse leaves by it
            code = left.code
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Give the folder of a random GPT-2 with a tokenizer of words w0 to w27."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_gpt2().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bare(tmp_path_factory) -> Path:
    """Give the folder of a random GPT-2 without a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "bare"
    tiny_gpt2().save_pretrained(folder)
    return folder


@pytest.fixture
def activations(run, tiny) -> Path:
    """Give a file that `lens cache` wrote, with all default entries of a short text."""
    assert run("cache", tiny, "--text", TEXT, "--out", "acts.safetensors").code == 0
    return Path("acts.safetensors").absolute()
