"""What lens.load takes, what it refuses, and that it leaves what it was given."""

import json
import shutil

import pytest
import torch
from golden.tiny import fresh, random_tokens, tiny_gpt2, tiny_tokenizer
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM

import lens_core as lens
from lens_core import errors


@pytest.fixture
def folder(tmp_path):
    """Save a tiny model and its tokenizer into a folder."""
    tiny_gpt2(dtype=torch.bfloat16).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_local_folder_keeps_its_dtype_and_finds_its_tokenizer(folder):
    """A folder, as text or path, loads in the checkpoint's dtype, bit-equal to HF, with its tokenizer."""
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    for source in (str(folder), folder):
        model = lens.load(source)
        assert model.hf_model.dtype == reference.dtype == torch.bfloat16
        assert torch.equal(model(random_tokens()), reference(random_tokens()).logits)
        assert model.to_tokens("w3 w1", prepend_bos=False).tolist() == [[3, 1]]
        assert not model.hf_model.training


def test_options_are_passed_through(folder):
    """dtype, device, attn_implementation and other from_pretrained options reach HF."""
    model = lens.load(folder, dtype=torch.float64, attn_implementation="eager", device="cpu")
    assert model.hf_model.dtype == torch.float64
    assert model.hf_model.config._attn_implementation == "eager"
    assert lens.load(folder, dtype="float32").hf_model.dtype == torch.float32
    assert lens.load(folder, device_map="cpu")(random_tokens()).shape == (2, 5, 29)


def test_a_tokenizer_may_be_given_or_absent(folder):
    """A given tokenizer is used; without one, ids still work."""
    given = tiny_tokenizer()
    assert lens.load(folder, tokenizer=given).tokenizer is given
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    model = lens.load(folder)
    assert model.tokenizer is None
    assert model(random_tokens()).shape == (2, 5, 29)


def test_offloaded_models_are_read_and_edited(folder, tmp_path):
    """With blocks on disk (parameters on meta) values, edits and purity hold."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h.0": "cpu", "transformer.h.1": "disk"}
    places |= {"transformer.h.2": "disk", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    model = lens.load(folder, dtype=torch.float32, device_map=places, offload_folder=tmp_path / "offload")
    whole = lens.load(fresh(reference))
    tokens = random_tokens()
    names = [point.name for point in whole.hook_points()]
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, names_filter=names)
        _, expected = whole.run_with_cache(tokens, names_filter=names)
        assert torch.equal(logits, reference(tokens).logits)
        for name in names:
            assert torch.equal(cache[name], expected[name]), name
            edit = [(name, lambda x, hook: x * 0.7 if x.is_floating_point() else x)]
            ours, theirs = (m.run_with_hooks(tokens, fwd_hooks=edit) for m in (model, whole))
            torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("source", ["no/such-model", "./no-such-folder", "/no/such/folder"])
def test_a_model_that_is_not_there_is_an_error(source):
    """An unknown id or folder, without network, is one clear error."""
    with pytest.raises(errors.ModelNotFoundError):
        lens.load(source)


@pytest.mark.parametrize(
    "source", [None, "", 3, b"x", object(), torch.nn.Linear(2, 2), {"a": 1}], ids=lambda s: type(s).__name__
)
def test_a_source_of_another_kind_is_an_error(source):
    """Not a name, folder or HF model."""
    with pytest.raises(errors.LensError):
        lens.load(source)


def test_an_unknown_toy_is_an_error():
    """toy:NAME of a plugin that is not there names what there is."""
    with pytest.raises(errors.LensError, match="gpt3"):
        lens.load("toy:gpt3")


def test_a_model_type_without_a_plugin_says_what_to_install():
    """An HF model whose type nobody provides names the package to install."""
    config = GPTJConfig(vocab_size=29, n_embd=8, n_inner=12, n_layer=1, n_head=2, rotary_dim=2)
    with pytest.raises(errors.UnknownModelTypeError, match="gptj"):
        lens.load(GPTJForCausalLM(config))


def test_missing_and_corrupt_weights_are_errors(folder):
    """A weights file that is absent, truncated or lacks tensors is an error, never random numbers."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    content = path.read_bytes()
    tensors = {
        key: value.clone() for key, value in load_file(path).items()
    }  # not views of the file, which is rewritten
    for broken in (content[: len(content) // 2], b"", b"\x00" * 64):
        path.write_bytes(broken)
        with pytest.raises(errors.WeightsError):
            lens.load(folder)
    for change in ("drop", "shape"):
        kept = dict(tensors)
        key = next(key for key in kept if key.endswith("h.1.mlp.c_fc.weight"))
        if change == "drop":
            del kept[key]
        else:
            kept[key] = torch.zeros(3, 3)
        save_file(kept, path, metadata={"format": "pt"})
        with pytest.raises(errors.WeightsError):
            lens.load(folder)
    path.unlink()
    with pytest.raises(errors.WeightsError):
        lens.load(folder)


def test_a_broken_config_is_an_error(folder):
    """A config file that is not JSON, or names no model type, is an error of the tree."""
    for content in ("{", "[]", "{}", json.dumps({"model_type": "nobody-knows"})):
        (folder / "config.json").write_text(content)
        with pytest.raises(errors.LensError):
            lens.load(folder)


def test_config_fields_that_the_plugin_does_not_hold_are_refused(folder):
    """Cross-attention changes the computation: refused by name, unless strict=False; unknown keys give one notice."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "my_finetune_note": "x"}))
    with pytest.warns(errors.ConfigWarning, match="my_finetune_note") as caught:
        lens.load(folder)
    assert len([w for w in caught if issubclass(w.category, errors.ConfigWarning)]) == 1
    with pytest.raises(errors.UnsupportedConfigError, match="add_cross_attention"):
        lens.load(tiny_gpt2(add_cross_attention=True))


def test_a_broken_tokenizer_leaves_ids_working(folder):
    """A tokenizer file that is damaged warns; ids still work."""
    (folder / "tokenizer.json").write_text("{")
    with pytest.warns(errors.LensWarning, match="tokenizer"):
        model = lens.load(folder)
    assert model(random_tokens()).shape == (2, 5, 29)


def test_loading_twice_gives_independent_models(folder):
    """Two loads share no parameter."""
    one, two = lens.load(folder), lens.load(folder)
    shutil.rmtree(folder)
    with torch.no_grad():
        for parameter in one.hf_model.parameters():
            parameter.zero_()
    assert bool(two(random_tokens()).any())
