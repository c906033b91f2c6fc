"""The public names: sorted, complete, and each where it says it is."""

import importlib
from importlib.metadata import version
from pathlib import Path

import pytest

import lens_core

PLUGINS = sorted(file.parent.name for file in Path(__file__).parents[1].glob("plugins/*/pyproject.toml"))
PUBLIC_MODULES = [
    *("lens_core", "lens_core.errors", "lens_core.plugin", "lens_core.testing"),
    *(f"lens_{name}" for name in PLUGINS),
]


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_all_is_sorted_and_without_duplicates(name):
    """A name has one place in the list: constants, then classes, then the rest, as ruff sorts them too."""
    names = importlib.import_module(name).__all__

    def place(name):
        return (not name.isupper(), not name[0].isupper(), name)

    assert names == sorted(set(names), key=place)


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_every_public_name_can_be_got(name):
    """Lazy names included."""
    module = importlib.import_module(name)
    for public in module.__all__:
        assert getattr(module, public) is not None


@pytest.mark.parametrize("name", ["lens_core", "lens_core.plugin"])
def test_dir_shows_the_public_names(name):
    """Tab completion offers what is public, whether it was loaded or not."""
    module = importlib.import_module(name)
    assert dir(module) == sorted(module.__all__)


@pytest.mark.parametrize("name", ["lens_core", "lens_core.plugin"])
def test_an_unknown_name_is_an_attribute_error(name):
    """As for any module."""
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'lode'"):
        _ = importlib.import_module(name).lode


def test_every_error_is_public():
    """Whatever lens raises can be caught by a name of the top module."""
    from lens_core import errors

    assert set(errors.__all__) <= set(lens_core.__all__)
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == set(errors.__all__)


@pytest.mark.parametrize("name", ["core", *PLUGINS])
def test_the_version_is_said_once(name):
    """The distribution's version is the module's."""
    assert version(f"lens-{name}") == importlib.import_module(f"lens_{name}").__version__


def test_the_version_of_the_citation_is_the_same():
    """CITATION.cff names the release that it describes."""
    citation = Path(__file__).parents[1] / "CITATION.cff"
    assert f"\nversion: {lens_core.__version__}\n" in citation.read_text()
