"""Two models of one architecture, such as a base and a finetuned one, compared on the same texts and weight by weight.

At every hook point and position, with a the first model's value and b the second's, flattened to one vector: the
relative difference ‖b - a‖ / ‖a‖ and the cosine; at the end KL(a ‖ b) of the next token, in nats. Texts go through a
batch at a time, and only sums stay.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import attrs
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core.analysis._batches import Batch, batches, token_rows
from lens_core.analysis._comparison import Comparison, Context, WeightChange
from lens_core.analysis._listed import listed
from lens_core.analysis.logit_lens import decoder
from lens_core.errors import ArgumentError
from lens_core.hook_points import NameFilter

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["Comparison", "Context", "WeightChange", "compare", "compare_weights"]

_CONTEXT = 12  # tokens before a position that are shown with it
_Place: TypeAlias = tuple[float, int, int, Tensor, int, int]
"""A divergence, the text, the position, the tokens up to it, and the most likely next token of a and of b."""


@checks_arguments
def compare(
    a: "LensModel",
    b: "LensModel",
    texts: Any,
    *,
    names: NameFilter = None,
    batch_size: int = 8,
    contexts: int = 20,
    weights: bool = True,
    prepend_bos: bool | None = None,
) -> Comparison:
    """Say where two models differ: at which hook points, positions and tokens, in which texts, in which weights.

    It costs a forward of each model for each batch. One batch's activations of one model are held at a time, its logits
    of both, and sums by position and by token.

    Args:
        a: The model that is compared to, such as the base.
        b: The other, of the same type and sizes.
        texts: A text, texts, rows of ids, or a tensor of ids `[row, pos]`; an iterable is read once, a batch at a time.
        names: Hook points; None for the embeddings, the residual stream and what is added to it. Values that are no
            floating numbers are left out, and so are masked scores.
        batch_size: Rows at a time.
        contexts: How many of the places where the next token's distributions differ most to keep.
        weights: Whether to compare the weights as well.
        prepend_bos: As in `forward`.

    Raises:
        ArgumentError: Models of other types, sizes or tokenisers; in training mode; names without floating values.
        UnknownHookError: No such hook point.
        InputError: Texts that the models cannot take, or none.

    Example:
        >>> import copy, torch, lens_core as lens
        >>> base = lens.load("toy:gpt2")
        >>> tuned = copy.deepcopy(base)
        >>> with torch.no_grad():
        ...     _ = tuned.weight("W_out", 1).mul_(1.1)
        >>> found = lens.compare(base, tuned, ["the cat sat on the mat.", "king apple river"])
        >>> found.top(2)
        [('blocks.1.hook_mlp_out', ...), ('blocks.1.hook_resid_post', ...)]
        >>> found.top_weights(1)[0].name
        'transformer.h.1.mlp.c_proj.weight'
    """
    _check_models(a, b)
    chosen = _names(a, names)
    sums = _Sums(names=chosen, n_contexts=contexts)
    for batch in batches(a, _rows(a, b, texts, prepend_bos), batch_size):
        _take(a, b, batch, sums)
    return sums.finished(a, b, compare_weights(a, b) if weights else ())


@checks_arguments
def compare_weights(a: "LensModel", b: "LensModel") -> tuple[WeightChange, ...]:
    """Compare the parameters of two models, by HF's names: those that both have, in the same shape, as numbers.

    Quantised and offloaded ones are left out. It costs two copies of one parameter at a time.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> max(change.relative for change in compare_weights(model, model))
        0.0
    """
    theirs = dict(b.bare_model.named_parameters())
    found = list[WeightChange]()
    for name, own in a.bare_model.named_parameters():
        other = theirs.get(name)
        if other is None or other.shape != own.shape or own.is_meta or other.is_meta:
            continue
        if own.is_floating_point() and other.is_floating_point():
            dtype = torch.promote_types(torch.promote_types(own.dtype, other.dtype), torch.float32)
            one = own.detach().to(dtype)
            size, change = float(one.norm()), float((other.detach().to(one) - one).norm())
            found.append(WeightChange(name=name, layer=_layer_of(a, name), size=size, change=change))
    return tuple(found)


def _layer_of(model: "LensModel", name: str) -> int | None:
    rest = name.removeprefix(f"{model.declaration.blocks}.")
    return int(rest.partition(".")[0]) if rest != name else None


# ---------------------------------------------------------------------- what is compared


def _check_models(a: "LensModel", b: "LensModel") -> None:
    ours, theirs = a.cfg, b.cfg
    if ours.model_type != theirs.model_type:
        raise ArgumentError(f"the models are of the types {ours.model_type!r} and {theirs.model_type!r}; give one type")
    sizes = {"n_layers": (ours.n_layers, theirs.n_layers)}
    sizes |= {axis: (size, theirs.sizes[axis]) for axis, size in ours.sizes.items()}
    for axis, (own, other) in sizes.items():
        if own != other:
            raise ArgumentError(f"the models differ in {axis}: {own} and {other}; nothing corresponds")
    if list(a.table) != list(b.table):
        only = next(iter(set(a.table) ^ set(b.table)), "their order")
        raise ArgumentError(f"the models have different hook points: {only}")
    if a.bare_model.training or b.bare_model.training:
        raise ArgumentError("a model is in training mode, where dropout draws; call .eval() on both first")
    if a.tokenizer is not None and b.tokenizer is not None and a.tokenizer.get_vocab() != b.tokenizer.get_vocab():
        raise ArgumentError("the models' tokenizers have different vocabularies: a token would be another's")


def _names(model: "LensModel", names: NameFilter) -> tuple[str, ...]:
    table = model.table
    if names is None:
        parts = {"hook_resid_post", *model.declaration.writers, *model.declaration.embeddings}
        return tuple(name for name, point in table.items() if point.part in parts)
    chosen = table.select(names).names
    other = [name for name in chosen if name.startswith("hf.") or table[name].position_axis is None]
    if other:
        raise ArgumentError(f"{other[0]!r} has no positions to compare by; give names of our own")
    return chosen


def _rows(a: "LensModel", b: "LensModel", texts: Any, prepend_bos: bool | None) -> Iterator[Tensor]:
    """Give ids, which both tokenizers agree on."""
    given = [texts] if isinstance(texts, str) else texts
    is_ids = isinstance(given, Tensor) or (isinstance(given, list | tuple) and not _is_text(cast("Any", given)))
    if a.tokenizer is not None and b.tokenizer is not None and isinstance(given, Iterable) and not is_ids:
        given = _agreed(a, b, cast("Iterable[Any]", given), prepend_bos)
    return token_rows(b if a.tokenizer is None else a, given, prepend_bos=prepend_bos)


def _is_text(given: Any) -> bool:
    return bool(given) and isinstance(given[0], str)


def _agreed(a: "LensModel", b: "LensModel", texts: Iterable[Any], prepend_bos: bool | None) -> Iterator[Any]:
    """Hand texts on, seeing that both tokenizers read each alike."""
    for one in texts:
        if isinstance(one, str):
            (own,), (other,) = (token_rows(model, [one], prepend_bos=prepend_bos) for model in (a, b))
            if not torch.equal(own, other):
                raise ArgumentError(
                    f"the tokenizers read {one[:60]!r} as {listed(own)[:8]} and {listed(other)[:8]}; give ids"
                )
        yield one


# ---------------------------------------------------------------------- sums


@torch.no_grad()
def _take(a: "LensModel", b: "LensModel", batch: Batch, sums: "_Sums") -> None:
    """Run a batch through both; the second model's values are met as they come, and not kept."""
    logits, cache = a.run_with_cache(batch.tokens, names_filter=list(sums.names), **batch.call)
    real = batch.attention_mask.bool()

    def meet(name: str, value: Tensor, hook: Any) -> None:
        axis, first = cast("int", a.table[name].position_axis), 0
        met = cache[name]
        if value.shape[axis] != met.shape[axis]:  # a state, shown after each position
            first = int(hook.positions[0])
            met = met.narrow(axis, first, value.shape[axis])
        else:
            del cache[name]
        if value.is_floating_point():
            own, other = _vectors(met.to(value.device), axis), _vectors(value, axis)
            sums.add(name, own, other, real[:, first : first + value.shape[axis]], first)

    hooks = [(name, partial(meet, name)) for name in sums.names]
    moved = {name: value.to(b.input_device) for name, value in batch.call.items()}
    changed = b.run_with_hooks(batch.tokens.to(b.input_device), fwd_hooks=hooks, **moved)
    for row, (own, other) in enumerate(zip(logits, changed.to(logits.device), strict=True)):
        sums.add_logits(batch.tokens[row], own, other, real[row], batch.first + row)


def _vectors(value: Tensor, axis: int) -> Float[Tensor, "batch pos width"]:
    """Bring a value to one vector for each position, in at least float32; what is masked becomes 0."""
    wide = value.to(torch.promote_types(value.dtype, torch.float32)).movedim(axis, 1).flatten(2)
    return wide.masked_fill(wide == -torch.inf, 0.0)


@attrs.define(kw_only=True, eq=False)
class _Sums:
    """What is kept of the texts so far: sums by position, and by token."""

    names: tuple[str, ...]
    n_contexts: int
    points: dict[str, Float[Tensor, "four pos"]] = attrs.field(factory=dict[str, Tensor])
    """By hook point and position: of ‖b - a‖², of ‖a‖², of the cosine, and of positions."""
    kl: Float[Tensor, "two pos"] = attrs.field(factory=lambda: torch.zeros(2, 0, dtype=torch.float64))
    """By position: of the divergence, and of positions."""
    probs: tuple[Tensor, Tensor] | None = None
    """By token: of the probability in a and in b."""
    losses: list[float] = attrs.field(factory=lambda: [0.0, 0.0])
    n_next: int = 0
    n_agree: int = 0
    contexts: list[_Place] = attrs.field(factory=list[_Place])

    def add(self, name: str, own: Tensor, other: Tensor, real: Tensor, first: int) -> None:
        """Take one hook point's vectors of one batch, from a position on."""
        real = real.to(own.device)
        size, theirs, off = (each.pow(2).sum(-1).sqrt() for each in (own, other, other - own))
        cosine = F.cosine_similarity(own, other, dim=-1)
        cosine = torch.where((size == 0) & (theirs == 0), 1.0, cosine)
        rows = torch.stack([off**2, size**2, cosine, torch.ones_like(off)]) * real
        found = F.pad(rows.sum(1).double().cpu(), (first, 0))
        self.points[name] = _sum(self.points[name], found) if name in self.points else found

    def add_logits(self, tokens: Tensor, own: Tensor, other: Tensor, real: Tensor, text: int) -> None:
        """Take the logits of one row."""
        length = int(real.sum())  # padding is on the right
        wide = torch.promote_types(own.dtype, torch.float32)
        log_a, log_b = (logits[:length].to(wide).log_softmax(-1) for logits in (own, other))
        probs = log_a.exp()
        kl = torch.where(probs == 0, 0.0, probs * (log_a - log_b)).sum(-1).clamp(min=0)
        found = torch.stack([kl, torch.ones_like(kl)]).double().cpu()
        self.kl = _sum(self.kl, found)
        own_probs, other_probs = probs.sum(0).double().cpu(), log_b.exp().sum(0).double().cpu()
        before = (0.0, 0.0) if self.probs is None else self.probs
        self.probs = before[0] + own_probs, before[1] + other_probs
        following = tokens[1:length, None].to(own.device)
        for index, log_probs in enumerate((log_a, log_b)):
            self.losses[index] -= float(log_probs[:-1].gather(-1, following).sum())
        self.n_next += length - 1
        best = log_a.argmax(-1), log_b.argmax(-1)
        self.n_agree += int((best[0] == best[1]).sum())
        for at in listed(kl.topk(min(self.n_contexts, length)).indices):
            read = tokens[max(0, at + 1 - _CONTEXT) : at + 1].cpu()
            self.contexts.append((float(kl[at]), text, at, read, int(best[0][at]), int(best[1][at])))
        self.contexts = sorted(self.contexts, key=lambda one: -one[0])[: self.n_contexts]

    def finished(self, a: "LensModel", b: "LensModel", weights: Sequence[WeightChange]) -> Comparison:
        """Make the record."""
        if not self.points:
            raise ArgumentError("none of these hook points holds floating numbers; choose others")
        decode = decoder(a if a.tokenizer is not None else b)
        names = [name for name in self.names if name in self.points]
        sums = torch.stack([self.points[name] for name in names])  # point four pos
        own, other = cast("tuple[Tensor, Tensor]", self.probs)
        n_positions = self.kl[1].sum()
        return Comparison(
            names=tuple(names),
            layers=tuple(a.table[name].layer for name in names),
            parts=tuple(a.table[name].part for name in names),
            relative=_relative(sums.sum(-1)),
            cosine=sums[:, 2].sum(-1) / sums[:, 3].sum(-1),
            relative_by_pos=_relative(sums),
            cosine_by_pos=sums[:, 2] / sums[:, 3],
            kl=float(self.kl[0].sum() / n_positions),
            kl_by_pos=self.kl[0] / self.kl[1],
            agreement=self.n_agree / int(n_positions),
            losses=(self.losses[0] / max(1, self.n_next), self.losses[1] / max(1, self.n_next)),
            probs=torch.stack([own, other]) / n_positions,
            contexts=tuple(_context(one, decode) for one in self.contexts),
            weights=tuple(weights),
            decode=decode,
        )


def _context(found: _Place, decode: Callable[[int], str]) -> Context:
    kl, text, pos, before, own, other = found
    shown = "".join(decode(token) for token in listed(before))
    return Context(kl=kl, text=text, pos=pos, before=shown, top_a=decode(own), top_b=decode(other))


def _relative(sums: Float[Tensor, "point four ..."]) -> Float[Tensor, "point ..."]:
    off, size = sums[:, 0], sums[:, 1]
    return torch.where(off == 0, 0.0, (off / size).sqrt())


def _sum(one: Tensor, other: Tensor) -> Tensor:
    """Add sums by position, of which one may have more."""
    width = max(one.shape[-1], other.shape[-1])
    return F.pad(one, (0, width - one.shape[-1])) + F.pad(other, (0, width - other.shape[-1]))
