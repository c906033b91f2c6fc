"""The command line: help, exit codes, errors without tracebacks, and `lens plugins`."""

import json
import os
import subprocess
import sys
import types
import warnings

import lens_gpt2
import pytest

from lens_core import _cli
from lens_core.errors import ConfigWarning, LensError
from lens_core.plugin import Capability, hookimpl
from lens_core.testing import isolated_registry


def run(*arguments):
    """Call the command line in this process; argparse leaves by SystemExit."""
    try:
        return _cli.main(arguments)
    except SystemExit as done:
        return done.code


@pytest.fixture
def command(monkeypatch):
    """Replace the commands by one, `try`, that does what the test says."""

    def set_up(action):
        module = types.ModuleType("lens_try")
        module.add_arguments = lambda parser: parser.add_argument("--flag")
        module.run = action
        monkeypatch.setitem(sys.modules, "lens_try", module)
        monkeypatch.setattr(_cli, "_COMMANDS", (_cli._Command("try", "try it", "lens_try"),))

    return set_up


def test_no_argument_shows_the_help(capsys):
    """And that is no mistake."""
    assert run() == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: lens")
    assert "plugins" in shown


@pytest.mark.parametrize("command_name", ["", *(command.name for command in _cli._COMMANDS)])
def test_each_help_fits_one_screen(capsys, command_name):
    """At most 40 lines of at most 100 characters, and exit code 0."""
    assert run(*command_name.split(), "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


def test_the_version_is_shown(capsys):
    """`lens --version` names the distribution."""
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("lens-core ")


@pytest.mark.parametrize("arguments", [["nonsense"], ["plugins", "--nonsense"]])
def test_a_mistake_in_the_arguments_is_exit_code_2(capsys, arguments):
    """As argparse has it, with the usage."""
    assert run(*arguments) == 2
    assert "usage: lens" in capsys.readouterr().err


@pytest.mark.parametrize("error", [LensError("No such\nthing."), OSError("No such\nthing.")])
def test_an_error_is_one_line_without_a_traceback(command, capsys, error):
    """What was asked could not be done: exit code 2."""

    def action(arguments):
        raise error

    command(action)
    assert run("try") == 2
    assert capsys.readouterr().err == "lens: No such thing.\n"


@pytest.mark.parametrize("arguments", [["--debug", "try"], ["try", "--debug"]])
def test_debug_shows_the_error_itself(command, arguments):
    """Before the command or after it."""

    def action(arguments):
        raise LensError("No.")

    command(action)
    with pytest.raises(LensError, match="No."):
        run(*arguments)


def test_a_mistake_of_lens_own_is_exit_code_1(command, capsys):
    """It is said to be one, without a traceback."""

    def action(arguments):
        raise ZeroDivisionError("division by zero")

    command(action)
    assert run("try", "--flag", "x") == 1
    assert capsys.readouterr().err == (
        "lens: unexpected ZeroDivisionError: division by zero; this is a mistake in lens (--debug shows where)\n"
    )


def test_an_interrupt_is_exit_code_130(command):
    """Ctrl-C shows no traceback."""

    def action(arguments):
        raise KeyboardInterrupt

    command(action)
    assert run("try") == 130


def test_a_warning_of_lens_is_one_line(command, capsys):
    """Others look as Python shows them; nothing of it outlives the command."""

    def action(arguments):
        warnings.simplefilter("always")
        warnings.warn("Two\nlines", ConfigWarning, stacklevel=1)
        warnings.warn("from elsewhere", RuntimeWarning, stacklevel=1)
        return 0

    before = warnings.showwarning
    command(action)
    assert run("try") == 0
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "lens: warning: Two lines"
    assert second.endswith("RuntimeWarning: from elsewhere")
    assert warnings.showwarning is before


def test_a_reader_that_leaves_is_no_error():
    """`lens plugins --json | head -c 1` ends quietly."""
    reading, writing = os.pipe()
    os.close(reading)
    command_line = [sys.executable, "-m", "lens_core", "plugins", "--json"]
    done = subprocess.run(command_line, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_plugins_as_json_tells_everything(capsys, monkeypatch, tmp_path):
    """Name, distribution, version, status, reason, and for each architecture its versions and capabilities."""
    monkeypatch.setenv("LENS_CERTIFICATES", str(tmp_path))  # not the user's own
    with isolated_registry(discover=True):
        assert run("plugins", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    (plugin,) = [plugin for plugin in document["plugins"] if plugin["distribution"] == "lens-gpt2"]
    architecture = plugin.pop("architectures")[0]
    assert plugin == {
        "name": "gpt2",
        "distribution": "lens-gpt2",
        "version": lens_gpt2.__version__,
        "status": "ok",
        "reason": "",
        "model_types": ["gpt2", "gpt_bigcode"],
        "certificates": [],
    }
    assert (architecture["api_version"], architecture["transformers"]) == (1, ">=5.20,<6")
    assert architecture["capabilities"].keys() == {capability.value for capability in Capability}
    assert architecture["capabilities"]["ssm_state"]["support"] == "absent"


class _Broken:
    @hookimpl
    def lens_architectures(self):
        raise RuntimeError("a [bold] mistake")


def test_plugins_shows_a_table(capsys, monkeypatch):
    """A broken plugin is a row with its reason as it is, not a warning."""
    monkeypatch.setenv("COLUMNS", "200")
    with isolated_registry(lens_gpt2, _Broken()):
        assert run("plugins") == 0
    shown = capsys.readouterr()
    assert "gpt2" in shown.out
    assert "broken" in shown.out
    assert "it raised RuntimeError: a [bold] mistake" in shown.out
    assert shown.err == ""


def test_without_plugins_it_says_what_to_install(capsys):
    """Rather than an empty table."""
    with isolated_registry():
        assert run("plugins") == 0
    assert "pip install lens-gpt2" in capsys.readouterr().out


def test_the_module_runs_like_the_command():
    """`python -m lens_core` is `lens`, and passes the exit code on."""
    done = subprocess.run([sys.executable, "-m", "lens_core", "nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: lens" in done.stderr
