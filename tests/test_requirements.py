"""What each distribution declares: no less than its code imports, no more, and pinned where we test."""

import ast
import importlib
import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PLUGINS = {
    f"lens-{file.parent.name}": (file.parent, f"lens_{file.parent.name}")
    for file in ROOT.glob("plugins/*/pyproject.toml")
}
PROJECTS = {"lens-core": (ROOT, "lens_core"), **PLUGINS}


def declared(folder):
    """Return the requirements of a project by the name of the distribution."""
    project = tomllib.loads(folder.joinpath("pyproject.toml").read_text())["project"]
    found = [Requirement(line) for line in project["dependencies"]]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in found}


def imported(folder):
    """Return the distributions of all that the modules below a folder import, inside functions too."""
    names = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.partition(".")[0])
    owners = importlib.metadata.packages_distributions()
    ours = {folder.name, *sys.stdlib_module_names}
    return {canonicalize_name(owners.get(name, [name])[0]) for name in names - ours}


@pytest.mark.parametrize("distribution", PROJECTS)
def test_what_is_imported_is_required_and_the_other_way_round(distribution):
    """A requirement that comes only by way of another package may go with that package."""
    folder, package = PROJECTS[distribution]
    used = imported(folder / package)
    if distribution != "lens-core":
        used.add("transformers")  # so that pip keeps to the range that was tested
    assert declared(folder).keys() == used


def pins():
    """Return what the requirements files pin, by the name of the distribution."""
    lines = [
        line for file in ("runtime.txt", "dev.txt") for line in (ROOT / "requirements" / file).read_text().splitlines()
    ]
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in found}


def test_every_pin_is_exact():
    """Two machines that run the checks run the same versions."""
    for name, specifier in pins().items():
        assert [part.operator for part in specifier] == ["=="], name


@pytest.mark.parametrize("distribution", PROJECTS)
def test_the_pins_lie_in_the_ranges_that_users_get(distribution):
    """What is tested is what is promised."""
    pinned = pins()
    for name, specifier in declared(PROJECTS[distribution][0]).items():
        if name.startswith("lens-"):
            continue
        (pin,) = pinned[name]
        assert specifier.contains(pin.version), name


def test_the_tests_run_on_the_pinned_versions():
    """An environment that drifted would prove something else."""
    for name, specifier in pins().items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.fail(f"{name} is pinned but not installed; run make test, which installs it")
        assert specifier.contains(installed), f"{name} {installed} is installed, {specifier} is pinned"


@pytest.mark.parametrize("distribution", PLUGINS)
def test_the_descriptor_and_the_distribution_give_the_same_range_of_transformers(distribution):
    """Pip and the registry refuse the same versions."""
    folder, package = PLUGINS[distribution]
    for architecture in importlib.import_module(package).lens_architectures():
        assert SpecifierSet(architecture.transformers) == declared(folder)["transformers"]
