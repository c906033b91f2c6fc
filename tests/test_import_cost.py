"""Importing the core or a descriptor, and asking for the plugins, is light."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PLUGINS = sorted(file.parent.name for file in Path(__file__).parents[1].glob("plugins/*/pyproject.toml"))

# `import` as a user would, then say which of the heavy packages came along.
_SCRIPT = (
    "import sys\n{statement}\nimport json\nprint(json.dumps(sorted({{'torch', 'transformers'}} & sys.modules.keys())))"
)


@pytest.mark.parametrize(
    "statement",
    [
        "import lens_core",
        "import lens_core.plugin, lens_core.errors, lens_core.testing",
        "from lens_core import LensError, HookPoint",
        *(f"import lens_{name}; lens_{name}.lens_architectures()" for name in PLUGINS),
        "from lens_core._registry import resolve_architecture; resolve_architecture('gpt2')",
        "from lens_core._cli import main; main(['--debug'])",
        "import lens_core; dir(lens_core)",
        "import contextlib, io\nfrom lens_core._cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()): assert main(['plugins', '--json']) == 0",
    ],
)
def test_neither_torch_nor_transformers_is_imported(statement):
    """Shown in a process of its own, where nothing else has imported them."""
    command = [sys.executable, "-W", "error", "-c", _SCRIPT.format(statement=statement)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_check_itself_can_fail():
    """An import that is heavy is seen."""
    command = [sys.executable, "-c", _SCRIPT.format(statement="import torch")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["torch"]
