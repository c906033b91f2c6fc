"""The descriptor and what is loaded through it: discovery, config fields, checkpoints as Pythia has them."""

import json
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import lens_core as lens
import pytest
import torch
from lens_core import errors
from lens_core.testing import isolated_registry
from neox_tiny import SIZES, tiny_neox
from transformers import GPTNeoXConfig, PreTrainedConfig

import lens_gpt_neox

FOLDER = Path(__file__).parents[1]


def test_an_installed_distribution_is_discovered(tmp_path, monkeypatch):
    """With the metadata that pip would write of pyproject.toml, the plugin serves gpt_neox and nothing else."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    info = tmp_path / "lens_gpt_neox-9.9.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", "Version: 9.9"]
    lines += [f"Requires-Dist: {line}" for line in project["dependencies"]]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    group, entries = next(iter(project["entry-points"].items()))
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *(f"{k} = {v}" for k, v in entries.items())]))
    monkeypatch.syspath_prepend(tmp_path)
    with isolated_registry(discover=True) as registry:
        (record,) = (record for record in registry.records if record.label == "lens-gpt-neox 9.9")
        assert (record.status, record.reason, record.model_types) == ("ok", "", ("gpt_neox",))
        assert registry.resolve("gpt_neox").name == "GPT-NeoX"
        assert lens.load(tiny_neox()).cfg.model_type == "gpt_neox"


def test_the_descriptor_is_light():
    """Importing it brings neither torch nor transformers."""
    code = "import sys, lens_gpt_neox; sys.exit(len({'torch', 'transformers'} & sys.modules.keys()))"
    root = str(FOLDER.parents[1])
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": f"{FOLDER}:{root}"}, check=False).returncode
        == 0
    )


def test_every_field_of_the_config_is_handled_or_ignored():
    """No field of HF's config class of its own is left open, and none is named that HF does not have."""
    (record,) = lens_gpt_neox.lens_architectures()
    known = {field.name for field in fields(GPTNeoXConfig)}
    own = known - {field.name for field in fields(PreTrainedConfig)}
    held = {*record.config_handled, *record.config_ignored}
    assert own <= held <= known


def test_a_checkpoint_with_pythias_config_loads_without_a_warning(tmp_path, recwarn):
    """Pythia's files name the rotated share and the base in their old way."""
    reference = tiny_neox("parallel")
    reference.save_pretrained(tmp_path)
    old = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
        "rotary_emb_base": 100,
        "rotary_pct": 0.5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        **SIZES,
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    model = lens.load(str(tmp_path))
    assert not [one for one in recwarn if issubclass(one.category, errors.LensWarning)]
    assert (model.cfg.positional_embedding_type, model.cfg.parallel_attn_mlp, model.cfg.d_head) == ("rotary", True, 8)
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens), reference(tokens).logits)


@pytest.mark.parametrize(
    ("rope", "reach"),
    [
        ({}, 32),
        ({"rope_type": "linear", "factor": 2.0}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
    ],
)
def test_stretched_positions_reach_beyond_the_config(rope, reach):
    """HF runs them; only what is beyond the stretch is refused."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5, **rope}}
    model, reference = lens.load(tiny_neox(**rope)), tiny_neox(**rope)
    tokens = torch.zeros(1, reach, dtype=torch.long)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        assert torch.equal(logits, reference(tokens).logits)
        turned = cache["rot_k", 0].norm(dim=-1) / cache["k", 0].norm(dim=-1)
        assert bool((turned > 0.9).all())
        with pytest.raises(errors.ContextLengthError):
            model(torch.zeros(1, reach + 1, dtype=torch.long))
