"""`lens.load`: what it takes, what it leaves alone, and one clear error for each thing that cannot be loaded."""

import json
import shutil
import struct

import pytest
import torch
from golden.tiny import fresh, random_tokens, tiny_gpt2, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, GPT2Model

import lens_core as lens
from lens_core.errors import (
    ArgumentError,
    ConfigWarning,
    LensError,
    LoadError,
    ModelNotFoundError,
    UnknownModelTypeError,
    UnsupportedConfigError,
    WeightsError,
)


@pytest.fixture
def folder(tmp_path):
    """Save a tiny checkpoint."""
    tiny_gpt2(tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_loads_as_hf_loads_it(folder):
    """Same logits as a fresh HF load, in the checkpoint's own dtype."""
    model, tokens = lens.load(folder), random_tokens()
    reference = GPT2LMHeadModel.from_pretrained(folder).eval()
    assert torch.equal(model(tokens), reference(tokens).logits)
    assert model.cfg.dtype == torch.float32
    assert not model.hf_model.training
    assert model.tokenizer is None
    assert str(folder) in repr(model)


def test_options_reach_hf(folder):
    """dtype, device, device_map and attn_implementation are HF's."""
    assert lens.load(folder, dtype=torch.float64).cfg.dtype == torch.float64
    assert lens.load(str(folder), dtype="bfloat16").cfg.dtype == torch.bfloat16
    assert lens.load(folder, device="cpu").cfg.device == torch.device("cpu")
    assert lens.load(folder, device_map="cpu").cfg.device == torch.device("cpu")
    assert lens.load(folder, attn_implementation="eager").hf_model.config._attn_implementation == "eager"


def test_a_half_precision_checkpoint_stays_so(tmp_path):
    """The checkpoint's dtype is kept unless another is asked for."""
    tiny_gpt2(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert lens.load(tmp_path).cfg.dtype == torch.bfloat16


def test_a_model_in_memory_is_left_untouched():
    """Training mode, parameters, hooks and config stay as they were."""
    hf = tiny_gpt2().train()
    before, config = {name: p.clone() for name, p in hf.named_parameters()}, hf.config.to_dict()
    model = lens.load(hf)
    assert model.hf_model is hf
    assert hf.training
    assert hf.config.to_dict() == config
    assert all(torch.equal(before[name], p) for name, p in hf.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())
    with pytest.raises(ArgumentError, match="left as it is"):
        lens.load(hf, dtype=torch.float64)


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("./no/such/folder", ModelNotFoundError, "no such folder"),
        ("", ArgumentError, "HF id"),
        (None, ArgumentError, "HF id"),
        (3, ArgumentError, "HF id"),
        ("toy:nonesuch", UnknownModelTypeError, "nonesuch"),
        (torch.nn.Linear(2, 2), ModelNotFoundError, "not an HF model"),
    ],
)
def test_what_is_no_model_is_a_clear_error(source, error, says):
    """Nothing there, or nothing that HF knows."""
    with pytest.raises(error, match=says):
        lens.load(source)


def test_an_unknown_hub_id_is_a_clear_error():
    """Offline or not, the message names the id and says what else can be given."""
    with pytest.raises(ModelNotFoundError, match=r"nobody/nothing.*toy:gpt2"):
        lens.load("nobody/nothing")


def test_a_model_type_without_a_plugin_says_what_to_install():
    """The registry's message, for a model in memory too."""
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=11)
    with pytest.raises(UnknownModelTypeError, match="bert"):
        lens.load(BertForMaskedLM(config))


def test_a_model_without_its_unembedding_is_refused():
    """The base model alone has no logits."""
    with pytest.raises(UnsupportedConfigError, match="AutoModelForCausalLM"):
        lens.load(GPT2Model(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=11)))


def test_an_empty_folder_is_a_clear_error(tmp_path):
    """A folder without config.json."""
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        lens.load(tmp_path)


def test_missing_weights_are_a_clear_error(folder):
    """No weights file, or a checkpoint that lacks some: HF would fill them at random."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight"):
        lens.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="missing"):
        lens.load(folder)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 0.999), flip=st.integers(0, 200))
def test_corrupt_weights_are_a_clear_error_or_load(folder, tmp_path_factory, cut, flip):
    """A truncated or scribbled file gives WeightsError; never another exception."""
    broken = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(folder, broken)
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[flip] ^= 0xFF
    (broken / "model.safetensors").write_bytes(bytes(data[: int(cut * len(data))]))
    with pytest.raises(WeightsError):
        lens.load(broken)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(max_size=40), st.sampled_from(['{"model_type": "gpt2", "n_layer": "many"}', "[]", "{}"])))
def test_a_corrupt_config_is_a_clear_error(folder, tmp_path_factory, text):
    """Any text in config.json: an error of ours."""
    broken = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(folder, broken)
    (broken / "config.json").write_text(text)
    with pytest.raises(LensError):
        lens.load(broken)


def test_sizes_that_do_not_fit_the_weights_are_a_clear_error(folder):
    """A config of another width than the weights."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_inner": 41}))
    with pytest.raises(WeightsError, match="fit"):
        lens.load(folder)


def test_a_field_that_nobody_handles_refuses_by_name():
    """Cross-attention is in HF's config class and in no table of ours."""
    hf = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=11, add_cross_attention=True))
    with pytest.raises(UnsupportedConfigError, match="add_cross_attention=True"):
        lens.load(hf)
    assert lens.load(hf, strict=False).cfg.n_layers == 1


def test_keys_unknown_to_hf_are_ignored_with_a_notice(folder):
    """Finetunes carry keys of their own."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "my_run_id": 7}))
    with pytest.warns(ConfigWarning, match="my_run_id"):
        lens.load(folder)


def test_code_from_a_checkpoint_is_never_run(folder):
    """trust_remote_code is refused, by a message that says what to do."""
    with pytest.raises(ArgumentError, match="load the model yourself"):
        lens.load(folder, trust_remote_code=True)


def test_a_device_that_is_none_is_refused(folder):
    """Not reported as corrupt weights."""
    with pytest.raises(ArgumentError, match="no such device"):
        lens.load(folder, device="gpu zero")


def test_contradicting_options_are_refused(folder):
    """One device or a map, not both."""
    with pytest.raises(ArgumentError, match="device_map"):
        lens.load(folder, device="cpu", device_map="auto")


def test_the_same_hf_model_may_be_loaded_twice():
    """Two lens models over one HF model do not disturb each other."""
    hf, tokens = tiny_gpt2(), random_tokens()
    one, two = lens.load(hf), lens.load(hf)
    one.add_hook("hook_embed", lambda value, hook: value * 0)
    assert torch.equal(two(tokens), fresh(hf)(tokens).logits)
    assert not torch.equal(one(tokens), two(tokens))


def gguf_header(architecture):
    """Give the bytes of a GGUF file (version 3) without tensors, whose metadata name an architecture and no more."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    text_type = 8
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)  # version, tensors, pairs
    return header + text("general.architecture") + struct.pack("<I", text_type) + text(architecture)


def test_a_gguf_file_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    """HF needs the package gguf, which is no requirement of ours."""
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda: False)
    (tmp_path / "m.gguf").write_bytes(gguf_header("llama"))
    with pytest.raises(LoadError, match=r"needs a package.*gguf.*pip install gguf") as caught:
        lens.load(tmp_path, gguf_file="m.gguf")
    assert type(caught.value) is LoadError  # neither "no such model" nor "corrupt"


@pytest.mark.parametrize("content", [b"", b"nonsense" * 9, gguf_header("llama")[:40]])
def test_a_gguf_file_that_cannot_be_read_is_a_clear_error(tmp_path, content):
    """Empty, something else, or cut off."""
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(WeightsError, match=r"'m\.gguf' of .* is corrupt, or of a kind"):
        lens.load(tmp_path, gguf_file="m.gguf")


def test_a_gguf_file_that_is_not_there_names_those_that_are(tmp_path):
    """A folder with another one; no folder; no such repository."""
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match=r"no file 'm\.gguf'.*there: other\.gguf"):
        lens.load(tmp_path, gguf_file="m.gguf")
    for nowhere in (str(tmp_path / "nowhere"), "nobody/nothing"):
        with pytest.raises(ModelNotFoundError, match=r"m\.gguf.*nowhere|m\.gguf.*nobody"):
            lens.load(nowhere, gguf_file="m.gguf")


def test_a_gguf_file_is_given_by_its_folder_and_its_name(tmp_path):
    """The path of the file itself, or something else than a name, is answered with the right call."""
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ArgumentError, match=r"lens\.load\('.*', gguf_file='m\.gguf'\)"):
        lens.load(tmp_path / "m.gguf")
    for wrong in (3, "", True):
        with pytest.raises(ArgumentError, match="gguf_file is the name"):
            lens.load(tmp_path, gguf_file=wrong)


def test_the_tokenizer_is_looked_for_where_the_model_was(tmp_path):
    """In the same subfolder; where another one is named, only there."""
    tiny_gpt2().save_pretrained(tmp_path / "inside")
    tiny_tokenizer().save_pretrained(tmp_path / "inside")
    assert lens.load(tmp_path, subfolder="inside").to_tokens("w3", prepend_bos=False).tolist() == [[3]]
    tiny_tokenizer().save_pretrained(tmp_path / "apart")
    other = lens.load(tmp_path, subfolder="inside", tokenizer=str(tmp_path / "apart")).tokenizer
    assert other.name_or_path == str(tmp_path / "apart")
