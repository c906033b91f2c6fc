"""The environment variables LENS_DISABLE_PLUGINS and LENS_PLUGIN_ERRORS."""

import pytest

from lens_core.errors import (
    ArgumentError,
    IncompatiblePluginError,
    PluginLoadError,
    PluginWarning,
    UnknownModelTypeError,
)
from lens_core.testing import isolated_registry


@pytest.mark.parametrize("value", ["foo_bar", "lens-foo-bar", " Lens_Foo.Bar , gpt2", "all"])
def test_a_disabled_plugin_is_not_imported(site, record_of, monkeypatch, value):
    """Entry names, distributions in any spelling, and `all` are understood; the error says what to undo."""
    site.install("lens-foo-bar", "raise RuntimeError", entries={"foo_bar": "lens_foo_bar"})
    monkeypatch.setenv("LENS_DISABLE_PLUGINS", value)
    with isolated_registry(discover=True) as registry:
        assert record_of(registry, "lens-foo-bar").status == "disabled"
        with pytest.raises(UnknownModelTypeError, match="is disabled: LENS_DISABLE_PLUGINS names it"):
            registry.resolve("foo_bar")


def test_a_disabled_plugin_leaves_the_others_alone(site, monkeypatch):
    """Only what is named is left out."""
    site.install_plugin("lens-foo")
    monkeypatch.setenv("LENS_DISABLE_PLUGINS", "foo")
    with isolated_registry(discover=True) as registry:
        assert registry.resolve("gpt2").name == "GPT-2"


def test_a_name_that_fits_no_plugin_is_reported(site, monkeypatch):
    """A misspelt name would otherwise disable nothing in silence."""
    monkeypatch.setenv("LENS_DISABLE_PLUGINS", "gtp2")
    with isolated_registry(discover=True) as registry:
        with pytest.warns(PluginWarning, match="'gtp2', which is not installed; did you mean gpt2"):
            assert registry.resolve("gpt2").name == "GPT-2"


def test_errors_can_be_made_to_raise(site, monkeypatch):
    """With LENS_PLUGIN_ERRORS=raise a broken plugin stops discovery, and its own exception is the cause."""
    site.install("lens-foo", "1 / 0")
    monkeypatch.setenv("LENS_PLUGIN_ERRORS", "raise")
    with isolated_registry(discover=True) as registry:
        with pytest.raises(PluginLoadError, match=r"plugin lens-foo 1\.0 does not serve: it raised Zero") as raised:
            registry.resolve("gpt2")
        assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_what_does_not_fit_raises_its_own_error(site, monkeypatch):
    """With LENS_PLUGIN_ERRORS=raise a plugin for other versions raises IncompatiblePluginError."""
    site.install_plugin("lens-foo", fields="{'api_version': 2}")
    monkeypatch.setenv("LENS_PLUGIN_ERRORS", "raise")
    with isolated_registry(discover=True) as registry:
        with pytest.raises(IncompatiblePluginError, match="upgrade lens-core"):
            registry.resolve("gpt2")


def test_another_value_is_refused(site, monkeypatch):
    """The switch knows two values."""
    monkeypatch.setenv("LENS_PLUGIN_ERRORS", "yes")
    with isolated_registry(discover=True) as registry:
        with pytest.raises(ArgumentError, match="LENS_PLUGIN_ERRORS is 'yes'; set it to 'warn' or 'raise'"):
            registry.resolve("gpt2")
