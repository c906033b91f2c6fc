"""What every command does with what it cannot use: exit code 2, one line, no traceback, nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lens_core import _cli
from lens_core.errors import ArgumentError, ModelNotFoundError

COMMANDS = [command.name for command in _cli._COMMANDS]


@pytest.fixture
def place(tiny, bare, run):
    """Give the working folder with files to stumble over."""
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("folder").mkdir()
    Path("tiny").symlink_to(tiny)
    Path("bare").symlink_to(bare)
    Path("noise.safetensors").write_bytes(os.urandom(200))
    (Path("sick")).mkdir()
    Path("sick/config.json").write_text("{")
    (Path("list")).mkdir()
    Path("list/config.json").write_text("[]")
    (Path("other")).mkdir()
    Path("other/config.json").write_text('{"model_type": "t5"}')
    return Path()


CACHE = ["cache", "tiny", "--out", "x.safetensors"]
MISTAKES = {
    "unknown model": (["hooks", "no/such"], "'no/such'"),
    "folder without a model": (["hooks", "folder"], "'folder'"),
    "sick config": (["hooks", "sick"], "the config of 'sick' cannot be read"),
    "config of another form": (["hooks", "list"], "the config of 'list' cannot be read"),
    "unserved model type": (["hooks", "other"], "'t5'"),
    "unknown toy": (["hooks", "toy:gtp2"], "gpt2"),
    "glob without match, hooks": (["hooks", "tiny", "--names", "*nothing*"], "'*nothing*'"),
    "unknown name, hooks": (["hooks", "tiny", "--names", "hook_qq"], "hook_q"),
    "layer beyond the last": (["hooks", "tiny", "--layer", "3"], "layers are 0 to 2"),
    "layer and names that exclude each other": (["hooks", "tiny", "--layer", "1", "--names", "hook_embed"], "layer 1"),
    "unknown model, cache": (["cache", "no/such", "--text", "w1", "--out", "x"], "'no/such'"),
    "glob without match, cache": ([*CACHE, "--text", "w1", "--names", "*nothing*"], "'*nothing*'"),
    "missing text file": ([*CACHE, "--file", "none.txt"], "'none.txt' does not exist"),
    "text file that is a folder": ([*CACHE, "--file", "folder"], "'folder' is a folder"),
    "empty text file": ([*CACHE, "--file", "empty.txt"], "the file 'empty.txt' holds no text"),
    "text file in another encoding": ([*CACHE, "--file", "latin.txt"], "'latin.txt' is not text in UTF-8 (byte 3)"),
    "empty text": ([*CACHE, "--text", " "], "--text holds no text"),
    "text too long": ([*CACHE, "--text", "w1 " * 33], "The input has 33 tokens, and the model's context holds 32"),
    "text without tokenizer": (["cache", "bare", "--text", "w1", "--out", "x"], "no tokenizer"),
    "out in no folder": (["cache", "tiny", "--text", "w1", "--out", "none/x"], "there is no folder 'none'"),
    "out that is a folder": (["cache", "tiny", "--text", "w1", "--out", "folder"], "--out 'folder' is a folder"),
    "no such device": ([*CACHE, "--text", "w1", "--device", "gpu"], "--device 'gpu' cannot be used here"),
    "device that is not there": ([*CACHE, "--text", "w1", "--device", "cuda:7"], "--device 'cuda:7' cannot be used"),
    "missing cache file": (["view", "none.safetensors"], "'none.safetensors' does not exist"),
    "cache file that is none": (["view", "noise.safetensors"], "'noise.safetensors'"),
    "page in no folder": (["view", "noise.safetensors", "--out", "none/x.html"], "there is no folder 'none'"),
    "page over the file": (["view", "noise.safetensors", "--out", "noise.safetensors"], "would overwrite"),
    "demo of an unknown model": (["demo", "--model", "no/such"], "'no/such'"),
    "demo of a missing file": (["demo", "--model", "tiny", "--file", "none.txt"], "'none.txt' does not exist"),
    "demo of an empty text": (["demo", "--model", "tiny", "--text", ""], "--text holds no text"),
    "demo of one token": (["demo", "--model", "tiny", "--text", "w1"], "a single token"),
    "demo of text without tokenizer": (["demo", "--model", "bare", "--text", "w1"], "no tokenizer"),
    "demo without words": (["demo", "--model", "tiny"], "no plain lower-case words"),
    "demo that cannot be written": (["demo", "--model", "tiny", "--out", "none/x.html"], "there is no folder 'none'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(run, place, mistake):
    """The line names what was wrong; there is no traceback and no file."""
    arguments, message = MISTAKES[mistake]
    before = sorted(place.iterdir())
    done = run(*arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.startswith("lens: ")
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["cache", "tiny", "--out", "x"],
        ["cache", "tiny", "--text", "a", "--file", "b", "--out", "x"],
        ["cache", "tiny", "--text", "a"],
        ["cache", "tiny", "--text", "a", "--out", "x", "--dtype", "int8"],
        ["hooks"],
        ["hooks", "tiny", "--layer", "one"],
        ["view"],
        ["demo", "--seed", "x"],
    ],
)
def test_a_mistake_in_the_arguments_shows_the_usage(run, arguments):
    """As argparse has it, before any model is looked for."""
    done = run(*arguments)
    assert done.code == 2
    assert done.err.startswith(f"usage: lens {arguments[0]}")


def test_a_file_that_may_not_be_written_is_refused_before_the_work(run, tiny, monkeypatch):
    """And not after it."""
    monkeypatch.setattr("lens_core._commands._cache.load", None)
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    done = run("cache", tiny, "--text", "w1", "--out", "x.safetensors")
    assert (done.code, done.err) == (2, "lens: --out 'x.safetensors' may not be written; choose another place\n")


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_cut_cache_file_is_refused(run, activations, size):
    """Wherever it was cut."""
    Path("cut.safetensors").write_bytes(activations.read_bytes()[:size])
    done = run("view", "cut.safetensors")
    assert done.code == 2
    assert "'cut.safetensors'" in done.err
    assert done.err.count("\n") == 1
    assert not Path("cut.html").exists()


def test_debug_raises_the_error_itself(run):
    """Before the command or after it."""
    with pytest.raises(ModelNotFoundError):
        run("--debug", "hooks", "no/such")
    with pytest.raises(ArgumentError):
        run("view", "none", "--debug")


def test_debug_shows_a_traceback():
    """In the process itself, where without it there is one line."""
    command = [sys.executable, "-m", "lens_core", "view", "none"]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (plain.returncode, plain.stderr) == (2, "lens: 'none' does not exist; give the path of a file\n")
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, check=False)
    assert debug.returncode == 1
    assert debug.stderr.startswith("Traceback")
    assert "ArgumentError: 'none' does not exist" in debug.stderr


@pytest.mark.parametrize(
    ("arguments", "module"), [(["cache", "m", "--text", "w1", "--out", "x"], "_cache"), (["demo"], "_demo")]
)
def test_an_interrupt_while_loading_is_exit_code_130(run, monkeypatch, arguments, module):
    """Without a word, and without a file."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"lens_core._commands.{module}.load", interrupted)
    done = run(*arguments)
    assert (done.code, done.err) == (130, "")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_each_help_fits_one_screen(run, command):
    """At most 30 lines of 80 columns."""
    done = run(*command.split(), "--help")
    lines = done.out.splitlines()
    assert done.code == 0
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick(command):
    """Declaring the options imports neither torch nor transformers."""
    script = (
        "import sys\nfrom lens_core._cli import main\n"
        f"try: main([{command!r}, '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
