"""`lens doctor`: what it finds out about types that plugins declare, and about types that no Decoder describes."""

import json

import attrs
import pytest
from lens_conformance import run, runner
from lens_conformance.doctor.examination import installed, written
from lens_conformance.doctor.fields import try_fields
from lens_conformance.doctor.proposal import propose
from lens_conformance.doctor.tiny import read_config, tiny
from transformers import AutoConfig

from lens_core._cli import main
from lens_core._loading import declare
from lens_core._registry import active_registry
from lens_core.errors import ArgumentError

DECLARED = ("llama", "gemma2", "phi3", "olmo2", "gpt2", "starcoder2", "cohere", "qwen3_moe")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Try few examples on few models: what is tested here is what they are tried on."""
    monkeypatch.setitem(runner.LEVELS, "fast", 2)
    monkeypatch.setitem(runner.VARIANTS, "fast", 2)


def of(model_type):
    """Give the tiny subject and what is proposed for it."""
    subject = tiny(*read_config(model_type))
    return subject, propose(subject)


def declared(subject):
    """Let whatever serves a type now declare the tiny config."""
    return declare(active_registry().resolve(subject.model_type), subject.tiny(), "tiny")


@pytest.mark.parametrize("model_type", DECLARED)
def test_it_says_what_the_plugin_says(model_type):
    """The same hook points at the same places, and values that the contract's equations hold for."""
    subject, proposal = of(model_type)
    assert proposal.unfit == ()
    theirs = declared(subject)
    skeleton = written(subject, proposal, try_fields(subject, proposal))
    with installed(skeleton) as family:
        ours = declared(subject)
        report = run(family, level="fast", only=["runs", "equations"])
    assert [point.name for point in ours.points] == [point.name for point in theirs.points]
    assert [point.shape for point in ours.points] == [point.shape for point in theirs.points]
    assert {name: place.path for name, place in ours.norms.items()} == {n: p.path for n, p in theirs.norms.items()}
    assert (ours.writers, ours.embeddings, ours.cfg) == (theirs.writers, theirs.embeddings, theirs.cfg)
    assert [view.name for view in ours.weights] == [view.name for view in theirs.weights]
    assert [outcome.status for outcome in report.outcomes] == ["passed"] * 2
    assert skeleton.declaration().count("\n") < 40


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("granite", {"embed_scale": "config.embedding_multiplier", "branch_scale": "config.residual_multiplier",
                     "logit_divisor": "config.logits_scaling", "embed_at": '"block"'}),
        ("exaone4", {"ln1": "None", "ln1_post": '"post_attention_layernorm"', "ln2": "None",
                     "ln2_post": '"post_feedforward_layernorm"',
                     "attn": 'Attn(qk_norm=QkNorm(takes="heads_first"), rotary=tuple(at for at, value in '
                             'enumerate(config.layer_types) if value == "sliding_attention"))'}),
        ("persimmon", {"norm": "LAYER_NORM", "final_norm": '"final_layernorm"',
                       "attn": 'Attn(layout="per_head", fused="query_key_value", out="dense", qk_norm=QkNorm('
                               'q="q_layernorm", k="k_layernorm"))',
                       "mlp": 'Mlp(kind="plain", up="dense_h_to_4h", down="dense_4h_to_h", added="dropout")'}),
    ],
)  # fmt: skip
def test_it_reads_factors_post_norms_and_fused_projections(model_type, fields):
    """As expressions of the config, and nothing but them."""
    assert dict(of(model_type)[1].fields) == fields


@pytest.mark.parametrize(
    ("model_type", "told"),
    [
        ("gptj", "attention code of its own"),
        ("doge", "resid_mid = input_residual * resid_pre + self_attn"),
        ("minimax", "resid_mid = self_attn + input_layernorm"),
        ("afmoe", "a gate, z * sigmoid(gate_proj), stands between"),
        ("laguna", "a gate, z * softplus(g_proj), stands between"),
        ("bitnet", "the module attn_sub_norm stands between"),
        ("youtu", "latent attention"),
        ("diffllama", "2 times a pass"),
        ("mamba", "has no attention"),
        ("nanochat", "model.norm is called 2 times"),
    ],
)
def test_it_says_what_no_decoder_describes(model_type, told):
    """The equation that does not hold, or the place that is not there."""
    _, proposal = of(model_type)
    assert proposal.fields == {}
    assert told in " ".join(proposal.unfit)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("lama", "did you mean llama"),
        ("bert", "no causal decoder"),
        ("t5", "no causal decoder"),
        ("blt", "not one stack of blocks"),
    ],
)
def test_what_is_no_causal_decoder_is_refused(model, told, capsys):
    """A line on standard error, and exit code 2."""
    assert main(["doctor", model, "--force"]) == 2
    assert told in capsys.readouterr().err


def test_a_checkpoint_of_an_unknown_type_is_refused(tmp_path, capsys):
    """By the type's name, as it stands in the config."""
    (tmp_path / "config.json").write_text('{"model_type": "lamma"}')
    assert main(["doctor", str(tmp_path)]) == 2
    assert "'lamma' is no model type of the installed transformers; did you mean" in capsys.readouterr().err


def test_a_flag_that_changes_the_description_is_told():
    """And left out of what the descriptor handles; the others are varied by the kit."""
    subject, proposal = of("cohere")
    fields = try_fields(subject, proposal)
    assert fields.changing == {"use_qk_norm": "True: attn=Attn(qk_norm=QkNorm())"}
    assert fields.axes["attention_bias"] == (False, True)
    assert "use_qk_norm" not in fields.handled
    assert "logit_scale" in fields.handled


def test_a_checkpoint_keeps_what_its_config_chooses(tmp_path):
    """Blocks of both kinds, the biases, the kind of rotation; sizes are small."""
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 4096}
    kinds = ["full_attention"] * 7 + ["sliding_attention"]
    config = AutoConfig.for_model("qwen2", num_hidden_layers=8, layer_types=kinds, use_sliding_window=True)
    config.rope_parameters = rope
    config.save_pretrained(tmp_path)
    made = tiny(*read_config(str(tmp_path))).tiny()
    assert made.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert made.rope_parameters["rope_type"] == "yarn"
    assert (made.hidden_size, made.num_hidden_layers, made.sliding_window) == (32, 3, 3)


def test_a_type_that_is_served_is_told_by_whom(capsys):
    """Exit code 0; nothing is built."""
    assert main(["doctor", "llama"]) == 0
    assert "served already, by lens-llama" in capsys.readouterr().out


def test_json_says_why_nothing_is_proposed(capsys, tmp_path):
    """Exit code 1, and nothing is written."""
    folder = tmp_path / "plugin"
    assert main(["doctor", "gptj", "--force", "--json", "--write", str(folder)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["proposal"], found["report"]) == (False, None, None)
    assert "attention interface" in found["unfit"][0]
    assert not folder.exists()


def test_a_proposal_that_passes_is_written(capsys, tmp_path, monkeypatch):
    """As a package, whose declaration is what was printed."""
    monkeypatch.setitem(runner.LEVELS, "fast", 1)
    monkeypatch.setitem(runner.VARIANTS, "fast", 1)
    folder = tmp_path / "plugin"
    assert main(["doctor", "mistral", "--force", "--write", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "passes the kit" in told
    assert (folder / "lens_mistral" / "_architecture.py").read_text() in told
    assert (folder / "pyproject.toml").is_file()
    assert main(["doctor", "mistral", "--force", "--write", str(folder)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_wrong_proposal_does_not_pass():
    """The kit is what judges: without the second norm after each branch, sums do not hold."""
    subject, proposal = of("gemma2")
    wrong = {name: value for name, value in proposal.fields.items() if name != "ln2_post"}
    skeleton = written(subject, attrs.evolve(proposal, fields=wrong), try_fields(subject, proposal))
    with installed(skeleton) as family:
        report = run(family, level="fast", only=["residual"])
    assert "resid_post" in report.failures[0].reason


def test_an_unknown_level_is_an_error():
    """Said by the function as by the command."""
    from lens_conformance.doctor import examine

    with pytest.raises(ArgumentError, match="level is fast, default, thorough"):
        examine("llama", level="slow")
