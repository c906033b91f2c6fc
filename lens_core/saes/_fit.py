"""Whether an SAE fits a model: the hook point, the sizes, and what SAELens' metadata say of the activations."""

import warnings
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, cast

from lens_core._boundary import frames_to_the_user
from lens_core.errors import SaeError, SaeWarning
from lens_core.hook_points import HookPoint

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["bos_check", "check_metadata", "check_place", "check_width", "metadata_of"]

PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
"""TransformerLens' weight processing, as `from_pretrained` is told of it."""
STREAM = ("embed", "pos_embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mixer_out")
COPIES = ("attn_in", "q_input", "k_input", "v_input", "k_input_rep", "v_input_rep", "mlp_in", "mixer_in")
TOUCHES: Mapping[str, frozenset[str]] = {
    "center_writing_weights": frozenset((*STREAM, *COPIES, "attn.out", "attn.result", "mlp.out")),
    "fold_value_biases": frozenset(("attn.v", "attn.v_rep", "attn.z", "attn.result")),
    "refactor_factored_attn_matrices": frozenset(f"attn.{part}" for part in ("q", "k", "v", "z", "rot_q", "rot_k")),
    "center_unembed": frozenset(("unembed.out", "logits")),
    "fold_ln": frozenset(("ln1.out", "ln2.out", "ln_final.out", "norm.out", "mlp.in", "unembed.in")),
}
"""Which hook points hold other values once the weights were processed so; their names without `hook_`."""


def metadata_of(sae: Any) -> Mapping[str, Any]:
    """Give what an SAE says of its hook point and of its training: ours, one of SAELens' own, or any module."""
    cfg: Any = getattr(sae, "cfg", None)
    nested: Any = getattr(cfg, "metadata", None)
    names = ("hook_name", "hook_name_out", "hook_head_index", "prepend_bos", "model_from_pretrained_kwargs")

    def find(name: str) -> Any:
        for source in (sae, cfg, nested):
            found: Any = cast("Any", source).get(name) if isinstance(source, Mapping) else getattr(source, name, None)
            if found is not None:
                return found
        return None

    return {name: find(name) for name in names}


def check_place(model: "LensModel", place: HookPoint, *, head: int | None) -> None:
    """See that an SAE can stand at a hook point.

    Raises:
        SaeError: The value there is no vector at each position, or has no such head.
    """
    axes = place.shape.split()
    if place.part == "mixer.hook_ssm_state":
        raise SaeError(
            f"{place.name!r} is inside the recurrence, one position after the other; an SAE reads what comes out of "
            "it: mixer.hook_y or mixer.hook_ssm_output"
        )
    if axes[:2] != ["batch", "pos"] or len(axes) not in (3, 4) or place.dtype.startswith("int"):
        raise SaeError(f"{place.name!r} holds [{place.shape}]; an SAE stands where each position has a vector")
    if head is None:
        return
    sizes = model.cfg.sizes
    if len(axes) != 4:
        raise SaeError(f"hook_head_index={head} is for a hook point with heads; {place.name!r} holds [{place.shape}]")
    if not 0 <= head < (sizes.get(axes[2]) or head + 1):
        raise SaeError(f"hook_head_index={head}: {place.name!r} has heads 0 to {sizes[axes[2]] - 1}")


def check_width(model: "LensModel", place: HookPoint, width: Any, *, head: int | None, what: str) -> None:
    """See that an SAE is as wide as a value, where both sizes are known.

    Raises:
        SaeError: It is not.
    """
    axes = place.shape.split()[2 if head is None else 3 :]
    wide = prod(int(axis) if axis.isdigit() else model.cfg.sizes.get(axis, 0) for axis in axes)
    if isinstance(width, int) and wide and width != wide:
        raise SaeError(
            f"the SAE has {what}={width}, and {place.name!r} is {wide} wide ({' x '.join(axes)}): another model, or "
            "another hook point"
        )


def check_metadata(model: "LensModel", place: HookPoint, about: Mapping[str, Any], *, strict: bool) -> None:
    """Compare what an SAE was trained on with how the model was loaded.

    Raises:
        SaeError: The values at the hook point are others than those that it was trained on (a `SaeWarning` if not
            strict).
    """
    kwargs = about.get("model_from_pretrained_kwargs")
    problem = None if kwargs is None else _processing(model, place, kwargs) or _normalized(model, place)
    if problem and strict:
        raise SaeError(f"{problem}; strict=False splices it nevertheless")
    if problem:
        warnings.warn(problem, SaeWarning, stacklevel=frames_to_the_user())


def _processing(model: "LensModel", place: HookPoint, kwargs: Mapping[str, Any]) -> str | None:
    done = _processed(model)
    for name in PROCESSING:
        if name == "center_writing_weights" and not model.cfg.normalization_type.startswith("LN"):
            continue  # TransformerLens leaves it out where norms keep the mean
        wanted = bool(kwargs.get(name, False))
        touched = place.part.replace("hook_", "") in TOUCHES[name]
        if touched and wanted != (name in done):
            had, has = ("", "not ") if wanted else ("no ", "")
            remedy = "load it by lens.load(..., process='transformerlens')" if wanted else "take it back: undo_passes()"
            return (
                f"the SAE was trained on a model with {had}{name} (its model_from_pretrained_kwargs), and this one was "
                f"{has}processed so, which changes {place.name!r}: {remedy}"
            )
    return None


def _processed(model: Any) -> frozenset[str]:
    """Name the weight passes that were applied to a model, as TransformerLens calls them."""
    passes: Any = getattr(model, "passes", ())
    return frozenset(one.name for one in passes if not one.skipped)


def _normalized(model: "LensModel", place: HookPoint) -> str | None:
    """TransformerLens' `hook_normalized` of a LayerNorm holds gain and bias too; ours never does."""
    if model.cfg.normalization_type != "LN" or not place.name.endswith(".hook_normalized"):
        return None
    if "fold_ln" in _processed(model):
        return None
    other = place.name.removesuffix("hook_normalized") + "hook_out"
    return (
        f"in TransformerLens {place.name!r} of a LayerNorm that is not folded holds gain and bias too, which here is "
        f"{other!r}: splice by {{{other!r}: sae}}"
    )


def bos_check(model: "LensModel", wants: bool) -> Any:
    """Make a function at `hook_tokens` that warns, once, of texts that begin otherwise than those of the training."""
    bos, warned = model.tokenizer.bos_token_id, False

    def look(tokens: Any, hook: Any) -> None:
        nonlocal warned
        if warned or not hook.is_prefill:
            return
        has = bool((tokens == bos).any(-1).all()) if wants else bool((tokens[:, 0] == bos).any())
        if has != wants:
            warned = True
            warnings.warn(
                f"the SAE was trained on texts {'with' if wants else 'without'} a leading BOS token (prepend_bos), and "
                f"these {'have none' if wants else 'have one'}: pass prepend_bos={wants}",
                SaeWarning,
                stacklevel=frames_to_the_user(),
            )

    return look
