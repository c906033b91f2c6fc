"""Checkpoints, cache and state files made to harm: one clear error, in little memory, and nothing else is touched."""

import json
import os
import pickle
import resource
import shutil
import struct

import pytest
import torch
from abuse.models import BUILDERS, KINDS, TOKENS

import lens_core as lens
from lens_core.errors import CacheFileError, LensError, StateFileError, UnsupportedConfigError, WeightsError

HUGE = (10**12, 2**63, 10**30)
VALUES = (*HUGE, -1, 0, 1.5, float("nan"), float("inf"), "x", "../../etc", None, True, [], [1], {}, {"a": 1})


def memory():
    """Give the most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save a checkpoint of each kind."""
    found = {}
    for kind, build in BUILDERS.items():
        found[kind] = tmp_path_factory.mktemp(kind) / "model"
        build().save_pretrained(found[kind])
    return found


def with_config(folder, target, **changes):
    """Copy a checkpoint and change its config."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def sizes(folder):
    """List the fields of a config that are numbers or kinds of things."""
    return [name for name, value in json.loads((folder / "config.json").read_text()).items() if value is not None]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_config_of_any_values_loads_or_is_an_error_of_ours(folders, tmp_path, kind):
    """Each field at a huge, negative or wrong value; no other exception, no memory to speak of."""
    before = memory()
    for index, field in enumerate(sizes(folders[kind])):
        for value in (VALUES[index % len(VALUES)], VALUES[(index * 7 + 3) % len(VALUES)]):
            broken = with_config(folders[kind], tmp_path / "m", **{field: value})
            try:
                lens.load(broken, tokenizer=False)
            except LensError as error:
                assert "\n" not in str(error)  # noqa: PT017 - it may load
    assert memory() - before < 300


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_huge_sizes_are_refused_before_anything_is_made(folders, tmp_path, kind):
    """A vocabulary of 10**12, as many layers, none, fewer than none."""
    layers = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    width = "n_embd" if kind == "gpt2" else "hidden_size"
    before = memory()
    for field, values in {"vocab_size": HUGE, layers: (*HUGE, 0, -3, True), width: (*HUGE, 0)}.items():
        for value in values:
            with pytest.raises((UnsupportedConfigError, WeightsError)):
                lens.load(with_config(folders[kind], tmp_path / "m", **{field: value}), tokenizer=False)
    assert memory() - before < 300


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"model_type": NaN}', "\ufeff{}", '"gpt2"', "null"]
)
def test_a_config_of_strange_json_is_an_error_of_ours(folders, tmp_path, text):
    """Deep nesting, NaN, a byte order mark, no object."""
    broken = with_config(folders["gpt2"], tmp_path / "m")
    (broken / "config.json").write_text(text)
    with pytest.raises(LensError):
        lens.load(broken, tokenizer=False)
    (broken / "config.json").write_bytes(b"\xff\xfe{\x00")
    with pytest.raises(LensError):
        lens.load(broken, tokenizer=False)


CODE = """
from pathlib import Path
Path({path!r}).touch()
from transformers import GPT2Config, GPT2LMHeadModel
class Own(GPT2Config):
    model_type = "own"
class OwnModel(GPT2LMHeadModel):
    config_class = Own
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["own", "gpt2"])
def test_code_in_a_checkpoint_is_never_run_nor_asked_for(folders, tmp_path, monkeypatch, model_type):
    """`auto_map` of an unknown and of a known model type: no question at the terminal, no code."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *given: asked.append(given) or "y")
    auto_map = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel", "AutoTokenizer": ["own.Own", None]}
    folder = with_config(folders["gpt2"], tmp_path / "m", model_type=model_type, auto_map=auto_map)
    (folder / "own.py").write_text(CODE.format(path=str(tmp_path / "ran")))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "tokenizer_class": "Own"}))
    if model_type == "own":
        with pytest.raises(UnsupportedConfigError, match="code of its own.*load the model yourself"):
            lens.load(folder)
    else:
        lens.load(folder)
    assert not (tmp_path / "ran").exists()
    assert asked == []


class Bomb:
    """Would make a folder if it were unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_a_pickle_are_not_unpickled(folders, tmp_path, monkeypatch):
    """A pickle as torch writes them, with code in it."""
    monkeypatch.chdir(tmp_path)
    folder = with_config(folders["gpt2"], tmp_path / "m")
    (folder / "model.safetensors").unlink()
    for write in (lambda path: torch.save({"w": Bomb()}, path), lambda path: path.write_bytes(pickle.dumps(Bomb()))):
        write(folder / "pytorch_model.bin")
        with pytest.raises(LensError):
            lens.load(folder, tokenizer=False)
        assert not (tmp_path / "exploded").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", ["../../nothing.safetensors", "/nothing.safetensors", "\0", 3, None, ["x"]])
def test_an_index_of_strange_files_is_an_error_of_ours(folders, tmp_path, shard):
    """A sharded checkpoint whose index names what is no file of it."""
    folder = with_config(folders["gpt2"], tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"w": shard}}))
    with pytest.raises(LensError):
        lens.load(folder, tokenizer=False)


# ---------------------------------------------------------------------- caches and states


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a cache and a state; give the model and how each is read."""
    model, folder = lens.load(BUILDERS["gpt2"](), tokenizer=False), tmp_path_factory.mktemp("saved")
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, names_filter=("z", 1))
        _, state = model(TOKENS, return_state=True)
    cache.save(folder / "cache")
    model.save_state(state, folder / "state")
    return {
        "cache": (folder / "cache", lens.ActivationCache.load, CacheFileError),
        "state": (folder / "state", model.load_state, StateFileError),
    }


def taken_apart(path):
    """Give a safetensors file's header, and its data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


def hostile(header, data):
    """List files: what is wrong, and the bytes."""
    parsed = json.loads(header)
    name = next(key for key in parsed if key != "__metadata__")
    twice = header[:-1] + b"," + json.dumps({name: parsed[name]}).encode()[1:]

    def whole(text, data=data):
        return struct.pack("<Q", len(text)) + text + data

    def entry(**changes):
        return whole(json.dumps({**parsed, name: {**parsed[name], **changes}}).encode())

    metadata = parsed["__metadata__"]
    begin, end = parsed[name]["data_offsets"]
    return {
        "length beyond the file": struct.pack("<Q", 2**40) + header + data,
        "length past all bounds": struct.pack("<Q", 2**64 - 1) + header + data,
        "huge shape": entry(shape=[2**31, 2**31]),
        "huge axis": entry(shape=[10**30]),
        "offsets out of range": entry(data_offsets=[begin, 2**40]),
        "offsets that overlap": entry(data_offsets=[begin, max(end - 4, 0)]),
        "offsets backwards": entry(data_offsets=[end, begin]),
        "a name twice": whole(twice),
        "not UTF-8": whole(b"\xff" + header[1:]),
        "NaN": whole(header.replace(b'"shape":[1', b'"shape":[NaN', 1)),
        "deep": whole(b'{"a":' * 50_000),
        "no object": whole(b"[]"),
        "path": whole(json.dumps({"../../x": parsed[name], "__metadata__": metadata}).encode()),
        "metadata of numbers": whole(json.dumps({**parsed, "__metadata__": {**metadata, "n_layers": 3}}).encode()),
        "data cut off": whole(header, data[:-1]),
        "nothing": b"",
    }


@pytest.mark.parametrize("kind", ["cache", "state"])
def test_hostile_files_are_refused(saved, tmp_path, kind):
    """Each way to be wrong is the one error, of one line; nothing appears beside the file, nothing big is allocated."""
    path, read, error_type = saved[kind]
    before = memory()
    for what, content in hostile(*taken_apart(path)).items():
        (tmp_path / "given").write_bytes(content)
        with pytest.raises(error_type) as caught:
            read(tmp_path / "given")
        assert "\n" not in str(caught.value), what
        assert [file.name for file in tmp_path.iterdir()] == ["given"], what
        assert (tmp_path / "given").read_bytes() == content, what
    assert memory() - before < 100


@pytest.mark.parametrize("kind", ["cache", "state"])
def test_links_are_read_through_and_written_over(saved, tmp_path, kind):
    """A link is read as what it points to; saving replaces the link, and leaves what it points to alone."""
    path, read, error_type = saved[kind]
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    assert read(tmp_path / "link") is not None
    for name in ("nowhere", "loop", "pipe"):
        with pytest.raises(error_type):
            read(tmp_path / name)
    if kind == "cache":
        (tmp_path / "precious").write_text("kept")
        (tmp_path / "target").symlink_to(tmp_path / "precious")
        read(path).save(tmp_path / "target")
        assert (tmp_path / "precious").read_text() == "kept"
        assert not (tmp_path / "target").is_symlink()
