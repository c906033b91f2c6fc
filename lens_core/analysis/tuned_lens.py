"""The tuned lens: a logit lens whose every layer first goes through an affine map that was trained for it.

For the stream x that enters block l, the translator is x + x A_l + b_l, at first the identity, and the lens says what
the final norm and the unembedding make of that. A_l and b_l minimise KL(final ‖ lens) over texts, each layer by itself.
What it corrects is that layers write in bases of their own, which the logit lens reads in the last one's.

Source: Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens" (arXiv 2303.08112).
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from lens_core._arguments import checks_arguments, is_whole
from lens_core._decomposition import stream_name
from lens_core._extras import need
from lens_core._tensor_file import FileKind, origin
from lens_core.analysis._batches import Batch, batches
from lens_core.analysis._identity import sample_of, unlike_sample
from lens_core.analysis._listed import listed
from lens_core.analysis.logit_lens import normed
from lens_core.analysis.readout import CHUNK, read_vocabulary
from lens_core.errors import AnalysisFileError, ArgumentError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["TunedLens", "fit_tuned_lens", "lens_divergence"]

KIND = FileKind(what="tuned lens", version=1, error=AnalysisFileError, writer="tuned.save(path)")
_SAMPLE = "sample/"


@attrs.frozen(kw_only=True, eq=False)
class TunedLens:
    """One affine translator for what enters each block; `logit_lens(model, text, lens=tuned)` reads through it.

    Attributes:
        weights: A of each layer: a vector x becomes x + x A + b.
        biases: b of each layer.
        model: The model that it is of, which `save` describes.
        kl: KL(final ‖ tuned lens) of each layer on held-out texts, in nats, the mean over their positions; None for a
            lens that was not fitted.
        logit_lens_kl: The same for the logit lens.
    """

    weights: Float[Tensor, "layer d_model d_model"] = attrs.field(repr=False)
    biases: Float[Tensor, "layer d_model"] = attrs.field(repr=False)
    model: "LensModel" = attrs.field(repr=False)
    kl: Float[Tensor, " layer"] | None = None
    logit_lens_kl: Float[Tensor, " layer"] | None = None

    def __call__(self, stream: Float[Tensor, "*batch d_model"], layer: int) -> Float[Tensor, "*batch d_model"]:
        """Translate what enters a block (0-based; what enters the final norm stays), in the stream's own dtype."""
        if layer == len(self.weights):
            return stream
        weight, bias = (value[layer].to(stream.device) for value in (self.weights, self.biases))
        wide = stream.to(weight.dtype)
        return (wide + wide @ weight + bias).to(stream.dtype)

    @classmethod
    def identity(cls, model: "LensModel") -> "TunedLens":
        """Give the lens that changes nothing: the logit lens, where fitting starts from.

        Example:
            >>> import lens_core as lens
            >>> TunedLens.identity(lens.load("toy:gpt2")).weights.shape
            torch.Size([2, 96, 96])
        """
        n_layers, d_model = model.table.n_layers, model.cfg.d_model
        dtype = torch.promote_types(model.cfg.dtype, torch.float32)
        zeros = torch.zeros(n_layers, d_model, d_model, dtype=dtype, device=model.input_device)
        return cls(weights=zeros, biases=torch.zeros_like(zeros[:, 0]), model=model)

    def to_dataframe(self) -> Any:
        """Give a pandas data frame of the held-out divergences, a row for each layer, in nats.

        Raises:
            MissingPackageError: pandas is not installed.
            ArgumentError: The lens was not fitted.
        """
        if self.kl is None or self.logit_lens_kl is None:
            raise ArgumentError("this lens was not fitted: fit_tuned_lens gives one with its divergences")
        found = {"logit_lens_kl": listed(self.logit_lens_kl), "tuned_lens_kl": listed(self.kl)}
        return need("pandas", "a data frame").DataFrame({"layer": range(len(self.kl)), **found})

    @checks_arguments
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the lens to a safetensors file, with a sample of the model's weights to know it by.

        Raises:
            AnalysisFileError: The file cannot be written there.
            ArgumentError: Not a path.
        """
        tensors = {"weights": self.weights, "biases": self.biases}
        for name in ("kl", "logit_lens_kl"):
            value = getattr(self, name)
            tensors |= {} if value is None else {name: value}
        tensors |= {f"{_SAMPLE}{name}": value for name, value in sample_of(self.model).items()}
        shapes = {name: list(value.shape) for name, value in tensors.items()}
        KIND.write(KIND.target(path), tensors, {**origin(self.model), "shapes": json.dumps(shapes)})

    @classmethod
    @checks_arguments
    def load(cls, path: str | os.PathLike[str], model: Any, *, strict: bool = True) -> "TunedLens":
        """Read a file that `save` wrote.

        Args:
            path: The file.
            model: The model, with the weights that the lens was fitted to.
            strict: False takes any model of the same layers and width, such as a finetuned one.

        Raises:
            AnalysisFileError: Not a tuned lens of ours, damaged, or of another model.
            ArgumentError: Not a path.
        """

        def parse(tensors: dict[str, Tensor], metadata: dict[str, str], shown: str) -> TunedLens:
            return _parse(cls.identity(model), tensors, metadata, shown, strict=strict)

        return KIND.read(path, parse)


def _parse(
    like: TunedLens, tensors: dict[str, Tensor], metadata: dict[str, str], shown: str, *, strict: bool
) -> TunedLens:
    listed = json.loads(metadata.get("shapes", ""))
    if listed != {name: list(value.shape) for name, value in tensors.items()} or not {"weights", "biases"} <= set(
        listed
    ):
        raise AnalysisFileError(f"{shown!r} is damaged: its tensors are not those that were saved; write it again")
    model, made_of = like.model, metadata.get("model") or metadata.get("model_type", "a model")
    for name, expected in (("weights", like.weights), ("biases", like.biases)):
        if tensors[name].shape != expected.shape or not tensors[name].is_floating_point():
            raise AnalysisFileError(
                f"{shown!r} is of another model ({made_of[:80]}): its {name} are {list(tensors[name].shape)}, and here "
                f"they are {list(expected.shape)}"
            )
    sample = {name.removeprefix(_SAMPLE): value for name, value in tensors.items() if name.startswith(_SAMPLE)}
    different = unlike_sample(sample, sample_of(model)) if strict else ""
    if different:
        raise AnalysisFileError(
            f"{shown!r} was fitted to other weights ({made_of[:80]}): {different}; strict=False takes it nevertheless"
        )
    values = {
        name: tensors[name].to(model.input_device, copy=True)
        for name in ("weights", "biases", "kl", "logit_lens_kl")
        if name in tensors
    }
    return TunedLens(model=model, **values)


# ---------------------------------------------------------------------- fitting


@checks_arguments
def fit_tuned_lens(
    model: "LensModel",
    data: Any,
    *,
    held_out: Any = None,
    epochs: int = 1,
    batch_size: int = 8,
    rows: int | None = None,
    lr: float = 1e-3,
    optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer] | None = None,
    start: TunedLens | None = None,
    seed: int = 0,
    verbose: bool = False,
) -> TunedLens:
    """Fit a tuned lens by gradient descent on KL(final ‖ lens), every layer by itself.

    A step is one batch: one forward of the model without a graph, and for each layer one product with the translator
    and one with the unembedding, forward and backward; logits of two distributions for every token exist at a time.
    Nothing of the model changes, its gradients included. The step size falls linearly to 0, and gradients are clipped
    to a norm of 1 in each layer, as in the paper.

    Args:
        model: The model; put it in evaluation mode first.
        data: Texts, or token ids `[n, pos]`, or an iterable of rows of ids.
        held_out: Data for the divergences that are reported; None keeps every tenth batch of `data` for it, the last
            one at least.
        epochs: How many times to go over the data, in a new order each time.
        batch_size: Rows of a batch.
        rows: Positions of a batch to take, drawn at random; None for all. Bounds the memory of the logits.
        lr: Adam's step size, unless an optimiser is given.
        optimizer: From the parameters to a torch optimiser, such as
            `lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.9, nesterov=True)`; the paper's.
        start: A lens to go on from; None for the identity.
        seed: For the order of batches and the positions drawn.
        verbose: Show a progress bar.

    Returns:
        The lens, with its held-out divergences and those of the logit lens.

    Raises:
        ArgumentError: Fewer than two batches and no held-out data; a number that is not positive; the model is in
            training mode; not texts or ids.
        InputError: Data that the model cannot take, or none.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> tokens = torch.randint(0, 250, (32, 12), generator=torch.Generator().manual_seed(0))
        >>> tuned = fit_tuned_lens(model, tokens, batch_size=4, lr=3e-3)
        >>> bool((tuned.kl < tuned.logit_lens_kl).all())
        True
    """
    if model.bare_model.training:
        raise ArgumentError("the model is in training mode, where dropout draws; call model.eval() first")
    for name, given in (("epochs", epochs), ("rows", 1 if rows is None else rows)):
        if not is_whole(given):
            raise ArgumentError(f"{name} is at least 1; got {given!r}")
    training, kept = _split(list(batches(model, data, batch_size)), held_out is None)
    if held_out is not None:
        kept = list(batches(model, held_out, batch_size))
    if not training:
        raise ArgumentError("nothing is left to fit on: give held_out=, or at least two batches of data")
    lens = start or TunedLens.identity(model)
    weights, biases = (
        [value.detach().clone().requires_grad_() for value in values] for values in (lens.weights, lens.biases)
    )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = [at for _ in range(epochs) for at in listed(torch.randperm(len(training), generator=generator))]
    _descend(
        model,
        [training[at] for at in order],
        (weights, biases),
        (optimizer or partial(torch.optim.Adam, lr=lr))([*weights, *biases]),
        rows=rows,
        generator=generator,
        verbose=verbose,
    )
    fitted = TunedLens(weights=torch.stack(weights).detach(), biases=torch.stack(biases).detach(), model=model)
    return attrs.evolve(fitted, kl=_divergence(model, kept, fitted), logit_lens_kl=_divergence(model, kept, None))


def _split(every: list[Batch], holds_out: bool) -> tuple[list[Batch], list[Batch]]:
    """Keep every tenth batch, or the last, for measuring."""
    if not holds_out:
        return every, []
    kept = range(9, len(every), 10) if len(every) > 9 else [len(every) - 1]
    return [batch for at, batch in enumerate(every) if at not in kept], [every[at] for at in kept]


def _descend(
    model: "LensModel",
    steps: Sequence[Batch],
    parameters: tuple[list[Tensor], list[Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    rows: int | None,
    generator: torch.Generator,
    verbose: bool,
) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
    for batch in _watched(steps, verbose=verbose):
        streams = _streams(model, batch, rows=rows, generator=generator)
        with torch.no_grad():
            final = _log_probs(model, streams[-1])
        for stream, weight, bias in zip(streams[:-1], *parameters, strict=True):
            own = stream.to(weight.device, weight.dtype)
            with torch.enable_grad():
                said = _log_probs(model, (own + own @ weight + bias).to(stream.dtype))
                loss = (final.exp() * (final - said)).sum(-1).mean()
                # Not backward(): the norm and the unembedding are the user's, and keep the gradients they have.
                weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
            torch.nn.utils.clip_grad_norm_([weight, bias], 1.0)
        optimizer.step()
        schedule.step()


def _watched(steps: Sequence[Batch], *, verbose: bool) -> Iterable[Batch]:
    if not verbose:
        return steps
    from rich.progress import track

    return track(steps, description="fitting", transient=True)


def _log_probs(model: "LensModel", stream: Tensor) -> Float[Tensor, "row d_vocab"]:
    logits = model.finish_logits(model.unembed(normed(model, stream)))
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@torch.no_grad()
def _streams(
    model: "LensModel", batch: Batch, *, rows: int | None = None, generator: torch.Generator | None = None
) -> list[Float[Tensor, "row d_model"]]:
    """Give what enters each block and the final norm, at the real positions or at some of them."""
    n_layers = model.table.n_layers
    names = [stream_name(model, layer) for layer in range(n_layers + 1)]
    _, cache = model.run_with_cache(batch.tokens, names_filter=names, **batch.call, stop_at_layer=n_layers)
    index = batch.attention_mask.flatten().nonzero().flatten()
    if rows is not None and rows < len(index):
        index = index[torch.randperm(len(index), generator=generator)[:rows].to(index.device)]
    return [cache[name].flatten(0, 1)[index.to(cache[name].device)] for name in names]


# ---------------------------------------------------------------------- measuring


@checks_arguments
def lens_divergence(
    model: "LensModel",
    data: Any,
    lens: Callable[[Tensor, int], Tensor] | None = None,
    *,
    batch_size: int = 8,
    chunk: int = CHUNK,
) -> Float[Tensor, " layer"]:
    """Measure how far what a lens says at each block's input is from what the model says.

    Args:
        model: The model.
        data: Texts, or token ids `[n, pos]`, or an iterable of rows of ids.
        lens: A `TunedLens`, or any function of the stream and the layer; None for the logit lens.
        batch_size: Rows of a batch.
        chunk: Tokens of the vocabulary at once.

    Returns:
        KL(final ‖ lens) in nats, the mean over real positions, for every block's input.

    Raises:
        ArgumentError: Not texts or ids.
        InputError: Data that the model cannot take, or none.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> found = lens_divergence(model, ["the cat sat on the mat.", "king apple river"])
        >>> bool(found[0] > found[1] > 0)
        True
    """
    return _divergence(model, batches(model, data, batch_size), lens, chunk=chunk)


def _divergence(
    model: "LensModel",
    measured: Iterable[Batch],
    lens: Callable[[Tensor, int], Tensor] | None,
    *,
    chunk: int = CHUNK,
) -> Float[Tensor, " layer"]:
    total: Tensor | None = None
    count = 0
    for batch in measured:
        *streams, final = _streams(model, batch)
        with torch.no_grad():
            read = streams if lens is None else [lens(stream, layer) for layer, stream in enumerate(streams)]
            entries = [normed(model, stream) for stream in read]
            found = read_vocabulary(model, entries, normed(model, final), top=1, chunk=chunk)
        assert found.kl is not None
        total = found.kl.sum(-1) if total is None else total + found.kl.sum(-1)
        count += len(final)
    assert total is not None  # without texts, `batches` raised
    return total / count
