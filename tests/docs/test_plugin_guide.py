"""The guide to plugins: the failing reports that it shows are what the kit says of the mistakes that it names."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import attrs
import pytest
from lens_conformance import oracle, run

from lens_core.plugin import hookimpl
from lens_core.testing import isolated_registry

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples/lens-gpt-neox"
MISTAKES = {  # check -> what stands in the declaration, and what the author wrote first
    "values": (
        "Columns(start=i * d_head, stop=(i + 1) * d_head, heads=heads, groups=heads)",
        "Columns(start=i * config.hidden_size, stop=(i + 1) * config.hidden_size, heads=heads)",
    ),
    "edits": ('ModuleInput(path=ln2, reaches="all")', "ModuleInput(path=ln2)"),
}


@pytest.fixture
def wrong(request, monkeypatch):
    """Register the example with one mistake, and give the check that must find it."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import lens_gpt_neox

    right, mistaken = MISTAKES[request.param]
    source = (EXAMPLE / "lens_gpt_neox/_architecture.py").read_text()
    assert source.count(right) == 1
    module = ModuleType(f"lens_gpt_neox._wrong_{request.param}")
    exec(source.replace(right, mistaken), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (record,) = lens_gpt_neox.lens_architectures()
    described = [attrs.evolve(record, implementation=f"{module.__name__}:GPTNeoX")]
    plugin = SimpleNamespace(lens_architectures=hookimpl(specname="lens_architectures")(lambda: described))
    with isolated_registry(plugin):
        oracle.forget_pairs()
        yield request.param
        oracle.forget_pairs()
    for name in [name for name in sys.modules if name.startswith("lens_gpt_neox")]:
        monkeypatch.delitem(sys.modules, name)


def masked(text):
    """Leave out names and numbers, and what was drawn: they depend on the machine, and on how the kit draws."""
    message = " ".join(re.split(r"assert \d|drawn:", text)[0].split())
    return re.sub(
        r"\([\d, ]+\)", "SHAPE", re.sub(r"[\d.]+e[+-]\d+", "NUMBER", re.sub(r"blocks[\w.]+", "NAME", message))
    )


@pytest.mark.parametrize("wrong", MISTAKES, indirect=True)
def test_a_report_in_the_guide_is_what_the_kit_says(wrong):
    """The message of the first failure, word for word."""
    from lens_gpt_neox.family import FAMILY

    report = run(FAMILY, level="thorough", only=[wrong])  # it stops at the first failure
    (failure,) = report.failures
    shown = re.findall(r"^```text\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    told = f"gpt_neox: property {failure.number}, {failure.title}\n{failure.reason}"
    assert masked(told) in [masked(block) for block in shown], told
