"""The wheels: what is in them, and that they work where the repository is not.

The clean environment is a new one. Packages of others are linked into it from the one that runs the tests, which spares
minutes, but only those that our wheels' own metadata requires: pip resolves the requirements against them without an
index, and a requirement that is missing or that nothing satisfies fails the installation.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PLUGINS = {f"lens_{folder.parent.name}": folder.parent for folder in sorted(ROOT.glob("plugins/*/pyproject.toml"))}
PROJECTS = {"lens_core": ROOT, **PLUGINS}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Build the wheel of every distribution, and return their paths by package."""
    folder = tmp_path_factory.mktemp("wheels")
    for project in PROJECTS.values():
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, project]
        subprocess.run(command, check=True, capture_output=True)
    return {package: next(folder.glob(f"{package}-*.whl")) for package in PROJECTS}


@pytest.fixture(scope="module")
def clean(wheels, tmp_path_factory):
    """Return a function that runs a command of an environment with our wheels and what they require."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=True, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    for name in _required(wheels.values()):
        _link(importlib.metadata.distribution(name), Path(site.stdout.strip()))
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE", "COV_"))
    }

    def run(*command):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    index = wheels["lens_core"].parent
    names = [name.replace("_", "-") for name in PLUGINS]
    run(python, "-m", "pip", "install", "--no-index", f"--find-links={index}", *names)
    run(python, "-m", "pip", "check")
    return lambda command, *arguments: run(python.parent / command, *arguments)


def _required(wheels):
    """Return the distributions, ours excepted, that the wheels require, and what those require, and so on."""
    waiting = [line for wheel in wheels for line in _metadata(wheel).get_all("Requires-Dist")]
    required = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and name not in required and not name.startswith("lens-"):
            required.add(name)
            waiting += importlib.metadata.requires(name) or []
    return sorted(required)


def _metadata(wheel):
    name = "-".join(wheel.name.split("-")[:2])
    with zipfile.ZipFile(wheel) as archive:
        return importlib.metadata.PathDistribution(zipfile.Path(archive, f"{name}.dist-info/")).metadata


def _link(distribution, site):
    """Link a distribution's top folders and files into another environment."""
    for top in {Path(file).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        link = site / top
        if not link.exists():
            link.symlink_to(distribution.locate_file(top))


@pytest.mark.parametrize("package", PROJECTS)
def test_a_wheel_has_the_package_and_nothing_else(wheels, package):
    """Every file of the package's folder is in it, with the marker of types; no test, no tool, no leftover is."""
    with zipfile.ZipFile(wheels[package]) as archive:
        inside = {name for name in archive.namelist() if not name.endswith("/")}
    assert {name.split("/")[0].split("-")[0] for name in inside} == {package}
    folder = PROJECTS[package] / package
    expected = {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {name for name in inside if name.startswith(f"{package}/")} == expected
    assert f"{package}/py.typed" in inside
    assert any(name.endswith("/licenses/LICENSE") for name in inside)


def test_the_requirements_are_ranges(wheels):
    """A user's environment is not pinned by ours."""
    for wheel in wheels.values():
        for line in _metadata(wheel).get_all("Requires-Dist"):
            assert "==" not in line.partition(";")[0]
            assert ">=" in line


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_requires_the_core_of_its_time(wheels, plugin):
    """The range that it asks for holds the core of this repository."""
    core = importlib.metadata.version("lens-core")
    (requirement,) = [
        Requirement(line)
        for line in _metadata(wheels[plugin]).get_all("Requires-Dist")
        if canonicalize_name(Requirement(line).name) == "lens-core"
    ]
    assert requirement.specifier.contains(core)
    assert not requirement.specifier.contains("99")


def test_the_command_lists_the_plugins_in_a_clean_environment(clean):
    """The entry points of all wheels work: the command, and the architectures."""
    for document in (clean("lens", "plugins", "--json"), clean("python", "-m", "lens_core", "plugins", "--json")):
        found = {(plugin["distribution"], plugin["status"]) for plugin in json.loads(document)["plugins"]}
        assert found == {(name.replace("_", "-"), "ok") for name in PLUGINS}


def test_the_toy_runs_in_a_clean_environment(clean):
    """What the wheels require is enough to load the toy and read inside it; nothing of the repository is needed."""
    script = (
        "import lens_core as lens, sys\n"
        "model = lens.load('toy:gpt2')\n"
        "logits, cache = model.run_with_cache([[1, 2, 3, 1, 2]], names_filter='blocks.0.attn.hook_pattern')\n"
        "print(tuple(logits.shape[:2]), tuple(cache['pattern', 0].shape[-2:]), lens.__file__.startswith(sys.prefix))\n"
    )
    script = script.replace("[[1, 2, 3, 1, 2]]", "__import__('torch').tensor([[1, 2, 3, 1, 2]])")
    assert clean("python", "-W", "error", "-c", script).split("\n")[-2] == "(1, 5) (5, 5) True"
