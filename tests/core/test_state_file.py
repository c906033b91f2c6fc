"""States on disk: every bit comes back, and a file that is not what it says touches nothing."""

import copy
import functools
import json
import struct

import pytest
import torch
from golden.tiny import pad, random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lens_core as lens
from lens_core.errors import ArgumentError, LensError, StateError, StateFileError

BUILDERS = {
    "gpt2": tiny_gpt2,
    "llama": functools.partial(tiny_llama, "llama"),
    "mistral": functools.partial(tiny_llama, "mistral"),  # window 3, shorter than the prefix
    "gemma3_text": functools.partial(tiny_llama, "gemma3_text"),  # windows on some layers
    "mamba": functools.partial(tiny_ssm, "mamba"),
    "mamba2": functools.partial(tiny_ssm, "mamba2"),
}
QUIET = settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))


@functools.cache
def loaded(kind, seed=0):
    """Load each kind once."""
    return lens.load(BUILDERS[kind](seed=seed), tokenizer=False)


@pytest.fixture(autouse=True)
def without_a_graph():
    """Run without a graph."""
    with torch.no_grad():
        yield


@pytest.fixture
def prefix(tmp_path):
    """Save a state of GPT-2 and give its path."""
    _, state = loaded("gpt2")(random_tokens(2, 5), return_state=True)
    loaded("gpt2").save_state(state, tmp_path / "prefix.safetensors")
    return tmp_path / "prefix.safetensors"


def held(state):
    """Give all tensors of a state."""
    layers = [value for layer in state.cache.layers for value in vars(layer).values()]
    for value in [*layers, state.tokens, state.attention_mask]:
        within = value.values() if isinstance(value, dict) else [value]
        yield from (one for one in within if isinstance(one, torch.Tensor))


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_state_comes_back_bit_for_bit(kind, dtype, tmp_path):
    """Tensors, length, mask and ids; and what follows is what follows the state itself, in another process' model."""
    model = lens.load(BUILDERS[kind]().to(dtype), tokenizer=False)
    twin = lens.load(copy.deepcopy(model.hf_model), tokenizer=False)
    tokens, mask = pad([random_tokens(1, n, seed=n)[0] for n in (7, 5)], "left")
    _, state = model(tokens, attention_mask=mask, return_state=True)
    model.save_state(state, tmp_path / "state.safetensors")
    again = twin.load_state(tmp_path / "state.safetensors")
    assert again.length == state.length == 7
    theirs, ours = list(held(state)), list(held(again))
    assert len(ours) == len(theirs) >= 5
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not {a.data_ptr() for a in ours} & {b.data_ptr() for b in theirs}
    for step in range(3):
        new = random_tokens(2, 1, seed=step)
        expected, state = model(new, past_key_values=state, return_state=True)
        found, again = twin(new, past_key_values=again, return_state=True)
        assert torch.equal(found, expected)


def test_an_edit_in_the_prefix_is_in_the_file(tmp_path):
    """What a hook put into the state is what later processes go on from."""
    model, tokens = loaded("mamba2"), random_tokens(1, 5)
    entry = ("blocks.1.mixer.hook_ssm_state", lambda state, hook: state * 0.5 + 0.1, [2])
    with model.hooks(fwd_hooks=[entry]):
        _, edited = model(tokens, return_state=True)
    _, plain = model(tokens, return_state=True)
    model.save_state(edited, tmp_path / "edited.safetensors")
    new = random_tokens(1, 1, seed=9)
    logits = model(new, past_key_values=model.load_state(tmp_path / "edited.safetensors"))
    assert torch.equal(logits, model(new, past_key_values=edited))
    assert (logits - model(new, past_key_values=plain)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny_gpt2(n_layer=2),
        lambda: tiny_gpt2(layer_norm_epsilon=1e-3),
        lambda: tiny_gpt2().to(torch.bfloat16),
        lambda: tiny_llama("llama"),
        lambda: tiny_ssm("mamba"),
    ],
    ids=["layers", "eps", "dtype", "llama", "mamba"],
)
def test_a_state_of_another_model_is_refused(prefix, other):
    """By what differs in the config, not by a crash later."""
    with pytest.raises(StateFileError, match="another model"):
        lens.load(other(), tokenizer=False).load_state(prefix)


def test_what_is_no_state_is_refused(tmp_path):
    """Wrong arguments, empty states and states of another model say so before anything is written."""
    model, target = loaded("gpt2"), tmp_path / "x.safetensors"
    _, state = loaded("llama")(random_tokens(1, 4), return_state=True)
    for wrong, error in ((None, ArgumentError), ({}, ArgumentError), (state, StateError)):
        with pytest.raises(error):
            model.save_state(wrong, target)
    with pytest.raises(LensError):
        model.save_state(model(random_tokens(1, 4), return_state=True)[1], tmp_path / "no" / "folder.safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StateFileError, match="there is no file"):
        model.load_state(target)


def test_an_activation_cache_is_no_state(tmp_path):
    """Files of the two kinds are told apart, both ways."""
    model = loaded("gpt2")
    _, cache = model.run_with_cache(random_tokens(1, 4), names_filter="resid_post")
    cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(StateFileError):
        model.load_state(tmp_path / "cache.safetensors")
    model.save_state(model(random_tokens(1, 4), return_state=True)[1], tmp_path / "state.safetensors")
    with pytest.raises(LensError):
        lens.ActivationCache.load(tmp_path / "state.safetensors")


# ---------------------------------------------------------------------- damage


def edited(path, change):
    """Write the file anew with other tensors or metadata, keeping it sound safetensors."""
    header_size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    metadata = json.loads(path.read_bytes()[8 : 8 + header_size])["__metadata__"]
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def set_length(length):
    """Change the length that the file says."""
    return lambda tensors, metadata: metadata.update(length=length)


CHANGES = {
    "a layer's keys are missing": lambda tensors, metadata: tensors.pop("layers.1.keys"),
    "a tensor of no layer": lambda tensors, metadata: tensors.update({"layers.9.keys": torch.zeros(1)}),
    "a tensor of no name": lambda tensors, metadata: tensors.update({"../../x": torch.zeros(1)}),
    "another shape": lambda tensors, metadata: tensors.update({"layers.0.keys": torch.zeros(2, 3, 4, 7)}),
    "another dtype": lambda tensors, metadata: tensors.update({"layers.0.keys": torch.zeros(2, 3, 5, 7).half()}),
    "another batch": lambda tensors, metadata: tensors.update({"layers.0.keys": torch.zeros(1, 3, 5, 7)}),
    "another length": set_length("6"),
    "no length": lambda tensors, metadata: metadata.pop("length"),
    "a negative length": set_length("-5"),
    "a length of text": set_length("five"),
    "a length past all bounds": set_length("9" * 30),
    "a config that is no JSON": lambda tensors, metadata: metadata.update(config="{"),
    "a config of another kind": lambda tensors, metadata: metadata.update(config="[1]"),
    "layers of another class": lambda tensors, metadata: metadata.update(
        layers=json.dumps([{"class": "os.system", "sliding_window": None}] * 3)
    ),
    "ids outside the vocabulary": lambda tensors, metadata: tensors.update(tokens=torch.full((2, 5), 999)),
    "ids of another shape": lambda tensors, metadata: tensors.update(tokens=torch.zeros(2, 4, dtype=torch.long)),
    "a mask that is none": lambda tensors, metadata: tensors.update(attention_mask=torch.full((2, 5), 7)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_file_that_does_not_fit_is_refused(prefix, what):
    """Each part is held to the model before it is believed."""
    edited(prefix, CHANGES[what])
    with pytest.raises(StateFileError, match=r"damaged|another model|other layers|not a") as caught:
        loaded("gpt2").load_state(prefix)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@QUIET
@given(st.data())
def test_damaged_bytes_are_refused_or_read_as_they_are(tmp_path_factory, data):
    """A cut or a flipped byte gives our error, or a state whose tensors are the file's; never another exception."""
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    _, state = loaded("gpt2")(random_tokens(1, 3), return_state=True)
    loaded("gpt2").save_state(state, path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, min(len(content) - 1, 4000)))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        again = loaded("gpt2").load_state(path)
    except StateFileError:
        return
    assert again.length == 3


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "gemma3_text"])
def test_every_tensor_must_be_there_as_it_was(kind, tmp_path):
    """One that is missing, cut or of another type is damage, in recurrent states as in keys and values."""
    model, path = loaded(kind), tmp_path / "state.safetensors"
    _, state = model(random_tokens(2, 5), return_state=True)
    model.save_state(state, path)
    with safe_open(path, "pt") as file:
        tensors, metadata = load_file(path), file.metadata()
    for name in [name for name in tensors if name.startswith("layers.1.")]:
        value = tensors[name]
        for wrong in (None, value[:, :-1].contiguous(), value.to(torch.bfloat16), value[:0]):
            rest = {key: tensor for key, tensor in tensors.items() if key != name}
            save_file(rest if wrong is None else {**rest, name: wrong}, path, metadata=metadata)
            with pytest.raises(StateFileError, match=f"is damaged: '{name}'"):
                model.load_state(path)
