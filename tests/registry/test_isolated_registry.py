"""`lens_core.testing.isolated_registry`."""

import threading
import types

import lens_gpt2
import pytest

from lens_core._registry import active_registry, resolve_architecture
from lens_core.errors import AmbiguousArchitectureError, PluginWarning, UnknownModelTypeError
from lens_core.plugin import hookimpl
from lens_core.testing import isolated_registry


class Renamed:
    """A plugin that is an object: GPT-2 under another model type."""

    @hookimpl
    def lens_architectures(self):
        """Describe it."""
        import attrs

        return [attrs.evolve(lens_gpt2.lens_architectures()[0], model_types=("renamed",))]


def test_it_knows_only_what_it_was_given():
    """Installed plugins are not there."""
    with isolated_registry(Renamed()):
        assert resolve_architecture("renamed").name == "GPT-2"
        with pytest.raises(UnknownModelTypeError):
            resolve_architecture("gpt2")


def test_it_can_add_to_what_is_installed():
    """With discover=True both are there."""
    with isolated_registry(Renamed(), discover=True):
        assert resolve_architecture("renamed").implementation == resolve_architecture("gpt2").implementation


def test_the_previous_registry_returns_even_after_an_error():
    """Blocks nest, and leave nothing behind."""
    before = active_registry()
    with isolated_registry(lens_gpt2) as outer:
        with isolated_registry() as inner:
            assert active_registry() is inner
        with pytest.raises(ZeroDivisionError), isolated_registry():
            raise ZeroDivisionError
        assert active_registry() is outer
    assert active_registry() is before


def test_other_threads_see_it():
    """The replacement is not bound to the thread that made it."""
    seen = []
    with isolated_registry() as registry:
        thread = threading.Thread(target=lambda: seen.append(active_registry()))
        thread.start()
        thread.join()
    assert seen == [registry]


def test_a_plugin_given_by_hand_competes_like_any_other():
    """Two of them that claim one type are ambiguous, and are named as what they are."""
    with isolated_registry(lens_gpt2, discover=True) as registry:
        with pytest.raises(AmbiguousArchitectureError, match=r"lens-gpt2 .* and by lens_gpt2 \(registered by hand\)"):
            registry.resolve("gpt2")
    with isolated_registry(Renamed(), Renamed()) as registry:
        with pytest.raises(AmbiguousArchitectureError):
            registry.resolve("renamed")


def test_what_is_wrong_with_it_is_said():
    """A module that implements nothing warns like an installed plugin."""
    with isolated_registry(types.ModuleType("empty")) as registry:
        with pytest.warns(PluginWarning, match=r"empty \(registered by hand\) is left out: it implements no hook"):
            (record,) = registry.records
        assert record.status == "broken"
