"""What the kit is told about one HF model type: tiny configs of it, and, where there is one, its golden forward."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from typing import Any

import attrs
import torch
from torch import Tensor

from lens_conformance import edits

__all__ = ["Family", "KnownFailure", "noisy"]

Golden = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def noisy(name: str, parameter: Tensor) -> Tensor:
    """Draw a parameter: gains and biases around where the type starts them, matrices large enough that edits show.

    A freshly initialised model hides mistakes: most of its vectors are constant.
    """
    noise = torch.randn_like(parameter)
    return parameter + noise * 0.2 if parameter.ndim == 1 else noise * 0.3


def _never(name: str) -> bool:
    return False


@attrs.frozen(kw_only=True)
class KnownFailure:
    """A check that a model type is known to fail, on one fixed witness; where it no longer fails, that is a failure.

    Attributes:
        check: The check's name.
        witness: Config fields of the examples on which it fails; all others must pass.
        reason: What is wrong, and whose it is to mend.
        since: The day it was found, as `2026-11-28`.
    """

    check: str
    witness: Mapping[str, Any] = attrs.field(validator=attrs.validators.min_len(1))
    reason: str = attrs.field(validator=attrs.validators.min_len(1))
    since: str = attrs.field(converter=lambda day: date.fromisoformat(day).isoformat())


@attrs.frozen(kw_only=True, eq=False)
class Family:
    """One model type as the kit tries it.

    A third party's needs `model_type` and `config` only; every property that HF alone can judge is then tried. With a
    `golden` forward the values, the effect of edits and the gradients are judged too.
    """

    model_type: str
    config: Mapping[str, Any]
    """Fields of a tiny config: sizes pairwise different, so that a swapped axis cannot broadcast; three layers or more
    where kinds of layers are mixed; `vocab_size` 29 (ids 0 to 27 are drawn, 28 is the end and the padding)."""
    axes: Mapping[str, Sequence[Any]] = attrs.field(
        factory=dict,
        validator=attrs.validators.deep_mapping(
            value_validator=attrs.validators.min_len(1), mapping_validator=None, key_validator=None
        ),
    )
    """Config fields that are varied, with the values that are tried. Each is drawn on its own."""
    golden: Golden | None = None
    """`golden(state_dict, config, tokens, attention_mask=None, position_ids=None, edits=None, record=True, through=())
    -> (logits, values)`: the forward written from the formulas, in float64, every hook point a cut point. It shares no
    code with the plugin and calls nothing of transformers."""
    names: Callable[[Any], Iterable[str]] | None = None
    """The names that the contract gives a config of this type, as the golden forward has them; None takes the
    plugin's own table."""
    noise: Callable[[str, Tensor], Tensor] = noisy
    """A parameter's name and value to the value that is tried."""
    implementations: tuple[str, ...] = attrs.field(default=("sdpa", "eager"), validator=attrs.validators.min_len(1))
    """What `attn_implementation` may be; ("eager",) where HF has one way only."""
    edit_at: Callable[..., Any] = edits.edit_at
    """`edit_at(name, causal=False)`: a function for the name that moves the logits far above rounding; a causal one may
    be repeated step by step."""
    decodes: Callable[[str], bool] = lambda name: not name.endswith(("k_rep", "v_rep", "input_rep"))
    """Whether prefill and decode with an edit at this name equal the whole run with it."""
    apart: Callable[[str], bool] = lambda name: name.endswith(
        ("attn_in", "q_input", "k_input", "v_input", "k_input_rep", "v_input_rep")
    )
    """Names of copies: their gradient is that of the run through them (`through` of golden), one name at a time."""
    per_position: Callable[[str], bool] = _never
    """Names whose function is called once for each position."""
    pos_axis: Callable[[str], int | None] = edits.pos_axis
    """Which axis is the positions of this call, as `edits.pos_axis`; None where there are only keys."""
    key_axis: Callable[[str], int | None] = edits.key_axis
    """Which axis is the keys, all real positions so far."""
    gradient: Callable[[str], bool] = lambda name: name != "hook_tokens" and not name.endswith("indices")
    """Whether the value is floating, so that it has a gradient."""
    chunks: bool = True
    """Whether several positions may continue a cache; where HF computes that wrongly the plugin refuses it."""
    paddings: tuple[str, ...] = ("left", "right")
    """Sides that a batch may be padded on."""
    dropout: Mapping[str, Any] = attrs.field(factory=dict)
    """Config fields that switch on the dropouts of the type."""
    known_failures: tuple[KnownFailure, ...] = ()
    """What is known to be wrong, by check and witness."""

    def __str__(self) -> str:
        """Name the model type."""
        return self.model_type
