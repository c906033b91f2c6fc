"""What is asked of an HF tokenizer: finding one, encoding, decoding. Nothing here changes one that it is given."""

import copy
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

from lens_core.errors import ArgumentError, LensWarning, TokenIdError, TokenizerError

Tokenizer: TypeAlias = Any  # transformers' base class, which is not imported here: loading it costs seconds

_TOKENIZER_FILE = re.compile(r"token|vocab|merges|spiece|tekken|\.model$|\.tiktoken$", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_TIMEOUT = 10.0  # seconds


def find_tokenizer(source: object, tokenizer: object = None, **options: Any) -> Tokenizer | None:
    """Find the tokenizer that belongs to a model.

    The local cache is asked before the hub, and the hub is asked once whether it can be reached, so that being
    offline costs no retries. Give `revision=` the commit of the loaded model, so that the two belong together.

    Args:
        source: hub id, local folder, or an HF model in memory (its config remembers where it came from).
        tokenizer: a tokenizer, which wins, or the id or folder of one.
        options: passed to `AutoTokenizer.from_pretrained`.

    Returns:
        The tokenizer, or None where the model has none. A tokenizer that is there and cannot be loaded, or that may
        be on a hub out of reach, gives None and a `LensWarning`: token ids still work.

    Raises:
        TokenizerError: `tokenizer` names one that cannot be loaded.
        ArgumentError: `tokenizer` is neither a name nor callable.
    """
    if isinstance(tokenizer, str | Path):
        found = _load_tokenizer(str(tokenizer), options)
        if found is None:
            message = (
                f"There is no tokenizer in {str(tokenizer)!r}. Give the id or folder of one, or a tokenizer object."
            )
            raise TokenizerError(message)
        return found
    if tokenizer is not None:
        if not callable(tokenizer):
            raise ArgumentError(f"tokenizer={tokenizer!r} is neither a tokenizer nor the id or folder of one.")
        return tokenizer
    if not isinstance(source, str | Path):
        source = getattr(getattr(source, "config", None), "_name_or_path", None) or ""
    try:
        return _load_tokenizer(str(source), options)
    except TokenizerError as error:
        warnings.warn(f"{error} Continuing without one: token ids still work.", LensWarning, stacklevel=2)
        return None


def _load_tokenizer(name: str, options: Mapping[str, Any]) -> Tokenizer | None:
    """Load from a folder, the hub's cache or the hub; None when there is nothing of the kind there."""
    folder = Path(name, options.get("subfolder") or "")
    is_local = bool(name) and folder.is_dir()
    if is_local and "gguf_file" not in options and not any(_TOKENIZER_FILE.search(f.name) for f in folder.iterdir()):
        return None  # HF would make up an empty tokenizer from the config's model type
    if not is_local and not _HUB_ID.fullmatch(name):
        return None
    from transformers import AutoTokenizer

    load = cast("Any", AutoTokenizer).from_pretrained
    reason = ""
    for cached_only in (True,) if is_local or options.get("local_files_only") else (True, False):
        try:
            if not cached_only:
                _check_hub(name, options)
            # Not None: HF would then ask at the terminal whether to run the repository's code.
            found = load(name, **{"trust_remote_code": False, **options, "local_files_only": cached_only})
        except Exception as error:  # whatever HF, the hub or a damaged file may raise
            reason = f"{type(error).__name__}: {str(error).strip()}"
            continue
        if len(found) - len(found.all_special_tokens) > 1:
            return found
        reason = "it holds special tokens only"  # HF made it up, as above
    raise TokenizerError(f"The tokenizer of {name!r} cannot be loaded ({reason}). Pass tokenizer= to lens.load.")


def _check_hub(name: str, options: Mapping[str, Any]) -> None:
    """Ask the hub for the repository once; HF's own loading retries each file for most of a minute."""
    from huggingface_hub import HfApi

    HfApi().model_info(name, revision=options.get("revision"), token=options.get("token"), timeout=_HUB_TIMEOUT)


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """Give a tokenizer that has a BOS: where it has none, a copy whose EOS is both, as TransformerLens has it."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    try:  # verbose=False: a warning about length would be noted in the tokenizer, which is not ours to change
        batch = tokenizer(texts, add_special_tokens=add_special_tokens, padding=False, truncation=False, verbose=False)
    except Exception as error:  # the backend raises plain ones: half a surrogate pair, a word and no unknown token
        message = f"The tokenizer cannot encode the text ({error}). Check it for broken characters and unknown words."
        raise TokenizerError(message) from error
    return [list(row) for row in batch["input_ids"]]


def added_tokens(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Find the ids that the tokenizer adds before and after a text, by comparing with and without.

    A text that is made of special tokens, or gives none, cannot tell the two sides apart: several are tried.
    """
    for probe in ("a", "0", " the", ".", text):
        try:
            (plain,) = encode(tokenizer, [probe], add_special_tokens=False)
        except TokenizerError:  # the probe is not in the vocabulary
            continue
        (whole,) = encode(tokenizer, [probe], add_special_tokens=True)
        n = len(plain)
        starts = [i for i in range(len(whole) - n + 1) if whole[i : i + n] == plain]
        if plain and len(starts) == 1:
            return whole[: starts[0]], whole[starts[0] + n :]
    (added,) = encode(tokenizer, [""], add_special_tokens=True)
    leading = int(added[:1] == [tokenizer.bos_token_id])
    return added[:leading], added[leading:]


def text_rows(tokenizer: Tokenizer, texts: list[str], *, prepend_bos: bool | None) -> list[list[int]]:
    """Give the ids of each text, unpadded, BOS by the rule of `lens_core.tokens`."""
    rows = encode(tokenizer, texts, add_special_tokens=prepend_bos is None)
    if prepend_bos is None:
        return rows
    bos = tokenizer.bos_token_id
    before, after = added_tokens(tokenizer, texts[0])
    before = [token for token in before if token != bos]
    if not prepend_bos:
        return [before + row + after for row in rows]
    return [[bos, *before, *without_leading(row, bos), *after] for row in rows]  # a typed BOS is the one asked for


def without_leading(row: list[int], token: int | None) -> list[int]:
    """Leave out a token wherever it stands at the start of a row."""
    start = next((i for i, other in enumerate(row) if other != token), len(row))
    return row[start:]


def apply_template(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # a template may raise whatever it likes
        if getattr(tokenizer, "chat_template", None) is None:
            message = "Messages were given, and the tokenizer has no chat_template. Set one, or give the text itself."
        else:
            message = f"The tokenizer's chat template refuses these messages ({error}): {messages!r}."
        raise TokenizerError(message) from error
    return list(ids)


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    if any(not 0 <= token < 2**31 for token in ids):  # larger ones do not fit the tokenizer's own type
        raise TokenIdError(f"No text for token ids {[i for i in ids if not 0 <= i < 2**31][:3]}. Give ids of 0 and up.")
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_text(tokenizer: Tokenizer, token: int, *, is_first: bool) -> str:
    """Decode one token as it reads at the start of a text, or after another token (some decoders eat a first space)."""
    alone = decode(tokenizer, [token])
    if is_first:
        return alone
    twice = decode(tokenizer, [token, token])
    return (twice[len(alone) :] if twice.startswith(alone) else "") or alone
