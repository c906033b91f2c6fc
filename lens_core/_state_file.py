"""States on disk: safetensors, with what is needed to see that a model is the one that made them.

A file's metadata hold `length`, `config` (JSON: what HF's config says that may change a value, and the dtype), `layers`
(JSON: of each layer HF's class and window), `tensors` (JSON: type and shape by name), and where the state comes from:
model id and type, plugin, versions.
Tensors stand under `layers.L.keys`, `.values`, `.conv_states.I` and `.recurrent_states.I`, beside `tokens` and
`attention_mask`. Nothing is pickled, nothing in a file is trusted, and no class is made from its name in a file: the
layers are those that HF makes for the model.
"""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from lens_core._arguments import checks_arguments
from lens_core._hf_cache import ATTENDED, RECURRENT, new_cache, tensors_in
from lens_core._shards import find_shards
from lens_core._state import State, check_origin, facts, unlike
from lens_core._tensor_file import FileKind, origin
from lens_core.errors import ArgumentError, StateFileError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["KIND", "load_state", "save_state"]

KIND = FileKind(what="model state", version=1, error=StateFileError, writer="model.save_state(state, path)")
_BESIDE = ("tokens", "attention_mask")


@checks_arguments
def save_state(model: "LensModel", state: State, path: Any) -> None:
    """Write a state to a safetensors file, to go on from in another process.

    The file appears complete or not at all. Nothing is pickled. Gradients are not kept.

    Args:
        model: The model that the state is of.
        state: What `return_state=True` gave.
        path: Where; an existing file is replaced.

    Raises:
        StateError: The state is of another model, empty, or HF would make another kind of cache for this model.
        StateFileError: The file cannot be written there, or the model is cut over processes.
        ArgumentError: Not a state, or not a path.

    Example:
        >>> import tempfile, lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> _, state = model("the cat sat", return_state=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_state(state, f"{folder}/prefix.safetensors")
        ...     again = model.load_state(f"{folder}/prefix.safetensors")
        >>> again
        State(1 row of 4 positions, 2 layers, 0.0 MiB)
    """
    if not isinstance(state, State):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"a state is what return_state=True gives; got {type(state).__name__}")
    target = KIND.target(path)
    check_origin(model, state)
    _refuse_parts(model)
    layers = [_described(layer) for layer in state.cache.layers]
    if not state.length:
        raise StateFileError("an empty state holds nothing to save")
    if layers != [_described(layer) for layer in new_cache(model.bare_model).layers]:
        raise StateFileError(
            f"the cache's layers are {', '.join(sorted({layer['class'] for layer in layers}))}, not those that HF "
            "makes for this model; start it from DynamicCache(config=model.hf_model.config), or by return_state=True"
        )
    tensors = {
        f"layers.{index}.{name}": tensor
        for index, layer in enumerate(state.cache.layers)
        for name, tensor in tensors_in(layer)
    }
    tensors |= {name: given for name in _BESIDE if (given := getattr(state, name)) is not None}
    metadata = {
        **origin(model),
        "length": str(state.length),
        "config": json.dumps(facts(model)),
        "layers": json.dumps(layers),
        "tensors": json.dumps(_listed(tensors)),
    }
    KIND.write(target, tensors, metadata)


@checks_arguments
def load_state(model: "LensModel", path: Any) -> State:
    """Read a state that `save_state` wrote, on to the devices of the model's blocks; every bit is as it was.

    Args:
        model: The model that made it, or one of the same config and dtype: a finetuned one cannot be told apart.
        path: The file.

    Raises:
        StateFileError: Not a state file of ours, damaged, of another format version, unsafe, or of another model; or
            the model is cut over processes.
        ArgumentError: Not a path.
    """

    def parse(tensors: dict[str, Tensor], metadata: dict[str, str], shown: str) -> State:
        return _read(model, tensors, metadata, shown)

    _refuse_parts(model)
    return KIND.read(path, parse)


def _refuse_parts(model: "LensModel") -> None:
    """See that a state's keys and values are whole in this process."""
    shards = find_shards(model.bare_model)
    if shards is not None:
        raise StateFileError(
            f"tensor parallelism cuts keys and values over {shards.count} processes, and a file holds whole ones; keep "
            "states in memory, or save and load them on a model in one process"
        )


def _listed(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: [str(value.dtype), *value.shape] for name, value in sorted(tensors.items())}


def _described(layer: Any) -> dict[str, Any]:
    return {"class": type(layer).__name__, "sliding_window": getattr(layer, "sliding_window", None)}


def _read(model: "LensModel", tensors: dict[str, Tensor], metadata: Mapping[str, str], shown: str) -> State:
    theirs: Any = json.loads(metadata.get("config", ""))
    length = metadata.get("length", "")
    if not isinstance(theirs, dict) or not re.fullmatch(r"[1-9][0-9]{0,9}", length):
        raise StateFileError(f"{shown!r} is damaged: its metadata lack the config or the length")
    if not {"model_type", "dtype"} <= theirs.keys():
        raise StateFileError(f"{shown!r} is damaged: its metadata do not say what model it is of")
    listed, own = json.loads(metadata.get("tensors", "")), _listed(tensors)
    if listed != own:
        wrong = sorted(name for name in {*listed, *own} if listed.get(name) != own.get(name))[0][:80]
        raise StateFileError(
            f"{shown!r} is damaged: {wrong!r} is {own.get(wrong, 'missing')}, and was {listed.get(wrong, 'missing')} "
            "when it was saved"
        )
    difference = unlike(cast("dict[str, Any]", theirs), facts(model))
    if difference:
        raise StateFileError(f"{shown!r} is a state of another model: {difference}; give the model that made it")
    cache = new_cache(model.bare_model)
    if json.loads(metadata.get("layers", "")) != [_described(layer) for layer in cache.layers]:
        raise StateFileError(f"{shown!r} has other layers than HF makes for this model; save it again")
    beside = {name: tensors.pop(name).to(model.input_device, copy=True) for name in _BESIDE if name in tensors}
    for index, layer in enumerate(cache.layers):
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        problem = _problem(layer, own, int(length), model.cfg)
        if problem:
            raise StateFileError(f"{shown!r} is damaged: layer {index} {problem}")
        _fill(layer, {name: value.to(_device(model, index), copy=True) for name, value in own.items()}, int(length))
    if tensors:
        raise StateFileError(f"{shown!r} is damaged: {next(iter(tensors))[:80]!r} is no tensor of a state")
    state = State(cache=cache, length=int(length), origin=facts(model), **beside)
    problem = _problem_beside(state, model.cfg.d_vocab)
    if problem:
        raise StateFileError(f"{shown!r} is damaged: {problem}")
    return state


def _problem(layer: Any, own: Mapping[str, Tensor], length: int, cfg: Any) -> str:
    """Tell what is wrong with a layer's tensors; empty if nothing is."""
    names = set(ATTENDED) if isinstance(layer, CacheLayerMixin) else set[str]()
    recurrent = {f"{name}.{index}" for name in RECURRENT for index in getattr(layer, name, ())}
    if not names <= own.keys() or not own.keys() <= names | recurrent or (recurrent and not own.keys() & recurrent):
        return f"holds {', '.join(sorted(own))[:80] or 'nothing'}, and HF's {type(layer).__name__} holds other tensors"
    window = getattr(layer, "sliding_window", None)
    slots = length if window is None or window < 2 else min(length, window - 1)
    sizes = {"n_kv_heads": cfg.sizes["n_kv_heads"], "d_head": cfg.sizes["d_head"]}
    for name, value in own.items():
        if name in ATTENDED:
            expected = (value.shape[0], sizes["n_kv_heads"], slots, sizes["d_head"])
        else:
            last = getattr(cfg, "d_conv" if name.startswith("conv") else "d_state", None)
            expected = (*value.shape[:-1], last or value.shape[-1])
        if not value.is_floating_point() or value.ndim < 3 or tuple(value.shape) != expected:
            return f"has {name} of shape {list(value.shape)[:10]} and type {value.dtype}, not {list(expected)[:10]}"
    return ""


def _problem_beside(state: State, d_vocab: int) -> str:
    """Tell what is wrong with rows, types, ids or mask; empty if nothing is."""
    rows = {tensor.shape[0] for layer in state.cache.layers for _, tensor in tensors_in(layer)}
    if len(rows) != 1 or not min(rows):
        return f"its layers have {sorted(rows)[:5]} rows"
    dtypes = {str(v.dtype) for layer in state.cache.layers for name, v in tensors_in(layer) if name in ATTENDED}
    if len(dtypes) > 1:
        return f"its keys and values are of the types {', '.join(sorted(dtypes))}"
    for name, top in (("tokens", d_vocab - 1), ("attention_mask", 1)):
        given: Tensor | None = getattr(state, name)
        if given is not None and (given.dtype != torch.long or int(given.min()) < 0 or int(given.max()) > top):
            return f"its {name} are not whole numbers from 0 to {top}"
    if state.attention_mask is not None and not bool(state.attention_mask.any(1).all()):
        return "its attention_mask leaves a row without a token"
    return ""


def _fill(layer: Any, own: Mapping[str, Tensor], length: int) -> None:
    """Put tensors into one of HF's layers by HF's own methods, which copy them."""
    if "keys" in own:
        layer.update(own["keys"], own["values"])
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length
    for name in own:
        kind, _, index = name.partition(".")
        if kind == "conv_states":
            layer.update_conv_state(own[name], int(index))
        elif kind == "recurrent_states":
            layer.update_recurrent_state(own[name], int(index))
            layer.has_previous_state[int(index)] = True


def _device(model: "LensModel", index: int) -> torch.device:
    """Where a block computes."""
    block = model.bare_model.get_submodule(f"{model.declaration.blocks}.{index}")
    device = next((parameter.device for parameter in block.parameters()), model.input_device)
    return model.input_device if device.type == "meta" else device
