"""How well an SAE reconstructs: the activations, and what the model makes of them."""

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments
from lens_core._extras import need
from lens_core.analysis._batches import Batch, batches
from lens_core.errors import EmptyInputError
from lens_core.saes._reading import beside

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["SaeQuality", "reconstruction_quality"]


@attrs.frozen(kw_only=True)
class SaeQuality:
    """How well an SAE reconstructs, over some texts.

    Attributes:
        variance_explained: 1 less the summed squared error over the summed squared distance from the mean activation;
            1 is perfect, 0 is what the mean vector does, and below 0 the SAE is worse than that.
        mse: Squared error of a vector, summed over its entries, mean over tokens; in squared units of the activations.
        cosine: Mean cosine similarity of activation and reconstruction.
        l0: Mean number of features on at a token.
        dead: Share of the features that were on at no token of these texts.
        ce_clean: Next-token cross-entropy of the model, in nats.
        ce_spliced: The same with the SAE's output in the value's place.
        ce_zero: The same with zeros there.
        n_tokens: Tokens that the first five are means over.
    """

    variance_explained: float
    mse: float
    cosine: float
    l0: float
    dead: float
    ce_clean: float
    ce_spliced: float
    ce_zero: float
    n_tokens: int

    @property
    def ce_increase(self) -> float:
        """What the reconstruction costs, in nats: `ce_spliced - ce_clean`."""
        return self.ce_spliced - self.ce_clean

    @property
    def ce_recovered(self) -> float:
        """Share of the loss between zeros and the value itself that the SAE makes good: 1 is all, 0 as bad as zeros."""
        return (self.ce_zero - self.ce_spliced) / (self.ce_zero - self.ce_clean)

    def to_dataframe(self) -> Any:
        """Give one row with a column for each number.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return need("pandas", "a data frame").DataFrame([self._numbers()])

    def _numbers(self) -> dict[str, float]:
        return {**attrs.asdict(self), "ce_increase": self.ce_increase, "ce_recovered": self.ce_recovered}

    def _repr_html_(self) -> str:
        rows = [[name, value] for name, value in self._numbers().items()]
        return view.table(rows, ["measure", "value"], title="Reconstruction")._repr_html_()  # pyright: ignore[reportPrivateUsage]


@checks_arguments
def reconstruction_quality(
    model: "LensModel",
    sae: Any,
    texts: Any,
    *,
    hook_name: Any = None,
    batch_size: int = 8,
    prepend_bos: bool | None = None,
    skip_special: bool = True,
    strict: bool = True,
) -> SaeQuality:
    """Measure how well an SAE reconstructs, and what the model loses by it.

    An SAE that was trained on other activations (processed weights, another model, no BOS) shows here at once: its
    variance explained is near or below 0. Costs three forwards of each text; a batch is in memory at a time.

    Args:
        model: The model.
        sae: The SAE, or a transcoder, which is then judged by the value that it foretells.
        texts: A text, texts, rows of token ids, or a tensor of ids `[row, pos]`.
        hook_name: Where the SAE belongs, if it does not say so itself.
        batch_size: Texts at a time.
        prepend_bos: As in `forward`.
        skip_special: Leave the tokenizer's special tokens out of the reconstruction's numbers. The losses are of whole
            texts, with the SAE at every token.
        strict: As in `model.saes`.

    Raises:
        EmptyInputError: No token to be foretold, or none that counts.
        SaeError: The SAE does not fit the model.

    Source: the measures of Bricken et al. 2023 and of SAELens' `run_evals`.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> sae = lens.saes.SparseAutoencoder(lens.saes.SaeConfig(d_in=model.cfg.d_model, d_sae=64))
        >>> quality = reconstruction_quality(model, sae, "the cat sat on the mat.", hook_name="blocks.1.hook_resid_pre")
        >>> quality.ce_spliced > quality.ce_clean  # it was never trained
        True
    """
    special = torch.tensor(sorted(getattr(model.tokenizer, "all_special_ids", ())) if skip_special else [])
    sums = _Sums()
    with torch.no_grad():
        for batch in batches(model, texts, batch_size, prepend_bos=prepend_bos):
            counted = batch.attention_mask.bool() & ~torch.isin(batch.tokens, special.to(batch.tokens.device))
            with beside(model, sae, hook_name, strict=strict) as place:
                names = [place.part(part) for part in ("acts_post", "recons", "error")]
                with model.caching(names) as cache:
                    sums.add_loss("clean", _loss(model, batch), batch)
                recons = cache[names[1]]
                sums.add(cache[names[0]], recons, cache[names[2]].reshape(recons.shape), counted)
            with model.saes(sae if hook_name is None else {hook_name: sae}, strict=False):
                sums.add_loss("spliced", _loss(model, batch), batch)
            head = getattr(getattr(sae, "cfg", None), "hook_head_index", None)
            with model.hooks([(place.name, _zero(head))]):
                sums.add_loss("zero", _loss(model, batch), batch)
    return sums.quality()


def _loss(model: "LensModel", batch: Batch) -> Tensor:
    return model(batch.tokens, return_type="loss", loss_per_token=True, **batch.call)


def _zero(head: int | None) -> Any:
    def zero(value: Tensor, hook: Any) -> Tensor:
        if head is None:
            return torch.zeros_like(value)
        value[:, :, head] = 0
        return value

    return zero


class _Sums:
    """Sums over tokens, in float64."""

    def __init__(self) -> None:
        self.tokens, self.targets = 0, 0
        self.total: Tensor | float = 0.0
        self.squares, self.errors, self.cosines, self.active = 0.0, 0.0, 0.0, 0
        self.on: Tensor | None = None
        self.losses: dict[str, float] = {}

    def add(self, acts: Tensor, recons: Tensor, error: Tensor, counted: Tensor) -> None:
        """Take the values of a batch, at the tokens that count."""
        counted = counted.to(acts.device)
        error, recons, is_on = error[counted].double(), recons[counted].double(), acts[counted] != 0
        value = recons + error
        self.tokens += len(value)
        self.total = self.total + value.sum(0)
        self.squares += float(value.square().sum())
        self.errors += float(error.square().sum())
        self.cosines += float(torch.cosine_similarity(value, recons, dim=-1).sum())
        self.active += int(is_on.sum())
        seen = is_on.any(0)
        self.on = seen if self.on is None else self.on | seen

    def add_loss(self, kind: str, losses: Tensor, batch: Batch) -> None:
        """Take the losses of a batch, 0 at padding."""
        if kind == "clean":
            self.targets += int((batch.attention_mask[:, 1:] & batch.attention_mask[:, :-1]).sum())
        self.losses[kind] = self.losses.get(kind, 0.0) + float(losses.double().sum())

    def quality(self) -> SaeQuality:
        """Divide."""
        if not self.targets or not self.tokens or self.on is None:
            raise EmptyInputError("these texts have no token to be foretold, or only special ones; give longer texts")
        mean = torch.as_tensor(self.total) / self.tokens
        spread = self.squares - self.tokens * float(mean.square().sum())
        return SaeQuality(
            variance_explained=1 - self.errors / spread,
            mse=self.errors / self.tokens,
            cosine=self.cosines / self.tokens,
            l0=self.active / self.tokens,
            dead=float((~self.on).double().mean()),
            **{f"ce_{kind}": loss / self.targets for kind, loss in self.losses.items()},
            n_tokens=self.tokens,
        )
