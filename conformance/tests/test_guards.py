"""The kit's own guards: what it deals, skips, known failures, and what a certificate says."""

import json
import subprocess
import sys

import attrs
import pytest
from hypothesis import assume
from lens_conformance import run
from lens_conformance.case import Case, Deck, NotThereError, Worst
from lens_conformance.checks import Check, all_checks
from lens_conformance.family import Family, KnownFailure
from lens_conformance.oracle import variants
from lens_conformance.report import Kill, Outcome, Report
from lens_conformance.runner import find_family, try_check

from lens_core.errors import ArgumentError

GPT2 = find_family("gpt2")


def made(prove, **options):
    """Make a check of a function."""
    return Check(number=40, name="made", title="made up", judge="law", prove=prove, **options)


# ---------------------------------------------------------------------- what is dealt


def test_a_deck_deals_all_before_it_repeats():
    """Whatever the order, each option comes up as often as the others."""
    deck = Deck(3)
    dealt = [name for _ in range(20) for name in deck.deal("names", list("abcdefghij"), 3)]
    counts = {name: dealt.count(name) for name in dealt}
    assert len(counts) == 10
    assert max(counts.values()) - min(counts.values()) <= 1


def test_variants_hold_every_value_of_every_axis():
    """Grouped queries and one key head, tied and not, each kind of rotation and both implementations."""
    llama = find_family("llama")
    found = variants(llama, count=8)
    for axis, values in llama.axes.items():
        assert all(any(v.overrides[axis] == value for v in found) for value in values), axis
    assert {v.attn for v in found} == set(llama.implementations)
    assert {v.seed for v in found} == {0, 1}


@pytest.mark.parametrize("model_type", ["gpt2", "mamba2"])
def test_what_is_tried_reaches_the_corners(model_type):
    """One token, padding on both sides, first and last layer, several edits at once, every name edited."""
    family, seen = find_family(model_type), []

    def look(case):
        all_checks()[watched].prove(case)
        seen.append(dict(case.drawn))
        names.update(name for label, value in case.drawn if label == "names" for name in value)

    names: set[str] = set()
    watched = "edits"
    assert try_check(made(look, share=2.0), family, level="default").status == "passed"
    assert {1, 8} <= {drawn["positions"] for drawn in seen}
    assert {drawn["edits"] for drawn in seen} == {1, 2, 3}
    assert len(names) > 0.75 * len(family.names(all_names(family)))
    assert {"0", "2"} <= {name.split(".")[1] for name in names if name.startswith("blocks.")}
    seen.clear()
    watched = "padding"
    assert try_check(made(look), family, level="default").status == "passed"
    assert {drawn["side"] for drawn in seen} == set(family.paddings)


def all_names(family):
    """Give the config that a family's names are asked for."""
    from lens_conformance.oracle import tiny_config

    return tiny_config(family, {})


# ---------------------------------------------------------------------- what counts as shown


def test_a_check_that_skips_itself_fails():
    """Only what the plugin declares absent is left out."""
    outcome = try_check(made(lambda case: pytest.skip("no time")), GPT2)
    assert outcome.status == "raised"
    assert "no time" in outcome.reason


def test_a_check_without_a_valid_example_fails():
    """What assumed everything away has shown nothing."""
    assert try_check(made(lambda case: assume(False)), GPT2).status == "raised"


def test_an_error_is_no_verdict_and_fails():
    """It says its kind, and what was drawn."""

    def stumble(case):
        case.integer(3, 3, "three")
        raise KeyError("gone")

    outcome = try_check(made(stumble), GPT2)
    assert outcome.status == "raised"
    assert outcome.reason.startswith("KeyError: 'gone' (test_guards.py, line ")
    assert outcome.reason.endswith("\n  drawn: three = 3")


def test_what_is_not_there_is_absent_with_its_reason():
    """HF's own config says so."""

    def look(case):
        raise NotThereError("no such thing")

    outcome = try_check(made(look), GPT2)
    assert (outcome.status, outcome.reason) == ("absent", "no such thing")


def test_ctrl_c_stops_the_kit():
    """It is no failure of a check."""

    def interrupt(case):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        try_check(made(interrupt), GPT2)


# ---------------------------------------------------------------------- known failures

KNOWN = KnownFailure(
    check="made", witness={"tie_word_embeddings": True}, reason="ties are forgotten", since="2026-11-28"
)


def fails_when_tied(case):
    """Fail where embeddings are tied."""
    assert not case.pair().config.tie_word_embeddings, "tied"


def test_a_known_failure_is_told():
    """It must fail on its witness, and nowhere else."""
    assert try_check(made(fails_when_tied), GPT2).status == "failed"
    outcome = try_check(made(fails_when_tied), attrs.evolve(GPT2, known_failures=(KNOWN,)))
    assert outcome.status == "known"
    assert "ties are forgotten" in outcome.reason
    assert "2026-11-28" in outcome.reason


def test_a_known_failure_that_is_mended_fails():
    """So that it is taken out."""
    outcome = try_check(made(lambda case: case.pair()), attrs.evolve(GPT2, known_failures=(KNOWN,)))
    assert outcome.status == "failed"
    assert "passes where it is known to fail" in outcome.reason


def test_a_known_failure_hides_nothing_else():
    """What fails beside the witness fails."""
    other = attrs.evolve(KNOWN, witness={"n_head": 7})
    assert try_check(made(fails_when_tied), attrs.evolve(GPT2, known_failures=(other,))).status == "failed"


def test_a_known_failure_must_fail_and_not_fall_over():
    """A config that cannot be built shows nothing, nor does a check that takes no config."""
    impossible = attrs.evolve(KNOWN, witness={"n_head": 5})
    outcome = try_check(made(lambda case: case.pair()), attrs.evolve(GPT2, known_failures=(impossible,)))
    assert outcome.status == "failed"
    assert "cannot be tried where it is known to fail" in outcome.reason
    outcome = try_check(made(lambda case: None), attrs.evolve(GPT2, known_failures=(KNOWN,)))
    assert outcome.status == "failed"


def test_a_known_failure_of_no_check_is_a_mistake():
    """A misspelt name would hide nothing, and be believed to."""
    with pytest.raises(ArgumentError, match="no such check"):
        run(attrs.evolve(GPT2, known_failures=(KNOWN,)), level="fast", only=["layers"])


@pytest.mark.parametrize(
    ("wrong", "told"), [({"witness": {}}, "witness"), ({"reason": ""}, "reason"), ({"since": "last week"}, "isoformat")]
)
def test_a_known_failure_needs_witness_reason_and_date(wrong, told):
    """Otherwise nobody could ever take it out."""
    with pytest.raises(ValueError, match=told):
        attrs.evolve(KNOWN, **wrong)


# ---------------------------------------------------------------------- what is told


def test_one_cause_is_one_failure():
    """Where the model does not even run, the others are blocked; a report of others still fails."""
    broken = Family(model_type="gpt2", config={**GPT2.config, "n_head": 4})
    report = run(broken, level="fast", only=["runs", "values", "logits"])
    assert [outcome.status for outcome in report.outcomes] == ["failed", "blocked", "blocked"]
    assert [outcome.name for outcome in report.failures] == ["runs"]
    assert "HF's own gpt2 does not run at this config" in report.failures[0].reason
    assert len(run(broken, level="fast", only="logits").failures) == 1


def tried(*arguments):
    """Run pytest in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--lens-conformance", "nope"], "no family 'nope'"),
        (["--lens-mutants", "."], "--lens-mutants is for --lens-conformance TYPE"),
        (["--lens-conformance", "gpt2", "--lens-report", __file__], "is a file; name a folder"),
    ],
)
def test_mistakes_are_told_once(arguments, told):
    """Before anything is tried."""
    done = tried(*arguments)
    assert done.returncode == 4
    assert done.stderr.count(told) == 1


def test_files_that_are_named_run_beside_the_kit(tmp_path):
    """And what level a report is of is what was tried."""
    (tmp_path / "test_mine.py").write_text(
        "from lens_conformance import conformance\n"
        "test_it = conformance('mamba', level='fast')\n"
        "def test_no():\n    raise AssertionError\n"
    )
    folder = tmp_path / "reports"
    done = tried(
        f"{tmp_path}/test_mine.py", "--lens-conformance", "gpt2", "-k", "layers or test_no", f"--lens-report={folder}"
    )
    assert done.returncode == 1
    assert "1 failed, 2 passed" in done.stdout
    assert json.loads((folder / "mamba.json").read_text())["level"] == "fast"
    assert json.loads((folder / "gpt2.json").read_text())["level"] == "default"


# ---------------------------------------------------------------------- reports


def test_a_report_of_some_checks_is_no_certificate(tmp_path):
    """It did not pass, and says how much of it there is."""
    report = run("gpt2", level="fast", only=["layers", "values"])
    assert not report.failures
    assert not report.passed
    report.save(tmp_path / "gpt2.json")
    told = json.loads((tmp_path / "gpt2.json").read_text())
    assert told["passed"] is False
    assert [outcome["name"] for outcome in told["outcomes"]] == ["values", "layers"]
    assert set(told["outcomes"][0]["worst"]["by_name"]) > {"hook_embed", "blocks.2.attn.hook_z", "logits"}
    assert {"python", "torch", "transformers", "lens-core", "plugin", "plugin code"} <= told["versions"].keys()


def test_a_report_with_a_survivor_does_not_pass():
    """Nor does one with a failure."""
    facts = {"model_type": "gpt2", "level": "fast", "seed": 0, "versions": {}}
    one = (Outcome(number=1, name="logits", title="", judge="hf", status="passed"),)
    assert Report(**facts, outcomes=one).passed
    assert not Report(**facts, outcomes=()).passed
    assert not Report(**facts, outcomes=one, mutants=(Kill(mutant="m", check="values", status="survived"),)).passed


def test_the_worst_error_is_the_one_nearest_to_its_bound():
    """Errors against different bounds are compared by how much of the bound they use."""
    worst = Worst()
    worst.note(1e-8, 1e-4, "hook_a, which is b")
    worst.note(1e-9, 1e-9, "the sum")
    worst.note(1e-7, 1e-4, "hook_a")
    assert (worst.off, worst.bound, worst.by_name) == (1e-9, 1e-9, {"hook_a": 1e-7})


def test_one_case_of_one_number_is_one_example():
    """What follows from a number is the same again."""
    cases = [Case(GPT2, 5, Worst(), deck=Deck(), variants=variants(GPT2, count=2)) for _ in range(2)]
    assert cases[0].some(range(9), "some") == cases[1].some(range(9), "some")
