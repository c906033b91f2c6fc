"""A model's state after some positions, as a value: calls go on from it and leave it as it is."""

import inspect
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import Cache

from lens_core._arguments import checks_arguments, is_whole
from lens_core._hf_cache import (
    cached_length,
    copied,
    copyable,
    has_attention,
    is_empty,
    new_cache,
    note_length,
    tensors_in,
)
from lens_core._pass_log import applied_passes
from lens_core.errors import ArgumentError, StateError

if TYPE_CHECKING:
    from lens_core._hooking import Hooked

__all__ = [
    "NOTHING",
    "Past",
    "State",
    "check_padding",
    "extended",
    "facts",
    "fills_cache",
    "read_past",
    "takes_position_ids",
    "unlike",
]


@attrs.frozen(kw_only=True, eq=False, repr=False)
class State:
    """What a model knows after some positions: HF's own cache, and what HF's cache does not say.

    Get one by `return_state=True`, go on from it by `past_key_values=`. No call changes a state: each works on a copy
    that shares what HF only replaces (keys and values), so one state may be continued as often as you like, and a call
    that fails half-way does no harm. What you write into the tensors of `cache` yourself is seen by every later
    continuation, and by whatever else shares them: `fork` first.

    Attributes:
        cache: HF's `DynamicCache`: keys and values, and the convolution windows and recurrent states of state space
            models, in the graph that they were computed in (under `torch.no_grad()`, in none). With tensor parallelism
            each process has the keys and values of its own heads.
        attention_mask: 1 for real tokens, 0 for padding; None where nothing is padding.
        tokens: The ids so far; None where any position was given as embeddings, or lens was not told.
        length: Positions so far, padding included; None reads it from the cache, which a state space model's does not
            know.
        origin: The config of the model that it is of; empty if lens was not told.

    Raises:
        StateError: A kind of cache that cannot be copied faithfully, or a mask or ids of another length.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> logits, state = model("the cat sat", return_state=True)
        >>> state
        State(1 row of 4 positions, 2 layers, 0.0 MiB)
        >>> more, longer = model(" on the mat", past_key_values=state, return_state=True)
        >>> state.length < longer.length
        True
    """

    cache: Any = attrs.field(converter=cast("Any", copyable))
    attention_mask: Int[Tensor, "batch pos"] | None = None
    tokens: Int[Tensor, "batch pos"] | None = None
    length: int = attrs.field(default=attrs.Factory(lambda self: cached_length(self.cache), takes_self=True))
    origin: Mapping[str, Any] = attrs.field(factory=dict[str, Any])

    def __attrs_post_init__(self) -> None:
        """See that all parts are of one length."""
        if has_attention(self.cache) and cached_length(self.cache) != self.length:
            raise StateError(f"length={self.length}, and the cache holds {cached_length(self.cache)} positions")
        if self.length < 0 or (self.length == 0) != is_empty(self.cache):
            held = "nothing" if is_empty(self.cache) else "something"
            raise StateError(f"length={self.length}, and the cache holds {held}")
        note_length(self.cache, self.length)
        for name, given in (("attention_mask", self.attention_mask), ("tokens", self.tokens)):
            if given is not None and given.shape != (self.batch or given.shape[0], self.length):
                raise StateError(
                    f"the {name} of a state of {self.batch} rows and {self.length} positions have shape "
                    f"{tuple(given.shape)}"
                )

    @property
    def batch(self) -> int | None:
        """Rows; None for an empty state."""
        tensors = (tensor for layer in self.cache.layers for _, tensor in tensors_in(layer))
        return next((tensor.shape[0] for tensor in tensors), None)

    def __repr__(self) -> str:
        """Show the size."""
        tensors = [tensor for layer in self.cache.layers for _, tensor in tensors_in(layer)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
        rows = f"{self.batch} row{'' if self.batch == 1 else 's'}"
        return f"State({rows} of {self.length} positions, {len(self.cache.layers)} layers, {size:.1f} MiB)"

    def __deepcopy__(self, memo: dict[int, Any]) -> "State":
        """Copy every tensor, in the graph that it is in."""
        return self.fork()

    @checks_arguments
    def fork(self, n: int = 1) -> "State":
        """Copy the state, every tensor included; nothing is shared with this one.

        Args:
            n: How often each row stands in the copy, one beside the other, to continue it in `n` ways in one batch.

        Raises:
            ArgumentError: `n` is not a positive number.

        Example:
            >>> import lens_core as lens
            >>> model = lens.load("toy:gpt2")
            >>> _, state = model("the cat sat", return_state=True)
            >>> logits = model([" on", " mat"], past_key_values=state.fork(n=2))
            >>> logits.shape[0]
            2
        """
        if not is_whole(n):
            raise ArgumentError(f"n is how often each row stands in the fork, a positive number; got {n!r}")

        def repeated(given: Tensor | None) -> Tensor | None:
            return None if given is None else given.repeat_interleave(n, dim=0)

        return attrs.evolve(
            self,
            cache=copied(self.cache, length=self.length, repeats=n),
            attention_mask=repeated(self.attention_mask),
            tokens=repeated(self.tokens),
        )


# ---------------------------------------------------------------------- going on


@attrs.frozen(kw_only=True, eq=False)
class Past:
    """What a call of the model goes on from."""

    cache: Any = None
    """What HF is given: a working copy of a state's, the user's own, or none."""
    length: int = 0
    state: State | None = None
    keeps_state: bool = False
    """Whether the call gives a state back."""

    @property
    def derives_positions(self) -> bool:
        """Whether position ids are to be the same whichever call they are derived in.

        HF's `generate` counts real tokens, and the forward of a rotary model counts slots; a state may pass from one to
        the other.
        """
        return self.keeps_state or self.state is not None

    @property
    def is_kept(self) -> bool:
        """Whether later calls go on from what this one leaves: a state that comes back, or a cache of the user's."""
        return self.keeps_state or (self.cache is not None and self.state is None)

    def joined(self, mask: Tensor | None, *, batch: int, n_pos: int) -> Tensor | None:
        """Put a state's mask before that of the new positions, which may also come with the state's part.

        Raises:
            StateError: Another batch than the state's, or a mask that contradicts it.
        """
        state = self.state
        if state is None or not self.length:
            return mask
        if batch != state.batch:
            raise StateError(
                f"the input has {batch} rows and the state {state.batch}; state.fork(n=...) repeats each row of a state"
            )
        before = state.attention_mask
        if mask is not None and mask.ndim == 2 and mask.shape[1] == self.length + n_pos:
            given, mask = mask[:, : self.length], mask[:, self.length :]
            if not torch.equal(given.bool(), (torch.ones_like(given) if before is None else before.to(given)).bool()):
                raise StateError("attention_mask contradicts the state's own for the positions before; leave these out")
        if before is None and mask is None:
            return None
        device = mask.device if mask is not None else cast("Tensor", before).device
        ones = torch.ones(batch, self.length, dtype=torch.long, device=device)
        mask = torch.ones(batch, n_pos, dtype=torch.long, device=device) if mask is None else mask.long()
        return torch.cat([ones if before is None else before.to(device), mask], dim=1)


NOTHING = Past()


def read_past(model: "Hooked", given: Any, *, keeps_state: bool = False) -> Past:
    """Bring what the user gave as `past_key_values` to what HF takes: a state as a working copy, a cache as it is.

    Raises:
        ArgumentError: Neither a state nor a cache of HF's, or an HF cache where a state is to come back.
        StateError: A state of another model.
    """
    if given is None:
        return Past(keeps_state=True) if keeps_state else NOTHING
    if isinstance(given, State):
        check_origin(model, given)
        cache = copied(given.cache, length=given.length, is_working=True) if given.length else None
        return Past(cache=cache, length=given.length, state=given, keeps_state=keeps_state)
    if not isinstance(given, Cache):
        raise ArgumentError(
            f"past_key_values is a state (return_state=True gives one) or a cache of HF's; got {type(given).__name__}"
        )
    if keeps_state:
        raise ArgumentError(
            "return_state=True goes on from a state; HF extends a cache of its own in place. "
            "Give past_key_values=lens_core.State(cache=cache), which stays as it is"
        )
    return Past(cache=given, length=cached_length(given))


def fills_cache(past: Past, use_cache: bool | None, *, is_partial: bool) -> bool:
    """Decide whether HF fills a cache in a call; `is_partial` says that some blocks are left out.

    Raises:
        ArgumentError: Nobody could get at the cache, or it would not be whole.
    """
    if is_partial and past.is_kept:
        raise ArgumentError(
            "start_at_layer and stop_at_layer leave blocks out, whose part of the cache would be missing: return no "
            "state, and go on from a state (return_state=True gives one), which no call changes, not from an HF cache"
        )
    if use_cache and past.cache is None and not past.keeps_state:
        raise ArgumentError("use_cache=True fills a cache that nobody would get; return_state=True gives it back")
    if past.keeps_state and use_cache is False:
        raise ArgumentError("return_state=True gives back the model's cache: leave use_cache=False out")
    return past.keeps_state or past.cache is not None if use_cache is None else use_cache


def extended(model: "Hooked", past: Past, cache: Any, tokens: Tensor | None, mask: Tensor | None) -> State:
    """Make the state after a call.

    Args:
        model: The model that was called.
        past: What it went on from.
        cache: HF's cache after it.
        tokens: The ids of the new positions that were run, or None.
        mask: Of all positions, or None.

    Raises:
        StateError: HF gave no cache back, or one that cannot be copied.
    """
    if cache is None:
        raise StateError(
            f"{type(model.bare_model).__name__} gave no cache back; gradient checkpointing in training mode turns it "
            "off: call model.eval() first"
        )
    before = None if past.state is None or not past.length else past.state.tokens
    if before is not None and tokens is not None:
        tokens = torch.cat([before.to(tokens.device), tokens], dim=1)
    elif past.length:
        tokens = None
    return State(
        cache=cache,
        attention_mask=None if mask is None or bool(mask.all()) else mask,
        tokens=None if tokens is None else tokens.clone(),
        origin=facts(model),
    )


def check_padding(model: "Hooked", past: Past, mask: Tensor | None) -> None:
    """See that padding does no harm where a sequence goes on.

    Padding after a real token stands between tokens once the sequence goes on. Full attention skips it. A recurrent
    state decays over it, a sliding window is shorter by it, and for HF's own caches nobody tells positions from slots.

    Raises:
        StateError: It would give wrong values.
    """
    if mask is None or not (past.length or past.keeps_state):
        return
    real = mask.bool()
    closed: Bool[Tensor, "batch pos"] = (real.cumsum(1) > 0) & ~real
    if not past.keeps_state:  # trailing padding harms nothing that is still to come
        closed = closed & (real.flip(1).cumsum(1).flip(1) > 0)
    forgets, knows_positions = _forgets(model), past.derives_positions or model.declaration.has_absolute_positions
    if not bool(closed.any()) or (knows_positions and not forgets):
        return
    row, position = (int(index) for index in closed.nonzero()[0])
    why = (
        f"{type(model.bare_model).__name__} has recurrent states or sliding windows, which do not skip it"
        if forgets
        else "in a cache of HF's own, positions would be slots; go on from a state (return_state=True)"
    )
    raise StateError(
        f"row {row} has padding at position {position}, after a real token, where the sequence goes on: {why}. "
        "Pad what comes first on the left, and what comes last on the right; or run rows of unequal length one by one"
    )


def _forgets(model: "Hooked") -> bool:
    """Whether any layer's memory is not of all positions: a recurrent state or a sliding window."""
    layers = new_cache(model.bare_model).layers
    return any(hasattr(layer, "conv_states") or getattr(layer, "is_sliding", False) for layer in layers)


# ---------------------------------------------------------------------- whose state


def takes_position_ids(model: "Hooked") -> bool:
    """Whether HF's forward takes position ids; state space models have none."""
    return "position_ids" in inspect.signature(model.bare_model.forward).parameters


_IMMATERIAL = (
    "architectures",
    "dtype",
    "attn_implementation",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def config_facts(hf_model: Any) -> dict[str, Any]:
    """Take what may change a value from HF's config, in what JSON can say."""
    config: dict[str, Any] = hf_model.config.get_text_config(decoder=True).to_dict()
    immaterial = ("drop", "initializer", "summary_", "_token_id")
    plain = {
        name: value
        for name, value in config.items()
        if name not in _IMMATERIAL and not name.startswith("_") and not any(part in name for part in immaterial)
    }
    return json.loads(json.dumps(plain, default=str))


def facts(model: "Hooked") -> dict[str, Any]:
    """Say what a state depends on: dtype, passes over the weights, and HF's config less what changes no value."""
    passes = list(applied_passes(model.bare_model))
    return {**model.config_facts, "dtype": str(model.bare_model.dtype), "passes": passes}


def unlike(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Tell in which facts that both know two models differ; empty if in none."""
    names = [name for name in theirs if name in ours and theirs[name] != ours[name]]
    return ", ".join(f"{name} is {theirs[name]!r} there and {ours[name]!r} here" for name in names[:4])


def check_origin(model: "Hooked", state: State) -> None:
    """See that a state could be of a model; another with the same config cannot be told.

    Raises:
        StateError: It could not.
    """
    difference = unlike(state.origin, facts(model)) if state.origin else ""
    n_layers, theirs = model.declaration.cfg.n_layers, len(state.cache.layers)
    if not difference and theirs not in (0, n_layers):
        difference = f"it has {theirs} layers, and this model {n_layers}"
    if difference:
        raise StateError(f"the state is of another model: {difference}; give the model that made it")
