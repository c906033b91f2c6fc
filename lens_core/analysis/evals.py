"""Small evaluations: loss on repeated random tokens, indirect objects, accuracy of the next token.

Source: induction loss, Olsson et al. 2022 (arXiv 2209.11895); indirect object identification (IOI), Wang et al. 2022
(arXiv 2211.00593); names and arguments as in TransformerLens' `evals`.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_core import tokens as _tokens
from lens_core._arguments import checks_arguments, is_whole
from lens_core._inputs import token_loss
from lens_core.analysis._batches import batches
from lens_core.analysis._random_text import repeated_rows
from lens_core.errors import ArgumentError, TokenizerError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["IOIDataset", "induction_loss", "ioi_eval", "lm_accuracy"]

TEMPLATES = (
    "When [A] and [B] went to the [PLACE], [B] gave a [OBJECT] to [A]",
    "After [A] and [B] left the [PLACE], [B] handed a [OBJECT] to [A]",
    "Yesterday [A] and [B] met at the [PLACE]. Then [B] showed a [OBJECT] to [A]",
    "While [A] and [B] were sitting in the [PLACE], [B] offered a [OBJECT] to [A]",
)
"""`[A]` is the indirect object, which the last place asks for; `[B]` the subject; other words are nouns' lists."""
NAMES = ("Mary", "John", "Tom", "Anna", "James", "Sarah", "David", "Laura", "Paul", "Kate", "Peter", "Emma")
NOUNS = {
    "PLACE": ("store", "park", "school", "office", "garden", "restaurant"),
    "OBJECT": ("drink", "book", "ring", "letter", "ball", "map"),
}


@checks_arguments
def lm_accuracy(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    per_token: bool = False,
    *,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""] | Bool[Tensor, "batch targets"]:
    """Give how often the likeliest next token is the true one.

    Args:
        logits: Of every position.
        tokens: The ids that they were computed for.
        per_token: Give `[batch, pos - 1]`, false where padding is concerned, instead of the share.
        attention_mask: 1 for real tokens; padding, as target or as context, does not count.

    Raises:
        ArgumentError: Logits and tokens of different texts, or of one position.

    Example:
        >>> logits = torch.tensor([[[0.0, 9.0], [9.0, 0.0], [0.0, 9.0]]])
        >>> lm_accuracy(logits, torch.tensor([[0, 1, 1]]))
        tensor(0.5000)
    """
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape or tokens.shape[1] < 2:
        raise ArgumentError(
            f"logits [batch, pos, d_vocab] are of tokens [batch, pos], two positions at least; got "
            f"{list(logits.shape)} and {list(tokens.shape)}"
        )
    right = logits[:, :-1].argmax(-1) == tokens[:, 1:].to(logits.device)
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
    real = (mask[:, 1:].bool() & mask[:, :-1].bool()).to(right.device)
    right = right & real
    return right if per_token else right.sum() / real.sum().clamp(min=1)


@checks_arguments
def induction_loss(
    model: "LensModel",
    tokenizer: Any = None,
    batch_size: int = 4,
    subseq_len: int = 384,
    prepend_bos: bool | None = None,
    *,
    seed: int = 0,
) -> Float[Tensor, ""]:
    """Give the loss on random tokens that come again, in nats: near 0 for a model with induction.

    The tokens are drawn evenly from the vocabulary without special tokens, `subseq_len` of them twice; the loss is the
    mean over the second time but its first token, which nothing foretells. Guessing costs `log(vocabulary)`.
    TransformerLens draws ids 100 to 20,000, lets BOS take the place of the first token, and prepends it by default.

    Args:
        model: The model.
        tokenizer: Not needed: the model's own is used. Here for TransformerLens' order of arguments.
        batch_size: Rows.
        subseq_len: Tokens before they come again, 2 at least; rows are twice as long, and BOS.
        prepend_bos: None for what the tokenizer does.
        seed: Of the tokens.

    Raises:
        ContextLengthError: The rows are longer than the model's context.
        ArgumentError: Numbers that are too small; another tokenizer.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> induction_loss(model, subseq_len=20) < 1.0
        tensor(True)
    """
    if tokenizer is not None and tokenizer is not model.tokenizer:
        raise ArgumentError("the model's own tokenizer is used; load the model with tokenizer= for another")
    if not is_whole(subseq_len, 2):
        raise ArgumentError(f"subseq_len is a number from 2; got {subseq_len!r}")
    generator = torch.Generator().manual_seed(seed)
    rows = repeated_rows(model, batch_size, subseq_len, generator, prepend_bos).to(model.input_device)
    with torch.no_grad():
        losses = token_loss(model(rows), rows, per_token=True)
    return losses[:, -(subseq_len - 1) :].mean()


class IOIDataset:
    """Prompts of indirect object identification: "When Mary and John went to the store, John gave a drink to" (Mary).

    An item is a dictionary of `prompt` (ids, without the answer), `IO` and `S`: the ids of the indirect object, which
    is right, and of the subject. Names are used that are one token each.

    Attributes:
        texts: The prompts as text.
        names: The names that are one token.
    """

    def __init__(
        self,
        tokenizer: Any,
        templates: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        nouns: Mapping[str, Sequence[str]] | None = None,
        num_samples: int = 1000,
        symmetric: bool = False,
        prepend_bos: bool | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Draw prompts.

        Args:
            tokenizer: Of the model.
            templates: Texts with `[A]`, `[B]` and nouns in brackets that end in `[A]`.
            names: What stands for `[A]` and `[B]`.
            nouns: Lists of what stands for the other brackets.
            num_samples: How many.
            symmetric: Whether each prompt comes a second time with the names exchanged (both count).
            prepend_bos: None for what the tokenizer does. TransformerLens' default is True.
            seed: Of the draws.

        Raises:
            TokenizerError: Fewer than two names are one token.
            ArgumentError: A template that does not end in `[A]`, or with unknown brackets.
        """
        self.names = [name for name in names or NAMES if _is_one_token(tokenizer, f" {name}")]
        if len(self.names) < 2:
            raise TokenizerError(f"fewer than two names are one token each: {self.names}; give others")
        templates, nouns = list(templates or TEMPLATES), dict(NOUNS if nouns is None else nouns)
        for template in templates:
            if not template.rstrip().endswith("[A]") or "[B]" not in template:
                raise ArgumentError(f"a template has [B], and ends in [A]; got {template!r}")
        generator = torch.Generator().manual_seed(seed)
        pairs = list(permutations(self.names, 2))
        self.texts: list[str] = []
        self._items: list[dict[str, Tensor]] = []
        while len(self._items) < num_samples:
            text = _choice(templates, generator).rstrip().removesuffix("[A]").rstrip()
            for noun, words in nouns.items():
                text = text.replace(f"[{noun}]", _choice(list(words), generator))
            first = _choice(pairs, generator)
            for pair in (first, first[::-1]) if symmetric else (first,):
                self._add(tokenizer, text, pair, prepend_bos)
        del self.texts[num_samples:], self._items[num_samples:]

    def _add(self, tokenizer: Any, template: str, pair: tuple[str, ...], prepend_bos: bool | None) -> None:
        text = template.replace("[A]", pair[0]).replace("[B]", pair[1])
        if "[" in text:
            raise ArgumentError(f"no words are given for a bracket of {template!r}; give them in nouns")
        io, s = (_tokens.to_single_token(tokenizer, f" {name}") for name in pair)
        prompt = _tokens.to_tokens(tokenizer, text, prepend_bos=prepend_bos).tokens[0]
        self.texts.append(text)
        self._items.append({"prompt": prompt, "IO": torch.tensor([io]), "S": torch.tensor([s])})

    def __len__(self) -> int:
        """Count the prompts."""
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Give one prompt's ids and answers."""
        return self._items[index]


@checks_arguments
def ioi_eval(
    model: "LensModel",
    dataset: IOIDataset | None = None,
    batch_size: int = 8,
    num_samples: int = 1000,
    tokenizer: Any = None,
    symmetric: bool = False,
) -> dict[str, float]:
    """Measure how a model tells the indirect object from the subject.

    Args:
        model: The model.
        dataset: The prompts; None draws `num_samples`.
        batch_size: Prompts at a time.
        num_samples: How many are drawn.
        tokenizer: For the prompts that are drawn; None for the model's.
        symmetric: Whether they come with the names exchanged, too.

    Returns:
        `"Logit Difference"`: the mean of the indirect object's logit less the subject's, in logits. `"Accuracy"`: how
        often it is above 0.

    Raises:
        TokenizerError: No tokenizer, or the names are not one token each.

    Example:
        >>> import lens_core as lens
        >>> model = lens.load("toy:gpt2")
        >>> prompts = IOIDataset(
        ...     model.tokenizer,
        ...     templates=["the [A] and the [B] saw a [OBJECT]. the [B] gave the [OBJECT] to the [A]"],
        ...     names=["king", "queen", "girl"],
        ...     nouns={"OBJECT": ["cake", "ball"]},
        ...     num_samples=4,
        ... )
        >>> prompts.texts[0], model.to_string(prompts[0]["IO"])
        ('the girl and the queen saw a ball. the queen gave the ball to the', 'girl')
        >>> sorted(ioi_eval(model, prompts))
        ['Accuracy', 'Logit Difference']
    """
    if dataset is None:
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
        dataset = IOIDataset(tokenizer, num_samples=num_samples, symmetric=symmetric)
    differences: list[Tensor] = []
    prompts = (dataset[index]["prompt"] for index in range(len(dataset)))
    for batch in batches(model, prompts, batch_size):
        items = [dataset[batch.first + row] for row in range(len(batch.tokens))]
        io, s = (torch.cat([item[name] for item in items]).to(batch.tokens.device) for name in ("IO", "S"))
        rows = torch.arange(len(items), device=batch.tokens.device)
        with torch.no_grad():
            logits = model(batch.tokens, **batch.call)[rows, batch.attention_mask.sum(1) - 1]
        differences.append((logits[rows, io] - logits[rows, s]).float().cpu())
    every = torch.cat(differences)
    return {"Logit Difference": float(every.mean()), "Accuracy": float((every > 0).float().mean())}


def _is_one_token(tokenizer: Any, text: str) -> bool:
    try:
        _tokens.to_single_token(tokenizer, text)
    except TokenizerError:
        return False
    return True


def _choice(options: Sequence[Any], generator: torch.Generator) -> Any:
    return options[int(torch.randint(len(options), (), generator=generator))]
