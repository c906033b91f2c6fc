"""Which config fields a description is right for: tried at other values, on tiny models."""

import re
from typing import Any

import attrs

from lens_conformance.doctor.proposal import Proposal, propose
from lens_conformance.doctor.tiny import Subject, build, config_fields

__all__ = ["Fields", "try_fields"]

_OF_MODULES = re.compile(
    r"(use_cache|token_id|_act$|activation|eps|epsilon|dropout|pdrop|rope|window|layer_types|router_aux|output_router|"
    r"tie_word|layernorm_epsilon|max_position|n_positions)"
)
"""Fields that HF's own modules read, or that the derived table does."""
_NEVER = ("initializer_range", "use_cache", "output_router_logits", "is_decoder", "add_cross_attention")


@attrs.frozen(kw_only=True)
class Fields:
    """What became of the fields."""

    handled: tuple[str, ...]
    axes: dict[str, tuple[Any, ...]]
    changing: dict[str, str]
    """Flags at whose other value the description is another, or none; with what it is then."""


def try_fields(subject: Subject, proposal: Proposal) -> Fields:
    """Turn each flag of the config class, and see whether the description stays what it is."""
    handled, axes, changing = list[str](), dict[str, tuple[Any, ...]](), dict[str, str]()
    config = subject.tiny()
    names = [*config_fields(config), "rope_parameters"] if hasattr(config, "rope_parameters") else config_fields(config)
    named = set(re.findall(r"config\.(\w+)", " ".join(proposal.fields.values())))
    for name in dict.fromkeys(names):
        value = getattr(config, name, None)
        if isinstance(value, bool) and name not in _NEVER and name != "tie_word_embeddings":
            other = _at(subject, name, not value)
            if other is None:
                continue  # HF builds no such model
            if other.fields == proposal.fields and not other.unfit:
                handled.append(name)
                axes[name] = (value, not value)
            else:
                changing[name] = f"{not value}: {_difference(proposal, other)}"
        elif name in subject.fields or name in named or _OF_MODULES.search(name):
            handled.append(name)
    handled += [config.attribute_map[name] for name in handled if name in config.attribute_map]  # as it is kept
    return Fields(handled=tuple(dict.fromkeys(handled)), axes=axes | _axes(subject, proposal), changing=changing)


def _at(subject: Subject, name: str, value: Any) -> Proposal | None:
    try:
        return propose(subject, **{name: value})
    except Exception:  # HF's own refusal of the value, whatever it raises
        return None


def _axes(subject: Subject, proposal: Proposal) -> dict[str, tuple[Any, ...]]:
    """Give groups and ties, where HF builds them."""
    found: dict[str, tuple[Any, ...]] = {}
    if subject.fields.get("num_key_value_heads") == 2:
        values = [at for at in (2, 1, 4) if _builds(subject, num_key_value_heads=at)]
        found["num_key_value_heads"] = tuple(values)
    if "tie_word_embeddings" in subject.fields and _builds(subject, tie_word_embeddings=True):
        found["tie_word_embeddings"] = (False, True)
    return found


def _builds(subject: Subject, **fields: Any) -> bool:
    try:
        build(subject, **fields)
    except Exception:  # as above
        return False
    return True


def _difference(one: Proposal, other: Proposal) -> str:
    if other.unfit:
        return other.unfit[0]
    names = [name for name in {**one.fields, **other.fields} if one.fields.get(name) != other.fields.get(name)]
    return ", ".join(f"{name}={other.fields.get(name, 'the default')}" for name in names)
