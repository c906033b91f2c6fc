"""Which plugin serves a model type, and what is said when none does."""

import pytest

from lens_core import _registry
from lens_core.errors import AmbiguousArchitectureError, PluginError, UnknownModelTypeError
from lens_core.testing import isolated_registry


def test_two_claimants_are_an_error_that_names_both(site, record_of):
    """It is raised when the type is asked for; what only one of them claims still works."""
    site.install_plugin("lens-foo", "foo", "gpt2")
    with isolated_registry(discover=True) as registry:
        with pytest.raises(AmbiguousArchitectureError) as raised:
            registry.resolve("gpt2")
        message = str(raised.value)
        assert "lens-foo 1.0" in message
        assert "lens-gpt2 " in message
        assert "LENS_DISABLE_PLUGINS" in message
        assert registry.resolve("foo").name == "lens-foo"
        assert record_of(registry, "lens-foo").status == "ambiguous"
        assert "gpt2 is also claimed by lens-gpt2 " in record_of(registry, "lens-foo").reason
        assert record_of(registry, "lens-gpt2").status == "ambiguous"


def test_two_plugins_that_are_named_for_one_type_are_ambiguous(site):
    """Two entry points of one name, of different distributions, are both seen."""
    site.install_plugin("lens-foo", "foo")
    site.install_plugin("lens-other-foo", "foo", entries={"foo": "lens_other_foo"})
    with isolated_registry(discover=True) as registry:
        with pytest.raises(AmbiguousArchitectureError, match=r"lens-foo 1\.0 and by lens-other-foo 1\.0"):
            registry.resolve("foo")


def test_disabling_one_of_two_claimants_ends_the_ambiguity(site, monkeypatch):
    """What the message recommends works."""
    site.install_plugin("lens-foo", "foo", "gpt2")
    monkeypatch.setenv("LENS_DISABLE_PLUGINS", "lens-foo")
    with isolated_registry(discover=True) as registry:
        assert registry.resolve("gpt2").name == "GPT-2"


def test_a_broken_claimant_does_not_make_a_type_ambiguous(site):
    """A plugin that cannot serve claims nothing."""
    site.install_plugin("lens-foo", "foo", "gpt2", fields="{'implementation': ''}")
    with isolated_registry(discover=True) as registry:
        with pytest.warns(UserWarning, match="lens-foo"):
            assert registry.resolve("gpt2").name == "GPT-2"


@pytest.mark.parametrize(
    ("model_type", "package"),
    [("gpt2", "lens-gpt2"), ("llama", "lens-llama"), ("qwen3_moe", "lens-llama"), ("falcon_mamba", "lens-mamba")],
)
def test_a_known_type_names_the_package_to_install(model_type, package):
    """For what lens itself publishes, the remedy is a command."""
    with isolated_registry() as registry:
        with pytest.raises(
            UnknownModelTypeError, match=f"'{model_type}'. pip install {package} brings it. Installed: none"
        ):
            registry.resolve(model_type)


def test_every_type_that_is_published_here_names_its_package():
    """Whoever lacks one plugin is told which."""
    with isolated_registry(discover=True) as registry:
        served = {name: record.distribution for record in registry.records for name in record.model_types}
    known = _registry._KNOWN_PACKAGES
    assert {name: package for name, package in served.items() if package in known.values()} == known


def test_a_near_miss_is_offered(site):
    """A misspelt type gets its likely meaning, and the list of what is installed."""
    with isolated_registry(discover=True) as registry:
        with pytest.raises(UnknownModelTypeError, match=r"Did you mean 'gpt2'\?.*Installed: .*gpt2 \(lens-gpt2 "):
            registry.resolve("gtp2")


def test_a_stranger_is_looked_for_by_name():
    """For any other type the naming convention says what to search."""
    with isolated_registry() as registry:
        with pytest.raises(UnknownModelTypeError, match="Look for a distribution named lens-zorp-next, or write one"):
            registry.resolve("zorp_next")


def test_all_of_it_can_be_caught_as_one_error():
    """A caller who cares only whether a plugin serves catches PluginError."""
    with isolated_registry() as registry:
        with pytest.raises(PluginError):
            registry.resolve("gpt2")
