"""The template: what it renders is tidy, is discovered, passes the conformance kit, and fails it when broken."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import copier
import pytest
from lens_conformance import oracle
from lens_conformance import run as hold

from lens_core.testing import isolated_registry

TEMPLATE = Path(__file__).parents[1] / "template"
PACKAGE = "lens_ernie4_5"


def render(folder, template=TEMPLATE, **answers):
    """Render the template with its default answers, or with others."""
    copier.run_copy(str(template), folder, data=answers, defaults=True, quiet=True)
    return folder


def contents(folder):
    """Give every file's text by its path."""
    return {file.relative_to(folder): file.read_text() for file in folder.rglob("*") if file.is_file()}


def run(*command, cwd, site=None):
    """Run Python on a module in a process that finds the rendered plugin in `site`, and not in the folder it is in.

    The plugin of this repository that serves the same type is left alone.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    environment |= {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "LENS_DISABLE_PLUGINS": "lens-llama"}
    environment |= {"PYTHONPATH": str(site)} if site else {}
    options = {"cwd": cwd, "env": environment, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, "-m", *command], **options, check=False)


def install(folder, site):
    """Install what was rendered, without network and beside everything else."""
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    done = run("pip", "install", *options, "--target", site, folder, cwd=folder)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """The rendered distribution's folder."""
    return render(tmp_path_factory.mktemp("rendered"))


@pytest.fixture(scope="module")
def site(plugin, tmp_path_factory):
    """The folder that it is installed in."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(plugin, source)  # building leaves files behind
    return install(source, tmp_path_factory.mktemp("site"))


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"model_type": "seed_oss", "licence": "BSD-3-Clause", "ci": False},
        {"model_type": "helium", "architecture": "H", "distribution": "lens-h", "licence": "other"},
        {"model_type": "a_rather_long_name_of_a_type", "norm": "LAYER_NORM", "base": "model.language_model"},
    ],
)
def test_what_is_rendered_is_tidy(answers, tmp_path):
    """Formatted and free of complaints by the settings that it has, whatever was answered; nothing of the template."""
    folder = render(tmp_path / "plugin", **answers)
    for command in (["format", "--check"], ["check"]):
        done = run("ruff", *command, "--no-cache", ".", cwd=folder)
        assert done.returncode == 0, done.stdout
    for file, text in contents(folder).items():
        assert not [mark for mark in ("{%", "{{ ", "jinja") if mark in f"{file} {text}".replace("${{ ", "")], file
    assert (folder / ".github").exists() == answers.get("ci", True)


def test_it_renders_without_version_control(plugin, tmp_path):
    """A copy of the folder, as in an archive, gives the same as the working tree."""
    shutil.copytree(TEMPLATE, tmp_path / "template")
    assert contents(render(tmp_path / "plugin", tmp_path / "template")) == contents(plugin)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("model_type", "Ernie-4.5"),
        ("distribution", "lens_ernie"),
        ("package", "lens-ernie"),
        ("base", "model."),
        ("fields", "use_bias, head_dim"),
        ("author", ""),
    ],
)
def test_answers_are_validated(question, answer, tmp_path):
    """An answer that would render something broken is refused, by the question's name."""
    with pytest.raises(ValueError, match=question):
        render(tmp_path, **{question: answer})


def test_it_is_discovered(site, tmp_path):
    """The installed distribution is listed, and it serves its type."""
    plugins = json.loads(run("lens_core", "plugins", "--json", cwd=tmp_path, site=site).stdout)["plugins"]
    (record,) = [one for one in plugins if one["distribution"] == "lens-ernie4-5"]
    assert record["status"] == "ok"
    assert record["model_types"] == ["ernie4_5"]


def test_its_own_tests_pass(plugin, site):
    """As rendered: everything that HF and the laws can judge holds, and what needs a golden forward is said."""
    done = run("pytest", "-p", "no:cacheprovider", "--lens-level", "fast", cwd=plugin, site=site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not judged: the family has no golden forward" in done.stdout


def test_a_mistake_is_found_by_name(plugin, tmp_path, monkeypatch):
    """With the norms' paths swapped, the check of the weights says which value is not what its weight makes."""
    shutil.copytree(plugin / PACKAGE, tmp_path / PACKAGE)
    module = tmp_path / PACKAGE / "_architecture.py"
    right = module.read_text()
    swapped = right.replace("post_attention_layernorm", "X").replace("input_layernorm", "post_attention_layernorm")
    swapped = swapped.replace("X", "input_layernorm")
    assert swapped != right
    module.write_text(swapped)
    monkeypatch.syspath_prepend(tmp_path)
    package, family = (importlib.import_module(name) for name in (PACKAGE, f"{PACKAGE}.family"))
    with isolated_registry(package):
        report = hold(family.FAMILY, level="fast", only=["weights", "dtypes"])  # what fails, and what does not
        oracle.forget_pairs()
    assert {one.name: one.status for one in report.outcomes} == {"weights": "failed", "dtypes": "passed"}
    (failure,) = report.failures
    assert "blocks.0.attn.hook_q, which is ln1.hook_out W_Q + b_Q, is off by" in failure.reason
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]
