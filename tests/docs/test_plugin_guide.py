"""The guide to plugins: its shortest plugin passes the kit, its numbers are counted, its failing reports are real."""

import ast
import importlib
import io
import re
import sys
import tokenize
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
    "values": ('layout="per_head"', 'layout="blocks"'),
    "residual": ('added="post_attention_dropout"', "added=None"),
}


def code_lines(source):
    """Count the lines that hold code: neither blank, nor a comment, nor a docstring."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [one for one in tokenize.generate_tokens(io.StringIO(source).readline) if one.type not in silent]
    lines = {line for one in tokens for line in range(one.start[0], one.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def shown(name):
    """Give the code block of the guide that is the whole of a file of the shortest plugin."""
    _, _, after = GUIDE.partition(f"`lens_helium/{name}`")
    return re.findall(r"^```python\n(.*?)^```$", after, re.MULTILINE | re.DOTALL)[0]


@pytest.fixture
def helium(tmp_path, monkeypatch):
    """Write the guide's shortest plugin into a folder, and register it alone."""
    folder = tmp_path / "lens_helium"
    folder.mkdir()
    for name in ("_architecture.py", "__init__.py"):
        (folder / name).write_text(shown(name))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("lens_helium")]:
        monkeypatch.delitem(sys.modules, name)  # of the guide's own code
    with isolated_registry(importlib.import_module("lens_helium")) as registry:
        oracle.forget_pairs()
        yield registry
        oracle.forget_pairs()
    for name in [name for name in sys.modules if name.startswith("lens_helium")]:
        del sys.modules[name]


def test_one_more_llama_takes_under_fifteen_lines(helium):
    """A type of a known shape: one record, which the kit finds true in what it runs, is, computes and reaches."""
    assert code_lines(shown("_architecture.py")) < 15
    assert [(record.status, record.reason) for record in helium.records] == [("ok", "")]
    checks = ["declaration", "runs", "logits", "equations", "edits"]
    report = run("helium", level="fast", only=checks)
    assert {outcome.name: outcome.status for outcome in report.outcomes} == dict.fromkeys(checks, "passed")


def test_the_numbers_of_lines_are_counted():
    """Those of the guide, and of the example's own table."""
    counted = {file.name: code_lines(file.read_text()) for file in (EXAMPLE / "lens_gpt_neox").glob("*.py")}
    table = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", (EXAMPLE / "README.md").read_text(), re.MULTILINE)
    assert {name: int(lines) for name, lines in table} == counted
    told = f"{counted['_architecture.py']} lines of description and {counted['__init__.py']} of descriptor"
    assert told in GUIDE.replace("\n", " ")
    assert f"GPT-NeoX's is {counted['golden.py']} lines" in GUIDE.replace("\n", " ")
    assert f"{code_lines(shown('_architecture.py'))} lines of code" in GUIDE


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

    report = run(FAMILY, level="fast", only=[wrong])  # it stops at the first failure
    (failure,) = report.failures
    blocks = re.findall(r"^```text\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    told = f"gpt_neox: property {failure.number}, {failure.title}\n{failure.reason}"
    assert masked(told) in [masked(block) for block in blocks], told
