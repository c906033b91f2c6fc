"""SAEs in SAELens' layout: files that the test writes, read and compared with the formulas; hostile files refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from sae.sae_subject import by_hand, new_fields, weights_of, write
from safetensors.torch import save_file
from torch import Tensor

import lens_core as lens
from lens_core.errors import ArgumentError, SaeError

NAME = "blocks.1.hook_resid_post"
X = torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
OLD_TRAINING = {
    "model_name": "gpt2-small",
    "hook_point": NAME,
    "hook_point_layer": 1,
    "hook_point_head_index": None,
    "dataset_path": "some/texts",
    "context_size": 128,
    "l1_coefficient": 8e-5,
    "lr": 4e-4,
    "train_batch_size": 4096,
    "log_to_wandb": True,
    "feature_sampling_window": 2000,
}


def agrees(sae: Any, fields: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Compare every part of an SAE with the formulas."""
    with torch.no_grad():
        pre = sae.pre_acts(X)
        parts = {"acts_pre": pre, "acts_post": sae.encode(X), "recons": sae(X)}
    for name, expected in by_hand(fields, weights, X).items():
        assert torch.allclose(parts[name], expected, atol=1e-10), name
    on = (parts["acts_post"] > 0).double().mean()
    assert 0.05 < on < 0.95  # else the test would show little


ARCHITECTURES = ("standard", "gated", "jumprelu", "topk", "transcoder", "skip_transcoder", "jumprelu_transcoder")


@pytest.mark.parametrize("normalise", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", [*ARCHITECTURES, "jumprelu_skip_transcoder"])
def test_each_architecture_computes_what_the_papers_say(tmp_path, kind, normalise):
    """As SAELens 6 writes it."""
    d_out = 7 if "transcoder" in kind else None
    weights = weights_of(kind, 11, 19, d_out=d_out)
    own: dict[str, Any] = {"k": 3, "rescale_acts_by_decoder_norm": True} if kind == "topk" else {}
    own |= {"d_out": 7, "hook_name_out": "blocks.1.hook_mlp_out"} if d_out else {}
    fields = new_fields(kind, 11, 19, hook_name=NAME, normalize_activations=normalise, **own)
    sae = lens.saes.load_sae(write(tmp_path / "sae", fields, weights))
    agrees(sae, fields, weights)
    assert (sae.hook_name, sae.cfg.prepend_bos, sae.cfg.d_out) == (NAME, True, d_out or 11)
    assert sae.cfg.hook_name_out == ("blocks.1.hook_mlp_out" if d_out else None)
    assert sae.cfg.model_from_pretrained_kwargs == {"center_writing_weights": False}
    assert sae.cfg.metadata["dataset_path"] == "none"
    assert dict(sae.named_parameters()).keys() == weights.keys()


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {"architecture": "standard"}),
        ({"activation_fn_str": "tanh-relu"}, {"architecture": "standard"}),
        ({"architecture": "gated", "apply_b_dec_to_input": False}, {"architecture": "gated"}),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}, {"architecture": "topk", "k": 4}),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 4}}, {"architecture": "topk", "k": 4}),
        ({"normalize_activations": False, "finetuning_scaling_factor": True}, {"architecture": "standard"}),
    ],
)
def test_files_of_earlier_releases(tmp_path, own, expected):
    """Everything at the top level, names of before, the whole training beside it."""
    fields = {"d_in": 11, "d_sae": 19, "dtype": "torch.float64", **OLD_TRAINING, **own}
    weights = weights_of(expected["architecture"], 11, 19)
    stored = dict(weights)
    if own.get("finetuning_scaling_factor"):
        weights["finetuning_scaling_factor"] = torch.linspace(0.5, 2, 19, dtype=torch.float64)
        stored["scaling_factor"] = weights["finetuning_scaling_factor"]
    else:
        stored["scaling_factor"] = torch.ones(19)  # written for a time, and meaning nothing
    sae = lens.saes.load_sae(write(tmp_path, fields, stored) / "sae_weights.safetensors")
    agrees(sae, {**fields, **expected}, weights)
    assert (sae.hook_name, sae.cfg.model_name, sae.cfg.prepend_bos) == (NAME, "gpt2-small", True)
    assert sae.cfg.model_from_pretrained_kwargs is None
    assert sae.cfg.metadata["lr"] == 4e-4


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk", "jumprelu"])
def test_checkpoints_of_a_training_become_what_saelens_saves_at_its_end(tmp_path, kind):
    """Batch-top-k has one threshold for all features, JumpReLU keeps its logarithm."""
    weights = weights_of("jumprelu", 11, 19)
    stored = {name: tensor for name, tensor in weights.items() if name != "threshold"}
    if kind == "jumprelu":
        stored["log_threshold"] = weights["threshold"].log()
    else:
        stored["topk_threshold"] = torch.tensor(0.7, dtype=torch.float64)
        weights["threshold"] = torch.full((19,), 0.7, dtype=torch.float64)
    fields = new_fields(
        kind, 11, 19, hook_name=NAME, k=3.5, rescale_acts_by_decoder_norm=True, aux_loss_coefficient=1.0
    )
    agrees(lens.saes.load_sae(write(tmp_path, fields, stored)), {**fields, "architecture": "jumprelu"}, weights)


def test_a_factor_of_the_training_is_folded_in_or_asked_for(tmp_path):
    """The SAE of x is that of the stored weights on factor * x, divided by the factor."""
    weights = weights_of("standard", 11, 19)
    fields = new_fields("standard", 11, 19, hook_name=NAME, normalize_activations="expected_average_only_in")
    folder = write(tmp_path, fields, weights)
    with pytest.raises(SaeError, match=r"expected_average_only_in.*norm_scaling_factor="):
        lens.saes.load_sae(folder)
    expected = by_hand(fields, weights, X * 0.3)["recons"] / 0.3
    assert torch.allclose(lens.saes.load_sae(folder, norm_scaling_factor=0.3)(X), expected, atol=1e-10)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.3}))
    assert torch.allclose(lens.saes.load_sae(folder)(X), expected, atol=1e-10)
    for wrong in (None, "large", float("nan"), -1, True):
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": wrong}))
        with pytest.raises(SaeError, match="norm_scaling_factor="):
            lens.saes.load_sae(folder)
    (tmp_path / "cfg.json").write_text(json.dumps(fields | {"normalize_activations": "none"}))
    with pytest.raises(ArgumentError, match="no factor to be folded"):
        lens.saes.load_sae(folder, norm_scaling_factor=0.3)


def test_dtype_device_and_what_stands_in_place_of_the_metadata(tmp_path):
    """The device that a file names is not ours."""
    folder = write(tmp_path, new_fields("standard", 11, 19, hook_name=NAME), weights_of("standard", 11, 19))
    sae = lens.saes.load_sae(
        folder, dtype=torch.bfloat16, device="cpu", model_from_pretrained_kwargs={"center_writing_weights": True}
    )
    assert (sae.W_enc.dtype, sae.W_enc.device.type, sae.cfg.dtype) == (torch.bfloat16, "cpu", torch.bfloat16)
    assert sae.cfg.model_from_pretrained_kwargs == {"center_writing_weights": True}
    with pytest.raises(ArgumentError, match="floating"):
        lens.saes.load_sae(folder, dtype=torch.int8)
    with pytest.raises(ArgumentError, match="path"):
        lens.saes.load_sae(3)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"architecture": "temporal"}, "the architecture 'temporal'"),
        ({"architecture": ["standard"]}, "architecture"),
        ({"normalize_decoder": True}, "the field 'normalize_decoder'"),
        ({"normalize_activations": "median"}, "normalize_activations = 'median'"),
        ({"activation_fn": "gelu"}, "the activation function 'gelu'"),
        ({"architecture": "topk"}, "k = None"),
        ({"architecture": "topk", "k": 20}, "k = 20"),
        ({"architecture": "topk", "k": True}, "k = True"),
        ({"d_in": "11"}, "d_in = '11'"),
        ({"d_sae": 0}, "d_sae = 0"),
        ({"d_sae": 10**12}, "the config's sizes make it"),
        ({"dtype": "int64"}, "dtype = 'int64'"),
        ({"dtype": "nn"}, "dtype = 'nn'"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input = 'yes'"),
        ({"hook_head_index": -1}, "hook_head_index = -1"),
        ({"prepend_bos": "true"}, "prepend_bos = 'true'"),
        ({"model_from_pretrained_kwargs": [1]}, "no mapping"),
        ({"architecture": "gated"}, "no weight 'b_gate'"),
        ({"d_in": 12}, r"W_dec of shape \[19, 11\], and the config's sizes make it \[19, 12\]"),
        (
            {"architecture": "transcoder", "d_out": 9},
            r"\[19, 11\], and the config's sizes make it \[19, 9\]",
        ),
        ({"architecture": "transcoder"}, "d_out = None"),
    ],
)
def test_configs_that_lens_cannot_vouch_for_are_refused_by_name(tmp_path, own, message):
    """Unknown computations, unsound sizes, and weights that do not fit."""
    fields = new_fields("standard", 11, 19, hook_name=NAME)
    inside = {name: own[name] for name in own if name in fields["metadata"]}
    fields = {**fields, **{n: v for n, v in own.items() if n not in inside}, "metadata": fields["metadata"] | inside}
    with pytest.raises(SaeError, match=message):
        lens.saes.load_sae(write(tmp_path, fields, weights_of("standard", 11, 19)))


class Evil:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        """Write a file."""
        return (Path.touch, (Path("/tmp/lens-sae-was-unpickled"),))


def test_hostile_files(tmp_path):
    """Nothing is unpickled; damage is told, and no file is half read."""
    fields, weights = new_fields("standard", 11, 19, hook_name=NAME), weights_of("standard", 11, 19)
    folder = write(tmp_path / "sae", fields, weights)
    whole, target = (folder / "sae_weights.safetensors").read_bytes(), folder / "sae_weights.safetensors"
    for damaged in (b"", whole[:50], whole[:-8], whole + b"12345678", pickle.dumps(Evil()), b"\xff" * 64):
        target.write_bytes(damaged)
        with pytest.raises(SaeError, match="cannot be read"):
            lens.saes.load_sae(folder)
    assert not Path("/tmp/lens-sae-was-unpickled").exists()
    for tensors, message in (
        (weights | {"W_extra": torch.zeros(2)}, "a weight 'W_extra'"),
        (weights | {"b_enc": torch.zeros(19, dtype=torch.int32)}, "b_enc in torch.int32"),
        (weights | {"scaling_factor": torch.full((19,), 2.0)}, "does not say to use it"),
    ):
        save_file(tensors, target)
        with pytest.raises(SaeError, match=message):
            lens.saes.load_sae(folder)
    target.unlink()
    with pytest.raises(SaeError, match="safetensors only"):
        lens.saes.load_sae(folder)
    config = folder / "cfg.json"
    for text, message in (("{", "no JSON"), ("[" * 10**5, "no JSON"), ("[1]", "holds list"), ("\x00", "no JSON")):
        config.write_text(text)
        with pytest.raises(SaeError, match=message):
            lens.saes.load_sae(folder)
    config.write_bytes(b"\xff\xfe")
    with pytest.raises(SaeError, match="no JSON"):
        lens.saes.load_sae(folder)
    config.write_text(" " * (2**22 + 1))
    with pytest.raises(SaeError, match="bytes"):
        lens.saes.load_sae(folder)
    with pytest.raises(SaeError, match="there is no file"):
        lens.saes.load_sae(tmp_path / "elsewhere")


def test_an_sae_is_made_of_weights_that_fit_or_drawn_the_same_each_time():
    """What a user builds by hand."""
    cfg = lens.saes.SaeConfig(d_in=5, d_sae=9)
    one, same, other = (lens.saes.SparseAutoencoder(cfg, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.W_dec, same.W_dec)
    assert not torch.equal(one.W_dec, other.W_dec)
    assert torch.allclose(one.W_dec.norm(dim=1), torch.ones(9))
    assert torch.equal(one.W_enc, one.W_dec.T)
    good = {name: torch.zeros(shape) for name, shape in cfg.weight_shapes().items()}
    for wrong, message in (
        ({"b_enc": torch.zeros(8)}, r"'b_enc' is \(8,\)"),
        ({"b_gate": torch.zeros(9)}, "'b_gate' is"),
    ):
        with pytest.raises(ArgumentError, match=message):
            lens.saes.SparseAutoencoder(cfg, good | wrong)
    with pytest.raises(ArgumentError, match="'W_dec' is missing"):
        lens.saes.SparseAutoencoder(cfg, {n: w for n, w in good.items() if n != "W_dec"})
    skip = lens.saes.SparseAutoencoder(lens.saes.SaeConfig(d_in=5, d_sae=9, d_out=4, architecture="skip_transcoder"))
    with pytest.raises(ArgumentError, match="needs x"):
        skip.decode(torch.zeros(2, 9))
