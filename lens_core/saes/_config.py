"""What a sparse autoencoder computes and what it was trained on, as SAELens writes it in `cfg.json`.

Releases before SAELens 6 keep everything at the top level, some of it under older names; later ones keep what concerns
the language model under `metadata`. Both are read. A field that would change the computation and is not known here is
refused by name.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

import attrs
import torch

from lens_core._arguments import is_whole
from lens_core.errors import SaeError

__all__ = ["SaeConfig", "read_config"]

ARCHITECTURES = (
    *("standard", "gated", "jumprelu", "topk"),
    *("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
)
THRESHOLD_OF_TRAINING = ("batchtopk", "matryoshka_batchtopk")
"""Checkpoints of a training whose finished SAEs SAELens itself saves as `jumprelu`."""
Activation = Literal["relu", "tanh-relu"]
Normalisation = Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"]
OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
    "meta": "metadata",
}
MODEL_FIELDS = (
    *("hook_name", "hook_name_out", "hook_head_index", "hook_head_index_out", "prepend_bos", "model_name"),
    *("model_from_pretrained_kwargs", "context_size", "exclude_special_tokens"),
)
COMPUTED = frozenset(
    (
        *("architecture", "d_in", "d_sae", "d_out", "dtype", "apply_b_dec_to_input", "normalize_activations"),
        *("reshape_activations", "activation_fn", "activation_fn_kwargs", "k", "rescale_acts_by_decoder_norm"),
        *("finetuning_scaling_factor",),
    )
)
INERT = frozenset(
    (
        *("device", "metadata", "hook_layer", "hook_layer_out", "noise_scale", "mse_loss_normalization", "lp_norm"),
        *("b_dec_init_method", "decoder_init_norm", "l1_coefficient", "l1_warm_up_steps", "l0_coefficient"),
        *("l0_warm_up_steps", "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode"),
        *("jumprelu_tanh_scale", "pre_act_loss_coefficient", "aux_loss_coefficient", "topk_threshold_lr"),
        *("use_sparse_activations", "matryoshka_widths", "use_matryoshka_aux_loss"),
    )
)
"""Fields of newer releases that say how it was trained, and change nothing that it computes."""


@attrs.frozen(kw_only=True)
class SaeConfig:
    """A sparse autoencoder's sizes, its computation, and what its activations were.

    Example:
        >>> SaeConfig(d_in=16, d_sae=64, architecture="topk", k=4).d_out
        16
    """

    d_in: int
    """Width of what it reads; heads flattened."""
    d_sae: int
    """Features."""
    d_out: int = attrs.field(default=attrs.Factory(lambda self: self.d_in, takes_self=True))
    """Width of what it gives: another than `d_in` in a transcoder only."""
    architecture: str = "standard"
    """`standard`, `gated`, `jumprelu`, `topk`, or one of SAELens' transcoders."""
    activation: Activation = "relu"
    k: int | None = None
    """How many features a top-k SAE keeps at each position."""
    apply_b_dec_to_input: bool = True
    """Whether the decoder's bias is taken off the input before it is encoded."""
    normalize_activations: Normalisation = "none"
    """What is done to each input vector before it is encoded, and undone after it is decoded."""
    rescale_acts_by_decoder_norm: bool = False
    """Whether features are chosen and given in units of their decoder rows' norms."""
    dtype: torch.dtype = torch.float32
    hook_name: str | None = None
    """The hook point whose values it was trained on."""
    hook_name_out: str | None = None
    """The hook point whose values it foretells, in a transcoder."""
    hook_head_index: int | None = None
    """The one head that it reads; None for the whole value, heads flattened."""
    prepend_bos: bool | None = None
    """Whether its texts began with the beginning-of-sequence token; None if nobody says."""
    model_name: str | None = None
    model_from_pretrained_kwargs: Mapping[str, Any] | None = None
    """How TransformerLens loaded the model, on top of no processing: what was on. None if nobody says."""
    metadata: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    """What else the file says of the training; lens does not use it."""

    @property
    def is_transcoder(self) -> bool:
        """Whether what it gives stands for another value than the one that it reads."""
        return "transcoder" in self.architecture

    @property
    def gate(self) -> str:
        """What decides which features are on: `none`, `gated`, `threshold` or `topk`."""
        kinds = {"gated": "gated", "topk": "topk"}
        return "threshold" if self.architecture.startswith("jumprelu") else kinds.get(self.architecture, "none")

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the shape of each weight that such an SAE has, by SAELens' names."""
        wide, shapes = (self.d_sae,), {"W_enc": (self.d_in, self.d_sae), "W_dec": (self.d_sae, self.d_out)}
        biases = ("b_gate", "r_mag", "b_mag") if self.gate == "gated" else ("b_enc",)
        shapes |= dict.fromkeys(biases, wide)
        shapes |= {"threshold": wide} if self.gate == "threshold" else {}
        shapes |= {"W_skip": (self.d_out, self.d_in)} if "skip" in self.architecture else {}
        return {**shapes, "b_dec": (self.d_out,)}


def read_config(given: Mapping[str, Any], source: str) -> SaeConfig:
    """Read what `cfg.json` holds.

    Raises:
        SaeError: Sizes or names missing or unsound, or a computation that lens does not know; `source` is named.
    """
    fields = {OLD_NAMES.get(name, name): value for name, value in given.items()}
    nested = _mapping(fields.get("metadata"), "metadata", source)
    is_new = bool(nested)
    about = {name: nested.get(name, fields.get(name)) for name in (*MODEL_FIELDS, "neuronpedia_id")}
    if is_new:
        _refuse_unknown(fields, source)
    architecture = _architecture(fields, source)
    is_transcoder = "transcoder" in architecture
    d_in, d_sae = _size(fields, "d_in", source), _size(fields, "d_sae", source)
    d_out = _size(fields, "d_out", source) if is_transcoder else d_in
    hook_name, hook_name_out = (_text(about, name, source) for name in ("hook_name", "hook_name_out"))
    if hook_name_out == hook_name:
        hook_name_out = None
    if (is_transcoder or hook_name_out) and about["hook_head_index_out"] is not None:
        raise SaeError(f"{source}: a transcoder to one head (hook_head_index_out) is not supported")
    kept = {**{k: v for k, v in fields.items() if k not in COMPUTED and k != "metadata"}, **nested}
    return SaeConfig(
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out,
        architecture=architecture,
        activation=_activation(fields, architecture, source),
        k=_k(fields, d_sae, source) if architecture == "topk" else None,
        apply_b_dec_to_input=_flag(fields, "apply_b_dec_to_input", not is_transcoder, source),
        normalize_activations=_normalisation(fields, source),
        rescale_acts_by_decoder_norm=_flag(fields, "rescale_acts_by_decoder_norm", False, source),
        dtype=_dtype(fields.get("dtype", "float32"), source),
        hook_name=hook_name,
        hook_name_out=hook_name_out,
        hook_head_index=_head(about["hook_head_index"], source),
        prepend_bos=_prepends(about["prepend_bos"], is_new=is_new, source=source),
        model_name=_text(about, "model_name", source),
        model_from_pretrained_kwargs=None
        if about["model_from_pretrained_kwargs"] is None
        else _mapping(about["model_from_pretrained_kwargs"], "model_from_pretrained_kwargs", source),
        metadata={name: value for name, value in kept.items() if name not in MODEL_FIELDS},
    )


def _refuse_unknown(fields: Mapping[str, Any], source: str) -> None:
    """Newer files hold what the SAE is and nothing else, so that a field which nobody knows may be a computation."""
    unknown = [name for name in fields if name not in COMPUTED | INERT | {*MODEL_FIELDS, "neuronpedia_id"}]
    found = [name for name in unknown if fields[name] not in (None, False, "none", {}, [])]
    if found:
        raise SaeError(
            f"{source} has the field {found[0]!r} = {fields[found[0]]!r}, which lens does not know and which may "
            "change what the SAE computes; load it by SAELens, and give that module to model.saes()"
        )


def _architecture(fields: Mapping[str, Any], source: str) -> str:
    named = fields.get("architecture", "standard")
    if named in THRESHOLD_OF_TRAINING:
        return "jumprelu"
    kwargs: Any = fields.get("activation_fn_kwargs") or {}
    if named == "standard" and fields.get("activation_fn") == "topk" and kwargs.get("k") is not None:
        return "topk"
    if named not in ARCHITECTURES:
        raise SaeError(
            f"{source} has the architecture {named!r}; lens reads {', '.join(ARCHITECTURES)}. Load it by other means, "
            "and give a module with encode and decode to model.saes()"
        )
    return str(named)


def _activation(fields: Mapping[str, Any], architecture: str, source: str) -> Activation:
    named = fields.get("activation_fn", "relu")
    if architecture == "topk" or named == "relu":
        return "relu"
    if named == "tanh-relu" and architecture == "standard":
        return "tanh-relu"
    raise SaeError(f"{source} has the activation function {named!r} in an SAE of architecture {architecture!r}")


def _k(fields: Mapping[str, Any], d_sae: int, source: str) -> int:
    kwargs: Any = fields.get("activation_fn_kwargs") or {}
    given = fields.get("k", kwargs.get("k"))
    if isinstance(given, bool) or not isinstance(given, int) or not 0 < given <= d_sae:
        raise SaeError(f"{source} is a top-k SAE of {d_sae} features with k = {given!r}; k is a number of them")
    return given


def _normalisation(fields: Mapping[str, Any], source: str) -> Normalisation:
    named = fields.get("normalize_activations")
    if named in (None, False):
        return "none"
    if named is True:  # early releases
        return "expected_average_only_in"
    if named not in ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"):
        raise SaeError(f"{source} has normalize_activations = {named!r}, which lens does not know")
    return named


def _dtype(named: object, source: str) -> torch.dtype:
    found = getattr(torch, str(named).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SaeError(f"{source} has dtype = {named!r}, which is no floating dtype of torch")
    return found


def _prepends(given: object, *, is_new: bool, source: str) -> bool | None:
    if given is None:
        return None if is_new else True  # SAELens' own default for its older files
    if not isinstance(given, bool):
        raise SaeError(f"{source} has prepend_bos = {given!r}, which is neither true nor false")
    return given


def _head(given: object, source: str) -> int | None:
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 0):
        raise SaeError(f"{source} has hook_head_index = {given!r}, which is no head")
    return given


def _size(fields: Mapping[str, Any], name: str, source: str) -> int:
    given = fields.get(name)
    if not is_whole(given):
        raise SaeError(f"{source} has {name} = {given!r}; it is a positive number")
    return given


def _flag(fields: Mapping[str, Any], name: str, default: bool, source: str) -> bool:
    given = fields.get(name, default)
    if not isinstance(given, bool):
        raise SaeError(f"{source} has {name} = {given!r}, which is neither true nor false")
    return given


def _text(fields: Mapping[str, Any], name: str, source: str) -> str | None:
    given = fields.get(name)
    if given is not None and not isinstance(given, str):
        raise SaeError(f"{source} has {name} = {given!r}, which is no text")
    return given or None


def _mapping(given: object, what: str, source: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise SaeError(f"{source}: {what} is {given!r}, which is no mapping")
    return dict(cast("Mapping[str, Any]", given))
