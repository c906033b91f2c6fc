"""Where features are most active: the first thing to look at for what a feature may be about."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_core import tokens as _tokens
from lens_core import view
from lens_core._arguments import checks_arguments, is_whole
from lens_core._extras import need
from lens_core.analysis._batches import Batch, batches
from lens_core.errors import ArgumentError
from lens_core.saes._reading import beside, plain

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["TopActivations", "top_activations"]

NO_TOKEN = -1


@attrs.frozen(kw_only=True, eq=False)
class TopActivations:
    """The tokens at which each feature is most active, over some texts.

    Attributes:
        features: Which features.
        acts: Their largest activations, largest first; 0 where fewer than `k` tokens had any.
        rows: Which text each is from, 0-based; -1 for none.
        positions: Which token of the text, 0-based; -1 for none.
        windows: The token ids around each, -1 where the text has ended.
        center: Which column of a window is the token itself.
        density: Share of the tokens at which the feature is on, 0 to 1.
        n_tokens: How many tokens were seen.
        tokenizer: For showing the windows; None without one.
    """

    features: Int[Tensor, " feature"]
    acts: Float[Tensor, "feature k"] = attrs.field(repr=False)
    rows: Int[Tensor, "feature k"] = attrs.field(repr=False)
    positions: Int[Tensor, "feature k"] = attrs.field(repr=False)
    windows: Int[Tensor, "feature k window"] = attrs.field(repr=False)
    center: int
    density: Float[Tensor, " feature"] = attrs.field(repr=False)
    n_tokens: int
    tokenizer: Any = attrs.field(repr=False, default=None)

    def top(self, feature: int) -> list[tuple[float, str]]:
        """List a feature's largest activations, each with its text around, the token itself in « ».

        Raises:
            ArgumentError: The feature was not asked for.
        """
        where = plain((self.features == feature).nonzero().flatten())
        if not where:
            raise ArgumentError(f"feature {feature} was not looked at; there are {plain(self.features)[:20]} ...")
        kept = [(act, ids) for act, ids in zip(self.acts[where[0]], self.windows[where[0]], strict=True) if act > 0]
        return [(float(act), self._shown(plain(ids))) for act, ids in kept]

    def _shown(self, window: Sequence[int]) -> str:
        """Show a window as text, the token itself in « »."""
        ids = [one for one in window if one != NO_TOKEN]
        at = sum(one != NO_TOKEN for one in window[: self.center])
        before, upto, whole = (self._text(ids[:end]) for end in (at, at + 1, len(ids)))
        own, after = upto.removeprefix(before), whole.removeprefix(upto)
        if before + own != upto or upto + after != whole:  # a token may be part of a character
            before, own, after = (self._text(part) for part in (ids[:at], ids[at : at + 1], ids[at + 1 :]))
        bare = own.lstrip(" ")
        return f"{before}{own[: len(own) - len(bare)]}«{bare}»{after}"

    def _text(self, ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return "".join(f" {one}" for one in ids)
        return str(_tokens.to_string(self.tokenizer, list(ids))) if ids else ""

    def to_dataframe(self) -> Any:
        """Give one row for each feature and token: `feature`, `act`, `row`, `position`, `text`.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        rows: list[dict[str, Any]] = []
        for index, feature in enumerate(plain(self.features)):
            for act, row, position, window in zip(
                self.acts[index], self.rows[index], self.positions[index], self.windows[index], strict=True
            ):
                if row >= 0:
                    found = {"feature": feature, "act": float(act), "row": int(row), "position": int(position)}
                    rows.append({**found, "text": self._shown(plain(window))})
        return need("pandas", "a data frame").DataFrame(rows)

    def _repr_html_(self) -> str:
        tables = [
            view.table(
                [[act, text] for act, text in self.top(feature)],
                ["activation", "text"],
                title=f"Feature {feature}: on at {float(self.density[index]):.2%} of {self.n_tokens} tokens",
            )
            for index, feature in enumerate(plain(self.features)[:10])
        ]
        return view.page("Where features are most active", tables)._repr_html_()  # pyright: ignore[reportPrivateUsage]


@checks_arguments
def top_activations(
    model: "LensModel",
    sae: Any,
    texts: Any,
    features: Sequence[int] | Int[Tensor, " feature"] | None = None,
    k: int = 10,
    *,
    hook_name: Any = None,
    window: tuple[int, int] = (8, 4),
    batch_size: int = 8,
    prepend_bos: bool | None = None,
    skip_special: bool = True,
    strict: bool = True,
) -> TopActivations:
    """Find the tokens at which features of an SAE are most active.

    Texts may come from an iterator: a batch is in memory at a time, with its activations `[batch, pos, d_sae]`, and `k`
    windows for each feature. The blocks above the SAE are not run.

    Args:
        model: The model; it runs as it is.
        sae: The SAE or transcoder.
        texts: A text, texts, rows of token ids, or a tensor of ids `[row, pos]`.
        features: Which features; None for all.
        k: How many tokens for each.
        hook_name: Where the SAE belongs, if it does not say so itself.
        window: How many tokens to keep before and after each.
        batch_size: Texts at a time.
        prepend_bos: As in `forward`.
        skip_special: Leave out the tokenizer's special tokens: at BOS most SAEs are far outside of their training.
        strict: As in `model.saes`.

    Raises:
        ArgumentError: No such feature, `k` below 1, a window of another form.
        SaeError: The SAE does not fit the model.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> sae = lens.saes.SparseAutoencoder(lens.saes.SaeConfig(d_in=model.cfg.d_model, d_sae=64))
        >>> name, text = "blocks.1.hook_resid_pre", "the cat sat on the mat."
        >>> found = top_activations(model, sae, text, [3], k=2, hook_name=name)
        >>> found.acts.shape, found.top(3)[0][1].count("«")
        (torch.Size([1, 2]), 1)
        >>> found.n_tokens
        7
    """
    if not is_whole(k):
        raise ArgumentError(f"k is a positive number; got {k!r}")
    if not (isinstance(window, tuple) and len(window) == 2 and all(isinstance(n, int) and n >= 0 for n in window)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"window is how many tokens before and after, such as (8, 4); got {window!r}")
    special = torch.tensor(sorted(getattr(model.tokenizer, "all_special_ids", ())) if skip_special else [])
    best: _Best | None = None
    with torch.no_grad(), beside(model, sae, hook_name, strict=strict) as place:
        for batch in batches(model, texts, batch_size, prepend_bos=prepend_bos):
            counted = batch.attention_mask.bool() & ~torch.isin(batch.tokens, special.to(batch.tokens.device))
            seen: list[Tensor] = []

            def see(acts: Tensor, hook: Any, seen: list[Tensor] = seen) -> None:
                seen.append(acts)

            hooks = [(place.part("acts_post"), see)]
            model.run_with_hooks(batch.tokens, fwd_hooks=hooks, stop_at_layer=place.stop_at, **batch.call)
            if best is None:
                best = _Best(_features(features, seen[0].shape[-1]), k, window)
            best.add(seen[0], batch, counted)
    assert best is not None  # batches() gives at least one
    return best.result(model.tokenizer)


def _features(given: Any, d_sae: int) -> Tensor:
    chosen = torch.arange(d_sae) if given is None else torch.as_tensor(given)
    if chosen.ndim != 1 or chosen.is_floating_point() or not len(chosen):
        raise ArgumentError(f"features are a list of numbers; got {given!r}")
    if not 0 <= int(chosen.min()) <= int(chosen.max()) < d_sae:
        raise ArgumentError(f"features {given!r}: the SAE has features 0 to {d_sae - 1}")
    return chosen.long()


class _Best:
    """The best tokens so far, for each feature; `[feature, k]`, on the CPU."""

    def __init__(self, features: Tensor, k: int, window: tuple[int, int]) -> None:
        self.features, self.k, self.window = features, k, window
        self.acts = torch.zeros(len(features), k)
        self.rows, self.positions = (torch.full((len(features), k), -1) for _ in range(2))
        self.windows = torch.full((len(features), k, sum(window) + 1), NO_TOKEN)
        self.on, self.n_tokens = torch.zeros(len(features), dtype=torch.long), 0

    def add(self, acts: Tensor, batch: Batch, counted: Tensor) -> None:
        """Take the activations `[batch, pos, d_sae]` of a batch; `counted` `[batch, pos]` says at which tokens."""
        chosen = acts[..., self.features.to(acts.device)].to(torch.promote_types(acts.dtype, torch.float32))
        chosen = chosen.masked_fill(~counted[..., None].to(acts.device), 0.0)
        self.n_tokens += int(counted.sum())
        self.on += (chosen > 0).sum((0, 1)).cpu()
        flat = chosen.flatten(0, 1).T  # feature token
        found = flat.topk(min(self.k, flat.shape[1]), dim=1)
        where, n_pos = found.indices.cpu(), acts.shape[1]
        rows, positions = where // n_pos, where % n_pos
        before, after = self.window
        ids = batch.tokens.masked_fill(~batch.attention_mask.bool(), NO_TOKEN).cpu()
        padded = torch.nn.functional.pad(ids, (before, after), value=NO_TOKEN)
        windows = padded[rows[..., None], positions[..., None] + torch.arange(before + after + 1)]
        self._merge(found.values.cpu(), rows + batch.first, positions, windows)

    def _merge(self, acts: Tensor, rows: Tensor, positions: Tensor, windows: Tensor) -> None:
        joined = torch.cat([self.acts.to(acts.dtype), acts], 1)
        order = joined.argsort(dim=1, descending=True, stable=True)[:, : self.k]  # of equals the earlier text
        self.acts = joined.gather(1, order)
        is_none = self.acts <= 0
        self.rows = torch.cat([self.rows, rows], 1).gather(1, order).masked_fill(is_none, -1)
        self.positions = torch.cat([self.positions, positions], 1).gather(1, order).masked_fill(is_none, -1)
        wide = order[..., None].expand(-1, -1, windows.shape[-1])
        self.windows = torch.cat([self.windows, windows], 1).gather(1, wide)
        self.windows = self.windows.masked_fill(is_none[..., None], NO_TOKEN)

    def result(self, tokenizer: Any) -> TopActivations:
        """Give what was found."""
        return TopActivations(
            features=self.features,
            acts=self.acts.clamp(min=0),
            rows=self.rows,
            positions=self.positions,
            windows=self.windows,
            center=self.window[0],
            density=self.on / max(self.n_tokens, 1),
            n_tokens=self.n_tokens,
            tokenizer=tokenizer,
        )
