"""Importing what an architecture names: its implementation and its toy."""

import attrs
import lens_gpt2
import pytest

from lens_core._registry import load_implementation, toy_folder
from lens_core.errors import ModelNotFoundError, PluginLoadError

GPT2 = lens_gpt2.lens_architectures()[0]


def test_an_implementation_is_imported_on_request():
    """`package.module:attribute` gives the attribute."""
    architecture = attrs.evolve(GPT2, implementation="lens_gpt2:lens_architectures")
    assert load_implementation(architecture) is lens_gpt2.lens_architectures


def test_a_module_that_is_not_there_is_a_plugin_error():
    """The message has the name and the cause."""
    with pytest.raises(PluginLoadError, match=r"'lens_gpt2\.nowhere:X' of GPT-2 does not import: ModuleNotFoundError"):
        load_implementation(attrs.evolve(GPT2, implementation="lens_gpt2.nowhere:X"))


def test_a_module_that_raises_is_a_plugin_error(tmp_path, monkeypatch):
    """Whatever it raises is the cause."""
    tmp_path.joinpath("lens_raising.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginLoadError, match="ZeroDivisionError") as raised:
        load_implementation(attrs.evolve(GPT2, implementation="lens_raising:X"))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_missing_attribute_gets_near_matches():
    """The message offers what the module has."""
    with pytest.raises(PluginLoadError, match="has no lens_architecture. Did you mean lens_architectures?"):
        load_implementation(attrs.evolve(GPT2, implementation="lens_gpt2:lens_architecture"))


def test_a_toy_is_a_folder_of_the_plugin():
    """Its path is inside the package, wherever that is installed."""
    folder = toy_folder(attrs.evolve(GPT2, toy="."))
    assert folder.joinpath("__init__.py").is_file()


def test_no_toy_is_said():
    """A name without a toy says what to load instead."""
    with pytest.raises(ModelNotFoundError, match="GPT-2 ships no toy"):
        toy_folder(attrs.evolve(GPT2, toy=None))


def test_a_toy_that_is_missing_is_a_plugin_error():
    """The folder and the remedy are named."""
    with pytest.raises(PluginLoadError, match="nowhere; reinstall the plugin"):
        toy_folder(attrs.evolve(GPT2, toy="nowhere"))


def test_a_toy_of_a_package_that_is_not_there_is_a_plugin_error():
    """As for any other part of the plugin."""
    with pytest.raises(PluginLoadError, match="lens_nowhere of GPT-2 does not import"):
        toy_folder(attrs.evolve(GPT2, implementation="lens_nowhere._code:X"))
