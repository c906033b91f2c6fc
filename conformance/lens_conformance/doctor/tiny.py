"""A tiny config of a model type: sizes shrink, what chooses behaviour stays.

Sizes are pairwise different, so that swapped axes show; factors of one become factors of their own, since one hides
where it is applied; and as many blocks stay as there are kinds of them.
"""

import contextlib
import copy
import dataclasses
import difflib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.utils import logging

from lens_conformance.family import noisy
from lens_core._loading import _read_config
from lens_core.errors import ArgumentError

__all__ = ["Subject", "build", "config_fields", "quiet", "read_config", "tiny"]

VOCAB = 29
SIZES: dict[str, int] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "ffn_dim": 37,
    "ffn_hidden_size": 37,
    "n_inner": 37,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "num_experts": 5,
    "num_local_experts": 5,
    "n_routed_experts": 5,
    "moe_num_experts": 5,
    "num_experts_per_tok": 3,
    "num_experts_per_token": 3,
    "moe_topk": 3,
    "moe_k": 3,
    "moe_top_k": 3,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 14,
    "qk_head_dim": 14,
    "rotary_dim": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "sliding_window": 3,
    "attention_chunk_size": 3,
}
_WIDTH = re.compile(r"(size|dim|rank|width|channels|positions|length|len|window|state|heads)$")
_PERIOD = re.compile(r"(interval|step|period|freq|pattern|every_n|_every)")
_FIRST_LAYERS = re.compile(r"(first_k_dense|dense_layers|layer_start|_offset|max_window_layers|replace)")
_FACTOR = re.compile(r"(multiplier|_scale|scaling|scaling_factor|scale_depth|scale_emb)$")
_CAP = re.compile(r"(logit.*cap|logits_soft_cap)")
_PROBES = (1.7, 0.6, 1.3, 0.45, 0.8, 1.9, 0.7, 1.4)
_SPARES = (20, 28, 44, 52, 60, 68, 76)
_RETRIES: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": 10},
    {"head_dim": 8},
    {"intermediate_size": 40},
    {"head_dim": 8, "intermediate_size": 40},
    {"num_key_value_heads": 4},
    {"head_dim": None},
    {"num_key_value_heads": 4, "head_dim": 8},
    {"num_key_value_heads": 4, "head_dim": None},
)
"""What is tried where HF builds or runs no model of the first sizes; grouped products ask for rows of 16 bytes."""


@attrs.frozen(kw_only=True, eq=False)
class Subject:
    """What is examined: a config as it was given, and fields that make a tiny one of it."""

    model_type: str
    config: Any
    fields: dict[str, Any]
    remarks: tuple[str, ...] = ()

    def tiny(self, **overrides: Any) -> Any:
        """Make the tiny config."""
        return AutoConfig.for_model(self.model_type, **copy.deepcopy({**self.fields, **overrides}))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep HF's remarks about sizes and missing kernels to itself."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(level)


def read_config(model: str) -> tuple[Any, tuple[str, ...]]:
    """Read the config of a checkpoint, or give the default one of a model type; and what is to be said of it.

    Raises:
        ArgumentError: No model type of transformers, or none of a causal language model.
        LensError: A checkpoint whose config cannot be read.
    """
    with quiet():
        return _read(model)


def _read(model: str) -> tuple[Any, tuple[str, ...]]:
    folder = Path(model)
    if model in CONFIG_MAPPING:
        config = _default(model)
    elif folder.is_dir() or "/" in model:
        _check_known(folder)
        config = _read_config(model, {})
    else:
        raise _unknown(model)
    kind, text = config.model_type, config.get_text_config()
    if kind in CAUSAL and not getattr(config, "is_encoder_decoder", False):
        if isinstance(getattr(config, "num_hidden_layers", None), int):
            return config, ()
        if text.model_type == kind or text.model_type not in CAUSAL:
            raise ArgumentError(f"{kind!r} is not one stack of blocks: its config has no num_hidden_layers")
    if text.model_type != kind and text.model_type in CAUSAL:
        return text, (f"{kind} holds a language model of the type {text.model_type}, which is what is examined",)
    raise ArgumentError(
        f"{kind!r} is no causal decoder: transformers has no ...ForCausalLM of it that reads tokens from left to right"
    )


def _default(model_type: str) -> Any:
    try:
        return CONFIG_MAPPING[model_type]()
    except Exception as error:  # of HF's own checks
        told = " ".join(str(error).split())[:200]
        raise ArgumentError(
            f"HF's default config of {model_type!r} is refused by HF ({told}); give a folder"
        ) from error


def _unknown(model: str) -> ArgumentError:
    near = difflib.get_close_matches(model, list(CONFIG_MAPPING), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; give a folder or an id with a config, or a model type"
    return ArgumentError(f"{model!r} is no model type of the installed transformers{hint}")


def _check_known(folder: Path) -> None:
    """Say it plainly where a folder's type is one that transformers does not have."""
    try:
        given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    kind = given.get("model_type") if isinstance(given, dict) else None
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        raise _unknown(kind)


def config_fields(config: Any) -> list[str]:
    """List the fields of a config's own class, the names in HF's dataclass."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return [field.name for field in dataclasses.fields(type(config)) if field.name not in common]


# ---------------------------------------------------------------------- fields


def tiny(config: Any, remarks: tuple[str, ...] = ()) -> Subject:
    """Shrink a config.

    Raises:
        ArgumentError: HF builds or runs no tiny model of it, or one that is not causal.
    """
    try:
        with quiet():
            fields = {**_kept(config), **_shrunk(config)}
    except Exception as failure:  # values that differ by block cannot be asked of the whole
        told = str(failure).split(". ", 1)[0]
        raise ArgumentError(f"the config of {config.model_type!r} is not one for all blocks: {told}") from failure
    error: Exception | None = None
    for retry in (*_mixed(fields), *_RETRIES):
        if not retry.keys() <= set(config_fields(config)):
            continue
        subject = Subject(
            model_type=config.model_type, config=config, fields={**fields, **retry}, remarks=tuple(remarks)
        )
        try:
            _check_causal(subject)
        except ArgumentError:
            raise
        except Exception as failure:  # whatever HF raises first
            error = error or failure
        else:
            return subject
    told = " ".join(str(error).split())[:200]
    raise ArgumentError(
        f"HF builds or runs no tiny model of the type {config.model_type!r} ({type(error).__name__}: {told}); "
        f"tried with {fields}"
    )


def _mixed(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Mix dense and sparse blocks, where the config has a list of them and all are sparse."""
    given = fields.get("mlp_layer_types")
    if given and set(given) == {"sparse"}:
        for retry in _RETRIES:
            yield {**retry, "mlp_layer_types": ["dense", *given[1:]]}


def _kept(config: Any) -> dict[str, Any]:
    """Give the fields that differ from the class' defaults."""
    default, found = type(config)(), dict[str, Any]()
    for name in config_fields(config):
        value = getattr(config, name, None)
        if value != getattr(default, name, None) and not hasattr(value, "to_dict"):
            found[name] = copy.deepcopy(value)
    return found


def _shrunk(config: Any) -> dict[str, Any]:
    """Give the fields whose values are sizes, layers, ids, factors, and dropouts."""
    mapped: dict[str, str] = getattr(config, "attribute_map", {})
    canonical = {own: name for name, own in mapped.items()}
    own = config_fields(config)
    hidden, spares, probes = getattr(config, "hidden_size", None), iter(_SPARES), iter(_PROBES)
    found: dict[str, Any] = {}
    for name in own:
        value, told = getattr(config, name, None), canonical.get(name, name)
        if told == "num_hidden_layers":
            continue
        if told in SIZES:
            if value is not None or told.endswith("experts") or "experts_per" in told:
                found[name] = SIZES[told]
        elif isinstance(value, int) and not isinstance(value, bool):
            new = _small(told, value, hidden, spares)
            found |= {name: new} if new != value else {}
        else:
            found |= _factor(name, value, probes)
    found |= {name: VOCAB - 1 for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in own}
    if "kv_lora_rank" in own and "num_key_value_heads" in found:  # latent attention: no groups
        found["num_key_value_heads"] = SIZES["num_attention_heads"]
    found |= {"tie_word_embeddings": False} if "tie_word_embeddings" in own else {}
    if isinstance(rope := getattr(config, "rope_parameters", None), dict) and rope:
        found["rope_parameters"] = _rope(rope)
    return {**found, **_layers(config, own, mapped.get("num_hidden_layers", "num_hidden_layers"))}


def _small(name: str, value: int, hidden: Any, spares: Iterator[int]) -> int:
    """Shrink one number, by what its name says it is."""
    if name.endswith("token_id"):
        return VOCAB - 1
    if value == hidden:
        return SIZES["hidden_size"]
    if _FIRST_LAYERS.search(name):
        return min(value, 1)
    if _PERIOD.search(name):
        return min(value, 2)
    if name.startswith(("num_shared", "n_shared")):
        return min(value, 1)
    return next(spares, value) if value > 60 and _WIDTH.search(name) else value


def _factor(name: str, value: Any, probes: Iterator[float]) -> dict[str, Any]:
    """Give dropouts of zero, factors of their own where they are one, and caps where there is none."""
    if isinstance(value, float) and ("dropout" in name or "pdrop" in name or name.endswith(("drop", "dropout_prob"))):
        return {name: 0.0}
    if isinstance(value, float) and value == 1.0 and _FACTOR.search(name):
        return {name: next(probes, value)}
    if value is None and name.startswith(("num_shared_expert", "n_shared_expert")):
        return {name: 1}
    return {name: 5.0} if value is None and _CAP.search(name) and "attn" not in name else {}


def _rope(given: dict[str, Any]) -> dict[str, Any]:
    """Give rotary parameters whose base is small enough that positions differ, and short enough for a tiny context."""
    if all(isinstance(value, dict) for value in given.values()):
        return {kind: _rope(value) for kind, value in given.items()}
    rope = copy.deepcopy(given)
    if isinstance(rope.get("rope_theta"), float | int):
        rope["rope_theta"] = 100.0
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = 16
    width = int(SIZES["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
    return {name: value[:width] if name.endswith("_factor") and isinstance(value, list) else value
            for name, value in rope.items()}  # fmt: skip


def _layers(config: Any, own: list[str], depth_field: str) -> dict[str, Any]:
    """Choose blocks so that every combination that per-layer lists make stays: three, or more where there are more."""
    depth = config.num_hidden_layers
    lists = {name: value for name in own
             if isinstance(value := getattr(config, name, None), list | tuple) and len(value) == depth}  # fmt: skip
    rows = [repr([values[at] for values in lists.values()]) for at in range(depth)]
    first = list(dict.fromkeys(rows))
    chosen = [rows.index(row) for row in first][:5]
    chosen += [at for at in range(depth) if at not in chosen][: max(0, 3 - len(chosen))]
    chosen.sort()
    kinds = getattr(config, "attention_layers", None)
    if "attention_types" in own and isinstance(kinds, list):  # GPT-Neo's: kinds, and how often they come again
        return {depth_field: 3, "attention_types": [[kinds[:3], 1]]}
    return {depth_field: max(3, len(chosen)), **{name: [v[at] for at in chosen] for name, v in lists.items()}}


# ---------------------------------------------------------------------- models


def build(
    subject: Subject, *, dtype: torch.dtype = torch.float32, attn: str = "eager", seed: int = 0, **overrides: Any
) -> Any:
    """Build HF's model of the tiny config, with noise in every parameter."""
    config = subject.tiny(**overrides)
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn)
        if torch.get_default_dtype() == torch.float64 and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the only one that takes float64
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(noisy(name, parameter))
    return model.to(dtype).eval()


def _check_causal(subject: Subject) -> None:
    """See that HF runs the tiny model, and that no position sees a later one.

    Raises:
        ArgumentError: One does.
    """
    model = build(subject)
    ids = torch.arange(1, 8)[None] * 3
    with torch.no_grad(), quiet():
        whole, cut = (_logits(model, given) for given in (ids, ids[:, :5]))
    if whole.shape[-2] != ids.shape[1] or whole.shape[-1] < VOCAB:
        raise ArgumentError(f"{subject.model_type!r} gives no logits for each position and token")
    if not torch.allclose(whole[:, :5], cut, atol=1e-4, rtol=1e-3):
        raise ArgumentError(f"{subject.model_type!r} is no causal decoder: a position's logits change with later ones")


def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits
