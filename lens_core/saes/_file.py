"""SAEs from disk, in SAELens' layout: a folder with `cfg.json` and `sae_weights.safetensors`."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import attrs
import safetensors
import torch
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core.errors import ArgumentError, SaeError
from lens_core.saes._config import SaeConfig, read_config
from lens_core.saes._module import SparseAutoencoder

__all__ = ["load_sae"]

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
LARGEST_CONFIG = 2**22
"""Bytes; a config has a few thousand."""


@checks_arguments
def load_sae(
    path: str | os.PathLike[str],
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    norm_scaling_factor: float | None = None,
    model_from_pretrained_kwargs: Mapping[str, Any] | None = None,
) -> SparseAutoencoder:
    """Read a sparse autoencoder or transcoder that SAELens wrote. Nothing is unpickled, nothing is downloaded.

    Args:
        path: The folder, or the `sae_weights.safetensors` in it; `cfg.json` lies beside.
        device: Where to put it; None for the CPU.
        dtype: Of its weights; None for what the config says.
        norm_scaling_factor: The factor that its training multiplied activations by, where the config says
            `expected_average_only_in` and it was not folded into the weights; None looks in the checkpoint's
            `activation_scaler.json`.
        model_from_pretrained_kwargs: What stands in place of the config's: SAELens' table of releases overrides it for
            some (`gpt2-small-res-jb` needs `{"center_writing_weights": True}`), and a download does not know.

    Raises:
        SaeError: No such file, damaged, of an architecture or with a field that lens does not know, or weights that do
            not fit the config.
        ArgumentError: Not a path, or a dtype that is not floating.

    Example:
        >>> load_sae("/nowhere")
        Traceback (most recent call last):
        lens_core.errors.SaeError: there is no file '/nowhere/cfg.json'; an SAE is a folder with cfg.json and ...
    """
    folder = _folder(path)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"an SAE's dtype is a floating one; got {dtype!r}")
    shown = os.fspath(folder / CONFIG)
    fields = _json(folder / CONFIG)
    cfg = read_config(fields, shown)
    if model_from_pretrained_kwargs is not None:
        cfg = attrs.evolve(cfg, model_from_pretrained_kwargs=dict(model_from_pretrained_kwargs))
    cfg = attrs.evolve(cfg, dtype=dtype or cfg.dtype)
    weights = _weights(folder / WEIGHTS, cfg, uses_factor=bool(fields.get("finetuning_scaling_factor")))
    if cfg.normalize_activations == "expected_average_only_in":
        factor = _scaling_factor(folder, norm_scaling_factor)
        _fold(weights, factor)
        cfg = attrs.evolve(cfg, normalize_activations="none")
    elif norm_scaling_factor is not None:
        raise ArgumentError(f"{shown} has no factor to be folded in: normalize_activations is not of that kind")
    return SparseAutoencoder(cfg, weights).to(device)


def _folder(path: Any) -> Path:
    try:
        given = Path(os.fsdecode(path))
    except TypeError:
        raise ArgumentError(f"an SAE is named by the path of its folder; got {path!r}") from None
    return given.parent if given.name in (CONFIG, WEIGHTS) else given


def _json(path: Path) -> dict[str, Any]:
    shown = os.fspath(path)
    if not path.is_file():
        raise SaeError(f"there is no file {shown!r}; an SAE is a folder with {CONFIG} and {WEIGHTS}, as SAELens writes")
    if path.stat().st_size > LARGEST_CONFIG:
        raise SaeError(f"{shown!r} has {path.stat().st_size} bytes, which no config of an SAE has")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SaeError(f"{shown!r} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise SaeError(f"{shown!r} holds {type(fields).__name__}, not the fields of a config")
    return cast("dict[str, Any]", fields)


def _weights(path: Path, cfg: SaeConfig, *, uses_factor: bool) -> dict[str, Tensor]:
    shown = os.fspath(path)
    if not path.is_file():
        raise SaeError(f"there is no file {shown!r}; lens reads safetensors only")
    try:
        with cast("Any", safetensors).safe_open(shown, framework="pt") as file:
            found: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged file makes safetensors raise errors of many types
        raise SaeError(f"{shown!r} cannot be read: {str(error).partition(chr(10))[0]}") from error
    weights = _renamed(found, cfg, shown, uses_factor=uses_factor)
    shapes = cfg.weight_shapes() | ({"finetuning_scaling_factor": (cfg.d_sae,)} if uses_factor else {})
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise SaeError(f"{shown!r} has no weight {missing[0]!r}, which an SAE of architecture {cfg.architecture!r} has")
    for name in weights:
        if name not in shapes:
            raise SaeError(
                f"{shown!r} has a weight {name!r}, which lens does not know in an SAE of architecture "
                f"{cfg.architecture!r}: what it computes would be another thing"
            )
        if tuple(weights[name].shape) != shapes[name]:
            raise SaeError(
                f"{shown!r} has {name} of shape {list(weights[name].shape)}, and the config's sizes make it "
                f"{list(shapes[name])}"
            )
        if not weights[name].is_floating_point():
            raise SaeError(f"{shown!r} has {name} in {weights[name].dtype}, which is no floating dtype")
    return {name: tensor.to(cfg.dtype) for name, tensor in weights.items()}


def _renamed(found: dict[str, Tensor], cfg: SaeConfig, shown: str, *, uses_factor: bool) -> dict[str, Tensor]:
    """Give the weights under the names of finished SAEs: checkpoints of a training have some in another form."""
    if "scaling_factor" in found:
        found["finetuning_scaling_factor"] = found.pop("scaling_factor")
    factor = found.get("finetuning_scaling_factor")
    if factor is not None and not uses_factor:
        if not bool((factor == 1).all()):
            raise SaeError(f"{shown!r} has a scaling factor for its features, and the config does not say to use it")
        del found["finetuning_scaling_factor"]
    if cfg.gate == "threshold" and "log_threshold" in found:
        found["threshold"] = found.pop("log_threshold").exp()
    if cfg.gate == "threshold" and "topk_threshold" in found and found["topk_threshold"].ndim == 0:
        found["threshold"] = found.pop("topk_threshold").expand(cfg.d_sae).clone()
    return found


def _scaling_factor(folder: Path, given: float | None) -> float:
    factor: Any = given
    if factor is None and (folder / SCALER).is_file():
        factor = _json(folder / SCALER).get("scaling_factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not (math.isfinite(factor) and factor > 0):
        raise SaeError(
            f"{os.fspath(folder / CONFIG)!r} says normalize_activations='expected_average_only_in': activations were "
            f"multiplied by a factor before the SAE saw them, and it is not in these weights (got {factor!r}). Give "
            f"norm_scaling_factor=, or a folder with {SCALER}"
        )
    return float(factor)


def _fold(weights: dict[str, Tensor], factor: float) -> None:
    """Make an SAE of scaled activations one of the activations themselves."""
    weights["W_enc"] = weights["W_enc"] * factor
    for name in ("W_dec", "b_dec"):
        weights[name] = weights[name] / factor
