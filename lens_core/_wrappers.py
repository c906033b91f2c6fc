"""What may stand around HF's own model: `torch.compile`'s module, and PEFT's.

Such a wrapper is what the user gave, so it is what is called; the hook points are in the HF model inside of it.
"""

from typing import Any

from lens_core.errors import UnsupportedConfigError

__all__ = ["bare", "layers_around"]


def layers_around(model: Any) -> list[Any]:
    """List what the user gave, then what it wraps, down to HF's own model, which is the last."""
    layers = [model]
    while (inner := _inside(layers[-1])) is not None:
        layers.append(inner)
    return layers


def bare(model: Any) -> Any:
    """Give HF's own model.

    Raises:
        UnsupportedConfigError: A PEFT model that puts virtual tokens before the input: HF's model then sees other
            positions than the caller does.
    """
    for layer in layers_around(model):
        active: Any = getattr(layer, "active_peft_config", None)
        if getattr(active, "is_prompt_learning", False):
            raise UnsupportedConfigError(
                f"the PEFT adapter is of the kind {getattr(active.peft_type, 'value', active.peft_type)}, which puts "
                "virtual tokens or keys before the input, so positions are not those of your tokens; load the HF model "
                "inside of it (get_base_model()) for the model without them"
            )
    return layers_around(model)[-1]


def _inside(model: Any) -> Any:
    """Give what a wrapper wraps; None for a model that wraps nothing."""
    compiled: Any = getattr(model, "_orig_mod", None)
    if compiled is not None:
        return compiled
    give = getattr(model, "get_base_model", None)  # PEFT's; an adapter that HF's own method loads wraps nothing
    return give() if callable(give) else None
