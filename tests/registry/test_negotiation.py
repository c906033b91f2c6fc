"""Versions: what does not fit is left out, with a message that says which side to upgrade."""

import importlib.metadata

import pytest

from lens_core import __version__
from lens_core.errors import IncompatiblePluginError, PluginWarning
from lens_core.testing import isolated_registry

CONFLICTS = {
    "API too new": (
        {"fields": "{'api_version': 2}"},
        "written for plugin API 2 and lens-core HERE speaks 1; upgrade lens-core (pip install --upgrade lens-core)",
    ),
    "API too old": (
        {"fields": "{'api_version': 0}"},
        "written for plugin API 0 and lens-core HERE speaks 1; upgrade lens-foo (pip install --upgrade lens-foo)",
    ),
    "transformers too new": (
        {"fields": "{'transformers': '>=4,<5'}"},
        "upgrade lens-foo (pip install --upgrade lens-foo), or install 'transformers<5,>=4'",
    ),
    "transformers too old": (
        {"fields": "{'transformers': '>=99'}"},
        "upgrade transformers (pip install --upgrade 'transformers>=99')",
    ),
    "core too old": (
        {"requires": ["lens-core>=99"]},
        "made for lens-core>=99 and lens-core HERE is installed; upgrade lens-core",
    ),
    "core too new": (
        {"requires": ["Lens_Core<0.0.1"]},
        "made for lens-core<0.0.1 and lens-core HERE is installed; upgrade lens-foo",
    ),
}


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_what_does_not_fit_is_incompatible(site, record_of, conflict):
    """The record, the warning and the error for its model type all say which side to upgrade."""
    how, text = CONFLICTS[conflict]
    remedy = text.replace("HERE", __version__)
    site.install_plugin("lens-foo", **how)
    with isolated_registry(discover=True) as registry:
        with pytest.warns(PluginWarning) as warned:
            record = record_of(registry, "lens-foo")
        assert record.status == "incompatible"
        assert remedy in record.reason
        assert remedy in str(warned[0].message)
        with pytest.raises(IncompatiblePluginError) as raised:
            registry.resolve("foo")
        assert remedy in str(raised.value)
        assert registry.resolve("gpt2").name == "GPT-2"


def test_requirements_are_compared_before_the_code_is_imported(site, record_of):
    """A plugin for another core may fail in any way when imported; it is not imported."""
    site.install("lens-foo", "raise RuntimeError('imported')", requires=["lens-core>=99"])
    with isolated_registry(discover=True) as registry:
        with pytest.warns(PluginWarning):
            record = record_of(registry, "lens-foo")
        assert record.status == "incompatible"
        assert "imported" not in record.reason


def test_versions_are_compared_before_the_descriptor_is_checked(site, record_of):
    """A plugin for a later API may lack what this one asks for: it is incompatible, not broken."""
    site.install_plugin("lens-foo", fields="{'api_version': 2, 'capabilities': {}, 'implementation': '?'}")
    with isolated_registry(discover=True) as registry:
        with pytest.warns(PluginWarning):
            record = record_of(registry, "lens-foo")
        assert record.status == "incompatible"
        assert record.model_types == ("foo",)


def test_requirements_of_extras_and_of_other_packages_do_not_count(site, record_of):
    """Only what the plugin needs of lens-core and transformers, here and now, is compared."""
    requires = [
        "lens-core>=99; extra == 'new'",
        "transformers<1; python_version < '3'",
        "something-else>=3",
        "lens-core",
    ]
    site.install_plugin("lens-foo", requires=requires)
    with isolated_registry(discover=True) as registry:
        assert record_of(registry, "lens-foo").status == "ok"


def test_without_transformers_the_message_says_so(site, record_of, monkeypatch):
    """A plugin that needs what is not installed is incompatible."""
    site.install_plugin("lens-foo")

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with isolated_registry(discover=True) as registry:
        with pytest.warns(PluginWarning):
            record = record_of(registry, "lens-foo")
        assert (
            record.reason
            == "it needs transformers>=5.20, and transformers is not installed; pip install 'transformers>=5.20'"
        )
