"""`lens verify` on checkpoints, and what `lens plugins` says of certificates."""

import json

import attrs
import pytest
import torch
from lens_conformance import verify
from lens_conformance.checkpoint import CHECKPOINT_CHECKS
from lens_conformance.mutants import all_mutants, planted
from lens_conformance.report import Outcome, Report, versions
from lens_conformance.runner import find_family

import lens_core as lens
from lens_core._cli import main
from lens_core._registry import active_registry
from lens_core.certificates import source_digest, stamps
from lens_core.errors import ArgumentError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Keep certificates out of the user's folder."""
    monkeypatch.setenv("LENS_CERTIFICATES", str(tmp_path / "certificates"))
    return tmp_path / "certificates"


def architecture_of(model_type):
    """Find the record and the descriptor."""
    registry = active_registry()
    architecture = registry.resolve(model_type)
    return next(r for r in registry.records if architecture in r.architectures), architecture


@pytest.mark.parametrize("toy", ["gpt2", "mamba2"])
def test_a_toy_is_verified_and_stamped(toy, folder, capsys):
    """The table, the certificate where `lens plugins` looks, and there the stamp."""
    assert main(["verify", f"toy:{toy}", "--examples", "1"]) == 0
    told = capsys.readouterr().out
    assert "an edit has the golden forward's effect" in told
    [path] = folder.iterdir()
    assert str(path) in told
    certificate = json.loads(path.read_text())
    assert certificate["passed"] is True
    assert {outcome["name"] for outcome in certificate["outcomes"]} == set(CHECKPOINT_CHECKS)
    assert certificate["dtype"] == "float32"
    [stamp] = stamps(*architecture_of(toy))
    assert (stamp.subject, stamp.holds) == (f"checkpoint toy:{toy}", True)
    assert main(["plugins"]) == 0
    assert f"checkpoint toy:{toy}" in capsys.readouterr().out


def test_half_precision_is_compared_in_float32_where_that_fits():
    """Bits on the checkpoint itself, values on a copy; without memory for one, laws with wide bounds, which is told."""
    model = lens.load("toy:llama", dtype="bfloat16")
    report = verify(model, examples=1)
    assert report.passed
    assert report.dtype == "bfloat16, values in float32"
    assert all(outcome.worst.bound <= 1e-4 for outcome in report.outcomes)
    report = verify(model, examples=1, memory=1e-6, only=["values", "residual"])
    assert report.dtype == "bfloat16"
    assert [outcome.status for outcome in report.outcomes] == ["not judged", "passed"]
    assert "half precision" in report.outcomes[0].reason


def test_a_mistake_in_half_precision_is_found():
    """One hundredth more than there is."""
    with planted(all_mutants()["branches-are-scaled"], find_family("llama")):
        report = verify(lens.load("toy:llama", dtype="bfloat16"), examples=1, only=["values", "residual"])
    assert {outcome.name for outcome in report.failures} >= {"values", "residual"}


def test_what_does_not_fit_in_memory_is_not_judged():
    """By the golden forward; everything else is."""
    report = verify(lens.load("toy:gpt2"), examples=1, memory=1e-6, only=["values", "logits"])
    assert [outcome.status for outcome in report.outcomes] == ["passed", "not judged"]


def test_only_some_layers_are_tried():
    """First and last; the others are not in the certificate."""
    report = verify(lens.load("toy:gpt2"), examples=1, layers=1, only=["values"])
    assert not any(name.startswith("blocks.0") for name in report.outcomes[0].worst.by_name)
    assert any(name.startswith("blocks.1") for name in report.outcomes[0].worst.by_name)


def test_a_model_without_tokenizer_runs_on_random_ids():
    """A text then is a mistake."""
    model = lens.load("toy:gpt2", tokenizer=False)
    assert verify(model, examples=1, only=["logits"]).outcomes[0].status == "passed"
    with pytest.raises(ArgumentError, match="no tokenizer"):
        verify(model, text="a b c")


@pytest.mark.parametrize("name", ["edits-are-ignored", "branches-are-scaled", "an-error-leaves-a-hook"])
def test_what_is_wrong_is_found_and_the_exit_code_says_so(name, folder, capsys):
    """A certificate that did not pass is written, and is no stamp that holds."""
    mutant = all_mutants()[name]
    with planted(mutant, find_family("gpt2")):
        assert main(["verify", "toy:gpt2", "--examples", "2"]) == 1
    [path] = folder.iterdir()
    certificate = json.loads(path.read_text())
    assert set(mutant.killers) <= {o["name"] for o in certificate["outcomes"] if o["status"] == "failed"}
    [stamp] = stamps(*architecture_of("gpt2"))
    assert (stamp.holds, stamp.problem) == (False, "not everything passed")
    assert "FAILED" in capsys.readouterr().out


def test_mistakes_are_told(capsys, tmp_path):
    """An unknown check, a text that is too short, numbers that make no sense."""
    for arguments, told in (
        (["--only", "vibes"], "no check 'vibes'"),
        (["--text", "a b"], "12 or more"),
        (["--examples", "0"], "1 or more"),
        (["--out", str(tmp_path)], "is a folder"),
    ):
        assert main(["verify", "toy:gpt2", *arguments]) == 2
        assert told in capsys.readouterr().err


# ---------------------------------------------------------------------- stamps


def certificate(**changes):
    """Make a certificate that holds, but for the changes."""
    one = Outcome(number=3, name="values", title="", judge="golden", status="not judged", reason="no golden forward")
    report = Report(
        model_type="gpt2", subject="type gpt2", level="fast", seed=0, versions=versions("gpt2"), outcomes=(one,)
    )
    return {**report.to_json(), **changes}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"passed": False}, "not everything passed"),
        ({"outcomes": []}, "not everything passed"),
        ({"versions": {**versions("gpt2"), "lens-conformance": "0"}}, "made with other lens-conformance 0"),
        ({"passed": "yes"}, "not everything passed"),
        ({"format": 2}, "its format is 2, and this lens-core reads 1"),
        ({"versions": None}, "it does not say which versions it was made with"),
        ({"versions": {**versions("gpt2"), "torch": "2.0.0"}}, "made with other torch 2.0.0"),
        ({"versions": {**versions("gpt2"), "plugin code": "0"}}, "made with other plugin code"),
    ],
)
def test_a_stamp_holds_only_for_what_is_installed(changes, problem, folder):
    """Any version or code that differs is named."""
    folder.mkdir()
    (folder / "gpt2.json").write_text(json.dumps(certificate(**changes)))
    [stamp] = stamps(*architecture_of("gpt2"))
    assert (stamp.problem, stamp.holds) == (problem, not problem)
    assert stamp.remark == ("" if changes == {"outcomes": []} else "1 of 1 checks not judged")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": 3}', "[" * 100_000, "\x00", '"gpt2"'])
def test_what_is_no_certificate_is_passed_over(text, folder):
    """Whatever lies in the folder."""
    folder.mkdir()
    (folder / "gpt2.json").write_text(text)
    assert stamps(*architecture_of("gpt2")) == []


def test_the_digest_sees_every_file_of_code(tmp_path, monkeypatch):
    """A changed, added or renamed module gives another digest."""
    package = tmp_path / "digested"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = set()
    for name, code in (("__init__.py", "a = 1\n"), ("b.py", ""), ("b.py", "b = 1\n"), ("c.py", "b = 1\n")):
        (package / name).write_text(code)
        source_digest.cache_clear()
        found.add(source_digest("digested"))
    assert len(found) == 4
    source_digest.cache_clear()


def test_a_package_of_one_file_has_a_digest(tmp_path, monkeypatch):
    """And what is not there has none that could hold."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "onefile.py").write_text("a = 1\n")
    source_digest.cache_clear()
    first = source_digest("onefile")
    (tmp_path / "onefile.py").write_text("a = 2\n")
    source_digest.cache_clear()
    assert source_digest("onefile") != first
    assert source_digest("no_such_package") == "not found"


def test_versions_are_those_of_what_computes():
    """And the plugin's own label."""
    found = versions("mamba")
    assert found["torch"] == torch.__version__
    assert found["plugin"].startswith("lens-mamba ")
    assert attrs.asdict(active_registry().resolve("mamba"))["model_types"]
