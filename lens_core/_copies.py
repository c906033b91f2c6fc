"""Copies and pickles of models.

A copy is declared anew for its HF model, by the plugin that is installed where the copy is made. Hooks that were added
go along, notes in `hook.ctx` do not.
"""

import copy
import pickle
from typing import TYPE_CHECKING, Any

from lens_core._loading import declared_anew
from lens_core._watch import HookEntry
from lens_core.errors import LensError, UnsupportedHookError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["copy_model", "deepcopy_model", "reduce_model"]


def copy_model(model: "LensModel") -> "LensModel":
    """Give another lens model over the same HF model, with the same hooks added; those added later are its own."""
    return _like(model, model.hf_model, model.tokenizer)


def deepcopy_model(model: "LensModel", memo: dict[int, Any]) -> "LensModel":
    """Copy the HF model too, and the tokenizer.

    Raises:
        UnsupportedHookError: Hooks are on the HF model: inside a `hooks()` or `caching()` block.
    """
    hf_model, tokenizer = copy.deepcopy(model.hf_model, memo), copy.deepcopy(model.tokenizer, memo)
    return _like(model, hf_model, tokenizer)


def reduce_model(model: "LensModel", protocol: Any) -> tuple[Any, ...]:
    """Say how to make the model from what can be pickled.

    Raises:
        UnsupportedHookError: A function that was added cannot be pickled; or hooks are on the HF model.
    """
    for entry in model.added_hooks:
        try:
            pickle.dumps(entry.fn)
        except LensError:
            raise
        except Exception as error:
            name = getattr(entry.fn, "__name__", repr(entry.fn))
            raise UnsupportedHookError(
                f"the hook function {name!r} that was added at {entry.names[0]!r} cannot be pickled ({error}): take it "
                "away by reset_hooks(including_permanent=True) first, or add one that stands in a module"
            ) from error
    name = model.declaration.cfg.model_name
    own = (list(model.added_hooks), model.default_prepend_bos)
    return _model, (type(model), model.hf_model, model.tokenizer, name, *own)


def _like(model: "LensModel", hf_model: Any, tokenizer: Any) -> "LensModel":
    name = model.declaration.cfg.model_name
    return _model(type(model), hf_model, tokenizer, name, model.added_hooks, model.default_prepend_bos)


def _model(
    kind: type["LensModel"],
    hf_model: Any,
    tokenizer: Any,
    name: str,
    added: list[HookEntry],
    prepend_bos: bool | None = None,
) -> "LensModel":
    model = kind(declared_anew(hf_model, name), tokenizer)
    model.added_hooks, model.default_prepend_bos = list(added), prepend_bos
    return model
