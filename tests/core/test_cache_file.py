"""Cache files: what is saved comes back, and no file whatever does anything but load or say what is wrong."""

import json
import os
import pickle
import re
import stat
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from golden.tiny import random_tokens, tiny_gpt2, tiny_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lens_core as lens
from lens_core.cache import ActivationCache
from lens_core.errors import ArgumentError, CacheError, CacheFileError, UnknownHookError

HF = "hf.transformer.h.1.mlp.output"


@pytest.fixture(scope="module")
def model():
    """Give a tiny GPT-2."""
    return lens.load(tiny_gpt2(), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def cache(model):
    """Give the default cache of one run, with an hf entry and gradients."""
    default = [point.name for point in model.hook_points() if point.default]
    with model.caching([*default, HF]) as cache:
        model(random_tokens(2, 5))
    return cache


@pytest.fixture(scope="module")
def small(model, tmp_path_factory):
    """Give the bytes of a small cache file, and a folder of its own."""
    with torch.no_grad():
        _, cache = model.run_with_cache(random_tokens(1, 2), names_filter=["hook_tokens", ("z", 1), ("pattern", 1)])
    folder = tmp_path_factory.mktemp("files")
    cache.save(folder / "small")
    return (folder / "small").read_bytes(), folder


def names_in(folder):
    """List a folder."""
    return sorted(path.name for path in folder.iterdir())


def header_of(content):
    """Take a safetensors file apart: its header as JSON, and its data."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def file_of(header, data=b""):
    """Put a safetensors file together, whatever its header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def load_bytes(content, folder, **options):
    """Load a file of these bytes, and see that nothing else has happened in its folder."""
    path = folder / "given"
    path.write_bytes(content)
    before = names_in(folder)
    try:
        return ActivationCache.load(path, **options)
    finally:
        assert names_in(folder) == before
        assert path.read_bytes() == content


def attempt(content, folder):
    """Load these bytes; give the cache and no message, or None and the message of the one error that may come."""
    try:
        return load_bytes(content, folder), ""
    except CacheFileError as error:
        return None, str(error)


# ---------------------------------------------------------------------- there and back


@pytest.mark.parametrize("with_model", [True, False])
def test_what_is_saved_comes_back(model, cache, tmp_path, with_model):
    """Names, order, bits and types are the same, with the model and without."""
    cache.save(tmp_path / "cache.safetensors")
    again = ActivationCache.load(tmp_path / "cache.safetensors", model=model if with_model else None)
    assert list(again) == list(cache)
    for name in cache:
        assert torch.equal(again[name], cache[name]), name
        assert again[name].dtype == cache[name].dtype, name
    assert again.has_batch_dim
    assert again.model is (model if with_model else None)
    assert names_in(tmp_path) == ["cache.safetensors"]


def test_a_file_is_read_by_short_forms_without_the_model(cache, tmp_path):
    """Short forms, negative layers, stacks, slices and plain stacks need no model."""
    cache.save(tmp_path / "c")
    again = ActivationCache.load(tmp_path / "c")
    assert torch.equal(again["z"], cache["z"])
    assert torch.equal(again["q", -1], cache["q", 2])
    assert torch.equal(again["embed.hook_out"], cache["hook_embed"])
    assert torch.equal(again["resid_pre0"], cache["hook_embed"] + cache["hook_pos_embed"])
    assert torch.equal(again.accumulated_resid(), cache.accumulated_resid())
    assert torch.equal(again.slice_pos(-1)["pattern", 1], cache["pattern", 1][:, :, -1:])
    assert torch.equal(again.apply_slice_to_batch_dim(1)[HF], cache[HF][1])
    assert again.table["q", 1].equation == "ln1 W_Q + b_Q"
    assert again.table["q", 1].shape == "batch pos n_heads d_head"
    with pytest.raises(CacheError, match=r"'hook_nothing' is not among the \d+ names of this cache file"):
        again["hook_nothing"]


def test_layers_count_from_the_end_of_the_model_not_of_the_file(model, tmp_path):
    """A file that holds layer 1 of three knows that there are three."""
    _, one = model.run_with_cache(random_tokens(), names_filter=[("z", 1)])
    one.save(tmp_path / "c")
    again = ActivationCache.load(tmp_path / "c")
    assert torch.equal(again["z", -2], one["z", 1])
    assert torch.equal(again["z"], one["z"])
    assert ("z", -1) not in again
    assert again.table.n_layers == 3


def test_with_the_model_the_algebra_works(model, cache, tmp_path):
    """A loaded cache attributes as the live one."""
    cache.save(tmp_path / "c")
    again = ActivationCache.load(tmp_path / "c", model=model)
    for one, other in (
        (again.get_full_resid_decomposition(), cache.get_full_resid_decomposition()),
        (again.logit_attrs(again.decompose_resid(), "w3", 7), cache.logit_attrs(cache.decompose_resid(), "w3", 7)),
    ):
        assert torch.equal(one, other)


def test_gradients_come_back(model, tmp_path):
    """Gradients, zeros included, stand under the names of their values."""
    with model.caching(["resid_post", "z", "hook_tokens"], detach=False) as live:
        logits = model(random_tokens())
    live["resid_post", 1].sum().backward()
    assert logits.requires_grad
    live.save(tmp_path / "c")
    again = ActivationCache.load(tmp_path / "c")
    assert list(again.grad) == list(live.grad)
    for name in live.grad:
        assert torch.equal(again.grad[name], live.grad[name]), name
        assert not again[name].requires_grad
    assert not again.grad["z", 2].any()
    assert again.grad["z", 0].any()
    assert set(load_file(tmp_path / "c")) == set(live) | {f"{name}#grad" for name in live.grad}


def test_a_cache_without_its_batch_axis_comes_back_so(model, tmp_path):
    """has_batch_dim is kept, and slices mean the same."""
    _, row = model.run_with_cache(random_tokens(1, 5), remove_batch_dim=True)
    row.save(tmp_path / "c")
    again = ActivationCache.load(tmp_path / "c", model=model)
    assert not again.has_batch_dim
    assert torch.equal(again.slice_pos([0, 3])["pattern", 1], row["pattern", 1][:, [0, 3]])
    assert torch.equal(again.decompose_resid(apply_ln=True), row.decompose_resid(apply_ln=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_floating_type_comes_back(model, tmp_path, dtype):
    """Nothing is cast on the way."""
    _, cache = model.run_with_cache(random_tokens(), dtype=dtype)
    cache.save(tmp_path / "c")
    again = ActivationCache.load(tmp_path / "c")
    assert all(torch.equal(again[name], cache[name]) and again[name].dtype == cache[name].dtype for name in cache)


def test_views_and_shared_storage_are_saved_as_they_look(model, cache, tmp_path):
    """Slices, expanded and shared tensors are written out; the live cache is untouched."""
    part = cache.slice_pos(slice(None, None, 2)).apply_slice_to_batch_dim(1)
    storage = part["z", 1].untyped_storage().data_ptr()
    part.save(tmp_path / "c")
    assert part["z", 1].untyped_storage().data_ptr() == storage
    again = ActivationCache.load(tmp_path / "c")
    assert all(torch.equal(again[name], part[name]) for name in part)
    shared = torch.randn(1, 5, 21)
    both = {
        "blocks.0.hook_resid_post": shared,
        "blocks.1.hook_resid_pre": shared,
        "hook_embed": shared[:, :1].expand(1, 5, 21),
    }
    ActivationCache(both, table=model.table, model=model).save(tmp_path / "c")
    again = ActivationCache.load(tmp_path / "c")
    assert all(torch.equal(again[name], value) for name, value in both.items())


def test_an_empty_cache_is_a_file_too(model, tmp_path):
    """Nothing cached is nothing saved."""
    ActivationCache(table=model.table, model=model).save(tmp_path / "c")
    assert len(ActivationCache.load(tmp_path / "c", model=model)) == 0


def test_calls_that_continued_are_saved_as_one(model, tmp_path):
    """Pieces are joined."""
    _, generated = model.generate(
        random_tokens(1, 3),
        max_new_tokens=3,
        return_cache=True,
        names_filter="z",
        do_sample=False,
        stop_at_eos=False,
        verbose=False,
    )
    generated.save(tmp_path / "c")
    assert torch.equal(ActivationCache.load(tmp_path / "c")["z"], generated["z"])


def test_the_metadata_say_where_the_values_come_from(model, cache, tmp_path):
    """Model, plugin and versions are there; saving a loaded cache again keeps them."""
    cache.save(tmp_path / "c")
    again = ActivationCache.load(tmp_path / "c")
    again.save(tmp_path / "d")
    for loaded in (again, ActivationCache.load(tmp_path / "d")):
        found = loaded.metadata
        assert found["model"] == "gpt2"
        assert found["model_type"] == "gpt2"
        assert found["architecture"] == "GPT-2"
        assert re.fullmatch(r"lens-gpt2 \d+\.\d+\.\d+", found["plugin"])
        assert found["torch"] == torch.__version__
        assert found["d_model"] == "21"
        assert all(re.match(r"\d", found[name]) for name in ("lens_core", "transformers", "format_version"))
    assert cache.metadata == {}


def test_a_folder_of_the_model_is_not_told(tmp_path):
    """Where somebody keeps a model is not written into files that they share."""
    hf = tiny_gpt2()
    hf.save_pretrained(tmp_path / "private" / "my-model")
    model = lens.load(tmp_path / "private" / "my-model")
    _, cache = model.run_with_cache(random_tokens(), names_filter="z")
    cache.save(tmp_path / "c")
    assert ActivationCache.load(tmp_path / "c").metadata["model"] == "my-model"
    assert b"private" not in (tmp_path / "c").read_bytes()


def test_tensors_are_mapped_not_read(cache, tmp_path):
    """Loading takes no memory for values; writing into one changes no file, and replacing the file changes no value."""
    cache.save(tmp_path / "c")
    content = (tmp_path / "c").read_bytes()
    again = ActivationCache.load(tmp_path / "c")
    again["hook_embed"].zero_()
    assert (tmp_path / "c").read_bytes() == content
    cache.slice_pos([0]).save(tmp_path / "c")
    assert torch.equal(again["hook_logits"], cache["hook_logits"])


def test_a_device_is_where_the_tensors_go(cache, tmp_path):
    """An unknown one is an argument error, not a damaged file."""
    cache.save(tmp_path / "c")
    assert ActivationCache.load(tmp_path / "c", device="meta")["z", 1].device.type == "meta"
    assert torch.equal(ActivationCache.load(tmp_path / "c", device="cpu")["z"], cache["z"])
    with pytest.raises(ArgumentError, match="no such device"):
        ActivationCache.load(tmp_path / "c", device="nowhere")


# ---------------------------------------------------------------------- writing


def test_writing_replaces_a_file_or_leaves_it(model, cache, tmp_path, monkeypatch):
    """A file that is there stays until the new one is complete; nothing is left of a failed one."""
    path = tmp_path / "c"
    path.write_bytes(b"before")
    odd = ActivationCache({"hook_embed": torch.eye(3).to_sparse()}, table=model.table, model=model)
    with pytest.raises(CacheFileError, match="cannot be written"):
        odd.save(path)
    assert path.read_bytes() == b"before"
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(CacheFileError, match=r"cannot be written to .*disk full"):
        cache.save(path)
    assert path.read_bytes() == b"before"
    assert names_in(tmp_path) == ["c"]
    monkeypatch.undo()
    cache.save(path)
    assert len(ActivationCache.load(path)) == len(cache)
    assert names_in(tmp_path) == ["c"]


def test_a_place_that_cannot_be_written_is_refused(cache, tmp_path):
    """A folder, a folder that is not there, a name that is too long, and what is no path."""
    with pytest.raises(CacheFileError, match="is a folder"):
        cache.save(tmp_path)
    with pytest.raises(CacheFileError, match="cannot be written"):
        cache.save(tmp_path / "nowhere" / "c")
    with pytest.raises(CacheFileError, match="cannot be written"):
        cache.save(tmp_path / ("x" * 250))
    for path in (3, None, "", "a\0b"):
        with pytest.raises(ArgumentError, match="named by a path"):
            cache.save(path)
        with pytest.raises(ArgumentError, match="named by a path"):
            ActivationCache.load(path)
    assert names_in(tmp_path) == []


def test_others_may_read_a_file_as_the_umask_says(cache, tmp_path):
    """A saved file has the permissions of any new file."""
    (tmp_path / "plain").touch()
    cache.save(tmp_path / "c")
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_an_entry_of_a_strange_name_is_not_written(model, tmp_path):
    """What could not be read again is not saved."""
    for name in ("../escape", "hook embed", "blocks.0.hook_q\n", "hf.x"):
        with pytest.raises(CacheFileError, match="not the name of a hook point"):
            ActivationCache({name: torch.zeros(1)}, table=model.table, model=model).save(tmp_path / "c")
    assert names_in(tmp_path) == []


# ---------------------------------------------------------------------- files that are not ours


def test_what_is_no_cache_file_is_told(cache, tmp_path):
    """Missing, a folder, a pickle, another safetensors file: each says what it is."""
    with pytest.raises(CacheFileError, match="there is no file"):
        ActivationCache.load(tmp_path / "missing")
    with pytest.raises(CacheFileError, match="is not a file"):
        ActivationCache.load(tmp_path)
    with pytest.raises(CacheFileError, match="is not a file"):
        ActivationCache.load("/dev/zero")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    save_file({"weight": torch.zeros(2)}, tmp_path / "named", metadata={"format": "pt"})
    for name in ("weights", "named"):
        with pytest.raises(CacheFileError, match=r"safetensors file, but no activation cache"):
            ActivationCache.load(tmp_path / name)


class Bomb:
    """Would run code if it were unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def test_nothing_is_ever_unpickled(tmp_path, monkeypatch):
    """A pickle is refused without being looked into."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").write_bytes(pickle.dumps(Bomb()))
    torch.save({"hook_embed": torch.zeros(2)}, tmp_path / "t")
    for name in ("p", "t"):
        with pytest.raises(CacheFileError, match="is no activation cache, or is damaged"):
            ActivationCache.load(tmp_path / name)
    assert names_in(tmp_path) == ["p", "t"]


@pytest.mark.parametrize(
    ("version", "match"),
    [
        ("2", "format version 2, written by lens-core 9.9, and this lens-core reads version 1: upgrade it"),
        ("999999999", "upgrade it"),
        ("0", "no sound format version, but '0'"),
        ("-1", "no sound format version"),
        ("1.0", "no sound format version"),
        ("\u0661", "no sound format version"),
        ("9" * 5000, "no sound format version"),
        (None, "no sound format version"),
    ],
)
def test_another_format_version_says_which_side_to_upgrade(small, version, match):
    """A newer file asks for a newer lens-core."""
    header, data = header_of(small[0])
    header["__metadata__"]["lens_core"] = "9.9"
    header["__metadata__"]["format_version"] = version
    if version is None:
        del header["__metadata__"]["format_version"]
    with pytest.raises(CacheFileError, match=match):
        load_bytes(file_of(header, data), small[1])


def edited(content, **metadata):
    """Change a file's metadata."""
    header, data = header_of(content)
    header["__metadata__"].update(metadata)
    return file_of(header, data)


def renamed(content, old, new):
    """Rename an entry everywhere."""
    header, data = header_of(content)
    header[new] = header.pop(old)
    points = json.loads(header["__metadata__"]["points"])
    header["__metadata__"]["points"] = json.dumps({new if name == old else name: at for name, at in points.items()})
    return file_of(header, data)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd", "/etc/passwd", "blocks.1.attn.hook_z/..", "blocks.3.attn.hook_z", "blocks.01.attn.hook_z",
        "blocks.99999999999999999999.attn.hook_z", "blocks.9999.attn.hook_z",
        "blocks.-1.attn.hook_z", "blocks.\u0661.attn.hook_z", "hook_z\n", "hook z",
        "blocks.1.blocks.2.hook_z", "hf.a/b.output", "hf.output", "hf...output", "hf.x.weight", "z", "",
        "hook_" + "x" * 1000,
        "__class__", "a." * 500 + "hook_z", "hook_é", "blocks.1.attn.hook_z\0",
    ],
)  # fmt: skip
def test_strange_names_are_refused(small, name):
    """Names must be hook points of the layers that the file tells of; a huge layer costs nothing."""
    with pytest.raises(CacheFileError):
        load_bytes(renamed(small[0], "blocks.1.attn.hook_z", name), small[1])


@pytest.mark.parametrize(
    "metadata",
    [
        {"n_layers": ""}, {"n_layers": "-3"}, {"n_layers": "99999999"}, {"n_layers": "1"}, {"n_layers": "three"},
        {"has_batch_dim": "maybe"}, {"has_batch_dim": "false"}, {"has_batch_dim": ""},
        {"points": ""}, {"points": "[]"}, {"points": "{}"}, {"points": "null"}, {"points": "[" * 100_000},
        {"points": '{"a":' * 100_000}, {"points": "9" * 5000}, {"points": "NaN"},
        {"points": '{"hook_tokens": null}'}, {"points": '{"hook_tokens": {"axes": 3, "equation": ""}}'},
        {"aliases": "3"}, {"aliases": '{"a": []}'}, {"format": "pt"},
    ],
    ids=lambda metadata: str(metadata)[:40],
)  # fmt: skip
def test_metadata_that_do_not_fit_are_refused(small, metadata):
    """Depth, batch axis and points are checked against the tensors."""
    with pytest.raises(CacheFileError):
        load_bytes(edited(small[0], **metadata), small[1])


@pytest.mark.parametrize(
    "axes",
    [
        "batch pos", "batch pos n_heads d_head d_head", "", "batch pos n_heads <script>", "batch pos n_heads d_head\n",
        "batch pos n_heads " + "x" * 1000, "batch pos n_heads t\u00eate",
    ],
)  # fmt: skip
def test_axes_that_do_not_fit_are_refused(small, axes):
    """An entry has as many axes as it says, in plain words."""
    points = json.loads(header_of(small[0])[0]["__metadata__"]["points"])
    points["blocks.1.attn.hook_z"]["axes"] = axes
    with pytest.raises(CacheFileError):
        load_bytes(edited(small[0], points=json.dumps(points)), small[1])


def test_a_gradient_without_its_entry_is_refused(small):
    """Gradients belong to entries, and have their shapes."""
    header, data = header_of(small[0])
    for name, shape in (("hook_embed#grad", [1]), ("hook_tokens#grad", [1]), ("blocks.1.attn.hook_z#grad#grad", [1])):
        more = {**header, name: {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + 4]}}
        with pytest.raises(CacheFileError):
            load_bytes(file_of(more, data + b"\0" * 4), small[1])


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [0, 2**63, 1, 1], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [0, 2**62, 4, 1], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1, 1, 1, 1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1, 1, 1, 1], "data_offsets": [100, 104]},
        {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]},
        {"dtype": "object", "shape": [1, 1, 1, 1], "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [1, 1, 1, 8], "data_offsets": [0, 4]},
    ],
    ids=str,
)
def test_hostile_shapes_and_offsets_allocate_nothing(small, entry):
    """What the header claims is compared with the file before anything is made."""
    header, _ = header_of(small[0])
    points = json.loads(header["__metadata__"]["points"])
    name = "blocks.1.attn.hook_z"
    header = {"__metadata__": {**header["__metadata__"], "points": json.dumps({name: points[name]})}, name: entry}
    tracemalloc.start()
    try:
        loaded, message = attempt(file_of(header, b"\0" * min(max(entry["data_offsets"]), 4)), small[1])
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert message or loaded[name].numel() in (0, 4)  # sizes of zero are sound, and eight halves of a byte are four
    assert peak < 2**22
    assert "\n" not in message  # torch's own message of an overflow is a stack trace


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_a_false_length_is_refused(small, length):
    """An oversized or empty header is told before it is read."""
    with pytest.raises(CacheFileError, match="is no activation cache, or is damaged"):
        load_bytes(struct.pack("<Q", length) + small[0][8:], small[1])


def loads_or_says_why(content, folder):
    """Load these bytes: a cache of sound names, or the one error, with a message of one line."""
    loaded, message = attempt(content, folder)
    assert "\n" not in message
    for name in loaded or ():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+", name)
        assert loaded[name].numel() < 1000
    return loaded


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_truncated_file_is_refused(small, data):
    """Cut off anywhere, or with something appended, a file does not load."""
    content, folder = small
    if data.draw(st.booleans()):
        cut = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        cut = content + data.draw(st.binary(min_size=1, max_size=50))
    assert loads_or_says_why(cut, folder) is None


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_corrupted_header_loads_or_is_refused(small, data):
    """Bytes changed anywhere in the header give the one error, or a cache that is sound by itself."""
    content, folder = small
    (length,) = struct.unpack("<Q", content[:8])
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    loads_or_says_why(bytes(changed), folder)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=300))
@example(content=b"")
@example(content=b"\x80\x04}.")
@example(content=b"PK\x03\x04")
def test_any_bytes_are_refused(small, content):
    """Random bytes, and random bytes as a header, are no cache."""
    assert loads_or_says_why(content, small[1]) is None
    assert loads_or_says_why(file_of(content), small[1]) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_json_in_place_of_a_part_is_refused_or_sound(small, data):
    """Whatever stands where the header or the metadata hold something, there is one error or a sound cache."""
    content, folder = small
    header, values = header_of(content)
    place = data.draw(st.sampled_from(["entry", "field", "metadata", "points", "point", "axes"]))
    anything = data.draw(JSON)
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    points = json.loads(header["__metadata__"]["points"])
    if place == "entry":
        header[name] = anything
    elif place == "field":
        header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = anything
    elif place == "metadata":
        key = data.draw(st.sampled_from(sorted(header["__metadata__"])))
        header["__metadata__"][key] = anything if data.draw(st.booleans()) else str(anything)
    elif place == "points":
        header["__metadata__"]["points"] = json.dumps(anything)
    elif place == "point":
        header["__metadata__"]["points"] = json.dumps({**points, name: anything})
    else:
        points[name]["axes"] = anything
        header["__metadata__"]["points"] = json.dumps(points)
    loads_or_says_why(file_of(header, values), folder)


# ---------------------------------------------------------------------- another model


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"n_layer": 4}, "of type 'gpt2' with 3 layers, and this model is of type 'gpt2' with 4"),
        ({"n_embd": 24}, r"'hook_embed' has shape \[2, 5, 21\].*this model has \[2, 5, 24\]"),
        ({"n_head": 7}, r"'blocks.0.attn.hook_q' has shape \[2, 5, 3, 7\].*\[2, 5, 7, 3\]"),
        ({"n_inner": 36}, r"'blocks.0.mlp.hook_pre' has shape"),
        ({"vocab_size": 30}, r"'unembed.hook_out' has shape"),
    ],
)
def test_a_model_of_another_shape_is_refused(cache, tmp_path, overrides, match):
    """Depth and every size are compared with the model's."""
    cache.save(tmp_path / "c")
    other = lens.load(tiny_gpt2(**overrides))
    with pytest.raises(CacheFileError, match=match):
        ActivationCache.load(tmp_path / "c", model=other)


def test_a_model_without_such_a_place_is_refused(model, small):
    """A name that the model's table lacks, other axes, or another type of model."""
    content, folder = small
    with pytest.raises(CacheFileError, match="holds 'blocks.1.attn.hook_rot_q', which this model does not have"):
        load_bytes(renamed(content, "blocks.1.attn.hook_z", "blocks.1.attn.hook_rot_q"), folder, model=model)
    with pytest.raises(CacheFileError, match="holds 'hf.no.such.output'"):
        load_bytes(renamed(content, "blocks.1.attn.hook_z", "hf.no.such.output"), folder, model=model)
    with pytest.raises(CacheFileError, match=r"'blocks.1.attn.hook_q' has shape|'blocks.1.hook_q_input' has shape"):
        load_bytes(renamed(content, "blocks.1.attn.hook_z", "blocks.1.hook_q_input"), folder, model=model)
    with pytest.raises(CacheFileError, match="of a model of type 'mamba' with 3 layers"):
        load_bytes(edited(content, model_type="mamba"), folder, model=model)
    assert len(load_bytes(content, folder, model=model)) == 3
    with pytest.raises(UnknownHookError):
        load_bytes(content, folder, model=model)["hook_nothing"]
