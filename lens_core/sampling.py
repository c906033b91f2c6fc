"""One sampling step by hand: a token from the logits of the last position, as `generate` draws it."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lens_core._arguments import checks_arguments
from lens_core.errors import ArgumentError

__all__ = ["sample_logits"]


@checks_arguments
def sample_logits(
    final_logits: Float[Tensor, "batch d_vocab"],
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    tokens: Int[Tensor, "batch pos"] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """Draw the next token of each row.

    In the order of `generate`, by HF's own processors: penalties, temperature, `top_k`, `top_p`. TransformerLens'
    function of this name divides by the temperature before it subtracts the penalty, and leaves `top_p` out where
    `top_k` is given.

    Args:
        final_logits: Of the last position; left as they are.
        top_k: Only the k likeliest; None for all.
        top_p: Only the likeliest that hold this probability; None for all.
        temperature: Divides the logits; 0 takes the likeliest token.
        freq_penalty: Subtracted from a token's logit for each time it occurs in `tokens`.
        repetition_penalty: HF's, for tokens that occur; 1 for none.
        tokens: The text so far, which penalties count.
        generator: Torch's own unless given.

    Raises:
        ArgumentError: Numbers out of range; a penalty without `tokens`.

    Example:
        >>> logits = torch.tensor([[1.0, 3.0, 2.9]])
        >>> sample_logits(logits, temperature=0.0), sample_logits(logits, top_k=1)
        (tensor([1]), tensor([1]))
        >>> sample_logits(logits, temperature=0.0, freq_penalty=0.5, tokens=torch.tensor([[1, 0]]))
        tensor([2])
    """
    if not isinstance(final_logits, Tensor) or final_logits.ndim != 2:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError("final_logits are those of one position, [batch, d_vocab]: logits[:, -1]")
    if tokens is None and (freq_penalty != 0.0 or repetition_penalty != 1.0):
        raise ArgumentError("a penalty counts the tokens so far; give tokens [batch, pos]")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or temperature < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"temperature is a number from 0; got {temperature!r}")
    logits = final_logits.detach().to(torch.promote_types(final_logits.dtype, torch.float32))
    seen: Any = torch.zeros(len(logits), 0, dtype=torch.long) if tokens is None else tokens
    seen = seen.to(logits.device)
    try:
        steps: list[Any] = [RepetitionPenaltyLogitsProcessor(float(repetition_penalty))] if tokens is not None else []
        warpers: list[Any] = [TemperatureLogitsWarper(float(temperature))] if temperature > 0 else []
        warpers += [TopKLogitsWarper(top_k)] if top_k is not None else []
        warpers += [TopPLogitsWarper(float(top_p))] if top_p is not None else []
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    logits = _processed(steps, seen, logits.clone())
    counts = torch.zeros_like(logits).scatter_add_(1, seen, torch.ones_like(seen, dtype=logits.dtype))
    logits = logits - freq_penalty * counts
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = _processed(warpers, seen, logits).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _processed(steps: list[Any], seen: Any, logits: Any) -> Tensor:
    return LogitsProcessorList(steps)(seen, logits)
