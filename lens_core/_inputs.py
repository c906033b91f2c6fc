"""What the user gave, brought to what HF's forward takes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_core import tokens as _tokens
from lens_core._arguments import checks_arguments
from lens_core._declaration import CallInput
from lens_core._state import NOTHING, Past, check_padding, takes_position_ids
from lens_core.errors import ArgumentError, ContextLengthError, EmptyInputError

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["Inputs", "is_text", "read_input", "token_loss", "visible_padding"]


@attrs.frozen(kw_only=True, eq=False)
class Inputs:
    """One batch: token ids or embeddings, and where padding is."""

    tokens: Tensor | None = None
    embeddings: Tensor | None = None
    attention_mask: Tensor | None = None
    """None where nothing is padding."""
    whole_mask: Tensor | None = None
    """Of all positions, those before this call's included, whatever part of it HF takes."""
    position_ids: Tensor | None = None
    targets: Tensor | None = None
    """Token ids that a loss is for."""

    def for_hf(self) -> dict[str, Any]:
        """Give the keyword arguments of HF's forward."""
        given = {"input_ids": self.tokens, "inputs_embeds": self.embeddings, "attention_mask": self.attention_mask}
        given["position_ids"] = self.position_ids
        return {name: value for name, value in given.items() if value is not None}


@checks_arguments
def read_input(
    model: "LensModel",
    given: Any,
    *,
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past: Past = NOTHING,
    is_residual: bool = False,
    targets: Tensor | None = None,
    continues: bool = False,
) -> Inputs:
    """Bring text, token ids, embeddings or a residual stream to HF's arguments.

    `continues` says that a cache is filled from which later calls go on.

    Raises:
        InputError: What the model cannot take.
        ArgumentError: Options that make no sense for this kind of input.
    """
    cfg = model.declaration.cfg
    device = model.input_device
    tokens = embeddings = None
    if isinstance(given, Tensor) and given.is_floating_point():
        if given.ndim != 3 or given.shape[-1] != cfg.d_model:
            raise ArgumentError(f"embeddings are [batch, pos, d_model={cfg.d_model}]; got {tuple(given.shape)}")
        if not given.numel():
            raise EmptyInputError(f"the input has no positions or no rows: shape {tuple(given.shape)}")
        if prepend_bos is not None:
            raise ArgumentError("prepend_bos is for text; embeddings are taken as they are")
        embeddings = given.to(device)
        batch, n_pos = given.shape[:2]
    elif is_residual:
        raise ArgumentError(
            f"start_at_layer takes the residual stream [batch, pos, d_model], not {type(given).__name__}"
        )
    else:
        tokens, mask = _read_tokens(model, given, prepend_bos=prepend_bos, padding_side=padding_side, past=past)
        attention_mask = mask if attention_mask is None else attention_mask
        batch, n_pos = tokens.shape
    total = past.length + n_pos
    if cfg.n_ctx is not None and total > cfg.n_ctx:
        raise ContextLengthError(
            f"{total} positions are more than the model's context of {cfg.n_ctx}; shorten the input"
        )
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise ArgumentError(f"attention_mask is a tensor of 0 and 1; got {type(attention_mask).__name__}")
    attention_mask = past.joined(attention_mask, batch=batch, n_pos=n_pos)
    needs_positions = model.declaration.restarts_positions and past.length > 0
    if attention_mask is not None or position_ids is not None or needs_positions:
        attention_mask, position_ids = _read_mask(
            model, past, attention_mask, position_ids, batch=batch, total=total, n_pos=n_pos
        )
    whole_mask = attention_mask
    if model.declaration.read_call is not None:
        training = model.bare_model.training
        call = CallInput(mask=attention_mask, past=past.length, n_pos=n_pos, continues=continues, training=training)
        attention_mask = model.declaration.read_call(call)
    check_padding(model, past, whole_mask)
    return Inputs(
        tokens=tokens,
        embeddings=embeddings,
        attention_mask=attention_mask,
        whole_mask=whole_mask,
        position_ids=position_ids,
        targets=tokens if targets is None else targets,
    )


def is_text(given: Any) -> bool:
    """Whether the input is for the tokenizer: text, texts, or role/content messages."""
    while isinstance(given, list | tuple) and given:
        given = cast("Sequence[Any]", given)[0]
    return isinstance(given, str | dict)


def visible_padding(tokenizer: Any, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"] | None:
    """Find padding at the ends of rows where it cannot be anything else: a pad token that is neither BOS nor EOS."""
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or pad in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return None
    real = tokens != pad
    inside = (real.cumsum(1) > 0) & (real.flip(1).cumsum(1).flip(1) > 0)
    return None if bool(inside.all()) else inside.long()


@checks_arguments
def _read_tokens(
    model: "LensModel", given: Any, *, prepend_bos: bool | None, padding_side: Any, past: Past
) -> tuple[Tensor, Tensor | None]:
    cfg, device = model.declaration.cfg, model.input_device
    if is_text(given):
        if past.length and prepend_bos is None:
            prepend_bos = False  # a sequence has one beginning
        if prepend_bos is None:
            prepend_bos = model.default_prepend_bos
        if padding_side is None and (past.length or past.keeps_state):
            padding_side = "left" if past.keeps_state else "right"  # not between tokens
        encoded = _tokens.to_tokens(
            model.tokenizer, given, prepend_bos=prepend_bos, padding_side=padding_side, device=device
        )
        return _tokens.check_tokens(encoded.tokens, d_vocab=cfg.d_vocab, n_ctx=cfg.n_ctx), encoded.attention_mask
    if prepend_bos is not None or padding_side is not None:
        raise ArgumentError("prepend_bos and padding_side are for text; token ids are taken as they are")
    tokens = _tokens.check_tokens(given, d_vocab=cfg.d_vocab, n_ctx=cfg.n_ctx).to(device)
    return tokens, None if past.length else visible_padding(model.tokenizer, tokens)


@checks_arguments
def _read_mask(
    model: "LensModel",
    past: Past,
    mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    batch: int,
    total: int,
    n_pos: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Drop a mask without padding; derive position ids from one with padding, where the model needs them.

    Beside given position ids there is always a mask: without one HF may read them as packed sequences.
    """
    mask = torch.ones(batch, total, dtype=torch.long) if mask is None else mask
    mask = _tokens.check_mask(mask, batch=batch, length=total).to(model.input_device)
    restarts = model.declaration.restarts_positions and past.length > 0
    if bool(mask.all()) and position_ids is None and not restarts:
        return None, None
    derives = model.declaration.has_absolute_positions or (past.derives_positions and takes_position_ids(model))
    if position_ids is None and derives:
        position_ids = _tokens.position_ids(mask)[:, -n_pos:]
    return mask, position_ids


def token_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch total"] | None = None,
    *,
    per_token: bool = False,
) -> Float[Tensor, ""] | Float[Tensor, "batch targets"]:
    """Cross-entropy of each next token, in nats; padding, as target or as context, does not count.

    Args:
        logits: Before any softmax; taken to at least float32.
        tokens: The ids that the logits were computed for.
        attention_mask: 1 for real tokens.
        per_token: Give `[batch, pos - 1]`, zero where padding is concerned, instead of the mean.
    """
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(wide.transpose(1, 2), tokens[:, 1:].to(logits.device), reduction="none")
    if attention_mask is None:
        return losses if per_token else losses.mean()
    mask = attention_mask[:, -tokens.shape[1] :].bool().to(logits.device)
    real = mask[:, 1:] & mask[:, :-1]
    losses = losses * real
    return losses if per_token else losses.sum() / real.sum().clamp(min=1)
