"""Logits taken apart: what each part of the residual stream adds to a token's logit, on the checkpoint's own weights.

With the scale s that the run had, the logit of token t is the sum over parts of `(centred part / s) * gain . W_U[:, t]`
plus the constant `bias . W_U[:, t] + b_U[t]`; gain and bias are the final norm's. A factor that a model multiplies its
logits by is included. A soft cap (Gemma 2) is not linear: there the sum is the logit before it. The functions are
methods of `ActivationCache`.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core._decomposition import model_of
from lens_core._residual import apply_ln_to_stack
from lens_core.errors import ArgumentError, TokenIdError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache
    from lens_core.model import LensModel

__all__ = ["logit_attrs", "logit_bias", "logit_directions", "logits_of", "token_ids", "token_pair"]


@checks_arguments
def logit_attrs(
    cache: "ActivationCache",
    residual_stack: Tensor,
    tokens: Any,
    incorrect_tokens: Any = None,
    pos_slice: Any = None,
    batch_slice: Any = None,
    has_batch_dim: bool = True,
    *,
    return_bias: bool = False,
) -> Any:
    """Attribute a token's logit, or the difference of two tokens' logits, to the parts of a stack.

    The final norm's gain is applied with the scale that the run had, so for a stack that sums to the final residual
    stream, `attrs.sum(0) + bias` is the logit (difference) on the checkpoint's own weights, before a soft cap. Positive
    values favour `tokens`.

    Args:
        cache: The cache; it needs `ln_final.hook_scale`.
        residual_stack: `[entry, batch, pos, d_model]`, without the axes that an int slice dropped.
        tokens: One token as text or id; or ids `[batch]`, one for each row; or ids `[batch, pos]`, either axis of which
            may be 1; rows and positions are those of the sliced stack. Without a batch axis, `[pos]`.
        incorrect_tokens: Tokens whose logits are subtracted: one token, or of the shape of `tokens`.
        pos_slice: What the stack's positions were sliced by.
        batch_slice: Rows to take, of a stack with a batch axis and of the cache.
        has_batch_dim: Whether the stack has a batch axis.
        return_bias: Give `(attrs, bias)`. The bias is what no part adds: the final norm's bias through the unembedding,
            and `b_U`. It broadcasts against `attrs[0]`.

    Returns:
        `[entry, batch, pos]` in logits, at least float32, without the axes that were dropped.

    Raises:
        CacheError: The scale was not cached, or the cache has no model.
        TokenizerError: Text that is not one token.
        TokenIdError: An id outside the vocabulary.
        ArgumentError: Stack, tokens and slices do not fit each other.
    """
    stack = apply_ln_to_stack(
        cache, residual_stack, pos_slice=pos_slice, batch_slice=batch_slice, has_batch_dim=has_batch_dim
    )
    right, wrong = token_pair(cache, tokens, incorrect_tokens)
    has_rows = has_batch_dim and cache.has_batch_dim and not isinstance(batch_slice, int)
    has_positions = not isinstance(pos_slice, int)
    right = _aligned(right, stack, has_rows=has_rows, has_positions=has_positions)
    wrong = None if wrong is None else _aligned(wrong, stack, has_rows=has_rows, has_positions=has_positions)
    gain, bias = _final_affine(cache, stack)
    through = _unembedding(cache, right, wrong, stack)
    attrs = torch.einsum("c...d,...d->c...", stack, gain * through)
    if not return_bias:
        return attrs
    return attrs, through @ bias + _output_bias(cache, right, wrong, through)


@checks_arguments
def logit_directions(cache: "ActivationCache", tokens: Any, incorrect_tokens: Any = None) -> Tensor:
    """Give the directions whose dot products with normalised parts are their logit attributions, gain included.

    For `project_output_onto`, with `apply_ln=True`: neurons are then attributed without making their outputs.

    Args:
        cache: The cache.
        tokens: One token as text or id, or ids of any shape.
        incorrect_tokens: Tokens whose directions are subtracted.

    Returns:
        `[*tokens, d_model]` in at least float32.

    Raises:
        CacheError: The cache has no model.
        TokenizerError: Text that is not one token.
        TokenIdError: An id outside the vocabulary.
    """
    right, wrong = token_pair(cache, tokens, incorrect_tokens)
    weight = model_of(cache).weight("W_U")
    like = torch.empty(0, device=cache.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    return _final_affine(cache, like)[0] * _unembedding(cache, right, wrong, like)


def logit_bias(cache: "ActivationCache", right: Tensor, wrong: Tensor | None, like: Tensor) -> Tensor:
    """Give what no part of the stream adds to the logits of ids (less those of others), in the ids' shape."""
    through = _unembedding(cache, right, wrong, like)
    return through @ _final_affine(cache, through)[1] + _output_bias(cache, right, wrong, through)


def logits_of(cache: "ActivationCache", received: Tensor, right: Tensor, wrong: Tensor | None) -> Tensor:
    """Give the logits of ids (less those of others) from what the unembedding received, `[*ids, d_model]`."""
    received = received.to(torch.promote_types(received.dtype, torch.float32))
    through = _unembedding(cache, right, wrong, received)
    return (received * through).sum(-1) + _output_bias(cache, right, wrong, through)


def _output_bias(cache: "ActivationCache", right: Tensor, wrong: Tensor | None, like: Tensor) -> Tensor:
    model = model_of(cache)
    b_U = model.weight("b_U").detach().to(like.device, like.dtype) * model.declaration.logit_factor
    own = b_U[right.to(b_U.device)]
    return own if wrong is None else own - b_U[wrong.to(b_U.device)]


def token_pair(cache: "ActivationCache", tokens: Any, incorrect_tokens: Any) -> tuple[Tensor, Tensor | None]:
    """Read tokens and those subtracted, on the cache's device; one token has no axes.

    Raises:
        TokenizerError: Text that is not one token.
        TokenIdError: An id outside the vocabulary.
        ArgumentError: Neither text nor ids, or two shapes.
    """
    right = _ids(cache, tokens)
    wrong = None if incorrect_tokens is None else _ids(cache, incorrect_tokens)
    if wrong is not None and right.ndim and wrong.ndim and right.shape != wrong.shape:
        raise ArgumentError(f"tokens {list(right.shape)} and incorrect_tokens {list(wrong.shape)} differ in shape")
    return right, wrong


def token_ids(model: "LensModel", tokens: Any, device: torch.device | None = None) -> Tensor:
    """Read one token or several, each as text or id.

    Returns:
        Ids in the shape of `tokens`.

    Raises:
        TokenizerError: Text that is not one token.
        TokenIdError: An id outside the vocabulary.
        ArgumentError: Neither text nor ids.
    """
    if isinstance(tokens, str):
        tokens = model.to_single_token(tokens)
    elif isinstance(tokens, list | tuple):
        listed = cast("list[Any]", tokens)
        tokens = [model.to_single_token(token) if isinstance(token, str) else token for token in listed]
    try:
        ids = torch.as_tensor(tokens, device=device)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or not ids.numel():
        raise ArgumentError(f"tokens are text, ids, or an integer tensor; got {tokens!r}")
    d_vocab = model.cfg.d_vocab
    outside = ids[(ids < 0) | (ids >= d_vocab)]
    if outside.numel():
        raise TokenIdError(f"token id {int(outside[0])} is outside the vocabulary of {d_vocab}")
    return ids.long()  # an 8-bit tensor would index as a mask


def _ids(cache: "ActivationCache", tokens: Any) -> Tensor:
    ids = token_ids(model_of(cache), tokens, cache.device)
    return ids.reshape(()) if ids.numel() == 1 else ids


def _aligned(ids: Tensor, stack: Tensor, *, has_rows: bool, has_positions: bool) -> Tensor:
    """Bring ids to axes that broadcast against the stack's `[batch, pos]`, `[batch]`, `[pos]` or none."""
    if ids.ndim == 0:
        return ids
    shape = stack.shape[1:-1]
    wanted = ids[:, None] if ids.ndim == 1 and has_rows and has_positions else ids
    fits = wanted.ndim == len(shape) and all(a in (1, b) for a, b in zip(wanted.shape, shape, strict=True))
    if not fits:
        axes = ["batch"] * has_rows + ["pos"] * has_positions
        raise ArgumentError(
            f"tokens of shape {list(ids.shape)} do not fit a stack whose axes {axes} have sizes {list(shape)}: give "
            "one token, [batch], or [batch, pos] (to share tokens among rows, [1, pos])"
        )
    return wanted


def _final_affine(cache: "ActivationCache", like: Tensor) -> tuple[Tensor, Tensor]:
    """Give the final norm's gain and bias `[d_model]`, whatever way its kind writes them."""
    model = model_of(cache)
    place = model.declaration.norms["ln_final"]
    module: Any = model.bare_model.get_submodule(place.path)
    zeros = torch.zeros(model.cfg.d_model, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        bias = place.kind.affine(module, zeros)
        return place.kind.affine(module, zeros + 1) - bias, bias


def _unembedding(cache: "ActivationCache", right: Tensor, wrong: Tensor | None, like: Tensor) -> Tensor:
    """Give `W_U[:, right] - W_U[:, wrong]`, times the logits' factor, as `[*ids, d_model]`."""
    model = model_of(cache)
    rows = model.weight("W_U").detach().T

    def pick(ids: Tensor) -> Tensor:
        return rows[ids.to(rows.device)].to(like.device, like.dtype) * model.declaration.logit_factor

    return pick(right) if wrong is None else pick(right) - pick(wrong)
