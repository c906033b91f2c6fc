"""The plugin that a third party would write, installed as a user installs it: its own tests, and the kit."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples/lens-gpt-neox"


def run(*command, cwd, site=None):
    """Run a Python module in a process that finds the plugin in `site` only."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    environment |= {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **({"PYTHONPATH": str(site)} if site else {})}
    options = {"cwd": cwd, "env": environment, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, "-m", *command], **options, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Install the example beside everything else, and give the folder."""
    source, site = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source)  # building leaves files behind
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    done = run("pip", "install", *options, "--target", site, source, cwd=source)
    assert done.returncode == 0, done.stderr
    return site


def test_its_own_tests_pass(site, tmp_path):
    """The two lines of the kit, and what is particular to GPT-NeoX."""
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")
    options = ("-q", "-W", "error", "-p", "no:cacheprovider", "--import-mode=importlib", "--lens-level", "fast")
    done = run("pytest", *options, "tests", cwd=tmp_path, site=site)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


def test_it_imports_public_names_only():
    """Nothing of the core but `lens_core.plugin`."""
    for file in (EXAMPLE / "lens_gpt_neox").glob("*.py"):
        imported = re.findall(r"^(?:from|import) (lens_core\S*)", file.read_text(), re.MULTILINE)
        assert set(imported) <= {"lens_core.plugin"}, file.name
