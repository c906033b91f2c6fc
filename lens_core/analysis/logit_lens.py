"""The logit lens: what the model would say next if the residual stream ended at each layer.

Every entry of the stream goes through the model's own final norm, on the entry's own statistics, its unembedding, and
whatever makes logits of that (a factor, a soft cap), so that the last entry gives the model's own logits.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; divergence from the final distribution as in Belrose et
al. 2023 (arXiv 2303.08112), who also say what is wrong with it: see `lens_core.analysis.tuned_lens`.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments
from lens_core._decomposition import model_of, read_values, sliced, stream_name
from lens_core._extras import need
from lens_core._logit_attrs import token_ids
from lens_core.analysis._listed import listed
from lens_core.analysis.readout import CHUNK, read_vocabulary
from lens_core.cache import ActivationCache
from lens_core.errors import ArgumentError, InputError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["LogitLens", "decoder", "logit_lens", "normed"]

_SHADES = {"entropy": "nats", "kl": "nats", "probability": "probability"}


@attrs.frozen(kw_only=True, eq=False)
class LogitLens:
    """What each entry of the residual stream says about the next token; all in at least float32.

    Attributes:
        labels: The entries: `2_pre` is what enters block 2, `2_mid` what its MLP reads, `final_post` what enters the
            final norm.
        positions: Indices along the cached axis.
        top_tokens: Ids of the most likely tokens, best first.
        top_log_probs: Their log-probabilities, in nats.
        entropy: Of each distribution, in nats.
        kl: From the final distribution to each entry's, KL(final ‖ entry), in nats; 0 at the last entry.
        target_tokens: Ids of the tokens that were followed; None without targets.
        target_log_probs: Their log-probabilities, in nats.
        target_ranks: How many tokens have a higher logit: 0 is the most likely one.
        tokens: Ids of the text at these positions; None if they were not cached.
    """

    labels: tuple[str, ...]
    positions: tuple[int, ...]
    top_tokens: Int[Tensor, "entry batch pos top"] = attrs.field(repr=False)
    top_log_probs: Float[Tensor, "entry batch pos top"] = attrs.field(repr=False)
    entropy: Float[Tensor, "entry batch pos"] = attrs.field(repr=False)
    kl: Float[Tensor, "entry batch pos"] = attrs.field(repr=False)
    target_tokens: Int[Tensor, "batch pos target"] | None = attrs.field(repr=False, default=None)
    target_log_probs: Float[Tensor, "entry batch pos target"] | None = attrs.field(repr=False, default=None)
    target_ranks: Int[Tensor, "entry batch pos target"] | None = attrs.field(repr=False, default=None)
    tokens: Int[Tensor, "batch pos"] | None = attrs.field(repr=False, default=None)
    decode: Callable[[int], str] = attrs.field(repr=False, default=str)
    """From a token id to what is shown."""

    @property
    def target_probs(self) -> Float[Tensor, "entry batch pos target"] | None:
        """Probabilities of the targets."""
        return None if self.target_log_probs is None else self.target_log_probs.exp()

    def to_dataframe(self) -> Any:
        """Give a pandas data frame with one row for each entry, row of the batch and position.

        Columns: `entry`, `batch`, `pos`, `token` (the text there), `top` (the likeliest next token), `log_prob` (its),
        `entropy`, `kl`; with one target `target`, `target_log_prob`, `target_rank`, with several `target_0` and so on.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas = need("pandas", "a data frame")
        return pandas.DataFrame(list(self._records()))

    def _records(self) -> Iterator[dict[str, Any]]:
        n_targets = 0 if self.target_tokens is None else self.target_tokens.shape[-1]
        for entry, row, at in product(*map(range, self.entropy.shape)):
            found: dict[str, Any] = {"entry": self.labels[entry], "batch": row, "pos": self.positions[at]}
            if self.tokens is not None:
                found["token"] = self.decode(int(self.tokens[row, at]))
            found |= {
                "top": self.decode(int(self.top_tokens[entry, row, at, 0])),
                "log_prob": float(self.top_log_probs[entry, row, at, 0]),
                "entropy": float(self.entropy[entry, row, at]),
                "kl": float(self.kl[entry, row, at]),
            }
            for index in range(n_targets):
                name = "target" if n_targets == 1 else f"target_{index}"
                ids, log_probs, ranks = (cast("Tensor", values) for values in self._targets())
                found[name] = self.decode(int(ids[row, at, index]))
                found[f"{name}_log_prob"] = float(log_probs[entry, row, at, index])
                found[f"{name}_rank"] = int(ranks[entry, row, at, index])
            yield found

    def _targets(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.target_tokens, self.target_log_probs, self.target_ranks

    @checks_arguments
    def grid(self, row: int = 0, *, shade: str = "probability", title: str | None = None) -> view.Picture:
        """Draw the most likely token of each entry (the last at the top) and position, of one row of the batch.

        Args:
            row: The row.
            shade: What colours a cell: the token's `"probability"`, `"entropy"`, or `"kl"`.
            title: Stands above the picture.

        Raises:
            ArgumentError: No such row or shade.
        """
        if shade not in _SHADES:
            raise ArgumentError(f"shade is one of {', '.join(map(repr, _SHADES))}; got {shade!r}")
        values = self.top_log_probs[..., 0].exp() if shade == "probability" else getattr(self, shade)
        shown = listed(sliced(values.flip(0), 1, row))
        best = listed(sliced(self.top_tokens[..., 0].flip(0), 1, row))
        texts = [str(at) for at in self.positions]
        if self.tokens is not None:
            texts = [self.decode(token) for token in listed(sliced(self.tokens, 0, row))]
        return view.grid(
            self.labels[::-1],
            texts,
            shown,
            texts=[[self.decode(token) for token in line] for line in best],
            title=title or "The most likely next token",
            unit=_SHADES[shade],
            full=1.0 if shade == "probability" else None,
        )

    def _repr_html_(self) -> str:
        return self.grid()._repr_html_()  # pyright: ignore[reportPrivateUsage]


@checks_arguments
def logit_lens(
    model: "LensModel | ActivationCache",
    input: Any = None,
    *,
    cache: ActivationCache | None = None,
    layers: Sequence[int] | int | None = None,
    incl_mid: bool = False,
    positions: Any = None,
    targets: Any = None,
    top: int = 5,
    lens: Callable[[Tensor, int], Tensor] | None = None,
    chunk: int = CHUNK,
    **kwargs: Any,
) -> LogitLens:
    """Read the residual stream, as it enters each block and the final norm, as a distribution over the next token.

    Logits exist for `chunk` tokens of the vocabulary at a time. It costs one product with the unembedding for each
    entry, and one for the final distribution.

    Args:
        model: The model; or a cache, and no input.
        input: What to run, as in `forward`; only the residual stream is cached then.
        cache: A cache to read instead; it needs `resid_pre` of the layers and the last `resid_post`.
        layers: Blocks whose input is read, 0-based; `n_layers` and -1 are what enters the final norm. None for all.
        incl_mid: Whether what the MLPs of these blocks read (`resid_mid`) is there too, where there is such a place.
        positions: Positions along the cached axis: an int, a slice, or several; the axis stays. None for all. Padding
            counts as positions.
        targets: Tokens to follow, at every position: one as text or id, or a list of these; or ids `[batch, pos]`, such
            as `tokens[:, 1:]` with `positions=slice(-1)`, or `[batch, pos, target]`, for each position its own.
        top: How many of the most likely tokens to keep.
        lens: What each entry goes through before the final norm, called with the entry and its layer: a `TunedLens`, or
            your own. What enters the final norm stays as it is.
        chunk: Tokens of the vocabulary at once.
        **kwargs: As in `forward`, with an input.

    Returns:
        Entries in order; a cache without a batch axis gives a batch of one. Where a hook edited something after the
        residual stream, the last entry is what the model makes of the stream, not what the edited run gave.

    Raises:
        CacheError: The stream was not cached, or the cache has no model.
        ArgumentError: No such layer or position; targets of another shape; both an input and a cache, or neither;
            `incl_mid` with a lens.
        TokenizerError: A target that is not one token.
        TokenIdError: A target outside the vocabulary.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> found = logit_lens(model, "king apple river moon book king apple river", targets="moon")
        >>> found.labels, found.kl.shape
        (('0_pre', '1_pre', 'final_post'), torch.Size([3, 1, 9]))
        >>> int(found.target_ranks[-1, 0, -1, 0])
        0
    """
    if isinstance(model, ActivationCache):
        model, cache, twice = model_of(model), model, cache is not None
    else:
        twice = False
    if twice or (input is None) == (cache is None):
        raise ArgumentError("give an input to run or a cache to read: one of them")
    if lens is not None and incl_mid:
        raise ArgumentError("a lens translates what enters a block; leave out incl_mid")
    names, labels, at = _entries(model, layers, incl_mid=incl_mid)
    final = stream_name(model, model.table.n_layers)
    filled: Any = cache
    if cache is None:
        with torch.no_grad():
            _, filled = model.run_with_cache(
                input,
                names_filter=["hook_tokens", *dict.fromkeys([*names, final])],
                stop_at_layer=model.table.n_layers,  # no logits of all tokens
                **kwargs,
            )
    streams = [_rows(filled, value) for value in read_values(filled, [*names, final])]
    index = torch.arange(streams[0].shape[1])
    chosen = sliced(index, 0, positions).reshape(-1)
    streams = [stream[:, chosen.to(stream.device)] for stream in streams]
    batch, pos, _ = streams[0].shape
    ids = _targets(model, targets, batch, pos)
    with torch.no_grad():
        if lens is not None:
            last = model.table.n_layers
            streams[:-1] = [
                stream if layer == last else lens(stream, layer) for stream, layer in zip(streams[:-1], at, strict=True)
            ]
        *entries, reference = (normed(model, stream).flatten(0, 1) for stream in streams)
    found = read_vocabulary(
        model, entries, reference, targets=None if ids is None else ids.flatten(0, 1), top=top, chunk=chunk
    )
    parts: dict[str, Any] = {
        name: None if value is None else value.unflatten(1, (batch, pos))
        for name, value in attrs.asdict(found, recurse=False).items()
    }
    tokens = _rows(filled, filled["hook_tokens"], axes=1)[:, chosen] if "hook_tokens" in filled else None
    return LogitLens(
        labels=tuple(labels),
        positions=tuple(listed(chosen)),
        target_tokens=ids,
        tokens=tokens,
        decode=decoder(model),
        **parts,
    )


def decoder(model: "LensModel") -> Callable[[int], str]:
    """Give what shows a token id: its text, or the number where the tokenizer has none."""

    def decode(token: int) -> str:
        try:
            return model.to_single_str_token(token)
        except InputError:
            return str(token)

    return str if model.tokenizer is None else decode


def _entries(model: "LensModel", layers: Any, *, incl_mid: bool) -> tuple[list[str], list[str], list[int]]:
    """Name the hook points of the entries, their labels, and their layers."""
    n_layers = model.table.n_layers
    listed = list(range(n_layers + 1)) if layers is None else [layers] if isinstance(layers, int) else list(layers)
    names, labels, at = list[str](), list[str](), list[int]()
    for given in listed:
        if isinstance(given, bool) or not isinstance(given, int) or not -n_layers - 1 <= given <= n_layers:
            raise ArgumentError(f"a layer is 0 to {n_layers} (the final norm), or negative from there; got {given!r}")
        layer = given % (n_layers + 1)
        names.append(stream_name(model, layer))
        labels.append("final_post" if layer == n_layers else f"{layer}_pre")
        at.append(layer)
        middle = f"blocks.{layer}.hook_resid_mid"
        if incl_mid and middle in model.table:
            names.append(middle)
            labels.append(f"{layer}_mid")
            at.append(layer)
    if not names:
        raise ArgumentError("layers names none: leave it out for all")
    return names, labels, at


def _rows(cache: ActivationCache, value: Tensor, *, axes: int = 2) -> Tensor:
    return value if cache.has_batch_dim or value.ndim > axes else value[None]


def normed(model: "LensModel", stream: Tensor) -> Tensor:
    """Apply the final norm where it is, in the dtype that HF's stream has there."""
    module = model.bare_model.get_submodule(model.declaration.norms["ln_final"].path)
    weight = next(module.parameters(), stream)
    return model.ln_final(stream if weight.is_meta else stream.to(weight.device))


def _targets(model: "LensModel", targets: Any, batch: int, pos: int) -> Int[Tensor, "batch pos target"] | None:
    if targets is None:
        return None
    ids = token_ids(model, targets)
    if ids.ndim < 2:
        return ids.reshape(1, 1, -1).expand(batch, pos, -1)
    ids = ids[..., None] if ids.ndim == 2 else ids
    if ids.ndim != 3 or any(size not in (1, wanted) for size, wanted in zip(ids.shape, (batch, pos), strict=False)):
        raise ArgumentError(
            f"targets are one token, a list, or ids [{batch}, {pos}] or [{batch}, {pos}, target], for the positions "
            f"that are read; got shape {list(ids.shape)}"
        )
    return ids.expand(batch, pos, -1)
