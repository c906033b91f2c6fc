"""A folder on `sys.path` into which tests install made-up distributions."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

_DESCRIPTOR = """
from lens_core.plugin import Architecture, Capability, Support, hookimpl

{before}

@hookimpl
def lens_architectures():
    fields = dict(
        name={distribution!r},
        model_types={model_types!r},
        api_version=1,
        transformers=">=5.20",
        implementation="{module}.code:Thing",
        capabilities=dict.fromkeys(Capability, Support.FULL),
        config_handled=("vocab_size",),
    )
    fields.update({fields})
    return [Architecture(**fields)]
"""


class Site:
    """Writes distributions as pip would: a module, and X-1.0.dist-info with METADATA and entry_points.txt."""

    def __init__(self, folder):
        self.folder = folder
        self.modules = set()

    def install(
        self,
        distribution: str,
        source: str,
        *,
        entries: Mapping[str, str] | None = None,
        version: str = "1.0",
        requires: Sequence[str] = (),
        folder: Path | None = None,
    ) -> str:
        """Install a distribution whose only module, of the same name, has the given source."""
        module = distribution.replace("-", "_")
        self.modules.add(module)
        place = folder or self.folder
        info = place / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        info.joinpath("METADATA").write_text(
            "\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n"
        )
        named = entries or {distribution.removeprefix("lens-"): module}
        text = "\n".join(f"{name} = {value}" for name, value in named.items())
        info.joinpath("entry_points.txt").write_text(f"[lens_core.architectures]\n{text}\n")
        place.joinpath(f"{module}.py").write_text(source)
        return module

    def install_plugin(
        self,
        distribution: str,
        *model_types: str,
        fields: str = "{}",
        before: str = "",
        **how: object,
    ) -> str:
        """Install a distribution with a sound descriptor, but for the `fields` that replace some of its own."""
        module = distribution.replace("-", "_")
        types = model_types or (distribution.removeprefix("lens-"),)
        source = _DESCRIPTOR.format(
            distribution=distribution, model_types=types, module=module, fields=fields, before=before
        )
        return self.install(distribution, source, **how)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder at the head of the import path; its modules are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delenv("LENS_DISABLE_PLUGINS", raising=False)
    monkeypatch.delenv("LENS_PLUGIN_ERRORS", raising=False)
    made = Site(folder)
    yield made
    for name in made.modules:
        sys.modules.pop(name, None)


@pytest.fixture
def record_of():
    """Find a distribution's record in a registry."""

    def find(registry, distribution):
        (record,) = [record for record in registry.records if record.distribution == distribution]
        return record

    return find
