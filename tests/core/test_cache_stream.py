"""A cache that goes to its file as the model runs: the file of `cache.save`, whole or not at all, and no memory."""

import errno
import gc
import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from golden.live import live_bytes
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel

import lens_core as lens
from lens_core import _cache_stream
from lens_core._call import Call
from lens_core._choice import Choice
from lens_core.errors import ArgumentError, CacheFileError, HookFunctionError
from lens_core.hook_points import Selection

TOKENS = random_tokens(2, 9)


@pytest.fixture(scope="module")
def model():
    """Give a tiny GPT-2."""
    return lens.load(tiny_gpt2())


def same(a, b):
    """Compare names, order, bits and types."""
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16},  # two bytes a number, and eight a token
        {"pos_slice": [1, 4, -1]},
        {"names_filter": ["pattern", "attn_scores", "z"], "heads": [0, 2], "pos_slice": -1, "dtype": torch.float16},
        {"names_filter": ["result", "hf.transformer.h.1.mlp.output", "hook_logits"]},
        {"remove_batch_dim": True},
        {"stop_at_layer": 1, "return_type": None},
    ],
)
def test_the_file_holds_what_a_cache_in_memory_holds(model, tmp_path, options):
    """With the run's output, and read again without the model."""
    tokens = TOKENS[:1] if options.get("remove_batch_dim") else TOKENS
    with torch.no_grad():
        output, cache = model.run_with_cache(tokens, **options)
        other, mapped = model.run_with_cache(tokens, file=tmp_path / "c", **options)
    assert (output is None and other is None) or torch.equal(output, other)
    same(cache, mapped)
    assert mapped.model is model
    assert mapped.has_batch_dim == cache.has_batch_dim
    again = lens.ActivationCache.load(tmp_path / "c")
    assert (again.has_gaps, again.heads) == (cache.has_gaps, cache.heads)
    same(cache, again.remove_batch_dim() if options.get("remove_batch_dim") else again)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_wide_values_after_narrow_ones_stand_where_their_type_may(model, tmp_path):
    """A float64 after three bfloat16 numbers is at a multiple of eight; what is between is nobody's value."""
    path, point = tmp_path / "c", model.table["hook_embed"]
    names = Selection(names=("hook_embed", "ln_final.hook_scale"), exact=True)
    stream = _cache_stream.CacheStream(model.new_cache(), names, path, dtype=None, choice=Choice())
    narrow, wide = torch.ones(1, 1, 3, dtype=torch.bfloat16), torch.arange(2.0, dtype=torch.float64).reshape(1, 2, 1)
    call = Call(batch=1, n_pos=2, past=0, device=torch.device("cpu"))
    with stream:
        stream.store(point, narrow, call, is_foreign=False)
        stream.store(model.table["ln_final.hook_scale"], wide, call, is_foreign=False)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert header["hook_embed"]["data_offsets"] == [0, 6]
    assert (8 + size + header["ln_final.hook_scale"]["data_offsets"][0]) % 8 == 0
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("ln_final.hook_scale"), wide)
    assert list(lens.ActivationCache.load(path)) == ["hook_embed", "ln_final.hook_scale"]


def test_it_is_the_file_that_save_writes(model, tmp_path):
    """The metadata are the same, and so is what analysis makes of it."""
    _, cache = model.run_with_cache(TOKENS)
    cache.save(tmp_path / "saved")
    _, mapped = model.run_with_cache(TOKENS, file=tmp_path / "streamed")
    found = []
    for name in ("saved", "streamed"):
        with safe_open(tmp_path / name, framework="pt") as file:
            found.append(file.metadata())
    assert found[0] == found[1]
    assert torch.equal(cache.accumulated_resid(), mapped.accumulated_resid())
    mapped.save(tmp_path / "again")
    same(cache, lens.ActivationCache.load(tmp_path / "again", model=model))


def test_heads_are_checked_in_files(model, tmp_path):
    """A cache of some heads fits its model, and none of other sizes."""
    _, cache = model.run_with_cache(TOKENS, names_filter=["pattern", "q"], heads=[0, 2], file=tmp_path / "c")
    assert lens.ActivationCache.load(tmp_path / "c", model=model).heads == (0, 2)
    with pytest.raises(CacheFileError, match="is of a model of type 'gpt2'"):
        lens.ActivationCache.load(tmp_path / "c", model=lens.load(tiny_llama()))
    cache.heads = (0, 1, 2)
    cache.save(tmp_path / "d")
    with pytest.raises(CacheFileError, match=r"tell of the heads \[0, 1, 2\], and scores or patterns have 2"):
        lens.ActivationCache.load(tmp_path / "d")


@pytest.mark.parametrize("kind", ["function", "disk", "header", "interrupt"])
def test_a_run_that_fails_leaves_the_old_file_and_no_other(model, tmp_path, monkeypatch, kind):
    """A hook that raises, a full disk while values or the header are written, Ctrl-C."""
    target = tmp_path / "c"
    _, old = model.run_with_cache(TOKENS, file=target, names_filter="z")
    old = {name: old[name].clone() for name in old}
    left = {"function": 1 << 30, "disk": 5000, "header": 0, "interrupt": 1 << 30}[kind]

    class Disk(io.FileIO):
        def write(self, data):
            nonlocal left
            left -= memoryview(data).nbytes
            if left < 0 and (kind == "disk" or bytes(data)[8:9] == b"{"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(_cache_stream.CacheStream, "_opened", lambda self: Disk(self._part, "xb"))
    raised = KeyboardInterrupt if kind == "interrupt" else ValueError

    def fail(value, hook):
        if kind in ("function", "interrupt"):
            raise raised

    expected = {"function": HookFunctionError, "interrupt": KeyboardInterrupt}.get(kind, CacheFileError)
    with pytest.raises(expected, match="No space left on device" if expected is CacheFileError else None):
        with model.hooks(fwd_hooks=[("blocks.2.mlp.hook_post", fail)]):
            model.run_with_cache(TOKENS, file=target)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    again = lens.ActivationCache.load(target)
    assert all(torch.equal(again[name], old[name]) for name in old)


def test_a_killed_process_leaves_nothing_under_the_name(tmp_path):
    """Kill -9 in the middle of a run: there is a part file at most."""
    code = f"""
import os, signal, lens_core as lens
model = lens.load("toy:gpt2")
die = lambda value, hook: os.kill(os.getpid(), signal.SIGKILL)
with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", die)]):
    model.run_with_cache("the cat", file={str(tmp_path / "c")!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".c.")
    assert left.name.endswith(".part")


def test_memory_stays_at_one_activation(tmp_path, monkeypatch):
    """Ten layers of residual streams take no more than a plain run and one of them.

    What is read again is mapped from the file (test_cache_file.py), and would be counted as if it were memory.
    """
    monkeypatch.setattr(lens.ActivationCache, "load", lambda path, model: model.new_cache())
    config = GPT2Config(vocab_size=50, n_positions=256, n_embd=32, n_layer=10, n_head=2, use_cache=False)
    model, tokens = lens.load(GPT2LMHeadModel(config).eval()), random_tokens(2, 256)
    names, one = ["resid_pre", "resid_post", "mlp_out", "attn_out"], 2 * 256 * 32 * 4
    gc.collect()
    with torch.no_grad():
        plain = live_bytes(lambda: model(tokens, return_type=None), model)

        def peak(**options):
            return live_bytes(
                lambda: model.run_with_cache(tokens, names_filter=names, return_type=None, **options)[0], model
            )

        assert peak(file=tmp_path / "c") <= plain + one + 1024
        assert peak(file=tmp_path / "c", dtype=torch.float64) <= plain + 2 * one + 1024
        assert peak() > plain + 20 * one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "device keeps some in memory"),
        ({"incl_bwd": True, "return_type": "loss"}, "incl_bwd keeps some in memory"),
    ],
)
def test_what_stays_in_memory_is_refused(model, tmp_path, options, message):
    """Before anything is run."""
    with pytest.raises(ArgumentError, match=message):
        model.run_with_cache(TOKENS, file=tmp_path / "c", **options)
    assert not list(tmp_path.iterdir())


def test_bad_places_are_refused(model, tmp_path):
    """A folder, a place that is not there, and no path."""
    for given, error, message in (
        (tmp_path, CacheFileError, "is a folder; give the path of a file"),
        (tmp_path / "none" / "c", CacheFileError, "cannot be written to .*No such file or directory"),
        (3, ArgumentError, "is named by a path; got 3"),
    ):
        with pytest.raises(error, match=message):
            model.run_with_cache(TOKENS, file=given)


def test_a_module_that_is_called_twice_is_refused(model, tmp_path):
    """There is place for one value of a name; a module of HF's may be called several times."""
    stream = _cache_stream.CacheStream(
        model.new_cache(), model.table.select("z"), tmp_path / "c", dtype=None, choice=_cache_stream.Choice()
    )
    point, value = model.table["z", 0], torch.ones(1, 1, 3, 7)
    call = Call(batch=1, n_pos=1, past=0, device=value.device)
    with stream:
        stream.store(point, value, call, is_foreign=False)
        with pytest.raises(CacheFileError, match=r"'blocks.0.attn.hook_z' was reached twice in one call"):
            stream.store(point, value, call, is_foreign=False)
        stream.begin(call)
        with pytest.raises(CacheFileError, match="takes one call of it; this is another"):
            stream.begin(call)
