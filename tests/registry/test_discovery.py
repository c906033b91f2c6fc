"""What becomes of an installed plugin, and that one cannot break another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lens_core.errors import PluginLoadError, PluginWarning
from lens_core.testing import isolated_registry


def test_a_sound_plugin_is_ok_and_serves(site, record_of):
    """Its record has what its metadata and its descriptor say."""
    site.install_plugin("lens-foo", "foo", version="1.2")
    with isolated_registry(discover=True) as registry:
        record = record_of(registry, "lens-foo")
        assert (record.entry_name, record.version, record.status, record.reason) == ("foo", "1.2", "ok", "")
        assert record.model_types == ("foo",)
        assert registry.resolve("foo").implementation == "lens_foo.code:Thing"


def test_the_installed_gpt2_plugin_is_found(site, record_of):
    """The repository's own plugin is discovered like any other."""
    with isolated_registry(discover=True) as registry:
        assert record_of(registry, "lens-gpt2").status == "ok"
        assert registry.resolve("gpt2").toy == "toy"


BROKEN = {
    "raises on import": ("1 / 0", "it raised ZeroDivisionError: division by zero"),
    "exits on import": ("import sys; sys.exit(3)", "it raised SystemExit: 3"),
    "imports what is not there": ("import not_installed_anywhere", "not_installed_anywhere"),
    "has no hook": ("x = 1", "implements no hook; decorate lens_architectures"),
    "forgets the decorator": ("def lens_architectures(): return []", "decorate lens_architectures"),
    "takes an argument": (
        "from lens_core.plugin import hookimpl\n@hookimpl\ndef lens_architectures(model): return []",
        "PluginValidationError",
    ),
    "misspells the hook": (
        "from lens_core.plugin import hookimpl\n@hookimpl\ndef lens_architecture(): return []",
        "unknown hook lens_architecture; did you mean lens_architectures?",
    ),
    "implements a hook of the future": (
        "from lens_core.plugin import hookimpl\n@hookimpl\ndef lens_architectures(): return []\n"
        "@hookimpl\ndef lens_tokenize(text): return text",
        "unknown hook lens_tokenize",
    ),
    "returns None": (
        "from lens_core.plugin import hookimpl\n@hookimpl\ndef lens_architectures(): return None",
        "returned None; return a list",
    ),
    "returns a number": (
        "from lens_core.plugin import hookimpl\n@hookimpl\ndef lens_architectures(): return 7",
        "returned int; return a list",
    ),
    "returns nothing": (
        "from lens_core.plugin import hookimpl\n@hookimpl\ndef lens_architectures(): return []",
        "describe at least one",
    ),
    "returns other records": (
        "from lens_core.plugin import hookimpl\n@hookimpl\ndef lens_architectures(): return ['foo']",
        "returned a list with 'foo'",
    ),
    "raises when asked": (
        "from lens_core.plugin import hookimpl\n@hookimpl\ndef lens_architectures():\n    yield {}['key']",
        "it raised KeyError",
    ),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_a_broken_plugin_warns_and_leaves_the_others_alone(site, record_of, defect):
    """Its record says what is wrong; another plugin still serves."""
    source, reason = BROKEN[defect]
    site.install("lens-foo", source)
    site.install_plugin("lens-goo")
    with isolated_registry(discover=True) as registry:
        with pytest.warns(PluginWarning, match="plugin lens-foo 1.0 is left out"):
            record = record_of(registry, "lens-foo")
        assert record.status == "broken"
        assert reason in record.reason
        assert registry.resolve("goo").name == "lens-goo"
        with pytest.raises(PluginLoadError, match=r"'foo', lens-foo 1\.0, is broken: ") as raised:
            registry.resolve("foo")
        assert reason in str(raised.value)


UNSOUND = {
    "no model type": ("{'model_types': ()}", "name at least one HF model type"),
    "odd implementation": ("{'implementation': 'lens_foo.Thing'}", "write it as 'package.module:attribute'"),
    "odd transformers": ("{'transformers': 'five'}", "write a version specifier"),
    "odd api version": ("{'api_version': '1'}", "api_version of lens-foo is '1'; write an integer"),
    "toy outside": ("{'toy': '../toy'}", "name a folder inside the plugin's package"),
    "toy absolute": ("{'toy': '/toy'}", "name a folder inside the plugin's package"),
    "capability missing": (
        "{'capabilities': {c: Support.FULL for c in Capability if c.name not in ('PER_HEAD', 'GENERATE')}}",
        "capabilities has no value for PER_HEAD, GENERATE",
    ),
    "no reason": (
        "{'capabilities': dict.fromkeys(Capability, Support.FULL) | {Capability.GENERATE: (Support.ABSENT, '')}}",
        "capability GENERATE is ABSENT without a reason",
    ),
    "handled and ignored": ("{'config_ignored': ('vocab_size',)}", "vocab_size are both handled and ignored"),
    "type described twice": ("{'model_types': ('foo', 'foo')}", "describes foo more than once"),
    "entry name is no model type": ("{'model_types': ('fu',)}", "entry point 'foo' is none of the model types"),
    "field of the future": ("{'flavour': 'sweet'}", "flavour"),
    "field missing": ("fields.pop('capabilities') and {}", "capabilities"),
}


@pytest.mark.parametrize("defect", UNSOUND)
def test_an_unsound_descriptor_is_broken(site, record_of, defect):
    """The reason names the field and says what to write."""
    fields, reason = UNSOUND[defect]
    site.install_plugin("lens-foo", fields=fields)
    with isolated_registry(discover=True) as registry:
        with pytest.warns(PluginWarning):
            record = record_of(registry, "lens-foo")
        assert record.status == "broken"
        assert reason in record.reason


def test_support_may_be_partial_with_a_reason(site):
    """A pair of support and reason is kept as a record."""
    fields = (
        "{'capabilities': dict.fromkeys(Capability, Support.FULL) | {Capability.GENERATE: (Support.PARTIAL, 'slow')}}"
    )
    site.install_plugin("lens-foo", fields=fields)
    with isolated_registry(discover=True) as registry:
        capabilities = registry.resolve("foo").capabilities
    shown = {capability.name: (given.support.name, given.reason) for capability, given in capabilities.items()}
    assert shown["GENERATE"] == ("PARTIAL", "slow")
    assert shown["PER_HEAD"] == ("FULL", "")


def test_one_module_may_serve_two_types_through_two_entry_points(site):
    """Two entry points of one distribution to one module are not in each other's way."""
    site.install_plugin("lens-foo", "foo", "fu", entries={"foo": "lens_foo", "fu": "lens_foo"})
    with isolated_registry(discover=True) as registry:
        assert [record.status for record in registry.records if record.distribution == "lens-foo"] == ["ok", "ok"]
        assert registry.resolve("foo") == registry.resolve("fu")


def test_a_distribution_that_shows_twice_is_one_plugin(site, record_of, tmp_path, monkeypatch):
    """An editable install next to a copy on the path is no ambiguity; the first on the path serves."""
    site.install_plugin("lens-foo", version="2.0")
    site.install_plugin("lens-foo", version="1.0", folder=tmp_path / "other")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "other")])
    with isolated_registry(discover=True) as registry:
        record = record_of(registry, "lens-foo")
        assert (record.version, record.status) == ("2.0", "ok")
        assert registry.resolve("foo").name == "lens-foo"


@pytest.mark.parametrize("file", ["METADATA", "entry_points.txt"])
def test_damaged_metadata_of_another_distribution_does_no_harm(site, file):
    """Neither a distribution without metadata nor one with unreadable entry points stops discovery."""
    site.install_plugin("lens-goo")
    info = site.folder / "strange-1.0.dist-info"
    info.mkdir()
    info.joinpath(file).write_text("no equals sign here\n[lens_core.architectures\n[x]\nneither here\n")
    with isolated_registry(discover=True) as registry:
        assert registry.resolve("goo").name == "lens-goo"
        assert registry.resolve("gpt2").name == "GPT-2"


def test_a_distribution_that_shows_twice_is_one_plugin_beside_damaged_metadata(site, record_of, tmp_path, monkeypatch):
    """Also where each distribution has to be read on its own."""
    site.install_plugin("lens-foo", version="2.0")
    site.install_plugin("lens-foo", version="1.0", folder=tmp_path / "other")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "other")])
    info = site.folder / "strange-1.0.dist-info"
    info.mkdir()
    info.joinpath("entry_points.txt").write_text("[x]\nno equals sign here\n")
    with isolated_registry(discover=True) as registry:
        assert record_of(registry, "lens-foo").version == "2.0"


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"\xff\xfe")], ids=["gone", "garbled"])
def test_a_plugin_without_metadata_is_named_by_its_entry_point(site, damage):
    """A record has something to show even so."""
    site.install_plugin("lens-foo")
    damage(site.folder / "lens_foo-1.0.dist-info" / "METADATA")
    with isolated_registry(discover=True) as registry:
        assert registry.resolve("foo").name == "lens-foo"
        (record,) = [record for record in registry.records if record.entry_name == "foo"]
        assert record.distribution


def test_a_descriptor_that_imports_torch_is_remarked_upon(site):
    """It serves, with a warning: in a new process, where a stand-in for torch is not imported yet."""
    site.install_plugin("lens-foo", before="import torch")
    site.folder.joinpath("torch.py").write_text("")
    script = (
        "import warnings; from lens_core.testing import isolated_registry\n"
        "with warnings.catch_warnings(record=True) as seen, isolated_registry(discover=True) as registry:\n"
        "    warnings.simplefilter('always')\n"
        "    record = next(r for r in registry.records if r.entry_name == 'foo')\n"
        "import json; print(json.dumps([record.status, record.reason, [str(w.message) for w in seen]]))"
    )
    environment = os.environ | {"PYTHONPATH": str(site.folder)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    status, reason, warned = json.loads(done.stdout)
    assert status == "ok"
    assert reason == "importing its descriptor imports torch; move that behind `implementation`"
    assert warned == [f"Plugin lens-foo 1.0: {reason}."]


def test_discovery_happens_once(site):
    """A plugin is imported when something is first asked, and not again."""
    site.install_plugin(
        "lens-foo", before="import builtins; builtins.lens_foo_count = 1 + getattr(builtins, 'lens_foo_count', 0)"
    )
    import builtins

    with isolated_registry(discover=True) as registry:
        assert not hasattr(builtins, "lens_foo_count")
        assert registry.records is registry.records
        assert builtins.lens_foo_count == 1
    del builtins.lens_foo_count
