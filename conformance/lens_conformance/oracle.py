"""What the kit compares with: fresh HF models whose every parameter has noise."""

import contextlib
import copy
import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import lens_core as lens
from lens_conformance.family import Family
from lens_conformance.float64 import true_float64

__all__ = [
    "Pair",
    "Variant",
    "forget_pairs",
    "new_pair",
    "plain",
    "shared_pair",
    "tiny_config",
    "tiny_model",
    "variants",
]


@attrs.frozen(kw_only=True, eq=False)
class Pair:
    """A lens model, the HF model inside it, and a twin that nothing of lens has touched."""

    family: Family
    model: Any
    hf: Any
    reference: Any
    dtype: torch.dtype

    @property
    def config(self) -> Any:
        """The untouched twin's config."""
        return self.reference.config

    def names(self) -> list[str]:
        """List the names to try: all, in the order of computation, so that what is told first is where it begins."""
        order = {name: at for at, name in enumerate(self.model.table)}
        return sorted(self.contract(), key=lambda name: order.get(name, len(order)))

    def contract(self) -> list[str]:
        """List every name: the contract's for this config, or the plugin's own table."""
        return list(self.model.table if self.family.names is None else self.family.names(self.config))

    def golden(self, tokens: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the golden forward on the twin's weights, without a graph."""
        assert self.family.golden is not None
        with torch.no_grad():
            return self.family.golden(self.reference.state_dict(), self.config, tokens, **options)


@attrs.frozen(eq=False)
class Variant:
    """One tiny model of a family: config fields, the attention implementation, and the seed of its weights."""

    overrides: Mapping[str, Any]
    attn: str
    seed: int


def variants(family: Family, *, count: int, seed: int = 0) -> list[Variant]:
    """Combine the values of a family's axes: in `count` variants each value of an axis comes up as often as another.

    Checks share them, since to build a model takes longer than to run it.
    """

    def spread(name: str, values: Sequence[Any]) -> list[Any]:
        many = [values[at % len(values)] for at in range(count)]
        random.Random(f"{seed} {name}").shuffle(many)
        return many

    axes = {name: spread(name, values) for name, values in family.axes.items()}
    attn, seeds = spread("attention", family.implementations), spread("weights", (0, 1))
    return [
        Variant({name: values[at] for name, values in axes.items()}, attn=attn[at], seed=seeds[at])
        for at in range(count)
    ]


def tiny_config(family: Family, overrides: Mapping[str, Any]) -> Any:
    """Make a config of the family."""
    return AutoConfig.for_model(family.model_type, **copy.deepcopy({**family.config, **overrides}))


def _build(family: Family, overrides: Mapping[str, Any], attn: str, seed: int) -> Any:
    config = tiny_config(family, overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn)
        if torch.get_default_dtype() == torch.float64 and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the only one that takes float64
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(family.noise(name, parameter))
            for name, buffer in model.named_buffers():
                if name in model.state_dict() and buffer.is_floating_point() and not buffer.any():
                    buffer.copy_(torch.randn_like(buffer) * 0.2)  # corrections of routers, which training moves
    return model.eval()


def tiny_model(family: Family, overrides: Mapping[str, Any]) -> Any:
    """Build HF's model alone."""
    return _build(family, overrides, family.implementations[0], 0)


def new_pair(
    family: Family,
    *,
    overrides: Mapping[str, Any] = {},
    attn: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """Build a pair of its own, for a check that trains, or changes parameters or mode."""
    attn = family.implementations[0] if attn is None else attn
    with true_float64() if dtype == torch.float64 else contextlib.nullcontext():
        hf, reference = (_build(family, overrides, attn, seed).to(dtype) for _ in range(2))
    reference.load_state_dict(copy.deepcopy(hf.state_dict()))
    return Pair(family=family, model=lens.load(hf), hf=hf, reference=reference, dtype=dtype)


@functools.lru_cache(maxsize=128)
def _shared(family: Family, key: tuple[tuple[str, Any], ...], attn: str, seed: int, dtype: torch.dtype) -> Pair:
    return new_pair(family, overrides={name: value.given for name, value in key}, attn=attn, seed=seed, dtype=dtype)


@attrs.frozen(eq=False)
class _ByText:
    """A config value that may not be hashable, told by what it looks like."""

    given: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByText) and repr(self.given) == repr(other.given)

    def __hash__(self) -> int:
        return hash(repr(self.given))


def shared_pair(
    family: Family, *, overrides: Mapping[str, Any], attn: str, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Pair:
    """Build a pair once for all checks that neither train it nor touch its parameters."""
    key = tuple((name, _ByText(value)) for name, value in sorted(overrides.items()))
    return _shared(family, key, attn, seed, dtype)


def forget_pairs() -> None:
    """Drop the pairs that checks share."""
    _shared.cache_clear()


def plain(one: Pair, ids: Tensor) -> Tensor:
    """Give HF's logits without a cache, as lens runs where nobody asked for one: with one HF may take another path."""
    return one.reference(ids, use_cache=False).logits
