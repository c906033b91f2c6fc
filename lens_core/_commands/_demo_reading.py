# ruff: noqa: TID253 - imported when the demo runs, not when its options are declared
"""What `lens demo` measures on any model: the text it reads, its losses and guesses."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_core import __version__
from lens_core._commands._demo_parts import Prediction
from lens_core._registry import active_registry
from lens_core._token_ids import id_rows
from lens_core.analysis import heads as _heads
from lens_core.errors import InputError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache
    from lens_core.model import LensModel

__all__ = [
    "ROUNDINGS",
    "Text",
    "choose_text",
    "contrast",
    "has_patterns",
    "has_scan",
    "losses_with",
    "places",
    "reading",
    "telling_position",
    "word",
]

LONGEST = 512  # tokens; more would make a page that no browser likes
LONGEST_SCAN = 128  # of a model whose effective attention is computed, in time quadratic in the tokens
ROUNDINGS = 100  # by how many roundings of the parts' size a sum may be off
_WORDS = 20  # random words, said twice
_GUESSES = 3


@attrs.frozen(kw_only=True, eq=False)
class Text:
    """What the model reads.

    Attributes:
        tokens: Its ids.
        words: Each token as text; the ids where there is no tokenizer.
        notes: What the reader should know about it.
    """

    tokens: Int[Tensor, "1 pos"]
    words: Sequence[str]
    notes: Sequence[str] = ()


def choose_text(model: "LensModel", text: str | None, *, seed: int) -> Text:
    """Turn the text into tokens, no more than the model and the page can take; None makes random words, said twice.

    Raises:
        InputError: A single token, or text for a model without a tokenizer.
    """
    notes: list[str] = []
    if text is None and model.tokenizer is None:
        tokens = _random_ids(model, seed)
        notes.append(f"{model.cfg.model_name} has no tokenizer: the text is random token ids, shown as numbers")
    else:
        tokens = model.to_tokens(_random_words(model, seed) if text is None else text)
    length, most = tokens.shape[1], LONGEST if has_patterns(model) else LONGEST_SCAN
    limit = min(model.cfg.n_ctx or most, most)
    if length < 2:
        raise InputError(f"the text is a single token, {text!r}; the demo needs at least two")
    if length > limit:
        whose = "the model's context" if limit == model.cfg.n_ctx else "what the demo can show"
        notes.append(f"the text has {length} tokens and was cut to the first {limit}, {whose}")
        tokens = tokens[:, :limit]
    if _heads.repeated_tokens(tokens).any() and not places(tokens)["induction"].any():
        notes.append("the repeats are so close together that induction looks like attention to the token before")
    if model.tokenizer is None:
        return Text(tokens=tokens, words=[str(token) for token in id_rows(tokens)[0]], notes=notes)
    unknown = int((tokens == model.tokenizer.unk_token_id).sum()) if model.tokenizer.unk_token_id is not None else 0
    if unknown and model.tokenizer.unk_token_id not in (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id):
        notes.append(f"{unknown} of {tokens.shape[1]} tokens are not in the vocabulary: {model.tokenizer.unk_token}")
    return Text(tokens=tokens, words=model.to_str_tokens(tokens), notes=notes)


def _random_ids(model: "LensModel", seed: int) -> Int[Tensor, "1 pos"]:
    count = min(_WORDS, (model.cfg.n_ctx or LONGEST) // 2)
    ids = torch.randint(model.cfg.d_vocab, (1, count), generator=torch.Generator().manual_seed(seed))
    return torch.cat([ids, ids], 1).to(model.cfg.device)


def _random_words(model: "LensModel", seed: int) -> str:
    """Draw lower-case words, each one token of the vocabulary inside a text, and say them twice."""
    generator = torch.Generator().manual_seed(seed)
    words: list[str] = []
    for token in map(int, torch.randperm(len(model.tokenizer), generator=generator)):
        word = model.to_single_str_token(token).strip()
        if len(word) < 3 or not (word.isascii() and word.isalpha() and word.islower()):
            continue
        if id_rows(model.to_tokens(f"{word} {word}", prepend_bos=False))[0][1:] == [token]:
            words.append(word)
        if len(words) == min(_WORDS, (model.cfg.n_ctx or LONGEST) // 2 - 1):
            break
    if not words:
        raise InputError("the tokenizer has no plain lower-case words to make a text of; give one by --text or --file")
    return " ".join([*words, *words])


def has_patterns(model: "LensModel") -> bool:
    """Whether some layer has attention patterns."""
    return any(point.part.endswith("hook_pattern") for point in model.hook_points())


def has_scan(model: "LensModel") -> bool:
    """Whether some layer has a state-space mixer."""
    return any(point.part.endswith("mixer.hook_delta") for point in model.hook_points())


def places(tokens: Int[Tensor, "1 pos"]) -> dict[str, Tensor]:
    """Find where heads of each kind look, but for the queries where the kinds cannot be told apart."""
    every = {
        "induction": _heads.induction_places(tokens),
        "previous": _heads.previous_places(tokens),
        "duplicate": _heads.duplicate_places(tokens),
    }
    return {
        kind: _heads.unmixed(place, *(others for other, others in every.items() if other != kind))
        for kind, place in every.items()
    }


def reading(
    model: "LensModel",
    text: Text,
    cache: "ActivationCache",
    logits: Float[Tensor, "1 pos d_vocab"],
    losses: Sequence[float | None],
    command: str,
) -> dict[str, Any]:
    """Give the fields that all results share, but for the description."""
    repeated = [at for at, is_repeated in enumerate(_heads.repeated_tokens(text.tokens)[0]) if is_repeated]
    shown = _some_positions(repeated, text.tokens.shape[1])
    return {
        "model": model.cfg.model_name,
        "activations": f"{len(cache)} activations, {sum(value.nbytes for value in cache.values()) / 2**20:.1f} MiB",
        "tokens": text.words,
        "repeated": repeated,
        "losses": losses,
        "predictions": [_prediction(model, logits[0], at) for at in shown],
        "command": command,
        "versions": _versions(model),
    }


def losses_with(
    model: "LensModel", tokens: Int[Tensor, "1 pos"], hooks: Sequence[tuple[Any, ...]]
) -> list[float | None]:
    """Give the loss of every token with these hooks in place; None for the first, which nothing predicts."""
    losses = model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="loss", loss_per_token=True)
    return [None, *map(float, losses[0])]


def contrast(
    logits: Float[Tensor, "pos d_vocab"], tokens: Int[Tensor, " pos"], position: int
) -> tuple[int, int, float]:
    """Give the token that follows a position, its strongest rival there, and by how much its logit is higher."""
    answer = int(tokens[position + 1])
    rival = next(token for token in map(int, logits[position].topk(2).indices) if token != answer)
    return answer, rival, float(logits[position, answer].double() - logits[position, rival].double())


def _some_positions(repeated: Sequence[int], length: int) -> list[int]:
    """Choose positions after which to show the guesses: a few before the repeats, a few before repeated tokens."""
    first = repeated[0] - 1 if repeated else length - 1
    fresh = [first // 3, 2 * first // 3]
    known = [repeated[len(repeated) * part // 4] - 1 for part in (1, 2, 3)] if repeated else []
    return sorted({*fresh, *known, length - 1})


def _prediction(model: "LensModel", logits: Float[Tensor, "pos d_vocab"], position: int) -> Prediction:
    best = logits[position].float().softmax(-1).topk(min(_GUESSES, logits.shape[-1]))
    top = [(word(model, int(token)), float(share)) for share, token in zip(*best, strict=True)]
    return Prediction(position=position, top=top)


def word(model: "LensModel", token: int) -> str:
    """Give a token as it reads inside a text."""
    if model.tokenizer is None:
        return str(token)
    return model.to_str_tokens(torch.tensor([token, token]))[1]


def telling_position(
    losses: Sequence[float | None], without: Sequence[float | None] | None, repeated: Sequence[int]
) -> int:
    """Choose where to read the logits: before the token that loses most without what was cut, or was best foreseen."""
    known = {at: losses[at] or 0.0 for at in (repeated or range(1, len(losses)))}
    if without is None:
        return min(known, key=lambda at: known[at]) - 1
    return max(known, key=lambda at: (without[at] or 0.0) - known[at]) - 1


def _versions(model: "LensModel") -> str:
    owners = (record for record in active_registry().records if model.architecture in record.architectures)
    plugin = [f"{record.distribution} {record.version}" for record in owners if record.distribution]
    others = [f"{name} {version(name)}" for name in ("torch", "transformers")]
    return ", ".join([f"lens-core {__version__}", *plugin, *others])
