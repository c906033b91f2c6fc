"""Generation by HF's own loop, with hooks live at every step."""

import threading
from collections.abc import Iterator, Sequence
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from lens_core._arguments import checks_arguments, is_whole
from lens_core._hf_cache import cache_in, has_attention, note_length
from lens_core._inputs import Inputs, is_text, read_input
from lens_core._state import NOTHING, Past, State, extended, read_past
from lens_core._streaming import Stream, progress
from lens_core.cache import CacheSink
from lens_core.errors import ArgumentError, ContextLengthError
from lens_core.hook_points import NameFilter

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["generate", "generate_stream"]


@checks_arguments
def generate(
    model: "LensModel",
    input: Any = "",
    max_new_tokens: int = 10,
    *,
    stop_at_eos: bool = True,
    eos_token_id: int | list[int] | None = None,
    do_sample: bool = True,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    use_past_kv_cache: bool = True,
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] | None = "left",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    return_type: Literal["input", "str", "tokens"] = "input",
    past_key_values: Any = None,
    return_state: bool = False,
    return_cache: bool = False,
    names_filter: NameFilter = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    verbose: bool = False,
    **hf_options: Any,
) -> Any:
    """Continue a text by HF's own `generate`; hooks fire at every step, and edits enter the model's cache.

    The prompt is step 0 and gives logits for its last position only, as HF computes them; each later step has one
    position. A hook function tells them apart by `hook.step`, `hook.is_prefill` and `hook.positions`.

    Args:
        model: The model.
        input: Text, a list of texts, role/content messages, or token ids.
        max_new_tokens: Tokens to add at most.
        stop_at_eos: Whether a row ends at the end-of-sequence token.
        eos_token_id: Which; None for the checkpoint's.
        do_sample: False takes the likeliest token.
        top_k: Sample from the k likeliest; None for all.
        top_p: Sample from the likeliest that hold this probability; None for all.
        temperature: Divides the logits; 0 is greedy.
        freq_penalty: Subtracted from a token's logit for each time it occurs already.
        repetition_penalty: HF's; 1 for none.
        use_past_kv_cache: False runs the whole sequence anew at each step.
        prepend_bos: As in `forward`.
        padding_side: For a list of texts; generation continues on the right, so padding belongs on the left.
        attention_mask: For token ids with padding.
        return_type: `"input"` gives what `input` was, text or ids; `"str"` text; `"tokens"` ids, prompt included.
        past_key_values: What the input continues: a state, which stays as it is, and then the input is new tokens only;
            or a cache of HF's own, which HF extends in place, and then the input is the whole sequence, as HF wants it.
        return_state: Give `(result, state)`; the state is that before the last token, which no forward has seen.
        return_cache: Give `(result, cache)`, or `(result, cache, state)`; the cache holds the positions of this call,
            but for the last token.
        names_filter: What to cache; None for the default names.
        device: Where to keep the cache.
        dtype: Kept dtype of floating activations.
        verbose: Show a progress bar.
        **hf_options: Anything else that HF's `generate` takes, such as `num_beams`.

    Penalties count the tokens of this call, not those of the state.

    Raises:
        ContextLengthError: Prompt and new tokens do not fit the context.
        StateError: A state of another model or batch.
        ArgumentError: A wrong `return_type`, an option that HF does not know, beams or drafts with a cache or a state,
            or `use_past_kv_cache=False` with a state.
    """
    if return_type not in ("input", "str", "tokens"):
        raise ArgumentError(f"return_type is 'input', 'str' or 'tokens'; got {return_type!r}")
    numbers: dict[str, object] = {"temperature": temperature, "freq_penalty": freq_penalty}
    for name, number in numbers.items():
        if not isinstance(number, int | float):
            raise ArgumentError(f"{name} is a number; got {number!r}")
    past = _past(model, past_key_values, return_state=return_state, uses_cache=use_past_kv_cache, options=hf_options)
    if return_cache:
        _check_rows(model, hf_options, ("num_beams", *_DRAFTS), "the activations cached are not the returned rows'")
    inputs = _prompt(
        model, past, input, max_new_tokens, prepend_bos, padding_side, attention_mask, continues=use_past_kv_cache
    )
    options = _hf_options(
        max_new_tokens=max_new_tokens,
        stop_at_eos=stop_at_eos,
        eos_token_id=eos_token_id,
        do_sample=do_sample and temperature > 0,
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
        freq_penalty=freq_penalty,
        repetition_penalty=repetition_penalty,
        use_cache=use_past_kv_cache,
        pad_token_id=_pad_id(model),
    )
    cache = model.new_cache()
    sinks = [CacheSink(cache, model.table.select(names_filter), device=device, dtype=dtype)] if return_cache else []
    with model.running((), sinks), progress(max_new_tokens if verbose else 0) as streamer:
        output = _call_hf(model, past, inputs, {**options, **hf_options}, streamer=streamer)
    tokens: Tensor = output.sequences if return_state else output
    as_text = return_type == "str" or (return_type == "input" and is_text(input))
    result = (
        _as_text(model, tokens, is_batch=isinstance(input, list) and not _is_conversation(input)) if as_text else tokens
    )
    results = (result, cache) if return_cache else (result,)
    if return_state:
        ends = _ends(model, stop_at_eos=stop_at_eos, given=eos_token_id)
        results = (*results, _state_after(model, past, inputs, output, ends))
    return results if len(results) > 1 else result


@checks_arguments
def generate_stream(
    model: "LensModel",
    input: Any = "",
    max_new_tokens: int = 10,
    *,
    max_tokens_per_yield: int = 1,
    return_type: Literal["input", "str", "tokens"] = "input",
    **options: Any,
) -> Iterator[Any]:
    """Generate as `generate` does, and give the new tokens while they come.

    HF's loop runs in a thread that shares this context's hooks; leaving the iterator early stops it.

    Args:
        model: The model.
        input: As in `generate`.
        max_new_tokens: Tokens to add at most.
        max_tokens_per_yield: Steps in one piece.
        return_type: `"tokens"` gives ids `[batch, new]`, the others text for one row and a list for several.
        **options: As in `generate`.
    """
    if options.get("return_state"):
        raise ArgumentError("a stream gives tokens only; generate gives back a state")
    if max_tokens_per_yield < 1:
        raise ArgumentError(f"max_tokens_per_yield is at least 1; got {max_tokens_per_yield}")
    stream = Stream()
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            stop = StoppingCriteriaList([_StopWhen(stream.closed)])
            own: dict[str, Any] = {"return_type": "tokens", "streamer": stream, "stopping_criteria": stop}
            with model.running(is_apart=True):  # the caller may call the model between two pieces
                generate(model, input, max_new_tokens, **own, **options)
        except BaseException as error:  # handed to the caller's thread
            outcome.append(error)
        finally:
            stream.end()

    thread = threading.Thread(target=copy_context().run, args=(work,), daemon=True)
    thread.start()
    as_text = return_type == "str" or (return_type == "input" and is_text(input))
    is_batch = isinstance(input, list) and not _is_conversation(input)
    try:
        for piece in stream.pieces(max_tokens_per_yield):
            yield _as_text(model, piece, is_batch=is_batch) if as_text else piece
    finally:
        stream.closed.set()
        thread.join()
    if outcome:
        raise outcome[0]


# ---------------------------------------------------------------------- the parts


def _prompt(
    model: "LensModel",
    past: Past,
    given: Any,
    max_new_tokens: Any,
    prepend_bos: Any,
    padding_side: Any,
    mask: Any,
    *,
    continues: bool,
) -> Inputs:
    if not is_whole(max_new_tokens):
        raise ArgumentError(f"max_new_tokens is a positive number; got {max_new_tokens!r}")
    if isinstance(given, Tensor) and given.is_floating_point():
        raise ArgumentError("generation starts from text or token ids, not from embeddings")
    side = padding_side if is_text(given) else None
    inputs = read_input(
        model,
        given,
        prepend_bos=prepend_bos,
        padding_side=side,
        attention_mask=mask,
        past=past,
        continues=continues and (max_new_tokens > 1 or past.keeps_state),
    )
    n_prompt, n_ctx = past.length + (inputs.tokens.shape[1] if inputs.tokens is not None else 0), model.cfg.n_ctx
    if n_ctx is not None and n_prompt + max_new_tokens > n_ctx:
        raise ContextLengthError(
            f"{n_prompt} prompt tokens and {max_new_tokens} new ones are more than the context of {n_ctx}; "
            "ask for fewer"
        )
    return inputs


def _hf_options(
    *,
    stop_at_eos: bool,
    eos_token_id: Any,
    freq_penalty: float,
    top_k: int | None,
    top_p: float | None,
    temperature: float,
    **plain: Any,
) -> dict[str, Any]:
    """Spell TransformerLens' options as HF's; HF's own defaults (`top_k=50`) do not slip in."""
    options: dict[str, Any] = {**plain, "disable_compile": True}
    if not stop_at_eos:
        options["eos_token_id"] = None
    elif eos_token_id is not None:
        options["eos_token_id"] = eos_token_id
    if plain["do_sample"]:
        options |= {"top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p, "temperature": temperature}
    if freq_penalty:
        options["logits_processor"] = LogitsProcessorList([_FrequencyPenalty(freq_penalty)])
    return options


def _past(model: "LensModel", given: Any, *, return_state: bool, uses_cache: bool, options: dict[str, Any]) -> Past:
    """Read what to go on from; a cache of HF's own is left to HF."""
    if given is not None and not isinstance(given, State) and not return_state:
        return Past(cache=read_past(model, given).cache)
    past = read_past(model, given, keeps_state=return_state)
    if past is NOTHING:
        return past
    if not uses_cache:
        raise ArgumentError("a state is the model's own cache: leave use_past_kv_cache=False out")
    why = "no state goes in or comes out; state.fork(n=...) gives several rows to continue"
    _check_rows(model, options, ("num_beams", "num_return_sequences", *_DRAFTS), why)
    if return_state and any(options.get(name) is not None for name in ("stopping_criteria", "stop_strings")):
        raise ArgumentError("return_state needs to know where each row ends: by its end token, or at max_new_tokens")
    return past


_DRAFTS = ("prompt_lookup_num_tokens", "assistant_model")
"""Options with which HF runs tokens that it may take back."""


def _check_rows(model: "LensModel", options: dict[str, Any], names: Sequence[str], consequence: str) -> None:
    """Refuse options that change which row or position a forward is about."""
    config: Any = model.hf_model.generation_config
    for name in names:
        value = options.get(name, getattr(config, name, None))
        if value not in (None, 1):
            raise ArgumentError(f"{name}={value!r} reorders, repeats or cuts rows while HF generates, so {consequence}")


def _call_hf(model: "LensModel", past: Past, inputs: Inputs, options: dict[str, Any], *, streamer: Any) -> Any:
    mask = inputs.attention_mask
    if mask is None and inputs.tokens is not None:
        before = past.length if past.cache is not None and has_attention(past.cache) else 0
        mask = torch.ones_like(inputs.tokens[:, :1]).repeat(1, before + inputs.tokens.shape[1])
    if streamer is not None:
        options = {"streamer": streamer, **options}
    if past.cache is not None:
        options = {model.cache_argument: past.cache, **options}
    if past.keeps_state:
        options = {**options, "return_dict_in_generate": True}
    try:
        return model.hf_model.generate(inputs.tokens, attention_mask=mask, **options)
    except ValueError as error:
        if "model_kwargs" in str(error):
            raise ArgumentError(f"HF's generate does not know an option: {error}") from error
        raise


def _ends(model: "LensModel", *, stop_at_eos: bool, given: Any) -> list[int]:
    """List the tokens at which a row ends."""
    if not stop_at_eos:
        return []
    ends: Any = model.hf_model.generation_config.eos_token_id if given is None else given
    return list(cast("list[int]", ends)) if isinstance(ends, list) else [] if ends is None else [int(ends)]


def _state_after(model: "LensModel", past: Past, inputs: Inputs, output: Any, ends: list[int]) -> State:
    """Make the state after all tokens but the last, which was not run; what HF fills ended rows with is padding."""
    run: Tensor = output.sequences[:, :-1]
    prompt = cast("Tensor", inputs.tokens).shape[1]
    ended = torch.isin(run[:, prompt:], torch.tensor(ends, dtype=run.dtype, device=run.device))
    after_end = ended.cumsum(1) - ended.long() > 0
    before = inputs.whole_mask
    if before is None:
        before = torch.ones(len(run), past.length + prompt, dtype=torch.long, device=run.device)
    note_length(cache_in(output), past.length + run.shape[1])
    return extended(model, past, cache_in(output), run, torch.cat([before, 1 - after_end.long()], dim=1))


def _pad_id(model: "LensModel") -> int:
    """The id that finished rows are filled with: the tokenizer's, the checkpoint's, or the end-of-sequence token."""
    config: Any = model.hf_model.generation_config
    eos: Any = config.eos_token_id
    if isinstance(eos, list):
        eos = cast("list[int]", eos)[0]
    candidates: list[int | None] = [getattr(model.tokenizer, "pad_token_id", None), config.pad_token_id, eos, 0]
    return next(candidate for candidate in candidates if candidate is not None)


def _is_conversation(given: Any) -> bool:
    rows: list[Any] = cast("list[Any]", given) if isinstance(given, list) else []
    return bool(rows) and isinstance(rows[0], dict)


def _as_text(model: "LensModel", tokens: Tensor, *, is_batch: bool) -> str | list[str]:
    rows = model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return rows if is_batch else rows[0]


class _FrequencyPenalty(LogitsProcessor):
    def __init__(self, penalty: float) -> None:
        self.penalty = penalty

    def __call__(
        self, input_ids: Int[Tensor, "batch pos"], scores: Float[Tensor, "batch d_vocab"]
    ) -> Float[Tensor, "batch d_vocab"]:
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype))
        return scores - self.penalty * counts


class _StopWhen(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
