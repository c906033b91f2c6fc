"""Find, check and load what `lens.load` was asked for; never wraps or changes a model that it is given."""

import os
import re
import warnings
from pathlib import Path
from typing import Any, cast

import attrs
import torch
from torch import nn

from lens_core._declaration import Declaration
from lens_core._descriptor import Architecture
from lens_core._registry import active_registry, load_implementation, toy_folder
from lens_core._wrappers import bare
from lens_core.errors import (
    ArgumentError,
    ConfigWarning,
    LensError,
    LoadError,
    ModelNotFoundError,
    UnsupportedConfigError,
    WeightsError,
)

__all__ = ["Loaded", "declare", "declared_anew", "load_hf", "read_declaration", "tokenizer_options"]


@attrs.frozen(kw_only=True, eq=False)
class Loaded:
    """An HF model with what its architecture declares."""

    hf_model: Any
    declaration: Declaration
    architecture: Architecture
    tokenizer_source: Any
    name: str


def load_hf(source: Any, *, strict: bool, dtype: Any, device: Any, options: dict[str, Any]) -> Loaded:
    """Load by id or folder, or adopt a model in memory.

    Raises:
        ModelNotFoundError: No such id or folder.
        UnknownModelTypeError: No plugin for the model type.
        UnsupportedConfigError: The config asks for what the architecture does not hold.
        WeightsError: Weights are missing or corrupt.
        LoadError: Reading the checkpoint needs a package that is not installed.
    """
    if isinstance(source, nn.Module):
        return _adopt(source, strict=strict, dtype=dtype, device=device, options=options)
    if isinstance(source, os.PathLike):
        source = str(Path(cast("os.PathLike[str]", source)))
    if not isinstance(source, str) or not source:
        raise ArgumentError(f"lens.load takes an HF id, a folder, an HF model or 'toy:NAME'; got {source!r}")
    if source.startswith("toy:"):
        architecture = active_registry().resolve(source.removeprefix("toy:"))
        folder = os.fspath(toy_folder(architecture))
    else:
        architecture, folder = None, source
    config = _read_config(folder, options)
    architecture = architecture or active_registry().resolve(config.model_type)
    check_config(config, architecture, strict=strict)
    declaration = declare(architecture, config, source)
    hf_model = _read_weights(folder, dtype, device, options)
    check_tree(hf_model, declaration)
    return Loaded(
        hf_model=hf_model, declaration=declaration, architecture=architecture, tokenizer_source=folder, name=source
    )


def _adopt(hf_model: Any, *, strict: bool, dtype: Any, device: Any, options: dict[str, Any]) -> Loaded:
    given = {"dtype": dtype, "device": device, **options}
    if any(value is not None for value in given.values()):
        named = ", ".join(name for name, value in given.items() if value is not None)
        raise ArgumentError(f"{named} cannot be given with a model in memory, which is left as it is; move it before")
    config: Any = getattr(bare(hf_model), "config", None)
    if getattr(config, "model_type", None) is None:
        raise ModelNotFoundError(f"{type(hf_model).__name__} is not an HF model: it has no config with a model_type")
    architecture = active_registry().resolve(config.model_type)
    check_config(config, architecture, strict=strict)
    name = getattr(config, "name_or_path", "") or config.model_type
    declaration = declare(architecture, config, name)
    check_tree(hf_model, declaration)
    source = name if Path(name).is_dir() else None
    return Loaded(
        hf_model=hf_model, declaration=declaration, architecture=architecture, tokenizer_source=source, name=name
    )


def read_declaration(folder: str, name: str, options: dict[str, Any]) -> Declaration:
    """Read what an architecture declares about a model from its config alone.

    Raises:
        ModelNotFoundError: No such folder or id.
        UnsupportedConfigError: A config that cannot be read, or of sizes that no model has.
        PluginError: No plugin serves it.
    """
    config = _read_config(folder, options)
    return declare(active_registry().resolve(config.model_type), config, name)


def declared_anew(hf_model: Any, name: str) -> Loaded:
    """Declare a copy of a model that was loaded before.

    Raises:
        UnknownModelTypeError: No plugin for the model type is installed here.
    """
    architecture = active_registry().resolve(hf_model.config.model_type)
    declaration = declare(architecture, hf_model.config, name)
    return Loaded(
        hf_model=hf_model, declaration=declaration, architecture=architecture, tokenizer_source=None, name=name
    )


def declare(architecture: Architecture, config: Any, name: str) -> Declaration:
    """Let a plugin say where everything is in a model of this config.

    Raises:
        UnsupportedConfigError: Sizes that no model has.
        PluginLoadError: The plugin does not import.
    """
    check_depth(config)
    make = load_implementation(architecture)
    try:
        declaration: Declaration = make(config)
    except LensError:
        raise
    except Exception as error:  # a size of zero, a text for a number: whatever the plugin computes with first
        raise UnsupportedConfigError(
            f"the config of {name!r} is not one that {architecture.name} can describe "
            f"({type(error).__name__}: {_first_line(error)}); check its sizes"
        ) from error
    return attrs.evolve(declaration, cfg=attrs.evolve(declaration.cfg, model_name=name))


_MAX_DEPTH = 1000
CONFIG_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "subfolder")
_ACCESS_OPTIONS = ("cache_dir", "token", "local_files_only")  # how the hub is reached, whatever is asked of it


def tokenizer_options(options: dict[str, Any], tokenizer: object) -> dict[str, Any]:
    """Pick the options that find the model's own tokenizer, or, where another is named, those that reach the hub."""
    names = (*CONFIG_OPTIONS, "gguf_file") if tokenizer is None else _ACCESS_OPTIONS
    return {name: options[name] for name in names if name in options}


def _read_config(folder: str, options: dict[str, Any]) -> Any:
    """Read HF's config from a folder or the hub; never runs code that comes with it.

    Raises:
        ModelNotFoundError: No such folder or id.
        UnsupportedConfigError: A config that the installed transformers cannot read.
    """
    from transformers import AutoConfig

    _refuse_unsafe(options)
    _check_gguf(folder, options)
    passed = {name: options[name] for name in CONFIG_OPTIONS if name in options}
    is_folder = Path(folder).is_dir()
    try:
        if "gguf_file" in options:
            passed["gguf_file"] = options["gguf_file"]
        auto: Any = AutoConfig
        # Not None: HF would then ask at the terminal whether to run the checkpoint's own code.
        return auto.from_pretrained(folder, trust_remote_code=False, **passed)
    except Exception as error:  # a malformed config makes HF raise whatever comes first
        if "trust_remote_code" in str(error):
            raise UnsupportedConfigError(
                f"{folder!r} is of a model type that transformers does not have, and asks for code of its own to be "
                "run, which lens does not do: load the model yourself and give it to lens.load"
            ) from error
        if "gguf_file" in options:
            raise _gguf_error(folder, options, error) from error
        if is_folder and (Path(folder) / "config.json").is_file():
            raise UnsupportedConfigError(
                f"the config of {folder!r} cannot be read by the installed transformers: {_first_line(error)}"
            ) from error
        looks_local = folder.startswith((".", "/", "~")) or folder.count("/") > 1
        what = "no config.json in the folder" if is_folder else "no such folder" if looks_local else "no such model"
        raise ModelNotFoundError(
            f"{what}: {folder!r}. Give an HF id that can be reached, a folder with config.json and weights, "
            f"or 'toy:gpt2' ({_first_line(error)})"
        ) from error


def _refuse_unsafe(options: dict[str, Any]) -> None:
    if options.get("trust_remote_code"):
        raise ArgumentError(
            "lens does not run code from a checkpoint: load the model yourself and give it to lens.load"
        )


def _check_gguf(folder: str, options: dict[str, Any]) -> None:
    """Refuse a GGUF file given as the source itself, and a `gguf_file` that is no name."""
    if folder.endswith(".gguf") and Path(folder).is_file():
        path = Path(folder)
        raise ArgumentError(f"a GGUF file is loaded by lens.load({str(path.parent)!r}, gguf_file={path.name!r})")
    name = options.get("gguf_file", "name")
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"gguf_file is the name of a file in the folder or repository; got {name!r}")


def _gguf_error(folder: str, options: dict[str, Any], error: Exception) -> LoadError:
    """Say what is wrong with a GGUF file that HF could not read."""
    name = options["gguf_file"]
    if isinstance(error, ImportError):
        return _missing_package(folder, error, "; pip install gguf")
    place = Path(folder, options.get("subfolder") or "")
    if place.is_dir() and not (place / name).is_file():
        there = ", ".join(sorted(file.name for file in place.glob("*.gguf"))) or "none"
        return ModelNotFoundError(f"no file {name!r} in {str(place)!r}; GGUF files there: {there}")
    if isinstance(error, OSError):
        return ModelNotFoundError(f"no such folder or model, or no {name!r} in it: {folder!r} ({_first_line(error)})")
    return WeightsError(
        f"the GGUF file {name!r} of {folder!r} is corrupt, or of a kind that transformers cannot read: "
        f"{_first_line(error)}"
    )


def _missing_package(folder: str, error: ImportError, remedy: str = "") -> LoadError:
    return LoadError(f"loading {folder!r} needs a package that is not installed: {_first_line(error)}{remedy}")


def check_config(config: Any, architecture: Architecture, *, strict: bool) -> None:
    """Refuse fields of HF's config class that the architecture neither handles nor may ignore, at other values.

    A model that also takes images has a config of its text stack inside, which is held to the same. Keys that HF does
    not know, which finetunes carry, are ignored with one notice.

    Raises:
        UnsupportedConfigError: Such a field, unless `strict=False`.
    """
    from transformers import PreTrainedConfig

    text = config.get_text_config(decoder=True)
    if text is not config:
        check_config(text, architecture, strict=strict)
    default: Any = _default(type(config))
    fields = _fields(default)
    known = (fields - _fields(PreTrainedConfig())) | ({"tie_word_embeddings"} & fields)
    held = {*architecture.config_handled, *architecture.config_ignored}
    open_fields = sorted(known - held)
    refused = [f for f in open_fields if getattr(config, f, None) != getattr(default, f)]
    if refused and strict:
        listed = ", ".join(f"{field}={getattr(config, field)!r}" for field in refused)
        raise UnsupportedConfigError(
            f"{architecture.name} does not hold {listed}; hook values could be wrong. "
            "lens.load(..., strict=False) loads it uncertified"
        )
    if getattr(config, "is_causal", True) is False and strict:
        raise UnsupportedConfigError("is_causal=False lets positions see later ones; lens serves causal models")
    unknown = sorted(_fields(config) - fields - held - _SEEN)
    moved: Any = getattr(config, "rope_parameters", None) or {}  # where HF keeps what older files have beside
    unknown = [name for name in unknown if not (name.startswith("_") or name in config.attribute_map or name in moved)]
    if unknown:
        told = f"config keys unknown to HF's config class are not checked: {', '.join(unknown)}"
        warnings.warn(told, ConfigWarning, stacklevel=4)


_SEEN = frozenset(("name_or_path", "_name_or_path", "model_type", "head_dim", "quantization_config", "is_causal"))
"""Keys beside a config class' own that need no notice: HF reads them, and so do weights and shapes."""


def _default(kind: Any) -> Any:
    """Make a config of defaults, without what HF says of its token ids."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return kind()
    finally:
        logging.set_verbosity(before)


def _fields(config: object) -> set[str]:
    """Name a config's fields; plans of how to spread a model over devices, which some releases keep there, are none."""
    plans = r"base_model_[a-z]+_plan|ignore_keys_at_rope_validation"
    return {name for name in vars(config) if not re.fullmatch(plans, name)}


def check_depth(config: Any) -> None:
    """Refuse a number of layers that nobody could build: a few bytes of config must not cost memory and hours.

    Raises:
        UnsupportedConfigError: More than a thousand, none, or no number.
    """
    depth = getattr(config, "num_hidden_layers", 1)
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= _MAX_DEPTH:
        raise UnsupportedConfigError(f"the config says {str(depth)[:40]} layers, not 1 to {_MAX_DEPTH}; check it")


def check_tree(hf_model: Any, declaration: Declaration) -> None:
    """Raise where the module tree is not the one that the architecture declares (a base model, another head)."""
    module = bare(hf_model)
    needed = [declaration.base, declaration.blocks, declaration.embed, declaration.unembed]
    for path in needed:
        try:
            module.get_submodule(path)
        except AttributeError:
            raise UnsupportedConfigError(
                f"{type(module).__name__} has no module {path!r}; lens needs the causal language model "
                "(AutoModelForCausalLM), with its unembedding"
            ) from None
    n_blocks = len(module.get_submodule(declaration.blocks))
    if n_blocks != declaration.cfg.n_layers:
        raise UnsupportedConfigError(
            f"the model has {n_blocks} blocks and its config says {declaration.cfg.n_layers}; make them agree"
        )


def _read_weights(folder: str, dtype: Any, device: Any, options: dict[str, Any]) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if device is not None and options.get("device_map") is not None:
        raise ArgumentError("give device or device_map, not both")
    passed = {name: value for name, value in options.items() if value is not None}
    if "gguf_file" in passed and Path(folder).is_dir():  # HF looks for the bare name in the working directory first
        passed["gguf_file"] = str(Path(folder, passed.get("subfolder", ""), passed["gguf_file"]).absolute())
    if device is not None:
        try:
            passed["device_map"] = {"": torch.device(device)}
        except (RuntimeError, TypeError) as error:
            raise ArgumentError(f"no such device: {device!r} ({_first_line(error)})") from error
    unreadable: tuple[type[Exception], ...] = (OSError, SafetensorError, EOFError, RuntimeError)
    if "gguf_file" in options:  # HF's reader raises two more where the data are cut off or of a kind it does not know
        unreadable = (*unreadable, ValueError, NotImplementedError)
    try:
        auto: Any = AutoModelForCausalLM
        hf_model, info = auto.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            **{**passed, "trust_remote_code": False},
        )
    except ImportError as error:
        raise _missing_package(folder, error) from error
    except unreadable as error:
        raise WeightsError(
            f"the weights of {folder!r} are missing, corrupt or do not fit its config: {_first_line(error)}. "
            "Download them again, or check config.json"
        ) from error
    except Exception as error:  # HF computes with whatever the config says
        raise UnsupportedConfigError(
            f"transformers cannot build the model that the config of {folder!r} and the options ask for "
            f"({type(error).__name__}: {_first_line(error)}); check config.json"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise WeightsError(
            f"the checkpoint {folder!r} lacks {len(missing)} weights, such as {missing[0]!r}; "
            "HF would fill them at random"
        )
    return hf_model.eval()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:300]
