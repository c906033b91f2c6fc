"""A model that HF cuts over two processes shows and edits the tensors of one process: the checks of the worker."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden.tiny_llama import tiny_llama
from lens_conformance.float64 import true_float64

import lens_core as lens
from lens_core._shards import Shards, find_shards

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
VARIANTS = ("llama", "qwen3", "phi3", "mixtral")
NOISE = 1e-12
"""True float64: 1e-15 or so for each operation, a hundred of them behind each other."""


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Run the worker in two processes, and give what each of them found."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with true_float64():
        for variant in VARIANTS:
            tiny_llama(variant, num_hidden_layers=2).save_pretrained(folder / variant)
        tiny_llama("phi3", num_hidden_layers=1, intermediate_size=36).save_pretrained(folder / "phi3-even")
        tiny_llama("mixtral", num_hidden_layers=1, num_local_experts=4).save_pretrained(folder / "mixtral-even")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", WORKER, folder]
    running = subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = running.communicate(timeout=300)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 0, said[-5000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def both(records, check):
    """Give what both processes found, which is one record for each."""
    for record in (record[check] for record in records):
        assert "error" not in record, record["error"]
        yield record


CLOSE = [f"{check} {variant}" for check in ("values", "weights") for variant in VARIANTS]
CLOSE += ["gradients llama", "gradients mixtral", "generation llama", "sweeps llama"]
CLOSE += ["partial_runs_and_states llama", "heads_attributed llama"]


@pytest.mark.parametrize("check", CLOSE)
def test_results_are_those_of_one_process(records, check):
    """Each tensor has the whole shape and the values of the model in one process, on either process."""
    for record in both(records, check):
        assert record
        assert {name: far for name, far in record.items() if not far < NOISE} == {}


@pytest.mark.parametrize("check", [*(f"edits {variant}" for variant in VARIANTS), "edits_with_gradients llama"])
def test_edits_move_the_logits_as_in_one_process(records, check):
    """An edit of the whole tensor reaches the part of each process; each moves the logits far above rounding."""
    for record in both(records, check):
        assert len(record) > 40
        assert {name: far for name, (far, _) in record.items() if not far < NOISE} == {}
        assert {name: moved for name, (_, moved) in record.items() if not moved > 1e-6} == {}


def test_hf_names_are_whole_or_refused(records):
    """Linear maps and what is outside of the cut parts are whole; what is between them says that nobody can tell."""
    for record in both(records, "hf_names llama"):
        refused = {name: why for name, why in record.items() if isinstance(why, str)}
        inside = "hf.model.layers.0.mlp.act_fn"
        assert set(refused) == {f"{inside}.input", f"{inside}.output"}
        assert all(
            "is inside 'model.layers.0.mlp', whose tensors tensor parallelism cuts over 2" in why
            for why in refused.values()
        )
        assert {name: far for name, far in record.items() if name not in refused and not far < NOISE} == {}
        linear = ["self_attn.q_proj.output", "self_attn.o_proj.input", "mlp.up_proj.output", "mlp.down_proj.input"]
        assert {f"hf.model.layers.0.{name}" for name in linear} <= set(record) - set(refused)


def test_what_cannot_be_made_whole_is_refused(records):
    """Weight passes, files of states, packed columns, a second mesh, a type without a plan of HF's."""
    for record in both(records, "refusals llama"):
        kinds = {what: kind for what, (kind, _) in record.items()}
        assert kinds == {"passes": "WeightError", "save": "StateFileError", "load": "StateFileError"}
        assert "spread over processes" in record["passes"][1]
    for record in both(records, "packed phi3-even"):
        assert record["logits"] < NOISE
        assert record["mlp.hook_out"] < NOISE
        assert record["attn.hook_z"] < NOISE
        for name in ("mlp.hook_pre", "mlp.hook_pre_linear"):
            assert "_StridedShard" in record[name]
            assert "how the whole is cut cannot be told" in record[name]
    for record in both(records, "other_meshes mixtral-even"):
        kind, why = record["experts"]
        assert kind == "UnsupportedHookError"
        assert "hooks are for tensor parallelism (tp) alone" in why
    for record in both(records, "no_plan toy:gpt2"):
        kind, why = record["toy:gpt2"]
        assert kind == "UnsupportedConfigError"
        assert "has no `tp_plan`" in why


# ---------------------------------------------------------------------- in one process


SIZES = {"n_heads": 4, "d_head": 6, "d_mlp": 37}


@pytest.fixture
def shards():
    """Two processes, of which this is the second; nothing is sent."""
    return Shards(hf_model=None, group=None, rank=1, count=2)


def test_a_part_is_told_by_the_declared_axes(shards):
    """One axis may be short, by as much as `torch.chunk` would cut."""
    z, post = (lens.load("toy:llama").table.point(f"blocks.0.{name}") for name in ("attn.hook_z", "mlp.hook_post"))
    assert shards.cut_axis(z, torch.zeros(2, 5, 4, 6), SIZES) is None
    assert shards.cut_axis(z, torch.zeros(2, 5, 2, 6), SIZES) == 2
    assert shards.cut_axis(post, torch.zeros(2, 5, 18), SIZES) == 2
    assert torch.arange(37).chunk(2)[1].shape == (18,)


@pytest.mark.parametrize("shape", [(2, 5, 1, 6), (2, 5, 2, 3), (2, 5, 4, 3), (2, 5, 8, 6)])
def test_any_other_difference_is_refused(shards, shape):
    """Heads that do not divide, halves of heads, more than there are; d_head 3 might be any half of 6."""
    z = lens.load("toy:llama").table.point("blocks.0.attn.hook_z")
    with pytest.raises(lens.UnsupportedHookError, match="how the whole is cut cannot be told"):
        shards.cut_axis(z, torch.zeros(shape), SIZES)


def test_a_model_in_one_process_has_no_shards():
    """Nothing is looked for where torch has no process group."""
    assert find_shards(lens.load("toy:llama").hf_model) is None
