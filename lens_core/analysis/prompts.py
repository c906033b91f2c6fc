# ruff: noqa: PT028 -- test_prompt is not a test, but TransformerLens' name
"""Can the model do it at all? How an answer ranks after a prompt."""

from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.text import Text
from torch import Tensor

from lens_core import view
from lens_core._arguments import checks_arguments
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["PromptTest", "test_prompt"]


@attrs.frozen(kw_only=True, eq=False, repr=False)
class PromptTest:
    """What a model says of an answer, token by token, each after the true ones before it.

    Attributes:
        prompt: The prompt's tokens as text.
        answer: The answer's tokens as text.
        answer_ids: Their ids.
        ranks: How many tokens are likelier than each, 0 for the likeliest.
        logits: Their logits.
        probabilities: Their probabilities.
        top_ids: The likeliest tokens in each one's place.
        top_words: They as text.
        top_logits: Their logits.
        top_probabilities: Their probabilities.
    """

    prompt: list[str]
    answer: list[str]
    answer_ids: Int[Tensor, " answer"]
    ranks: tuple[int, ...]
    logits: Float[Tensor, " answer"]
    probabilities: Float[Tensor, " answer"]
    top_ids: Int[Tensor, "answer k"]
    top_words: list[list[str]]
    top_logits: Float[Tensor, "answer k"]
    top_probabilities: Float[Tensor, "answer k"]

    def __str__(self) -> str:
        """Write it out as TransformerLens prints it."""
        lines = [f"Tokenized prompt: {self.prompt}", f"Tokenized answer: {self.answer}"]
        for index, word in enumerate(self.answer):
            told = _numbers(float(self.logits[index]), float(self.probabilities[index]), word)
            lines += ["Performance on answer token:", f"Rank: {self.ranks[index]: <8} {told}"]
            for place, top in enumerate(self.top_words[index]):
                numbers = float(self.top_logits[index, place]), float(self.top_probabilities[index, place])
                lines.append(f"Top {place}th token. {_numbers(*numbers, top)}")
        return "\n".join([*lines, f"Ranks of the answer tokens: {list(zip(self.answer, self.ranks, strict=True))}"])

    def __repr__(self) -> str:
        """Show the ranks."""
        return f"PromptTest({list(zip(self.answer, self.ranks, strict=True))})"

    def _repr_html_(self) -> str:
        pictures = [
            view.bars(
                self.top_words[index],
                cast("Any", self.top_probabilities[index]).tolist(),
                title=f"{word!r}: rank {self.ranks[index]}, probability {float(self.probabilities[index]):.3g}",
                unit="probability",
                highlight=[place for place, one in enumerate(self.top_ids[index]) if one == self.answer_ids[index]],
            )
            for index, word in enumerate(self.answer)
        ]
        return view.page("".join(self.prompt), pictures)._repr_html_()  # pyright: ignore[reportPrivateUsage]


def _numbers(logit: float, probability: float, word: str) -> str:
    return f"Logit: {logit:5.2f} Prob: {probability:6.2%} Token: |{word}|"


@checks_arguments
def test_prompt(
    prompt: str,
    answer: str,
    model: "LensModel",
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> PromptTest:
    """See how a model ranks an answer after a prompt: rank, logit and probability of each of its tokens.

    One forward. TransformerLens' function prints only; this gives what it prints back, too.

    Args:
        prompt: The text.
        answer: What should follow.
        model: The model.
        prepend_space_to_answer: Whether to put a space before an answer that has none.
        print_details: Whether to print the result.
        prepend_bos: As in `forward`.
        top_k: How many of the likeliest tokens are shown.

    Raises:
        TokenizerError: The model has no tokenizer.
        EmptyInputError: The answer has no tokens.
        ArgumentError: `top_k` is not from 1 to the vocabulary's size.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> test_prompt("king apple river moon king apple", "river moon", model, print_details=False)
        PromptTest([(' river', 0), (' moon', 0)])
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= model.cfg.d_vocab:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"top_k is from 1 to {model.cfg.d_vocab}; got {top_k!r}")
    if prepend_space_to_answer and not answer.startswith(" "):
        answer = f" {answer}"
    asked = model.to_tokens(prompt, **({} if prepend_bos is None else {"prepend_bos": prepend_bos}))
    wanted = model.to_tokens(answer, prepend_bos=False)
    tokens, length = torch.cat([asked, wanted], dim=1), asked.shape[1]
    with torch.no_grad():
        logits = model(tokens)[0, length - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()
    probabilities, ids = logits.softmax(-1), wanted[0].cpu()
    own = logits.gather(1, ids[:, None])
    best = logits.topk(top_k, dim=-1)
    words = model.to_str_tokens(tokens)
    found = PromptTest(
        prompt=words[:length],
        answer=words[length:],
        answer_ids=ids,
        ranks=tuple((logits > own).sum(-1).tolist()),
        logits=own[:, 0],
        probabilities=probabilities.gather(1, ids[:, None])[:, 0],
        top_ids=best.indices,
        top_words=[[_word(model, one) for one in row] for row in best.indices.tolist()],
        top_logits=best.values,
        top_probabilities=probabilities.gather(1, best.indices),
    )
    if print_details:
        Console(highlight=False, soft_wrap=True).print(Text(str(found)))
    return found


test_prompt.__test__ = False  # pyright: ignore[reportFunctionMemberAccess] -- pytest takes it for a test


def _word(model: Any, token: int) -> str:
    """Give a token as text; a vocabulary may be padded beyond the tokenizer's."""
    return model.to_single_str_token(token) if token < len(model.tokenizer) else f"<{token}>"
