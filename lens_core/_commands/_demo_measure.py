# ruff: noqa: TID253 - imported when the demo runs, not when its options are declared
"""What `lens demo` measures, step by step: a model and a text in, plain values out."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_core import __version__, edits
from lens_core._commands._demo_page import (
    Ablation,
    Attribution,
    DemoResult,
    HeadScores,
    Prediction,
    head_label,
)
from lens_core._registry import active_registry
from lens_core._token_ids import id_rows
from lens_core.analysis import heads as _heads
from lens_core.errors import InputError, UnsupportedHookError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache
    from lens_core.model import LensModel

INDUCTION = 0.4  # share of attention from which a head counts as an induction head
LONGEST = 512  # tokens; more would make a page that no browser likes
PICTURED = 2_000_000  # cells of attention patterns on the page, about 5 MB
_WORDS = 20  # random words, said twice
_GUESSES = 3
_ROUNDINGS = 100  # by how many roundings of the parts' size the sum may be off
_HEAD_LABEL = re.compile(r"L\d+H\d+")
_Head = tuple[int, int]


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
    length, limit = tokens.shape[1], min(model.cfg.n_ctx, LONGEST)
    if length < 2:
        raise InputError(f"the text is a single token, {text!r}; the demo needs at least two")
    if length > limit:
        whose = "the model's context" if limit == model.cfg.n_ctx else "what the demo can show"
        notes.append(f"the text has {length} tokens and was cut to the first {limit}, {whose}")
        tokens = tokens[:, :limit]
    if _heads.repeated_tokens(tokens).any() and not _places(tokens)["induction"].any():
        notes.append("the repeats are so close together that induction looks like attention to the token before")
    if model.tokenizer is None:
        return Text(tokens=tokens, words=[str(token) for token in id_rows(tokens)[0]], notes=notes)
    unknown = int((tokens == model.tokenizer.unk_token_id).sum()) if model.tokenizer.unk_token_id is not None else 0
    if unknown and model.tokenizer.unk_token_id not in (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id):
        notes.append(f"{unknown} of {tokens.shape[1]} tokens are not in the vocabulary: {model.tokenizer.unk_token}")
    return Text(tokens=tokens, words=model.to_str_tokens(tokens), notes=notes)


def _random_ids(model: "LensModel", seed: int) -> Int[Tensor, "1 pos"]:
    count = min(_WORDS, model.cfg.n_ctx // 2)
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
        if len(words) == min(_WORDS, model.cfg.n_ctx // 2 - 1):
            break
    if not words:
        raise InputError("the tokenizer has no plain lower-case words to make a text of; give one by --text or --file")
    return " ".join([*words, *words])


@torch.no_grad()
def measure(model: "LensModel", text: Text, command: str, *, begin: Callable[[str], None]) -> DemoResult:
    """Run the whole demo on one text; `begin` is told what comes next.

    Raises:
        UnsupportedHookError: The model has no attention patterns.
    """
    if not any(point.part.endswith("hook_pattern") for point in model.hook_points()):
        raise UnsupportedHookError(
            f"{model.cfg.model_name} has no attention patterns, so there are no heads to look for; "
            "`lens hooks` lists what it has"
        )
    tokens = text.tokens
    begin("caching every activation")
    (logits, clean), cache = model.run_with_cache(tokens, return_type="both", loss_per_token=True)
    begin("looking for induction heads")
    repeated = [at for at, is_repeated in enumerate(_heads.repeated_tokens(tokens)[0]) if is_repeated]
    scores = _scores(cache, tokens)
    induction = {head: score["induction"] for head, score in scores.items()}
    found = _heads.heads_above(induction, INDUCTION) if repeated else []
    control = _heads.control_heads(found, induction)
    begin("ablating them")
    losses = [None, *map(float, clean[0])]
    ablation = _ablation(model, tokens, losses, repeated, found, control) if found else None
    begin("attributing the logits")
    position = _telling_position(losses, ablation, repeated)
    return DemoResult(
        model=model.cfg.model_name,
        description=_description(model),
        activations=f"{len(cache)} activations, {sum(value.nbytes for value in cache.values()) / 2**20:.1f} MiB",
        tokens=text.words,
        repeated=repeated,
        losses=losses,
        predictions=[_prediction(model, logits[0], at) for at in _some_positions(repeated, tokens.shape[1])],
        scores=[HeadScores(label=head_label(*head), **score) for head, score in scores.items()],
        patterns=_patterns(cache, induction),
        threshold=INDUCTION,
        induction_heads=sorted(found),
        control_heads=control,
        ablation=ablation,
        attribution=_attribution(model, cache, logits[0], tokens[0], position),
        command=command,
        versions=_versions(model),
    )


def _places(tokens: Int[Tensor, "1 pos"]) -> dict[str, Tensor]:
    """Find where heads of each kind look, but for the queries where the kinds cannot be told apart."""
    every = {
        "induction": _heads.induction_places(tokens),
        "previous": _heads.previous_places(tokens),
        "duplicate": _heads.duplicate_places(tokens),
    }
    return {
        kind: _heads.unmixed(places, *(others for other, others in every.items() if other != kind))
        for kind, places in every.items()
    }


def _scores(cache: "ActivationCache", tokens: Int[Tensor, "1 pos"]) -> dict[_Head, dict[str, float]]:
    kinds = {kind: _heads.head_scores(cache, places) for kind, places in _places(tokens).items()}
    return {head: {kind: found[head] for kind, found in kinds.items()} for head in kinds["induction"]}


def _ablation(
    model: "LensModel",
    tokens: Int[Tensor, "1 pos"],
    losses: Sequence[float | None],
    repeated: Sequence[int],
    found: Sequence[_Head],
    control: Sequence[_Head],
) -> Ablation:
    ablated = _losses_without(model, tokens, found)
    compared = _losses_without(model, tokens, control) if control else None

    def mean(values: Sequence[float | None]) -> float:
        return sum(values[at] or 0.0 for at in repeated) / len(repeated)

    return Ablation(
        clean=mean(losses),
        induction=mean(ablated),
        control=None if compared is None else mean(compared),
        method="set to zero",
        losses=ablated,
    )


def _losses_without(model: "LensModel", tokens: Int[Tensor, "1 pos"], heads: Sequence[_Head]) -> list[float | None]:
    """Give the loss of every token with the output of these heads set to zero."""
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        by_layer[layer].append(head)
    hooks = [(("z", layer), edits.zero(heads=chosen)) for layer, chosen in by_layer.items()]
    losses = model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="loss", loss_per_token=True)
    return [None, *map(float, losses[0])]


def _some_positions(repeated: Sequence[int], length: int) -> list[int]:
    """Choose positions after which to show the guesses: a few before the repeats, a few before repeated tokens."""
    first = repeated[0] - 1 if repeated else length - 1
    fresh = [first // 3, 2 * first // 3]
    known = [repeated[len(repeated) * part // 4] - 1 for part in (1, 2, 3)] if repeated else []
    return sorted({*fresh, *known, length - 1})


def _prediction(model: "LensModel", logits: Float[Tensor, "pos d_vocab"], position: int) -> Prediction:
    best = logits[position].float().softmax(-1).topk(min(_GUESSES, logits.shape[-1]))
    top = [(_word(model, int(token)), float(share)) for share, token in zip(*best, strict=True)]
    return Prediction(position=position, top=top)


def _word(model: "LensModel", token: int) -> str:
    """Give a token as it reads inside a text."""
    if model.tokenizer is None:
        return str(token)
    return model.to_str_tokens(torch.tensor([token, token]))[1]


def _patterns(cache: "ActivationCache", induction: Mapping[_Head, float]) -> dict[int, Any]:
    """Give the patterns of as many layers as a page can show, those with the most inductive heads first."""
    best: dict[int, float] = defaultdict(float)
    for (layer, _), score in induction.items():
        best[layer] = max(best[layer], score)
    shown: dict[int, Any] = {}
    cells = 0
    for layer in sorted(best, key=lambda layer: -best[layer]):
        pattern = cache["pattern", layer][0]
        cells += pattern.numel()
        if shown and cells > PICTURED:
            break
        shown[layer] = pattern.float().cpu()
    return shown


def _telling_position(losses: Sequence[float | None], ablation: Ablation | None, repeated: Sequence[int]) -> int:
    """Choose where to read the logits: before the token that suffers most from the ablation, or was best foreseen."""
    known = {at: losses[at] or 0.0 for at in (repeated or range(1, len(losses)))}
    if ablation is None:
        return min(known, key=lambda at: known[at]) - 1
    return max(known, key=lambda at: (ablation.losses[at] or 0.0) - known[at]) - 1


def _attribution(
    model: "LensModel",
    cache: "ActivationCache",
    logits: Float[Tensor, "pos d_vocab"],
    tokens: Int[Tensor, " pos"],
    position: int,
) -> Attribution:
    """Split the logit of the token that follows, less that of its strongest rival, into what each head adds."""
    answer = int(tokens[position + 1])
    rival = next(token for token in map(int, logits[position].topk(2).indices) if token != answer)
    stack, labels = cache.get_full_resid_decomposition(expand_neurons=False, pos_slice=position, return_labels=True)
    shares, bias = cache.logit_attrs(stack, answer, rival, pos_slice=position, return_bias=True)
    parts = dict(zip(labels, map(float, shares[:, 0]), strict=True)) | {"final bias": float(bias)}
    heads = {label: value for label, value in parts.items() if _HEAD_LABEL.fullmatch(label)}
    return Attribution(
        position=position,
        answer=_word(model, answer),
        rival=_word(model, rival),
        labels=list(heads),
        values=list(heads.values()),
        remainder=sum(value for label, value in parts.items() if label not in heads),  # never total less the heads
        total=float(logits[position, answer].double() - logits[position, rival].double()),
        tolerance=_ROUNDINGS * torch.finfo(logits.dtype).eps * sum(map(abs, parts.values())),
    )


def _description(model: "LensModel") -> str:
    cfg = model.cfg
    return f"{model.architecture.name}, {cfg.n_layers} layers of {cfg.n_heads} heads, width {cfg.d_model}"


def _versions(model: "LensModel") -> str:
    owners = (record for record in active_registry().records if model.architecture in record.architectures)
    plugin = [f"{record.distribution} {record.version}" for record in owners if record.distribution]
    others = [f"{name} {version(name)}" for name in ("torch", "transformers")]
    return ", ".join([f"lens-core {__version__}", *plugin, *others])
