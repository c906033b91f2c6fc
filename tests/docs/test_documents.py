"""The README and the documentation: complete, fresh and not too long; conftest.py runs their code."""

import contextlib
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lens_core
import lens_core.plugin
from lens_core import _cli, errors, shapes

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(name):
    """Return the text of a page of the documentation."""
    return (DOCS / name).read_text(encoding="utf-8")


def documented(module, text):
    """Return the names of a module that some directive or role of a page names."""
    direct = re.findall(rf"{re.escape(module)}\.(\w+)", text)
    split = re.findall(rf"^\.\. py:\w+:: (\w+).*\n   :module: {re.escape(module)}$", text, re.MULTILINE)
    return {*direct, *split}


def test_the_readme_is_at_most_120_lines():
    """It is for somebody who has two minutes."""
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_the_example_of_the_readme_has_twelve_lines_and_prints_what_it_says():
    """The comment beside a `print` is what comes out."""
    code = next(code for kind, code in FENCE.findall(README.read_text(encoding="utf-8")) if kind == "python")
    assert len(code.splitlines()) == 12
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    word, effect = printed.getvalue().splitlines()
    assert f"print(model.to_string(logits[0, -1].argmax()))  # {word}\n" in code
    assert float(re.search(r"-?\d+\.\d+", effect)[0]) > 1.0  # the head is an induction head


@pytest.mark.parametrize(
    "script",
    [
        "architecture_table.py",
        "hook_tables.py",
        "kit_tables.py",
        "migrating_table.py",
        "peers_table.py",
        "technique_table.py",
    ],
)
def test_a_generated_table_is_fresh(script):
    """Whoever changes a plugin runs the script again."""
    command = [sys.executable, ROOT / "scripts" / script, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_generated_table_that_is_out_of_date_is_noticed_and_mended(tmp_path, capsys):
    """Only what stands between the markers is replaced."""
    spec = importlib.util.spec_from_file_location("generated", ROOT / "scripts" / "generated.py")
    generated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generated)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- things: begin (remark) -->\nold\n<!-- things: end -->\nafter\n")
    assert generated.update(page, "things", "new", check=True) == 1
    assert "page.md: things is out of date" in capsys.readouterr().err
    assert generated.update(page, "things", "new", check=False) == 0
    assert page.read_text() == "before\n<!-- things: begin (remark) -->\n\nnew\n\n<!-- things: end -->\nafter\n"
    assert generated.update(page, "things", "new", check=True) == 0
    with pytest.raises(SystemExit, match="has not just one pair of the markers"):
        generated.update(page, "others", "new", check=True)


@pytest.mark.parametrize("module", [lens_core, lens_core.plugin], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module):
    """What can be imported is described."""
    assert set(module.__all__) <= documented(module.__name__, read("api.md")) | documented("lens_core", read("api.md"))


def test_every_error_has_its_advice():
    """The page on errors says of each what to do."""
    assert {*errors.__all__, "LensWarning"} <= documented("lens_core", read("errors.md"))


def test_every_command_is_described():
    """As `lens --help` lists them."""
    text = read("cli.md")
    assert [command.name for command in _cli._COMMANDS if f"| `lens {command.name}" not in text] == []


def test_every_axis_is_in_the_contract():
    """Shapes are written in these words only."""
    text = read("hooks.md").partition("## Axes")[2].partition("\n## ")[0]
    assert [axis for axis in shapes.AXES if f"`{axis}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_python_is_one_that_the_tests_run(page):
    """Sybil runs ```python and nothing else, so no block may be spelt otherwise."""
    spelt = {kind for kind, _ in FENCE.findall(page.read_text(encoding="utf-8"))}
    assert not spelt & {"py", "python3", "Python", "pycon", "ipython", "{code-block}"}


def test_every_link_of_the_readme_leads_somewhere():
    """Sphinx checks those of the documentation."""
    targets = re.findall(r"\]\(([^)#]+)", README.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []
