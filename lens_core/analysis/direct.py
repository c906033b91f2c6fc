"""Direct logit attribution: what each part of the model itself added to a token's logit.

What enters the final norm is a sum, and given the scale that the norm had, a logit is linear in it. So the logit of a
token, or the difference of two, is a sum over components, layers, heads, neurons, experts, or over the positions that
heads and state-space mixers read from, plus a constant that no part adds. It holds on the checkpoint's own weights,
with nothing folded: the norm's gain and bias, the unembedding's bias and a factor on the logits are in it. Where a
model caps its logits (Gemma 2), it is the logit before the cap.

It is the direct effect alone: what a part did to later parts, which then wrote to the logit, counts as theirs.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Wang et al. 2022 (arXiv 2211.00593).
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments
from lens_core._decomposition import declaration_of, model_of, read_values, sliced
from lens_core._extras import need
from lens_core._inputs import read_input
from lens_core._logit_attrs import logit_bias, logits_of, token_pair
from lens_core._positions import check_ends
from lens_core.analysis._direct_units import check_unit, read_parts, unit_names
from lens_core.analysis._listed import listed
from lens_core.analysis.logit_lens import decoder
from lens_core.cache import ActivationCache
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["DirectLogitAttribution", "direct_logit_attribution"]

_SHOWN = 40  # entries of a picture


@attrs.frozen(kw_only=True, eq=False, repr=False)
class DirectLogitAttribution:
    """What each part added to a logit, or to a difference of two, in logits; at least float32.

    Attributes:
        values: `[entry, batch]` at one position, else `[entry, batch, pos]`; by source `[entry, batch, source]`: what
            came from each position. What mixes no positions (embeddings, MLPs, biases) stands at the target itself.
        labels: The entries: `embed`, `0_attn_out`, `L0` (a layer), `L0H3` (a head), `L0N12` (a neuron), `L0E2` (an
            expert), `L0` (a mixer, by source), `bias` (the sum of output biases).
        bias: What no part of the stream adds: the final norm's bias, and `b_U`.
        logit: The run's own logit, or difference, before a soft cap, from what the unembedding received.
        unit: What the entries are.
        positions: Indices along the cached axis where logits were attributed.
        tokens: Ids of the text at `positions`; by source, of all sources. None if they were not cached.
    """

    values: Float[Tensor, "entry batch *pos"] = attrs.field(repr=False)
    labels: tuple[str, ...] = attrs.field(repr=False)
    bias: Float[Tensor, "*batch_pos"] = attrs.field(repr=False)
    logit: Float[Tensor, "*batch_pos"] = attrs.field(repr=False)
    unit: str
    positions: tuple[int, ...]
    tokens: Int[Tensor, "batch pos"] | None = attrs.field(repr=False, default=None)
    decode: Callable[[int], str] = attrs.field(repr=False, default=str)
    """From a token id to what is shown."""

    @property
    def total(self) -> Float[Tensor, "*batch_pos"]:
        """The sum of everything: the logit, or difference."""
        parts = self.values.sum((0, -1)) if self.unit == "source" else self.values.sum(0)
        return parts + self.bias

    @property
    def error(self) -> float:
        """The largest difference between `total` and `logit`, as a share of the largest entry.

        About 1e-6 in float32, 1e-2 in bfloat16, whose stream is rounded after each addition. Large where a hook edited
        what the entries do not see, such as the residual stream itself.
        """
        largest = float(self.values.abs().max())
        return float((self.total - self.logit).abs().max()) / (largest or 1.0)

    @checks_arguments
    def top(self, k: int = 10, *, lowest: bool = False) -> list[tuple[str, float]]:
        """Give the entries that add most, as `(label, logits)`: the mean over rows and positions.

        Args:
            k: How many.
            lowest: Whether to give those that take away most, first.

        Returns:
            Labels and values; labels of sources say from where, as `L1H3 from 5` does.
        """
        labels, values = self._flat()
        index = listed(values.argsort(descending=not lowest, stable=True)[:k])
        return [(labels[at], float(values[at])) for at in index]

    def _flat(self) -> tuple[list[str], Tensor]:
        if self.unit != "source":
            return list(self.labels), self.values.reshape(len(self.labels), -1).mean(-1)
        values = self.values.mean(1)  # entry source
        sources = range(values.shape[1])
        return [f"{label} from {at}" for label in self.labels for at in sources], values.reshape(-1)

    def to_dataframe(self) -> Any:
        """Give a pandas data frame with one row for each value: `entry`, `batch`, `pos` or `source`, `token`, `logits`.

        The constant is in it as the entry `(constant)`, by source at the target: a row's values sum to the logit.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas = need("pandas", "a data frame")
        return pandas.DataFrame(list(self._records()))

    def _records(self) -> Iterator[dict[str, Any]]:
        by_source = self.unit == "source"
        values = self.values if self.values.ndim == 3 else self.values[..., None]
        bias = self.bias.reshape(values.shape[1], -1)
        places = range(values.shape[2]) if by_source else self.positions
        for entry, row, at in product(*map(range, values.shape)):
            yield self._record(self.labels[entry], row, at, places[at], float(values[entry, row, at]))
        for row, at in product(*map(range, bias.shape)):
            column = self.positions[0] if by_source else at
            yield self._record("(constant)", row, column, places[column], float(bias[row, at]))

    def _record(self, label: str, row: int, at: int, place: int, value: float) -> dict[str, Any]:
        token = {} if self.tokens is None else {"token": self.decode(int(self.tokens[row, at]))}
        axis = "source" if self.unit == "source" else "pos"
        return {"entry": label, "batch": row, axis: place, **token, "logits": value}

    @checks_arguments
    def picture(self, row: int | None = None, *, title: str | None = None) -> view.Picture:
        """Draw the largest entries as bars; by source, as a grid of entries and tokens.

        Args:
            row: A row of the batch; None for the mean over rows (and, in bars, positions).
            title: Stands above the picture.

        Raises:
            ArgumentError: No such row.
        """
        values = self.values.mean(1) if row is None else sliced(self.values, 1, row)
        title = title or f"Direct logit attribution by {self.unit}"
        size = values.reshape(len(values), -1)
        order: list[int] = listed(size.abs().sum(-1).argsort(descending=True, stable=True)[:_SHOWN].sort().values)
        labels = [self.labels[at] for at in order]
        if self.unit != "source":
            return view.bars(labels, listed(size.mean(-1)[order]), title=title, unit="logits")
        texts = [str(at) for at in range(values.shape[-1])]
        if self.tokens is not None and (row is not None or len(self.tokens) == 1):
            texts = [self.decode(token) for token in listed(self.tokens[row or 0])]
        return view.grid(labels, texts, listed(values[order]), title=title, unit="logits")

    def __repr__(self) -> str:
        """Show the largest."""
        largest = ", ".join(f"{label} {value:+.3g}" for label, value in self.top(3))
        return f"DirectLogitAttribution(by {self.unit}, in logits: {largest}, of {len(self.labels)} entries)"

    def _repr_html_(self) -> str:
        return self.picture()._repr_html_()  # pyright: ignore[reportPrivateUsage]


@checks_arguments
def direct_logit_attribution(
    model: "LensModel | ActivationCache",
    input: Any = None,
    answer_tokens: Any = None,
    incorrect_tokens: Any = None,
    *,
    unit: Literal["component", "layer", "head", "neuron", "expert", "source"] = "component",
    pos: Any = -1,
    cache: ActivationCache | None = None,
    **kwargs: Any,
) -> DirectLogitAttribution:
    """Attribute a token's logit, or the difference of two tokens' logits, to what wrote to the residual stream.

    Units: `"component"` (embeddings, and what each block's attention, mixer and MLP added); `"layer"` (these summed by
    block); `"head"` (heads, mixers and MLPs); `"neuron"` (heads, mixers and single MLP neurons, whose output vectors
    are never made); `"expert"` (components, with mixtures of experts taken apart: zero where an expert was not chosen);
    `"source"` (each head's pattern times values, and each mixer's convolution and scan, by the position read from).

    Args:
        model: The model; or a cache, and no input.
        input: What to run, as in `forward`; what the unit needs is cached then.
        answer_tokens: One token as text or id; or ids `[batch]`, one for each row; or `[batch, pos]`, for the positions
            of `pos`, either axis of which may be 1.
        incorrect_tokens: Tokens whose logits are subtracted: one, or of the same shape.
        unit: What the entries are.
        pos: Positions along the cached axis where logits are attributed: an int drops the axis; a slice or several keep
            it; None for all. By source, one int.
        cache: A cache to read instead. The default names will do, but for `"expert"`: `mlp.hook_expert_out` is starred.
        **kwargs: As in `forward`, with an input.

    Returns:
        Entries that with the constant `bias` sum to the logit: `error` says how nearly. A cache without a batch axis
        gives a batch of one. It costs a pass over the cached values for each distinct pair of tokens.

    Raises:
        CacheError: A value that it needs was not cached, or the cache has no model or leaves out positions.
        ArgumentError: No such unit, in this model or at all; no such position; tokens that do not fit; no answer; both
            an input and a cache, or none.
        TokenizerError: Text that is not one token.
        TokenIdError: An id outside the vocabulary.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> text = "king apple river moon book king apple river"
        >>> found = direct_logit_attribution(model, text, "moon", "king", unit="head")
        >>> [label for label, _ in found.top(2)]
        ['1_mlp_out', 'L1H0']
        >>> found.error < 1e-4
        True
    """
    if answer_tokens is None:
        raise ArgumentError("give answer_tokens, the tokens whose logits are attributed")
    if isinstance(model, ActivationCache):
        model, cache, twice = model_of(model), model, cache is not None
    else:
        twice = False
    if twice or (input is None) == (cache is None):
        raise ArgumentError("give an input to run or a cache to read: one of them")
    check_unit(model, unit)
    with torch.no_grad():
        filled: Any = cache
        if cache is None:
            check_ends(pos, read_input(model, input, **kwargs).whole_mask, "pos")
            _, filled = model.run_with_cache(input, names_filter=unit_names(model, unit), return_type=None, **kwargs)
        return _attribute(_batched(filled), answer_tokens, incorrect_tokens, unit, pos)


def _attribute(cache: ActivationCache, answer: Any, incorrect: Any, unit: str, pos: Any) -> DirectLogitAttribution:
    name = "unembed.hook_in" if "unembed.hook_in" in cache else "ln_final.hook_out"
    (received,) = read_values(cache, [name])
    batch, n_pos, _ = received.shape
    chosen: list[int] = listed(sliced(torch.arange(n_pos), 0, pos).reshape(-1))
    is_one = sliced(torch.arange(n_pos), 0, pos).ndim == 0
    if unit == "source" and not is_one:
        raise ArgumentError(f"by source, logits are attributed at one position, an int; got {pos!r}")
    if not chosen:
        raise ArgumentError(f"pos={pos!r} leaves none of {n_pos} positions")
    right, wrong = token_pair(cache, answer, incorrect)
    right = _spread(right, batch, len(chosen), is_one=is_one)
    wrong = None if wrong is None else _spread(wrong, batch, len(chosen), is_one=is_one)
    received = received[:, torch.tensor(chosen, device=received.device)]
    logit = logits_of(cache, received, right, wrong)
    bias = logit_bias(cache, right, wrong, logit)
    values, labels = _by_pair(cache, right, wrong, unit, chosen)
    if is_one:
        logit, bias = logit[:, 0], bias[:, 0]
        values = values if unit == "source" else values[..., 0]
    tokens = cache.get("hook_tokens")
    return DirectLogitAttribution(
        values=values,
        labels=labels,
        bias=bias,
        logit=logit,
        unit=unit,
        positions=tuple(chosen),
        tokens=tokens if tokens is None or unit == "source" else tokens[:, chosen],
        decode=decoder(model_of(cache)),
    )


def _by_pair(
    cache: ActivationCache, right: Tensor, wrong: Tensor | None, unit: str, chosen: list[int]
) -> tuple[Tensor, tuple[str, ...]]:
    """Attribute for each distinct pair of tokens, at the rows and positions that have it."""
    pairs = torch.stack([right, right if wrong is None else wrong], -1)
    found: Tensor | None = None
    labels = list[str]()
    for right_one, wrong_one in sorted({(int(one), int(other)) for one, other in listed(pairs.flatten(0, 1))}):
        mask = (pairs[..., 0] == right_one) & (pairs[..., 1] == wrong_one)
        rows, columns = (listed(mask.any(axis).nonzero().flatten()) for axis in (1, 0))
        whole = len(rows) == len(mask)
        part = cache if whole else cache.apply_slice_to_batch_dim(slice(rows[0], rows[-1] + 1))
        if not whole and len(rows) != rows[-1] + 1 - rows[0]:
            part = cache.apply_slice_to_batch_dim(rows)
        onto = cache.logit_directions(right_one, None if wrong is None else wrong_one)
        values, labels = read_parts(part, onto, unit, [chosen[at] for at in columns])
        if found is None:
            width = values.shape[2] if unit == "source" else len(chosen)
            found = values.new_zeros(len(values), *mask.shape[:1], width)
        if unit == "source":
            found[:, rows] = values
        else:
            block = found[:, rows][:, :, columns]
            inside = mask[rows][:, columns].to(values.device)
            found[:, torch.tensor(rows)[:, None], torch.tensor(columns)] = torch.where(inside, values, block)
    assert found is not None
    return found, tuple(labels)


def _spread(ids: Tensor, batch: int, pos: int, *, is_one: bool) -> Int[Tensor, "batch pos"]:
    """Give the token of each row and position."""
    wanted = ids[:, None] if ids.ndim == 1 else ids
    if ids.ndim > 2 or any(a not in (1, b) for a, b in zip(wanted.shape, (batch, pos), strict=False)):
        shape = f"[{batch}]" if is_one else f"[{batch}] or [{batch}, {pos}]"
        raise ArgumentError(f"tokens are one token, or ids {shape}; got shape {list(ids.shape)}")
    return wanted.expand(batch, pos)


def _batched(cache: ActivationCache) -> ActivationCache:
    """Give a cache with a batch axis, of one row if it had none."""
    if cache.has_batch_dim:
        return cache
    declaration_of(cache)
    tensors = {name: cache[name][None] for name in cache if not name.startswith("hf.")}
    made = ActivationCache(tensors, table=cache.table, model=cache.model)
    made.has_gaps = cache.has_gaps
    return made
